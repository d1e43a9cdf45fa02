"""The public losses: validate once at the door, then one operator forward and one backward.

Axes: B sample; every further axis of the latents counts as elements, D of them per sample. All log-ratios are means
over the elements, as in every public trainer; a clip range belongs to that reduction and to D.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguard.loss.calls import LATENTS, Call, checked
from fastguard.loss.checks import (
    KlType,
    Reduction,
    Reweight,
    check_draw,
    check_draw_from_means,
    check_finite,
    check_latents,
    check_step,
)
from fastguard.loss.objectives import DEFAULT_OBJECTIVE, Objective
from fastguard.ops.registry import Backend, compute_dtype, refuse_transforms, resolve_backend
from fastguard.ops.transition import (
    TransitionLossFunction,
    TransitionSumsFunction,
)
from fastguard.sde import Transition


class GuardLoss(NamedTuple):
    """A loss and the numbers that it was made of. Only `loss` has a gradient. All tensors stay on the device.

    Attributes:
        loss: () float32 (float64 for float64 inputs), or (B,) with reduction="none".
        log_ratio: (B,), what the objective limits: RatioNorm's `std * cross`, or `cross - drift / 2`.
        ratio: (B,), `exp(log_ratio)`. In float32 it cannot show changes below 6e-8; log_ratio can.
        cross: (B,), `<eps, w> / D`, where eps is the rollout's noise and w the whitened drift.
        drift: (B,), `<w, w> / D`. The KL divergence from the rollout policy is `drift / 2` per element.
        clipped: (B,) bool, whether the sample has no policy gradient because of the clip or the mask.
        kl: (B,), KL divergence from the reference (of kl_type), or None without a reference.
    """

    loss: Tensor
    log_ratio: Tensor
    ratio: Tensor
    cross: Tensor
    drift: Tensor
    clipped: Tensor
    kl: Tensor | None


class Moments(NamedTuple):
    """Moments of each sample, (B,) float32 (float64 for float64 inputs), differentiable in the velocity.

    Attributes:
        cross: `<eps, w> / D`, where eps is the rollout's noise and w the whitened drift.
        drift: `<w, w> / D`.
        ref_drift: the same as drift, from the reference; None without one.
    """

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
    objective: str | Objective = DEFAULT_OBJECTIVE,
    reweight: Reweight | float | Tensor = "inverse_dt",
    sample_weight: float | Tensor | None = None,
    ref_velocity: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    kl_type: KlType = "gaussian",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    check_values: bool = False,
    **options: Any,
) -> GuardLoss:
    """Policy loss of one denoising step per sample, from velocities. Only `velocity` gets a gradient.

    Derivation: docs/math.md. Sources: GRPO-Guard, arXiv 2510.22319 (RatioNorm Eq. 8, reweighting Eq. 12);
    Flow-GRPO, arXiv 2505.05470.

    A factor per sample may be a number, or a floating tensor (), (B,) or (B, 1, ..., 1).

    Args:
        velocity: (B, ...) the model's output now; bfloat16, float16, float32, or float64 (torch backend).
        old_velocity: as velocity, from the rollout.
        noise: (B, ...) the noise that the rollout drew, rounded as it was used; any floating dtype.
        advantages: (B,) or (B, 1), floating.
        step: the Transition of each sample's step. Every std must be positive.
        objective: a name of `fastguard.loss.objectives.OBJECTIVES`, or an objective that `build_objective` made.
        reweight: factor on the policy loss of each sample. "inverse_dt" is 1 / |dt|, as published with GRPO-Guard.
            "equalized" is 1 / |step.velocity_coef|: RatioNorm's gradient is then the same at every step of every
            sampler. "none" is published Flow-GRPO. Otherwise a factor per sample.
        sample_weight: a further factor per sample on the policy loss, such as the importance weight of a rollout
            correction. A mean over the samples still divides by B.
        ref_velocity: as velocity, from the reference policy. `kl_weight` needs it, and `.kl` reports its KL.
        kl_weight: factor on the KL divergence from the reference, one for all, or a tensor with one per sample. The
            KL is not reweighted. With the number 0 it is only reported.
        kl_type: "gaussian" (per element), or "velocity" (mean squared velocity difference).
        reduction: "mean" or "sum" over the samples, or "none".
        backend: "auto" (Triton on CUDA, else torch), "triton" or "torch".
        check_values: raise an error if an input holds NaN or Inf, or if the noise is not a standard normal draw: with
            1,000 elements or more its mean square must be near 1. This waits for the GPU. Without it, a sample whose
            latents are not finite gives NaN in its own outputs and in the mean. An infinite advantage is clipped.
        options: options of the objective, if it is given by name. `clip_range` (about 2e-6 for RatioNorm at
            D = 65,536) and `adv_clip` belong to those that clip. The objective's class documents its options.

    Raises:
        ValueError: a shape, device or option does not fit; the message says what came and what was expected.
        TypeError: the same for a type or a dtype.
    """
    call = Call(
        False, velocity, old_velocity, noise, ref_velocity, advantages, step, objective, options, reweight,
        sample_weight, kl_weight, kl_type, reduction, backend,
    )  # fmt: skip
    return _loss(call, check_values)


def guard_loss_from_means(
    prev_sample: Tensor,
    prev_sample_mean: Tensor,
    old_prev_sample_mean: Tensor,
    advantages: Tensor,
    step: Transition,
    *,
    objective: str | Objective = DEFAULT_OBJECTIVE,
    reweight: Reweight | float | Tensor = "inverse_dt",
    sample_weight: float | Tensor | None = None,
    ref_prev_sample_mean: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    kl_type: KlType = "gaussian",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    check_values: bool = False,
    **options: Any,
) -> GuardLoss:
    """The same loss for trainers that have the mean of each step. Only `prev_sample_mean` gets a gradient.

    Args:
        prev_sample: (B, ...) what the rollout drew; any floating dtype. The noise is recovered from it. Rounding it
            after the draw changes that noise by the rounding error over std. The first ratio stays 1.
        prev_sample_mean: (B, ...) mean of the step under the model now.
        old_prev_sample_mean: (B, ...) mean of the step under the rollout policy, of the same dtype.
        advantages: as in `guard_loss`.
        step: the Transition of each sample's step: from `flow_sde` or another sampler, or from `gaussian_step` with a
            std and dt of your own. The `std_dev_t` of public Flow-GRPO code is not the std: it lacks sqrt(|dt|).
        objective: as in `guard_loss`.
        reweight: as in `guard_loss`. "equalized" needs the step's velocity_coef.
        sample_weight: as in `guard_loss`.
        ref_prev_sample_mean: (B, ...) mean of the step under the reference, of the same dtype.
        kl_weight: as in `guard_loss`.
        kl_type: as in `guard_loss`. "velocity" needs the step's velocity_coef.
        reduction: as in `guard_loss`.
        backend: as in `guard_loss`.
        check_values: as in `guard_loss`. The noise is `(prev_sample - old_prev_sample_mean) / std`, so a std that is
            not the draw's is found, and the message names the usual mistakes.
        options: as in `guard_loss`.

    Raises:
        ValueError: a shape, device or option does not fit; the message says what came and what was expected.
        TypeError: the same for a type or a dtype.
    """
    call = Call(
        True, prev_sample_mean, old_prev_sample_mean, prev_sample, ref_prev_sample_mean, advantages, step, objective,
        options, reweight, sample_weight, kl_weight, kl_type, reduction, backend,
    )  # fmt: skip
    return _loss(call, check_values)


def transition_moments(
    velocity: Tensor,
    old_velocity: Tensor,
    noise: Tensor,
    step: Transition,
    ref_velocity: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Moments:
    """The numbers per sample from which any objective can be written in plain PyTorch, in one pass over the latents.

    `cross = <eps, w> / D` and `drift = <w, w> / D` with `w = B (v - v_old) / s`. `ref_drift` is the drift from the
    reference. The result can be differentiated once, with respect to `velocity`.

    Args:
        velocity: as in `guard_loss`.
        old_velocity: as in `guard_loss`.
        noise: as in `guard_loss`.
        step: as in `guard_loss`.
        ref_velocity: as in `guard_loss`; without it `ref_drift` is None.
        backend: as in `guard_loss`.

    Raises:
        ValueError: a shape, device or option does not fit; the message says what came and what was expected.
        TypeError: the same for a type or a dtype.
    """
    tensors = {"velocity": velocity, "old_velocity": old_velocity, "noise": noise}
    if ref_velocity is not None:
        tensors["ref_velocity"] = ref_velocity
    check_latents(tensors, ("velocity", "old_velocity", "ref_velocity"))
    check_step(step, "velocity", velocity)
    refuse_transforms("transition_moments")
    resolved = resolve_backend(backend, velocity)
    dtype = compute_dtype(velocity.dtype)
    whiten = (step.mean_coefs[1] / step.std).to(dtype)
    n_elements = math.prod(velocity.shape[1:])
    if velocity.shape[0] == 0:
        empty = velocity.flatten(1).sum(1).to(dtype)
        return Moments(empty, empty, None if ref_velocity is None else empty)
    ref = None if ref_velocity is None else ref_velocity.detach()
    sums = TransitionSumsFunction.apply(velocity, old_velocity.detach(), noise.detach(), ref, resolved)
    drift_scale = whiten**2 / n_elements
    ref_drift = None if ref is None else drift_scale * sums[2]
    return Moments(whiten / n_elements * sums[0], drift_scale * sums[1], ref_drift)


def _loss(call: Call, check_values: bool) -> GuardLoss:
    """The numbers of the forward pass without a graph, then the loss with its gradient attached."""
    found = checked(call)
    weight = _policy_weight(call, found.dtype)
    if check_values:
        _check_values(call, weight)
    _, velocity, old, noise, ref, advantages, step, *_ = call
    if velocity.numel() == 0:
        return of_no_samples(velocity, advantages, ref, call.reduction, found.dtype)

    advantages = advantages if advantages.ndim == 1 else advantages[:, 0]
    kl_weights = call.kl_weight.reshape(-1) if isinstance(call.kl_weight, Tensor) else None
    coef, std = step.velocity_coef, step.std
    constant = velocity.detach()
    if not found.as_given:
        constant, old, noise, ref = _constant(velocity), _constant(old), _constant(noise), _constant(ref)
        advantages, coef, std, weight, kl_weights = [
            _constant(value, found.dtype) for value in (advantages, coef, std, weight, kl_weights)
        ]
    loss, log_ratio, ratio, cross, drift, kl, coefs, clipped = found.loss(
        constant, old, noise, ref, advantages, coef, std, weight, kl_weights
    )
    ref_or_none = ref if found.kl_weight != 0 else None
    loss = TransitionLossFunction.apply(
        velocity, loss, coefs, noise, old, ref_or_none, (call.from_means, found.has_drift, found.backend)
    )
    return GuardLoss(loss, log_ratio, ratio, cross, drift, clipped, None if ref is None else kl)


def of_no_samples(
    velocity: Tensor, advantages: Tensor, ref: Tensor | None, reduction: str, dtype: torch.dtype
) -> GuardLoss:
    """The loss of an empty batch: 0, or none, with a graph."""
    empty = advantages.detach().flatten().to(dtype)
    loss = (velocity.sum() if reduction != "none" else velocity.flatten(1).sum(1)).to(dtype)
    return GuardLoss(loss, empty, empty, empty, empty, empty.bool(), None if ref is None else empty)


def _policy_weight(call: Call, dtype: torch.dtype) -> Tensor | None:
    """What the factor on the policy loss is made of, (B,) or (1,): itself, or for `invert_weight` 1 / |itself|."""
    reweight, sample_weight = call.reweight, call.sample_weight
    if not isinstance(reweight, str):
        weight = column(reweight, call.velocity, dtype)
        return weight if sample_weight is None else weight * column(sample_weight, call.velocity, dtype)
    inverse = {"none": None, "inverse_dt": call.step.dt, "equalized": call.step.velocity_coef}[reweight]
    if sample_weight is None:
        return inverse
    weight = column(sample_weight, call.velocity, dtype)
    return weight if inverse is None else weight / inverse.to(dtype).abs()


def column(value: Tensor | float, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """A factor as (B,) or (1,)."""
    if isinstance(value, Tensor):
        return value.reshape(-1).to(dtype)
    # torch.compile makes one graph for all factors of a product, but one for each value that fills a tensor.
    return torch.ones(1, dtype=dtype, device=latents.device) * float(value)


def _check_values(call: Call, weight: Tensor | None) -> None:
    name, old_name, noise_name, ref_name = LATENTS[call.from_means]
    latents = {name: call.velocity, old_name: call.old, noise_name: call.noise, ref_name: call.ref}
    step = {f"the step's {field}": getattr(call.step, field) for field in ("velocity_coef", "std", "dt")}
    factors = {
        "advantages": call.advantages, "reweight": call.reweight, "sample_weight": call.sample_weight,
        "reweight times sample_weight": weight, "kl_weight": call.kl_weight,
    }  # fmt: skip
    check_finite({**latents, **step, **factors})
    if call.from_means:
        check_draw_from_means(f"({noise_name} - {old_name}) / std", call.noise, call.old, call.step)
    else:
        check_draw(noise_name, call.noise, call.step)


def _constant(value: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    """The value without its graph, in this dtype, as it stands in memory."""
    if value is None:
        return None
    if value.requires_grad or torch.compiler.is_compiling() or value.is_neg():  # dynamo cannot ask the last
        value = value.detach().resolve_neg()
    return value if dtype is None or value.dtype == dtype else value.to(dtype)
