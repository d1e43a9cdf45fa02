"""Checks at the door of the public functions: shapes, dtypes, devices and options always, values on demand.

Values on a GPU are not looked at unless asked for: a check must not synchronize in the hot path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastguard.loss.objectives import OBJECTIVES, Given, Objective, build_objective
from fastguard.loss.objectives.base import Process
from fastguard.options import is_number
from fastguard.sde import Transition

Reweight = Literal["none", "inverse_dt", "equalized"]
KlType = Literal["gaussian", "velocity"]
Reduction = Literal["mean", "sum", "none"]
# Not where they are used, because torch 2.6 cannot compile a call of get_args.
REWEIGHTS, KL_TYPES, REDUCTIONS = get_args(Reweight), get_args(KlType), get_args(Reduction)
LATENTS_DTYPES = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})


def check_latents(tensors: dict[str, Tensor], same_dtype: tuple[str, ...]) -> None:
    """All (B, ...) of one shape and device, floating; those named in `same_dtype`, which begins, of one dtype."""
    name = same_dtype[0]
    first = tensors[name]
    for other_name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{other_name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in LATENTS_DTYPES:
            raise TypeError(f"{other_name} must be bfloat16, float16, float32 or float64; got {tensor.dtype}")
        if tensor is first:
            continue
        if not isinstance(first, Tensor):
            raise TypeError(f"{name} must be a tensor; got {type(first).__name__}")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{other_name} has shape {tuple(tensor.shape)}, {name} {tuple(first.shape)}; they must be the same"
            )
        if tensor.device != first.device:
            raise ValueError(f"{other_name} is on {tensor.device}, {name} on {first.device}; move them to one device")
        if tensor.dtype != first.dtype and other_name in same_dtype:
            raise TypeError(
                f"{other_name} is {tensor.dtype}, {name} {first.dtype}; they must be the same: a value rounded on one "
                "side only moves the ratio away from 1"
            )
    if first.ndim < 2:
        raise ValueError(f"{name} must have shape (B, ...), one sample per row; got {tuple(first.shape)}")
    if first.numel() == 0 and math.prod(first.shape[1:]) == 0:
        raise ValueError(f"{name} has no elements per sample; got shape {tuple(first.shape)}")


def check_step(
    step: Transition, name: str, latents: Tensor, *, needs_density: bool = True, needs_coefs: bool = True
) -> None:
    """A Transition on the device of the latents called `name`, with one entry for all samples or one per sample."""
    if not isinstance(step, Transition):
        raise TypeError(
            "step must be a Transition (from flow_sde, dance_sde, wan_sde or cps, or gaussian_step with a std and dt "
            f"of your own); got {type(step).__name__}"
        )
    if needs_coefs:
        _ = step.mean_coefs
    if needs_density and not step.has_density:
        where = "" if torch.compiler.is_compiling() else f" at samples {(step.std == 0).nonzero()[:, 0].tolist()}"
        raise ValueError(
            f"the {step.kind} step has std == 0{where}: it is deterministic, so there is no density and no ratio. "
            "Leave such steps (ode; the last step of cps; noise_level 0) out of the trained steps"
        )
    if step.std.device != latents.device:
        raise ValueError(f"step is on {step.std.device}, {name} on {latents.device}; pass step.to({name}.device)")
    if len(step) != 1:
        step.expand(latents.shape[0])


def check_advantages(advantages: Tensor, velocity: Tensor) -> None:
    _check_of_each("advantages", advantages, velocity, "a floating point tensor")
    if advantages.device != velocity.device:
        raise ValueError(f"advantages are on {advantages.device}, the latents on {velocity.device}")


def check_sigma(sigma: Tensor, velocity: Tensor) -> None:
    """Flow times; their values are on the device and not read."""
    _check_of_each("sigma", sigma, velocity, "a floating point tensor of flow times")
    if sigma.device != velocity.device:
        raise ValueError(f"sigma is on {sigma.device}, the latents on {velocity.device}; move it there")


def _check_of_each(name: str, value: Tensor, velocity: Tensor, expected: str) -> None:
    """A floating tensor with one entry per sample, (B,) or (B, 1)."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be {expected}; got {came}")
    n_samples = velocity.shape[0]
    if value.shape not in ((n_samples,), (n_samples, 1)):
        raise ValueError(
            f"{name} must have shape ({n_samples},) or ({n_samples}, 1), one per sample; got {tuple(value.shape)}"
        )


