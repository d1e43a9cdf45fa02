"""Flux blocks with fused kernels: less memory kept for backward, fewer passes over the activations."""

from fastguard.blocks.fuse import FuseReport, fuse_flux, unfuse_flux

__all__ = ["FuseReport", "fuse_flux", "unfuse_flux"]
