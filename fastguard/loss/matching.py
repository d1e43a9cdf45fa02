"""The loss of the forward process: from velocities at noised images and their target to a loss and its gradient.

The sums over the latents and the gradient are those of a transition from means, with the target as the sample. An
objective of the forward process says why (`fastguard.loss.objectives.matching`).

Axes: B noised latents; every further axis of the latents counts as elements, D of them each.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastguard.loss.api import GuardLoss, column, of_no_samples
from fastguard.loss.checks import (
    Reduction,
    check_advantages,
    check_factor,
    check_finite,
    check_kl_weight,
    check_latents,
    check_objective,
    check_reduction,
    check_sigma,
    check_times,
)
from fastguard.loss.objectives import DEFAULT_MATCHING, MatchingObjective, Noised, Objective, Terms
from fastguard.ops.registry import Backend, compute_dtype, refuse_transforms, resolve_backend
from fastguard.ops.transition import TransitionLossFunction, epilogue, transition_sums

STD = math.sqrt(0.5)
"""of the Gaussians whose log-ratio is a difference of squared errors"""


def matching_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    advantages: Tensor,
    sigma: Tensor,
    *,
    objective: str | Objective = DEFAULT_MATCHING,
    sample_weight: float | Tensor | None = None,
    ref_velocity: Tensor | None = None,
    kl_weight: float | Tensor = 0.0,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
    check_values: bool = False,
    **options: Any,
) -> GuardLoss:
    """Policy loss of final latents noised to `x_t = x0 + t (n - x0)`, one each. Only `velocity` gets a gradient.

    Derivation: docs/math.md. Sources: DiffusionNFT, arXiv 2509.16117; AWM, arXiv 2509.25050; DGPO, arXiv 2510.08425;
    Diffusion-DPO, arXiv 2311.12908. A factor per sample may be a number, or a floating tensor (), (B,) or
    (B, 1, ..., 1).

    Args:
        velocity: (B, ...) the model's output at x_t; bfloat16, float16, float32, or float64 (torch backend).
        old_velocity: as velocity, from the policy that the objective names as its `anchor`.
        target: (B, ...) `n - x0`, the noise less the final latents; any floating dtype. Rounding it changes what is
            matched, so make x_t from the rounded one.
        advantages: (B,) or (B, 1), floating.
        sigma: (B,) or (B, 1), the flow times t in (0, 1], floating; 1 is noise.
        objective: a name of `OBJECTIVES` whose class is a `MatchingObjective`, or such an objective. One of scope
            "group" needs two passes (docs/objectives.md): give the derivatives of the first as an objective `Given`.
        sample_weight: a factor per sample on the policy loss.
        ref_velocity: as velocity, from the reference policy. `kl_weight` needs it, and `.kl` reports its KL.
        kl_weight: factor on the KL divergence from the reference, `|v - v_ref|^2 / D`; a number, or one per sample.
        reduction: "mean" or "sum" over the samples, or "none".
        backend: "auto" (Triton on CUDA, else torch), "triton" or "torch".
        check_values: raise an error if an input holds NaN or Inf. This waits for the GPU.
        options: options of the objective, if it is given by name. Its class documents them.

    Returns:
        As `guard_loss`, with log_ratio `(|v_old - target|^2 - |v - target|^2) / D`, times the objective's factor of the
        flow time if it has one, cross `2 <target - v_old, v - v_old> / D` and drift `2 |v - v_old|^2 / D`.

    Raises:
        ValueError: a shape, device or option does not fit; the message says what came and what was expected.
        TypeError: the same for a type or a dtype.
    """
    tensors = {"velocity": velocity, "old_velocity": old_velocity, "target": target}
    if ref_velocity is not None:
        tensors["ref_velocity"] = ref_velocity
    check_latents(tensors, ("velocity", "old_velocity", "ref_velocity"))
    check_advantages(advantages, velocity)
    check_sigma(sigma, velocity)
    if sample_weight is not None:
        check_factor("sample_weight", sample_weight, velocity)
    check_kl_weight(kl_weight, velocity, ref_velocity, "ref_velocity")
    check_reduction(reduction)
    found = check_objective(objective, options, "forward")
    refuse_transforms("the loss")
    if check_values:
        factors = {"advantages": advantages, "sigma": sigma, "sample_weight": sample_weight, "kl_weight": kl_weight}
        check_finite({**tensors, **factors})
        check_times(sigma)

    dtype, resolved = compute_dtype(velocity.dtype), resolve_backend(backend, velocity)
    n_elements = math.prod(velocity.shape[1:])
    if velocity.numel() == 0:
        return of_no_samples(velocity, advantages, ref_velocity, reduction, dtype)
    advantages, sigma = (column(value.detach(), velocity, dtype) for value in (advantages, sigma))
    old, target = old_velocity.detach(), target.detach()
    ref = None if ref_velocity is None else ref_velocity.detach()
    spread = found.error_spread() if isinstance(found, MatchingObjective) else None
    sums = transition_sums(velocity.detach(), old, target, ref, True, spread, resolved)
    n_moments = 2 if ref is None else 3
    noised = Noised(sigma, *(row / n_elements for row in sums[n_moments:]))

    def terms(log_ratio: Tensor, drift: Tensor) -> Terms:
        if isinstance(found, MatchingObjective):
            return found.terms(log_ratio, drift, advantages, n_elements=n_elements, noised=noised)
        return found.terms(log_ratio, drift, advantages, n_elements=n_elements)

    smooth = found.time_factor(sigma) if isinstance(found, MatchingObjective) else None
    fixed = not isinstance(kl_weight, Tensor)
    loss, log_ratio, ratio, cross, drift, kl, coefs, clipped = epilogue(
        sums[:n_moments],
        terms,
        None,
        column(STD, velocity, dtype),
        None if sample_weight is None else column(sample_weight, velocity, dtype).detach(),
        None if fixed else column(kl_weight, velocity, dtype).detach(),
        n_elements,
        normalized=False,
        moves_drift=found.moves_drift,
        from_means=True,
        kl_weight=float(kl_weight) if fixed else 1.0,
        velocity_kl=False,
        invert_weight=False,
        reduction=reduction,
        smooth=smooth,
    )
    ref_or_none = None if fixed and kl_weight == 0 else ref
    loss = TransitionLossFunction.apply(velocity, loss, coefs, target, old, ref_or_none, (True, True, resolved))
    return GuardLoss(loss, log_ratio, ratio, cross, drift, clipped, None if ref is None else kl)
