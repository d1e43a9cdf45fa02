"""fastguard: fused, exact GRPO-Guard losses for online reinforcement learning of flow-matching image models."""

from fastguard.loss import GuardLoss, Moments, guard_loss, guard_loss_from_means, transition_moments
from fastguard.sde import Transition, cps, dance_sde, flow_sde, ode
from fastguard.step import SdeStep, sde_step

__version__ = "0.1.0"

__all__ = [
    "GuardLoss",
    "Moments",
    "SdeStep",
    "Transition",
    "cps",
    "dance_sde",
    "flow_sde",
    "guard_loss",
    "guard_loss_from_means",
    "ode",
    "sde_step",
    "transition_moments",
]
