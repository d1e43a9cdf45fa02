"""The public losses: validate once at the door, then one operator forward and one backward.

Axes: B sample; every further axis of the latents counts as elements, D of them per sample. All log-ratios are means
over the elements, as in every public trainer; a clip range belongs to that reduction and to D.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard import ops
from fastguard.sde import Transition

OBJECTIVES = ("grpo_guard", "flow_grpo", "flow_dppo")
REWEIGHTINGS = ("none", "inverse_dt", "equalized")
KL_TYPES = ("gaussian", "velocity")
REDUCTIONS = ("mean", "sum", "none")


class GuardLoss(NamedTuple):
    """A loss and what it was made of. Only `loss` carries a gradient; everything stays on the device.

    Fields:
        loss: () float32 (float64 for float64 inputs), or (B,) with reduction="none".
        log_ratio: (B,), what the objective clips: `std * cross` for grpo_guard (RatioNorm), else `cross - drift / 2`.
        ratio: (B,), `exp(log_ratio)`. In float32 it cannot show changes below 6e-8; log_ratio can.
        cross: (B,), `<eps, w> / D`, the whitened drift w along the rollout's noise eps.
        drift: (B,), `<w, w> / D`; the KL divergence from the rollout policy is `drift / 2` per element.
        clipped: (B,) bool, whether the sample's policy gradient is zero because of the clip (flow_dppo: the mask).
        kl: (B,), KL to the reference (of kl_type), or None without a reference.
    """

    loss: Tensor
    log_ratio: Tensor
    ratio: Tensor
    cross: Tensor
    drift: Tensor
    clipped: Tensor
    kl: Tensor | None


class Moments(NamedTuple):
    """Per-sample moments, (B,) float32 (float64 for float64 inputs), differentiable in the velocity."""

    cross: Tensor
    drift: Tensor
    ref_drift: Tensor | None


def guard_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor,
    advantages: Tensor,
    step: Transition,
    *,
    objective: str = "grpo_guard",
    clip_range: float | tuple[float, float] = 2e-6,
    adv_clip: float | None = 5.0,
    reweight: str | Tensor = "inverse_dt",
    kl_threshold: float = 1e-5,
    ref_velocity: Tensor | None = None,
    kl_weight: float = 0.0,
    kl_type: str = "gaussian",
    reduction: str = "mean",
    backend: str = "auto",
    check_values: bool = False,
) -> GuardLoss:
    """Policy loss of one denoising step per sample, from velocities; the gradient flows to `velocity` alone.

    Derivation: docs/math.md. Sources: GRPO-Guard, arXiv 2510.22319 (RatioNorm Eq. 8, reweighting Eq. 12);
    Flow-GRPO, arXiv 2505.05470.

    Args:
        velocity: (B, ...) the model's output now; bfloat16, float16, float32, or float64 (torch backend).
        old_velocity: like velocity, as the rollout used it.
        noise: (B, ...) the noise that the rollout drew, in the rounding in which it was used; any floating dtype.
        advantages: (B,) floating.
        step: the Transition of each sample's step; every std must be positive.
        objective: "grpo_guard", "flow_grpo", or "flow_dppo" (no clipping; a mask by `kl_threshold`).
        clip_range: distance of the ratio from 1, or (low, high). About 2e-6 for grpo_guard at D = 65,536, 1e-5 to
            1e-4 for flow_grpo. Not used by flow_dppo.
        adv_clip: advantages are clipped to +-adv_clip; None leaves them. Not used by flow_dppo.
        reweight: factor on each sample's policy loss: "inverse_dt" 1 / |dt| (the paper's), "equalized" 1 / |B| (makes
            grpo_guard's gradient the same at every step for every sampler), "none" (published Flow-GRPO), or (B,).
        kl_threshold: flow_dppo drops a sample that moves away from the rollout once its KL (drift / 2) reaches this.
        ref_velocity: like velocity, of the reference policy; needed by kl_weight, reported in `.kl`.
        kl_weight: factor on the KL to the reference, which is not reweighted.
        kl_type: "gaussian" (per element), or "velocity" (mean squared velocity difference).
        reduction: "mean" or "sum" over samples, or "none".
        backend: "auto" (Triton on CUDA, else torch), "triton" or "torch".
        check_values: raise on NaN or Inf in any input. Synchronizes with a GPU. Without it a non-finite sample gives
            NaN in its own outputs, and in the mean.

    Raises:
        ValueError, TypeError: what came and what was expected.
    """
    tensors = {"velocity": velocity, "old_velocity": old_velocity, "noise": noise}
    if ref_velocity is not None:
        tensors["ref_velocity"] = ref_velocity
    _check_latents(tensors, same_dtype=("velocity", "old_velocity", "ref_velocity"))
    step = _check_step(step, velocity)
    weight, invert = _weight(reweight, velocity, step.dt, step.velocity_coef)
    options = _options(
        velocity, objective, clip_range, adv_clip, kl_threshold, ref_velocity is not None, kl_weight, kl_type,
        invert, reduction, backend, ref_name="ref_velocity",
    )  # fmt: skip
    _check_advantages(advantages, velocity)
    if check_values:
        _check_finite({**tensors, "advantages": advantages, "reweight": weight})
    return _apply(
        velocity, old_velocity, noise, ref_velocity, advantages, step.velocity_coef, step.std, weight, options
    )


def guard_loss_from_means(
    prev_sample: Tensor,
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    std: Tensor | float,
    dt: Tensor | float,
    advantages: Tensor,
    *,
    objective: str = "grpo_guard",
    clip_range: float | tuple[float, float] = 2e-6,
    adv_clip: float | None = 5.0,
    reweight: str | Tensor = "inverse_dt",
    kl_threshold: float = 1e-5,
    ref_prev_sample_mean: Tensor | None = None,
    kl_weight: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    check_values: bool = False,
) -> GuardLoss:
    """The same loss for trainers that already have the means; the gradient flows to `prev_sample_mean` alone.

    Args:
        prev_sample: (B, ...) what the rollout drew, not rounded after the draw (a rounded sample moves the first
            ratio away from 1); any floating dtype.
        prev_sample_mean, old_prev_sample_mean, ref_prev_sample_mean: (B, ...) means of the step under the model now,
            the rollout policy, the reference; one dtype.
        std: standard deviation of the step *including* sqrt(|dt|), where flow_grpo's `std_dev_t` does not include
            it: a float, or a tensor with one entry, or one per sample (any trailing axes of size 1).
        dt: time step, of either sign; shapes as for std.
        The rest is as in `guard_loss`; reweight="equalized" and kl_type="velocity" need the velocities.

    Raises:
        ValueError, TypeError: what came and what was expected.
    """
    tensors = {
        "prev_sample": prev_sample,
        "prev_sample_mean": prev_sample_mean,
        "old_prev_sample_mean": old_prev_sample_mean,
    }
    if ref_prev_sample_mean is not None:
        tensors["ref_prev_sample_mean"] = ref_prev_sample_mean
    means = ("prev_sample_mean", "old_prev_sample_mean", "ref_prev_sample_mean")
    _check_latents(tensors, same_dtype=means)
    std = _per_sample("std", std, prev_sample_mean)
    dt = _per_sample("dt", dt, prev_sample_mean)
    if check_values or not (std.is_cuda or torch.compiler.is_compiling()):
        _check_positive("std", std, "a step with std == 0 has no density; leave it out of the trained steps")
        _check_positive("|dt|", dt.abs(), "dt is the time step, sigma_next - sigma")
    weight, invert = _weight(reweight, prev_sample_mean, dt, None)
    options = _options(
        prev_sample_mean, objective, clip_range, adv_clip, kl_threshold, ref_prev_sample_mean is not None, kl_weight,
        "gaussian", invert, reduction, backend, ref_name="ref_prev_sample_mean",
    )  # fmt: skip
    _check_advantages(advantages, prev_sample_mean)
    if check_values:
        _check_finite({**tensors, "advantages": advantages, "reweight": weight})
    return _apply(
        prev_sample_mean, old_prev_sample_mean, prev_sample, ref_prev_sample_mean, advantages, None, std, weight,
        options,
    )  # fmt: skip


def transition_moments(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor,
    step: Transition,
    ref_velocity: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Moments:
    """The numbers per sample from which any objective can be written in plain PyTorch, in one pass over the latents.

    `cross = <eps, w> / D`, `drift = <w, w> / D`, and `ref_drift` the same as drift towards the reference, with
    `w = B (v - v_old) / s`. Arguments as in `guard_loss`. Differentiable in `velocity`, once.
    """
    tensors = {"velocity": velocity, "old_velocity": old_velocity, "noise": noise}
    if ref_velocity is not None:
        tensors["ref_velocity"] = ref_velocity
    _check_latents(tensors, same_dtype=("velocity", "old_velocity", "ref_velocity"))
    step = _check_step(step, velocity)
    backend = ops.resolve_backend(backend, velocity)
    dtype = ops.compute_dtype(velocity.dtype)
    whiten = (step.velocity_coef / step.std).to(dtype)
    n_elements = math.prod(velocity.shape[1:])
    if velocity.shape[0] == 0:
        empty = whiten + 0 * velocity.sum().to(dtype)
        return Moments(empty, empty, None if ref_velocity is None else empty)
    ref = None if ref_velocity is None else ref_velocity.detach()
    sums = ops.TransitionSumsFunction.apply(velocity, old_velocity.detach(), noise.detach(), ref, backend)
    drift_scale = whiten**2 / n_elements
    ref_drift = None if ref is None else drift_scale * sums[2]
    return Moments(whiten / n_elements * sums[0], drift_scale * sums[1], ref_drift)


def _apply(
    velocity: Tensor,
    old: Tensor,
    noise: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    velocity_coef: Tensor | None,
    std: Tensor,
    weight: Tensor | None,
    options: ops.Options,
) -> GuardLoss:
    dtype = ops.compute_dtype(velocity.dtype)
    if velocity.shape[0] == 0:
        empty = std.to(dtype)
        loss = (velocity.sum() if options.reduction != "none" else velocity.flatten(1).sum(1)).to(dtype)
        return GuardLoss(loss, empty, empty, empty, empty, empty.bool(), None if ref is None else empty)

    def column(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach().to(dtype).contiguous()

    loss, stats, clipped = ops.GuardLossFunction.apply(
        velocity,
        old.detach(),
        noise.detach(),
        None if ref is None else ref.detach(),
        column(advantages),
        column(velocity_coef),
        column(std),
        column(weight),
        options,
    )
    log_ratio, ratio, cross, drift, kl = stats[:5].unbind()
    return GuardLoss(loss, log_ratio, ratio, cross, drift, clipped, None if ref is None else kl)


# --- checks: shapes, dtypes and options on the host, values only on demand ------------------------------------------


def _check_latents(tensors: dict[str, Tensor], same_dtype: tuple[str, ...]) -> None:
    """All (B, ...) of one shape and device, floating; those named in `same_dtype` of one dtype."""
    name, first = next((n, t) for n, t in tensors.items() if n in same_dtype)
    for other_name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{other_name} must be a tensor; got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{other_name} must be floating point; got {tensor.dtype}")
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


def _check_step(step: Transition, velocity: Tensor) -> Transition:
    if not isinstance(step, Transition):
        raise TypeError(f"step must be a Transition (from flow_sde, dance_sde or cps); got {type(step).__name__}")
    if not step.has_density:
        where = "" if torch.compiler.is_compiling() else f" at samples {(step.std == 0).nonzero()[:, 0].tolist()}"
        raise ValueError(
            f"the {step.kind} step has std == 0{where}: it is deterministic, so there is no density and no ratio. "
            "Leave such steps (ode; the last step of cps; noise_level 0) out of the trained steps"
        )
    if step.std.device != velocity.device:
        raise ValueError(f"step is on {step.std.device}, velocity on {velocity.device}; pass step.to(velocity.device)")
    return step.expand(velocity.shape[0])


def _check_advantages(advantages: Tensor, velocity: Tensor) -> None:
    if not isinstance(advantages, Tensor) or not advantages.is_floating_point():
        came = advantages.dtype if isinstance(advantages, Tensor) else type(advantages).__name__
        raise TypeError(f"advantages must be a floating point tensor; got {came}")
    if advantages.shape != velocity.shape[:1]:
        raise ValueError(
            f"advantages must have shape ({velocity.shape[0]},), one per sample; got {tuple(advantages.shape)}"
        )
    if advantages.device != velocity.device:
        raise ValueError(f"advantages are on {advantages.device}, the latents on {velocity.device}")


def _per_sample(name: str, value: Tensor | float, latents: Tensor) -> Tensor:
    """A float, one entry, or one entry per sample (with any trailing axes of size 1) as (B,)."""
    n_samples = latents.shape[0]
    tensor = torch.as_tensor(value, dtype=None if isinstance(value, Tensor) else torch.float32)
    if not isinstance(value, Tensor):
        tensor = tensor.to(latents.device)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
    if tensor.device != latents.device:
        raise ValueError(f"{name} is on {tensor.device}, the latents on {latents.device}; move them to one device")
    if tensor.numel() == 1:
        return tensor.reshape(1).expand(n_samples)
    if tensor.numel() != n_samples or tensor.shape[0] != n_samples:
        raise ValueError(
            f"{name} must have one entry, or {n_samples} (one per sample); got shape {tuple(tensor.shape)}"
        )
    return tensor.reshape(n_samples)


def _weight(
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
    if reweight not in REWEIGHTINGS:
        raise ValueError(f"reweight must be one of {', '.join(REWEIGHTINGS)}, or a tensor (B,); got {reweight!r}")
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


def _options(
    velocity: Tensor,
    objective: str,
    clip_range: float | tuple[float, float],
    adv_clip: float | None,
    kl_threshold: float,
    has_ref: bool,
    kl_weight: float,
    kl_type: str,
    invert_weight: bool,
    reduction: str,
    backend: str,
    *,
    ref_name: str,
) -> ops.Options:
    for name, value, known in (
        ("objective", objective, OBJECTIVES),
        ("kl_type", kl_type, KL_TYPES),
        ("reduction", reduction, REDUCTIONS),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    low, high = clip_range if isinstance(clip_range, tuple | list) else (clip_range, clip_range)
    if not (0 < low < math.inf and 0 < high < math.inf):
        raise ValueError(f"clip_range must be positive and finite, or a pair (low, high) of such; got {clip_range}")
    if adv_clip is not None and not adv_clip > 0:
        raise ValueError(f"adv_clip must be positive, or None for no clipping; got {adv_clip}")
    if not kl_threshold >= 0:
        raise ValueError(f"kl_threshold must be >= 0; got {kl_threshold}")
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight must be finite and >= 0; got {kl_weight}")
    if kl_weight > 0 and not has_ref:
        raise ValueError(f"kl_weight = {kl_weight} needs a reference; pass {ref_name}, or kl_weight=0")
    return ops.Options(
        objective=objective,
        log_clip_low=math.log1p(-low) if low < 1 else -math.inf,
        log_clip_high=math.log1p(high),
        adv_clip=math.inf if adv_clip is None else float(adv_clip),
        kl_threshold=float(kl_threshold),
        kl_weight=float(kl_weight),
        velocity_kl=kl_type == "velocity",
        invert_weight=invert_weight,
        reduction=reduction,
        backend=ops.resolve_backend(backend, velocity),
    )


def _check_finite(tensors: dict[str, Tensor | None]) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("check_values=True reads values on the host and cannot be compiled; call it in eager mode")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        bad = ~torch.isfinite(tensor).flatten(1).all(1) if tensor.ndim > 1 else ~torch.isfinite(tensor)
        if bool(bad.any()):
            raise ValueError(f"{name} holds NaN or Inf at samples {bad.nonzero()[:, 0].tolist()}")


def _check_positive(name: str, value: Tensor, why: str) -> None:
    bad = ~(value > 0)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(f"{name} must be positive; got {value[index].item():g} at sample {index}: {why}")
