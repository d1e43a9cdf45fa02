"""The public losses: validate once at the door, then one operator forward and one backward.

Axes: B sample; every further axis of the latents counts as elements, D of them per sample. All log-ratios are means
over the elements, as in every public trainer; a clip range belongs to that reduction and to D.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from fastguard import ops
from fastguard.loss.checks import (
    build_options,
    check_advantages,
    check_finite,
    check_latents,
    check_step,
    per_sample,
    weight_source,
)
from fastguard.sde import Transition


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
        clip_range: distance of the ratio from 1, or the distances (low, high) below and above. About 2e-6 for
            grpo_guard at D = 65,536, 1e-5 to 1e-4 for flow_grpo. Not used by flow_dppo.
        adv_clip: advantages are clipped to +-adv_clip; None leaves them. Not used by flow_dppo.
        reweight: factor on each sample's policy loss: "inverse_dt" 1 / |dt| (the paper's), "equalized"
            1 / |step.velocity_coef| (makes grpo_guard's gradient the same at every step for every sampler), "none"
            (published Flow-GRPO), or a tensor (B,).
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
    check_latents(tensors, same_dtype=("velocity", "old_velocity", "ref_velocity"))
    step = check_step(step, "velocity", velocity, needs_density=True)
    weight, invert = weight_source(reweight, velocity, step.dt, step.velocity_coef)
    options = build_options(
        velocity, objective, clip_range, adv_clip, kl_threshold, ref_velocity is not None, kl_weight, kl_type,
        invert, reduction, backend, ref_name="ref_velocity",
    )  # fmt: skip
    check_advantages(advantages, velocity)
    if check_values:
        coefs = {"the step's velocity_coef": step.velocity_coef, "the step's std": step.std}
        check_finite({**tensors, **coefs, "advantages": advantages, "reweight": weight})
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
        prev_sample: (B, ...) what the rollout drew; any floating dtype. Rounding it after the draw changes the noise
            that is recovered from it, by the rounding error over std. The first ratio stays 1.
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
    check_latents(tensors, same_dtype=means)
    std = per_sample("std", std, prev_sample_mean, check_values)
    dt = per_sample("dt", dt, prev_sample_mean, check_values)
    weight, invert = weight_source(reweight, prev_sample_mean, dt, None)
    options = build_options(
        prev_sample_mean, objective, clip_range, adv_clip, kl_threshold, ref_prev_sample_mean is not None, kl_weight,
        "gaussian", invert, reduction, backend, ref_name="ref_prev_sample_mean",
    )  # fmt: skip
    check_advantages(advantages, prev_sample_mean)
    if check_values:
        check_finite({**tensors, "std": std, "advantages": advantages, "reweight": weight})
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
    check_latents(tensors, same_dtype=("velocity", "old_velocity", "ref_velocity"))
    step = check_step(step, "velocity", velocity, needs_density=True)
    ops.refuse_transforms("transition_moments")
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
    ops.refuse_transforms("the loss")
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
    log_ratio, ratio, cross, drift, kl = stats.unbind()
    return GuardLoss(loss, log_ratio, ratio, cross, drift, clipped, None if ref is None else kl)
