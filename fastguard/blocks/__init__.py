"""Transformer blocks with fused kernels: less is saved for backward, with fewer passes over the activations."""

from fastguard.extras import need

need("blocks")

from fastguard.blocks.fuse import FuseReport, fuse, fuse_flux, fusible, unfuse, unfuse_flux
from fastguard.blocks.offload import OffloadedCheckpoints

__all__ = ["FuseReport", "OffloadedCheckpoints", "fuse", "fuse_flux", "fusible", "unfuse", "unfuse_flux"]
