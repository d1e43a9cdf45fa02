"""fastguard: fused, exact GRPO-Guard losses for online reinforcement learning of flow-matching image models."""

from typing import TYPE_CHECKING, Any

from fastguard.loss import (
    GuardLoss,
    Moments,
    guard_loss,
    guard_loss_from_means,
    matching_loss,
    transition_moments,
)
from fastguard.schedule import sd3_sigmas, shifted_sigmas
from fastguard.sde import Transition, cps, dance_sde, flow_sde, gaussian_step, ode, wan_sde
from fastguard.step import SdeStep, sde_step

if TYPE_CHECKING:
    from fastguard.blocks.fuse import fuse, fuse_flux, unfuse, unfuse_flux

__version__ = "0.1.0"

__all__ = [
    "GuardLoss",
    "Moments",
    "SdeStep",
    "Transition",
    "cps",
    "dance_sde",
    "flow_sde",
    "fuse",
    "fuse_flux",
    "gaussian_step",
    "guard_loss",
    "guard_loss_from_means",
    "matching_loss",
    "ode",
    "sd3_sigmas",
    "sde_step",
    "shifted_sigmas",
    "transition_moments",
    "unfuse",
    "unfuse_flux",
    "wan_sde",
]


def __getattr__(name: str) -> Any:
    """Import fused blocks on first use, because they import diffusers and peft, which takes seconds."""
    if name in ("fuse", "fuse_flux", "unfuse", "unfuse_flux"):
        from fastguard import blocks

        return getattr(blocks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
