"""Checks at the door of the public functions: shapes, dtypes, devices and options always, values on demand.

Values on a GPU are not looked at unless asked for: a check must not synchronize in the hot path.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastguard.loss.objectives import Objective, build_objective
from fastguard.loss.objectives.base import is_number
from fastguard.ops.registry import compute_dtype
from fastguard.sde import Transition

Reweight = Literal["none", "inverse_dt", "equalized"]
KlType = Literal["gaussian", "velocity"]
Reduction = Literal["mean", "sum", "none"]
LATENTS_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_latents(tensors: dict[str, Tensor], same_dtype: tuple[str, ...]) -> None:
    """All (B, ...) of one shape and device, floating; those named in `same_dtype` of one dtype."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in LATENTS_DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64; got {tensor.dtype}")
    name, first = next((n, t) for n, t in tensors.items() if n in same_dtype)
    for other_name, tensor in tensors.items():
        if tensor.shape != first.shape:
            raise ValueError(
                f"{other_name} has shape {tuple(tensor.shape)}, {name} {tuple(first.shape)}; they must be the same"
            )
        if tensor.device != first.device:
            raise ValueError(f"{other_name} is on {tensor.device}, {name} on {first.device}; move them to one device")
        if other_name in same_dtype and tensor.dtype != first.dtype:
            raise TypeError(
                f"{other_name} is {tensor.dtype}, {name} {first.dtype}; they must be the same: a value rounded on one "
                "side only moves the ratio away from 1"
            )
    if first.ndim < 2:
        raise ValueError(f"{name} must have shape (B, ...), one sample per row; got {tuple(first.shape)}")
    if math.prod(first.shape[1:]) == 0:
        raise ValueError(f"{name} has no elements per sample; got shape {tuple(first.shape)}")


def check_step(step: Transition, name: str, latents: Tensor, *, needs_density: bool) -> Transition:
    """A Transition on the device of the latents called `name`, with one entry per sample."""
    if not isinstance(step, Transition):
        raise TypeError(f"step must be a Transition (from flow_sde, dance_sde, cps or ode); got {type(step).__name__}")
    if needs_density and not step.has_density:
        where = "" if torch.compiler.is_compiling() else f" at samples {(step.std == 0).nonzero()[:, 0].tolist()}"
        raise ValueError(
            f"the {step.kind} step has std == 0{where}: it is deterministic, so there is no density and no ratio. "
            "Leave such steps (ode; the last step of cps; noise_level 0) out of the trained steps"
        )
    if step.std.device != latents.device:
        raise ValueError(f"step is on {step.std.device}, {name} on {latents.device}; pass step.to({name}.device)")
    return step.expand(latents.shape[0])


def check_advantages(advantages: Tensor, velocity: Tensor) -> None:
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        came = advantages.dtype if isinstance(advantages, Tensor) else type(advantages).__name__
        raise TypeError(f"advantages must be a floating point tensor; got {came}")
    if advantages.shape != velocity.shape[:1]:
        raise ValueError(
            f"advantages must have shape ({velocity.shape[0]},), one per sample; got {tuple(advantages.shape)}"
        )
    if advantages.device != velocity.device:
        raise ValueError(f"advantages are on {advantages.device}, the latents on {velocity.device}")


def per_sample(name: str, value: Tensor | float, latents: Tensor, check_values: bool) -> Tensor:
    """std or dt as (B,): from a float, one entry, or one entry per sample (with any trailing axes of size 1).

    Values are checked where that costs no synchronization with a GPU, and on demand.
    """
    n_samples = latents.shape[0]
    if isinstance(value, numbers.Real):
        dtype = compute_dtype(latents.dtype)
        if torch.compiler.is_compiling():
            # torch.compile makes one graph for all factors of a product, but one for each value that fills a tensor.
            return torch.ones(n_samples, dtype=dtype, device=latents.device) * float(value)
        _check_step_value(name, torch.tensor([float(value)], dtype=dtype, device="cpu"))
        return torch.full((n_samples,), float(value), dtype=dtype, device=latents.device)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a float or a floating point tensor; got {came}")
    if value.device != latents.device:
        raise ValueError(f"{name} is on {value.device}, the latents on {latents.device}; move them to one device")
    if value.numel() != 1 and (value.numel() != n_samples or value.shape[0] != n_samples):
        raise ValueError(f"{name} must have one entry, or {n_samples} (one per sample); got shape {tuple(value.shape)}")
    if check_values or not (value.is_cuda or torch.compiler.is_compiling()):
        _check_step_value(name, value.reshape(-1))
    return value.reshape(-1).expand(n_samples)