def check_times(sigma: Tensor) -> None:
    """The values of flow times; waits for the GPU."""
    if not bool(((sigma > 0) & (sigma <= 1)).all()):
        raise ValueError(f"sigma holds flow times in (0, 1], where 1 is noise; got {sigma.flatten().tolist()}")


def check_factor(name: str, value: float | Tensor, latents: Tensor) -> None:
    """A number, or a tensor () or with one entry per sample and axes of size 1."""
    if is_number(value):
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        came = value.dtype if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a number or a floating point tensor; got {came}")
    if value.device != latents.device:
        raise ValueError(f"{name} is on {value.device}, the latents on {latents.device}; move it there")
    n_samples = latents.shape[0]
    if value.numel() != 1 and (value.numel() != n_samples or value.shape[0] != n_samples):
        raise ValueError(
            f"{name} must be a number, or have one entry per sample, ({n_samples},) or ({n_samples}, 1, 1); "
            f"got shape {tuple(value.shape)}"
        )


def check_reweight(reweight: str | float | Tensor, latents: Tensor, step: Transition) -> None:
    if not isinstance(reweight, str):
        return check_factor("reweight", reweight, latents)
    if reweight not in REWEIGHTS:
        raise ValueError(f"reweight must be one of {', '.join(REWEIGHTS)}, or a factor per sample; got {reweight!r}")
    if reweight == "equalized" and step.velocity_coef is None:
        raise ValueError(
            f"reweight='equalized' is 1 / |velocity_coef|, which the {step.kind} step does not have; build the step "
            "with flow_sde or another sampler, or pass the factor as a tensor (B,)"
        )


def check_objective(objective: str | Objective, options: dict[str, Any], process: Process = "reverse") -> Objective:
    """The objective itself, or the one of this name with these options; of this process, or derivatives that are known.

    Raises ValueError or TypeError.
    """
    if isinstance(objective, Objective):
        if options:
            raise TypeError(
                f"{', '.join(options)}: options belong to a name; this objective is an instance, which has its own"
            )
        found = objective
    elif isinstance(objective, str):
        found = build_objective(objective, **options)
    else:
        raise TypeError(f"objective must be a name or an Objective; got {type(objective).__name__}")
    if isinstance(found, Given):
        _check_given(found, process)
    else:
        _check_process(found, process)
        _check_scope(found)
    return found


def _check_given(given: Given, process: Process) -> None:
    if process == "forward" and (given.log_ratio != "plain" or given.bandwidth):
        raise ValueError(
            "derivatives for matching_loss are by the plain log-ratio without a bandwidth; got log_ratio = "
            f"{given.log_ratio!r}, bandwidth = {given.bandwidth}"
        )


def _check_process(objective: Objective, process: Process) -> None:
    if objective.process == process:
        return
    if process == "reverse":
        raise ValueError(
            f"{objective.title} trains on final latents with fresh noise, not on the steps that sampled them: call "
            "matching_loss"
        )
    known = ", ".join(name for name, kind in OBJECTIVES.items() if kind.process == process)
    raise ValueError(
        f"{objective.title} trains on the steps that sampled an image: call guard_loss. Objectives of final latents "
        f"with fresh noise are {known}"
    )


def _check_scope(objective: Objective) -> None:
    if objective.scope == "transition":
        return
    whole, shape = {
        "trajectory": ("all steps of a trajectory", "(n, T)"),
        "group": ("all images of a group", "(g, n)"),
    }[objective.scope]
    raise ValueError(
        f"{objective.title} needs {whole} at once: take its derivatives from `terms(log_ratio {shape}, ...)`, and give "
        "those of each row to the loss as an objective `Given` (docs/objectives.md, two passes)"
    )


def check_kl(
    kl_weight: float | Tensor, kl_type: str, step: Transition, latents: Tensor, ref: Tensor | None, ref_name: str
) -> None:
    if kl_type not in KL_TYPES:
        raise ValueError(f"kl_type must be one of {', '.join(KL_TYPES)}; got {kl_type!r}")
    if kl_type == "velocity" and step.velocity_coef is None:
        raise ValueError(
            f"kl_type='velocity' needs the velocity_coef of the step, and the {step.kind} step has none; build the "
            "step with flow_sde or another sampler, or use kl_type='gaussian'"
        )
    check_kl_weight(kl_weight, latents, ref, ref_name)


