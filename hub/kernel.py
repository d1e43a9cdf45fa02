"""Fused GRPO-Guard losses, rollout steps and block operators for online reinforcement learning of flow-matching models.

The functions are those of the package fastguard. `ops` has one module per block operator, with its autograd Function.
"""

from fastguard import ops
from fastguard.loss import (
    GuardLoss,
    Moments,
    guard_loss,
    guard_loss_from_means,
    matching_loss,
    transition_moments,
)
from fastguard.loss.objectives import OBJECTIVES, Objective, build_objective
from fastguard.ops.adaln import AdaLNFunction
from fastguard.ops.dequantize import dequantize_blocks, dequantize_rows
from fastguard.ops.gated_residual import GatedResidualFunction
from fastguard.ops.gelu import BiasGeluFunction
from fastguard.ops.qk_norm_rope import QKNormRopeFunction
from fastguard.ops.swiglu import SwiGLUFunction
from fastguard.schedule import sd3_sigmas, shifted_sigmas
from fastguard.sde import Transition, cps, dance_sde, flow_sde, gaussian_step, ode, wan_sde
from fastguard.step import SdeStep, sde_step

__all__ = [
    "OBJECTIVES",
    "AdaLNFunction",
    "BiasGeluFunction",
    "GatedResidualFunction",
    "GuardLoss",
    "Moments",
    "Objective",
    "QKNormRopeFunction",
    "SdeStep",
    "SwiGLUFunction",
    "Transition",
    "build_objective",
    "cps",
    "dance_sde",
    "dequantize_blocks",
    "dequantize_rows",
    "flow_sde",
    "gaussian_step",
    "guard_loss",
    "guard_loss_from_means",
    "matching_loss",
    "ode",
    "ops",
    "sd3_sigmas",
    "sde_step",
    "shifted_sigmas",
    "transition_moments",
    "wan_sde",
]