def _check_step_value(name: str, value: Tensor) -> None:
    """std > 0 and dt != 0, both finite; value (n,) on the host, or wherever a synchronization was asked for."""
    good = (value > 0 if name == "std" else value != 0) & torch.isfinite(value)
    if not bool(good.all()):
        index = int((~good).nonzero()[0])
        expected = {
            "std": "positive (a step with std == 0 has no density; leave it out of the trained steps)",
            "dt": "not 0 (it is the time step, sigma_next - sigma)",
        }[name]
        raise ValueError(f"{name} must be finite and {expected}; got {value[index].item():g} at sample {index}")


def weight_source(
    reweight: str | Tensor, latents: Tensor, dt: Tensor, velocity_coef: Tensor | None
) -> tuple[Tensor | None, bool]:
    """The tensor behind the reweighting factor, and whether the factor is 1 / |tensor|."""
    if isinstance(reweight, Tensor):
        if reweight.shape != latents.shape[:1] or not reweight.is_floating_point():
            raise ValueError(
                f"reweight as a tensor must be floating point of shape ({latents.shape[0]},); "
                f"got {reweight.dtype} of shape {tuple(reweight.shape)}"
            )
        if reweight.device != latents.device:
            raise ValueError(f"reweight is on {reweight.device}, the latents on {latents.device}")
        return reweight, False
    if not isinstance(reweight, str) or reweight not in get_args(Reweight):
        raise ValueError(f"reweight must be one of {', '.join(get_args(Reweight))}, or a tensor (B,); got {reweight!r}")
    if reweight == "none":
        return None, False
    if reweight == "inverse_dt":
        return dt, True
    if velocity_coef is None:
        raise ValueError(
            "reweight='equalized' is 1 / |velocity_coef|, which means do not tell; use guard_loss with velocities, "
            "or pass the factor as a tensor (B,)"
        )
    return velocity_coef, True


def check_objective(objective: str | Objective, options: dict[str, Any]) -> Objective:
    """The objective itself, or the one of this name with these options."""
    if isinstance(objective, Objective):
        if options:
            raise TypeError(
                f"{', '.join(options)}: options belong to a name; this objective is an instance, which has its own"
            )
        return objective
    if not isinstance(objective, str):
        raise TypeError(f"objective must be a name or an Objective; got {type(objective).__name__}")
    return build_objective(objective, **options)


def check_kl_and_reduction(kl_weight: float, kl_type: str, reduction: str, ref: Tensor | None, ref_name: str) -> None:
    for name, value, known in (("kl_type", kl_type, get_args(KlType)), ("reduction", reduction, get_args(Reduction))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if not is_number(kl_weight):
        raise TypeError(f"kl_weight must be a number; got {kl_weight!r}")
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight must be finite and >= 0; got {kl_weight}")
    if kl_weight > 0 and ref is None:
        raise ValueError(f"kl_weight = {kl_weight} needs a reference; pass {ref_name}, or kl_weight=0")


def check_finite(tensors: dict[str, Tensor | None]) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("check_values=True reads values on the host and cannot be compiled; call it in eager mode")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        bad = ~torch.isfinite(tensor).flatten(1).all(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
        if bool(bad.any()):
            raise ValueError(f"{name} holds NaN or Inf at samples {bad.nonzero()[:, 0].tolist()}")
