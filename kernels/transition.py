"""Sums over the latents of one denoising step, the surrogate loss from them, and its gradient.

Axes: B sample; D elements of one sample; P programs (partial sums) per sample.

Inputs come in one of two forms, told apart by FROM_MEANS:

    velocities   velocity, old_velocity, noise, ref_velocity                             noise = the rollout's draw
    means        prev_sample_mean, old_prev_sample_mean, prev_sample, ref_mean           noise = prev_sample - old_mean
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.common import LAUNCH, MAX_PARTIALS, as_rows, cdiv, entry_stride, launch

# The epilogue's tile of samples x partial sums: 8 x 64 (Flux 1024^2 has 64 partial sums a sample), or 32 x 16 where a
# sample has 16 or fewer (512^2). Larger tiles, and longer columns of samples, spill registers.
EPILOGUE_TILE = 512
EPILOGUE_WARPS = 4
EPILOGUE_PARTIALS = (64, 16)

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


@triton.jit
def _transition_sums_kernel(
    velocity_ptr,
    old_ptr,
    noise_ptr,
    ref_ptr,
    partials_ptr,
    stride_velocity,
    stride_old,
    stride_noise,
    stride_ref,
    spread,
    n_samples,
    n_elements,
    n_partials,
    FROM_MEANS: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ERRORS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of `<noise, v - v_old>`, `<v - v_old, v - v_old>` and `<v - v_ref, v - v_ref>`.

    With HAS_ERRORS also of `noise^2` and `|noise -+ spread (v - v_old)|`, rows 3 to 5.
    Reads each input once (bf16: 6 bytes an element, 8 with a reference), accumulates in float32.
    partials: (2, 3 or 6, B, P) float32, one entry per program.
    """
    pid = tl.program_id(0)
    sample = (pid // n_partials).to(tl.int64)
    part = (pid % n_partials).to(tl.int64)
    velocity_ptr += sample * stride_velocity
    old_ptr += sample * stride_old
    noise_ptr += sample * stride_noise
    if HAS_REF:
        ref_ptr += sample * stride_ref

    lanes = tl.arange(0, BLOCK)
    cross = tl.zeros((BLOCK,), tl.float32)
    drift = tl.zeros((BLOCK,), tl.float32)
    ref_drift = tl.zeros((BLOCK,), tl.float32)
    square = tl.zeros((BLOCK,), tl.float32)
    error_towards = tl.zeros((BLOCK,), tl.float32)
    error_away = tl.zeros((BLOCK,), tl.float32)
    for start in range(part * BLOCK, n_elements, tl.cast(n_partials, tl.int64) * BLOCK):
        mask = lanes < n_elements - start
        velocity = tl.load(velocity_ptr + start + lanes, mask, other=0.0).to(tl.float32)
        old = tl.load(old_ptr + start + lanes, mask, other=0.0).to(tl.float32)
        noise = tl.load(noise_ptr + start + lanes, mask, other=0.0).to(tl.float32)
        if FROM_MEANS:
            noise -= old
        change = velocity - old
        cross += noise * change
        drift += change * change
        if HAS_REF:
            ref = tl.load(ref_ptr + start + lanes, mask, other=0.0).to(tl.float32)
            ref_drift += (velocity - ref) * (velocity - ref)
        if HAS_ERRORS:
            square += noise * noise
            error_towards += tl.abs(noise - spread * change)
            error_away += tl.abs(noise + spread * change)

    row = tl.cast(n_samples, tl.int64) * n_partials
    tl.store(partials_ptr + pid, tl.sum(cross))
    tl.store(partials_ptr + row + pid, tl.sum(drift))
    if HAS_REF:
        tl.store(partials_ptr + 2 * row + pid, tl.sum(ref_drift))
    if HAS_ERRORS:
        tl.store(partials_ptr + 3 * row + pid, tl.sum(square))
        tl.store(partials_ptr + 4 * row + pid, tl.sum(error_towards))
        tl.store(partials_ptr + 5 * row + pid, tl.sum(error_away))


@triton.jit
def _sum_partials(partials_ptr, samples, sample_mask, n_partials, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr):
    """Add each sample's partial sums in a fixed order: (BLOCK_B,) float32."""
    total = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    for start in range(0, n_partials, BLOCK_P):
        parts = start + tl.arange(0, BLOCK_P)
        mask = sample_mask[:, None] & (parts < n_partials)[None, :]
        total += tl.load(partials_ptr + samples[:, None] * n_partials + parts[None, :], mask, other=0.0)
    return tl.sum(total, axis=1)


@triton.jit
def _guard_epilogue_kernel(
    partials_ptr,
    advantages_ptr,
    velocity_coef_ptr,
    std_ptr,
    weight_ptr,
    kl_weights_ptr,
    loss_ptr,
    log_ratio_ptr,
    ratio_ptr,
    cross_ptr,
    drift_ptr,
    kl_ptr,
    coefs_ptr,
    clipped_ptr,
    stride_advantages,
    stride_velocity_coef,
    stride_std,
    stride_weight,
    stride_kl_weights,
    log_clip_low,
    log_clip_high,
    adv_clip,
    kl_threshold,
    kl_weight,
    n_samples,
    n_elements,
    n_partials,
    OBJECTIVE: tl.constexpr,
    REDUCTION: tl.constexpr,
    FROM_MEANS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    INVERT_WEIGHT: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_KL_WEIGHTS: tl.constexpr,
    VELOCITY_KL: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """From the sums to the loss and the gradient's three scalars, for all samples, in one program.

    With S the sums and `whiten = B / s` (1 / s from means): cross = whiten S_cross / D (once more over s from means,
    whose noise carries it), drift = whiten^2 S_drift / D. GRPO-Guard clips `s cross`, the others `cross - drift / 2`.
    log_ratio, ratio, cross, drift, kl: (B,) float32. coefs: (3, B) float32 rows alpha, beta, gamma, where
    the gradient of the loss is `alpha noise + beta (v - v_old) + gamma (v - v_ref)`. GRPO-Guard without a reference has
    alpha alone, (1, B).
    """
    total = 0.0
    inv_size = 1.0 / n_elements
    share = 1.0
    if REDUCTION == 2:
        share = 1.0 / n_samples
    row = tl.cast(n_samples, tl.int64) * n_partials
    for first in range(0, n_samples, BLOCK_B):
        samples = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask = samples < n_samples
        std = tl.load(std_ptr + samples * stride_std, mask, other=1.0)
        advantage = tl.load(advantages_ptr + samples * stride_advantages, mask, other=0.0)

        # One scale for each sum, moments first.
        if FROM_MEANS:
            drift_scale = inv_size / (std * std)
            cross_scale = drift_scale
        else:
            whiten = tl.load(velocity_coef_ptr + samples * stride_velocity_coef, mask, other=1.0) / std
            drift_scale = inv_size * whiten * whiten
            cross_scale = inv_size * whiten
        cross = cross_scale * _sum_partials(partials_ptr, samples, mask, n_partials, BLOCK_B, BLOCK_P)
        drift = drift_scale * _sum_partials(partials_ptr + row, samples, mask, n_partials, BLOCK_B, BLOCK_P)

        # log_ratio, and its slope along noise; a sum that is not finite must not end in a clipped, plausible loss.
        if OBJECTIVE == 0:
            log_ratio = std * cross
            noise_slope = std * cross_scale
        else:
            log_ratio = cross - 0.5 * drift
            noise_slope = cross_scale
        finite = (tl.abs(cross) < float("inf")) & (drift < float("inf"))
        log_ratio = tl.where(finite, log_ratio, float("nan"))
        ratio = tl.exp(log_ratio)

        # Decided in log space: a float32 ratio holds a clip range of 2e-6 to two digits only.
        if OBJECTIVE == 2:
            away = ((log_ratio > 0) & (advantage > 0)) | ((log_ratio < 0) & (advantage < 0))
            clipped = (0.5 * drift >= kl_threshold) & away
            loss = -advantage * tl.where(clipped, 0.0, ratio)
        else:
            # Comparisons keep a NaN, where min and max would drop it.
            advantage = tl.where(advantage > adv_clip, adv_clip, advantage)
            advantage = tl.where(advantage < -adv_clip, -adv_clip, advantage)
            # Compared, not subtracted: contracted to a fused multiply-add, a difference of equals leaves a residue.
            above = (advantage > 0) & (log_ratio > log_clip_high)
            below = (advantage < 0) & (log_ratio < log_clip_low)
            clipped = above | below
            edge = tl.where(above, log_clip_high, log_clip_low)
            loss = -advantage * tl.where(clipped, tl.exp(edge), ratio)
        # No advantage, no loss, even where the ratio overflows (0 * inf is NaN); a NaN in log_ratio stays.
        loss = tl.where(advantage == 0, 0.0 * log_ratio, loss)
        slope = tl.where(clipped, 0.0, loss)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + samples * stride_weight, mask, other=1.0)
            if INVERT_WEIGHT:
                weight = 1.0 / tl.abs(weight)
            loss *= weight
            slope *= weight
        kl = tl.zeros((BLOCK_B,), tl.float32)
        gamma = tl.zeros((BLOCK_B,), tl.float32)
        if HAS_REF:
            kl_scale = 0.5 * drift_scale
            if VELOCITY_KL:
                kl_scale = tl.zeros((BLOCK_B,), tl.float32) + inv_size
                if FROM_MEANS:  # which differ by B (v - v_ref)
                    velocity_coef = tl.load(velocity_coef_ptr + samples * stride_velocity_coef, mask, other=1.0)
                    kl_scale = inv_size / (velocity_coef * velocity_coef)
            kl_factor = tl.zeros((BLOCK_B,), tl.float32) + kl_weight
            if HAS_KL_WEIGHTS:
                kl_factor = tl.load(kl_weights_ptr + samples * stride_kl_weights, mask, other=0.0)
            kl = kl_scale * _sum_partials(partials_ptr + 2 * row, samples, mask, n_partials, BLOCK_B, BLOCK_P)
            # A KL that is only reported may be NaN.
            if HAS_KL_WEIGHTS:
                loss += kl_factor * kl
            else:
                loss = tl.where(kl_weight == 0, loss, loss + kl_weight * kl)
            gamma = 2.0 * kl_factor * kl_scale

        alpha = slope * noise_slope
        beta = tl.zeros((BLOCK_B,), tl.float32)
        if OBJECTIVE != 0:
            beta = -slope * drift_scale
        tl.store(log_ratio_ptr + samples, log_ratio, mask)
        tl.store(ratio_ptr + samples, ratio, mask)
        tl.store(cross_ptr + samples, cross, mask)
        tl.store(drift_ptr + samples, drift, mask)
        tl.store(kl_ptr + samples, kl, mask)
        tl.store(coefs_ptr + samples, share * alpha, mask)
        if OBJECTIVE != 0 or HAS_REF:
            tl.store(coefs_ptr + n_samples + samples, share * beta, mask)
            tl.store(coefs_ptr + 2 * n_samples + samples, share * gamma, mask)
        tl.store(clipped_ptr + samples, clipped, mask)
        if REDUCTION == 0:
            tl.store(loss_ptr + samples, loss, mask)
        else:
            total += tl.sum(tl.where(mask, loss, 0.0))
    if REDUCTION != 0:
        tl.store(loss_ptr, share * total)


@triton.jit
def _transition_bwd_kernel(
    grad_loss_ptr,
    coefs_ptr,
    noise_ptr,
    velocity_ptr,
    old_ptr,
    ref_ptr,
    grad_ptr,
    stride_grad_loss,
    stride_noise,
    stride_velocity,
    stride_old,
    stride_ref,
    n_samples,
    n_elements,
    n_blocks,
    FROM_MEANS: tl.constexpr,
    HAS_DRIFT: tl.constexpr,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`grad = g (alpha noise + beta (v - v_old) + gamma (v - v_ref))`, with three scalars per sample.

    Reads only what the flags need and writes the gradient once (bf16, noise alone: 4 bytes an element). The upstream
    gradient g joins in float32, so that a loss scale acts before the cast to the storage dtype.
    coefs: (3, B) float32 rows alpha, beta, gamma. grad: (B, D), contiguous.
    """
    pid = tl.program_id(0)
    sample = (pid // n_blocks).to(tl.int64)
    start = (pid % n_blocks).to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < n_elements - start

    grad_loss = tl.load(grad_loss_ptr + sample * stride_grad_loss).to(tl.float32)
    noise = tl.load(noise_ptr + sample * stride_noise + start + lanes, mask, other=0.0).to(tl.float32)
    if FROM_MEANS or HAS_DRIFT:
        old = tl.load(old_ptr + sample * stride_old + start + lanes, mask, other=0.0).to(tl.float32)
    if HAS_DRIFT or HAS_REF:
        velocity = tl.load(velocity_ptr + sample * stride_velocity + start + lanes, mask, other=0.0).to(tl.float32)
    if FROM_MEANS:
        noise -= old
    grad = (grad_loss * tl.load(coefs_ptr + sample)) * noise
    if HAS_DRIFT:
        grad += (grad_loss * tl.load(coefs_ptr + n_samples + sample)) * (velocity - old)
    if HAS_REF:
        ref = tl.load(ref_ptr + sample * stride_ref + start + lanes, mask, other=0.0).to(tl.float32)
        grad += (grad_loss * tl.load(coefs_ptr + 2 * n_samples + sample)) * (velocity - ref)
    grad_ptr += sample * n_elements
    tl.store(grad_ptr + start + lanes, grad.to(grad_ptr.dtype.element_ty), mask)


def transition_partials(
    velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, from_means: bool, spread: float | None = None
) -> Tensor:
    """Launch the one pass over the latents: (2, 3 or 6, B, P) float32 partial sums. Inputs (B, ...) bf16/fp16/fp32.

    With a spread there are 6, of which the third is not written without a reference.
    """
    velocity, stride_velocity = as_rows(velocity)
    old, stride_old = as_rows(old)
    noise, stride_noise = as_rows(noise)
    ref_rows, stride_ref = (None, 0) if ref is None else as_rows(ref)
    n_samples = velocity.shape[0]
    n_elements = velocity.numel() // n_samples
    n_partials = min(cdiv(n_elements, LAUNCH.block), MAX_PARTIALS)
    rows = 6 if spread is not None else 2 if ref is None else 3
    partials = velocity.new_empty(rows, n_samples, n_partials, dtype=torch.float32)
    launch(
        _transition_sums_kernel,
        n_samples * n_partials,
        (velocity, old, noise, ref_rows, partials),
        (stride_velocity, stride_old, stride_noise, stride_ref, spread or 0.0, n_samples, n_elements, n_partials),
        FROM_MEANS=from_means, HAS_REF=ref is not None, HAS_ERRORS=spread is not None,
        BLOCK=LAUNCH.block, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return partials


class Epilogue:
    """The options of `guard_epilogue`, in the form that its kernel takes. Made once for a kind of call."""

    def __init__(
        self, objective: int, clip_low: float, clip_high: float, adv_clip: float, kl_threshold: float,
        from_means: bool, kl_weight: float, velocity_kl: bool, invert_weight: bool, reduction: str,
    ) -> None:  # fmt: skip
        log_clip_low = math.log1p(-clip_low) if clip_low < 1 else -math.inf
        self.limits = log_clip_low, math.log1p(clip_high), adv_clip, kl_threshold, kl_weight
        self.flags = {
            "OBJECTIVE": objective, "REDUCTION": REDUCTIONS[reduction], "FROM_MEANS": from_means,
            "INVERT_WEIGHT": invert_weight, "VELOCITY_KL": velocity_kl, "num_warps": EPILOGUE_WARPS,
        }  # fmt: skip
        self.from_means = from_means
        self.reduced = reduction != "none"
        self.follows_noise = objective == 0
        """whether the policy's gradient is a multiple of the noise"""


def guard_epilogue(
    partials: Tensor,
    advantages: Tensor,
    velocity_coef: Tensor | None,
    std: Tensor,
    weight: Tensor | None,
    kl_weights: Tensor | None,
    n_elements: int,
    options: Epilogue,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss () or (B,), log_ratio, ratio, cross, drift, kl (B,) each, coefs (1 or 3, B) and clipped (B,) from the sums.

    Per-sample inputs are (B,) or (1,) float32.
    """
    sums, n_samples, n_partials = partials.shape
    new = partials.new_empty
    loss = new(()) if options.reduced else new(n_samples)
    log_ratio, ratio, cross, drift, kl = new(n_samples), new(n_samples), new(n_samples), new(n_samples), new(n_samples)
    coefs = new(1 if options.follows_noise and sums == 2 else 3, n_samples)
    clipped = new(n_samples, dtype=torch.bool)
    block = EPILOGUE_PARTIALS[n_partials <= EPILOGUE_PARTIALS[1]]
    inputs = (partials, advantages, velocity_coef, std, weight, kl_weights)
    outputs = (loss, log_ratio, ratio, cross, drift, kl, coefs, clipped)
    launch(
        _guard_epilogue_kernel,
        1,
        (*inputs, *outputs),
        (
            entry_stride(advantages), entry_stride(velocity_coef), entry_stride(std), entry_stride(weight),
            entry_stride(kl_weights), *options.limits, n_samples, n_elements, n_partials,
        ),
        HAS_WEIGHT=weight is not None, HAS_REF=sums == 3, HAS_KL_WEIGHTS=kl_weights is not None,
        BLOCK_B=EPILOGUE_TILE // block, BLOCK_P=block, **options.flags,
    )  # fmt: skip
    return outputs


def transition_bwd(
    grad_loss: Tensor,
    coefs: Tensor,
    noise: Tensor,
    velocity: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    dtype: torch.dtype,
    from_means: bool,
    has_drift: bool,
) -> Tensor:
    """The gradient, of noise's shape and in `dtype`, in one launch.

    grad_loss: () or (B,) float32. coefs: (3, B) float32, or (1, B) without the drift and the reference. velocity is
    needed for the drift and the reference, old for the drift and for means.
    """
    grad = noise.new_empty(noise.shape, dtype=dtype)
    noise, stride_noise = as_rows(noise)
    velocity, stride_velocity = (None, 0) if velocity is None else as_rows(velocity)
    old, stride_old = (None, 0) if old is None else as_rows(old)
    ref, stride_ref = (None, 0) if ref is None else as_rows(ref)
    n_samples = noise.shape[0]
    n_elements = noise.numel() // n_samples
    n_blocks = cdiv(n_elements, LAUNCH.block)
    launch(
        _transition_bwd_kernel,
        n_samples * n_blocks,
        (grad_loss, coefs.contiguous(), noise, velocity, old, ref, grad),
        (
            entry_stride(grad_loss), stride_noise, stride_velocity, stride_old, stride_ref,
            n_samples, n_elements, n_blocks,
        ),
        FROM_MEANS=from_means, HAS_DRIFT=has_drift, HAS_REF=ref is not None,
        BLOCK=LAUNCH.block, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return grad