def check_kl_weight(kl_weight: float | Tensor, latents: Tensor, ref: Tensor | None, ref_name: str) -> None:
    if isinstance(kl_weight, Tensor):
        if ref is None:
            raise ValueError(f"kl_weight as a tensor needs a reference; pass {ref_name}, or kl_weight=0")
        return check_factor("kl_weight", kl_weight, latents)
    if not is_number(kl_weight):
        raise TypeError(f"kl_weight must be a number, or a tensor with one entry per sample; got {kl_weight!r}")
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight must be finite and >= 0; got {kl_weight}")
    if kl_weight > 0 and ref is None:
        raise ValueError(f"kl_weight = {kl_weight} needs a reference; pass {ref_name}, or kl_weight=0")


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")


def check_finite(values: Mapping[str, Any]) -> None:
    """Every tensor and number among the values."""
    if torch.compiler.is_compiling():
        raise ValueError("check_values=True reads values on the host and cannot be compiled; call it in eager mode")
    for name, value in values.items():
        if is_number(value) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite; got {value}")
        if not isinstance(value, Tensor):
            continue
        finite = torch.isfinite(value)
        bad = ~(finite.flatten(1).all(1) if value.ndim > 1 else finite.reshape(-1))
        if bool(bad.any()):
            raise ValueError(f"{name} holds NaN or Inf at samples {bad.nonzero()[:, 0].tolist()}")


# Below this many elements the mean square of a draw says too little: its standard deviation is sqrt(2 / D).
MIN_ELEMENTS_OF_DRAW = 1000


def check_draw(
    name: str, draw: Tensor, step: Transition, *, rounding: Tensor | float = 0.0, advice: str | None = None
) -> None:
    """Raise ValueError unless the noise (B, ...), standard normal by its definition, has a mean square of about 1.

    Args:
        rounding: (B,) what the rounding of what was stored may add to the mean square.
        advice: what to look at, in place of the usual mistakes with std.
    """
    n_elements = math.prod(draw.shape[1:])
    if n_elements < MIN_ELEMENTS_OF_DRAW:
        return
    square = draw.flatten(1).to(torch.float64).square().mean(1)
    tolerance = 0.02 + 6 * math.sqrt(2 / n_elements) + rounding
    wrong, square = (~((square - 1).abs() <= tolerance)).cpu(), square.cpu()
    for index in wrong.nonzero()[:, 0].tolist():
        size, one = float(square[index]), step.expand(len(square))[index : index + 1]
        cause = f"; {advice}" if advice else _usual_mistake(size, abs(float(one.dt)), float(one.std))
        raise ValueError(f"{name} has a mean square of {size:.4g} at sample {index}, and 1 was expected{cause}")


def check_draw_from_means(
    name: str, sample: Tensor, old_mean: Tensor, step: Transition, advice: str | None = None
) -> None:
    """The same of `(x' - mu_old) / std`, where a std that is not the draw's shows. x' may have been stored in bf16."""
    std = step.std.to(torch.float64).reshape(-1, *[1] * (sample.ndim - 1))
    sample, old_mean = sample.to(torch.float64), old_mean.to(torch.float64)
    # bf16 rounds to 8 bits: an error of variance x^2 2^-18 at most. Twice that, for the mean has one too.
    rounding = 2**-17 * (sample / std).square().flatten(1).mean(1)
    check_draw(name, (sample - old_mean) / std, step, rounding=rounding, advice=advice)


def _usual_mistake(square: float, dt: float, std: float) -> str:
    """Which mistake makes noise of this mean square, as the end of a sentence."""
    causes = {
        "std lacks sqrt(|dt|). Multiply std by sqrt(|dt|)": dt,
        "std has sqrt(|dt|) twice. Divide std by sqrt(|dt|)": 1 / dt,
        "this is the noise times std, as in prev_sample - prev_sample_mean": std**2,
    }
    like = (cause for cause, factor in causes.items() if factor > 0 and abs(square / factor - 1) < 0.1)
    return next((f". It looks as if {cause}" for cause in like), "")
