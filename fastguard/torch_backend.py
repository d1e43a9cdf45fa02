"""The kernels' functions in plain torch, for any device and dtype, float64 included.

Same signatures and results as `fastguard.kernels`. The mathematics is the analytic one, not the textbook's: two or
three inner products forward, one scaled copy backward, no autograd graph of temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Elements of a sample that are worked on at once: the difference of two velocities, 1 MB in float32, stays in cache.
CHUNK = 2**18


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transition_partials(
    velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, *, from_means: bool
) -> Tensor:
    """(2 or 3, B, P): the sums `<noise, v - v_old>`, `|v - v_old|^2` and `|v - v_ref|^2` of each chunk of a sample."""
    dtype = compute_dtype(velocity.dtype)
    inputs = [velocity, old, noise] if ref is None else [velocity, old, noise, ref]
    sums: list[list[Tensor]] = [[] for _ in inputs[1:]]

    def rows(block: Tensor) -> Iterable[Tensor]:
        return block.unbind() if block.dtype == dtype else (row.to(dtype) for row in block.unbind())

    for blocks in zip(*(_as_rows(tensor).split(CHUNK, dim=1) for tensor in inputs), strict=True):
        for v, v_old, eps, *v_ref in zip(*map(rows, blocks), strict=True):
            change = v - v_old
            # torch.dot, unlike matmul, never goes down to tf32 or bf16.
            sums[0].append(torch.dot(eps - v_old if from_means else eps, change))
            sums[1].append(torch.dot(change, change))
            if v_ref:
                change = v - v_ref[0]
                sums[2].append(torch.dot(change, change))
    partials = torch.stack([value for row in sums for value in row]).view(len(sums), -1, len(velocity))
    return partials.transpose(1, 2).contiguous()


def _as_rows(tensor: Tensor) -> Tensor:
    """(B, ...) as (B, D) with contiguous rows: a view where there is one."""
    rows = tensor.flatten(1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def guard_epilogue(
    partials: Tensor,
    advantages: Tensor,
    velocity_coef: Tensor | None,
    std: Tensor,
    weight: Tensor | None,
    n_elements: int,
    *,
    invert_weight: bool,
    objective: str,
    log_clip: tuple[Any, Any],
    adv_clip: Any,
    kl_threshold: float,
    kl_weight: float,
    velocity_kl: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss () or (B,), stats (5, B), coefs (3, B) and clipped (B,): see the kernel of this name for the equations.

    The clips are floats or 0-d tensors.
    """
    # On the host each operation on these few numbers costs more than its arithmetic, so they are kept few.
    sums = partials.sum(-1)
    whiten = 1 / std if velocity_coef is None else velocity_coef / std
    drift_scale = whiten * whiten / n_elements
    cross_scale = drift_scale if velocity_coef is None else whiten / n_elements
    cross = cross_scale * sums[0]
    drift = drift_scale * sums[1]

    if objective == "grpo_guard":
        log_ratio, noise_slope = std * cross, std * cross_scale
    else:
        log_ratio, noise_slope = cross - drift / 2, cross_scale
    # A sum that is not finite must not end in a clipped, plausible loss: 0 * inf is NaN.
    log_ratio = log_ratio + 0 * (cross + drift)
    ratio = torch.exp(log_ratio)

    if objective == "flow_dppo":
        away = ((log_ratio > 0) & (advantages > 0)) | ((log_ratio < 0) & (advantages < 0))
        clipped = away & (drift / 2 >= kl_threshold)
        loss = -advantages * torch.where(clipped, 0.0, ratio)
    else:
        # Decided in log space: a float32 ratio holds a clip range of 2e-6 to two digits only.
        advantages = advantages.clamp(-adv_clip, adv_clip)
        within = log_ratio.clamp(*log_clip)
        clipped = advantages * (log_ratio - within) > 0
        loss = -advantages * torch.where(clipped, torch.exp(within), ratio)
    # No advantage, no loss, even where the ratio overflows (0 * inf is NaN); a NaN in log_ratio stays.
    loss = torch.where(advantages == 0, 0 * log_ratio, loss)
    slope = torch.where(clipped, 0.0, loss)
    if weight is not None:
        factor = 1 / weight.abs() if invert_weight else weight
        loss, slope = loss * factor, slope * factor

    zero = torch.zeros_like(ratio)
    kl, beta, gamma = zero, zero, zero
    if objective != "grpo_guard":
        beta = -slope * drift_scale
    if len(sums) == 3:
        kl_scale = torch.ones_like(ratio) / n_elements if velocity_kl else drift_scale / 2
        kl = kl_scale * sums[2]
        if kl_weight != 0:  # a KL that is only reported may be NaN
            loss = loss + kl_weight * kl
            gamma = 2 * kl_weight * kl_scale

    stats = torch.stack([log_ratio, ratio, cross, drift, kl])
    coefs = torch.stack([slope * noise_slope, beta, gamma])
    if reduction == "mean":
        return loss.mean(), stats, coefs / len(loss), clipped
    return loss.sum() if reduction == "sum" else loss, stats, coefs, clipped


def transition_bwd(
    grad_loss: Tensor,
    coefs: Tensor,
    noise: Tensor,
    velocity: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    dtype: torch.dtype,
    *,
    from_means: bool,
    has_drift: bool,
) -> Tensor:
    """`g (alpha noise + beta (v - v_old) + gamma (v - v_ref))` in `dtype`, contiguous."""
    scaled = (coefs * grad_loss).view(3, -1, *([1] * (noise.ndim - 1)))
    grad = torch.empty(noise.shape, dtype=dtype, device=noise.device)
    if not (from_means or has_drift or ref is not None):
        return torch.mul(noise, scaled[0], out=grad)
    acc = grad if dtype == scaled.dtype else torch.empty(noise.shape, dtype=scaled.dtype, device=noise.device)
    if from_means:
        assert old is not None
        torch.sub(noise, old, out=acc)
        acc *= scaled[0]
    else:
        torch.mul(noise, scaled[0], out=acc)
    if has_drift:
        assert velocity is not None
        assert old is not None
        acc += scaled[1] * (velocity.to(acc.dtype) - old.to(acc.dtype))
    if ref is not None:
        assert velocity is not None
        acc += scaled[2] * (velocity.to(acc.dtype) - ref.to(acc.dtype))
    return grad if acc is grad else grad.copy_(acc)


def sde_step(
    latents: Tensor,
    velocity: Tensor,
    seeds: Tensor | None,
    latents_coef: Tensor,
    velocity_coef: Tensor,
    std: Tensor,
    noise_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Next latents in the dtype of `latents`, and the noise in `noise_dtype` (empty without seeds), contiguous."""
    shape = (-1, *([1] * (latents.ndim - 1)))
    dtype = torch.promote_types(compute_dtype(latents.dtype), std.dtype)
    mean = latents_coef.view(shape) * latents.to(dtype) + velocity_coef.view(shape) * velocity.to(dtype)
    if seeds is None:
        return mean.to(latents.dtype).contiguous(), latents.new_empty((0,), dtype=noise_dtype)
    noise = philox_normal(seeds, latents[0].numel()).view(latents.shape).to(noise_dtype)
    return (mean + std.view(shape) * noise.to(dtype)).to(latents.dtype).contiguous(), noise


def philox_normal(seeds: Tensor, n_elements: int) -> Tensor:
    """Standard normals (B, n_elements) float32: the stream of the kernel, up to rounding.

    Philox4x32-10 (Salmon et al., 2011) keyed by a 64-bit seed per sample; counter i gives elements 4 i to 4 i + 3
    by Box-Muller.
    int64 arithmetic wraps, and the masks cut out the 32-bit words.
    """
    word = 0xFFFFFFFF
    key0, key1 = (seeds & word)[:, None], ((seeds >> 32) & word)[:, None]
    c0 = torch.arange(-(-n_elements // 4), device=seeds.device).expand(len(seeds), -1)
    c1 = c2 = c3 = torch.zeros_like(c0)
    for _ in range(10):
        product0, product2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((product2 >> 32) & word) ^ c1 ^ key0, product2 & word
        c2, c3 = ((product0 >> 32) & word) ^ c3 ^ key1, product0 & word
        key0, key1 = (key0 + 0x9E3779B9) & word, (key1 + 0xBB67AE85) & word

    pairs = [*_box_muller(c0, c1), *_box_muller(c2, c3)]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :n_elements].contiguous()


def _box_muller(radius_bits: Tensor, angle_bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two random 32-bit words, as the kernel makes them: quadrant and offset within it."""
    radius = torch.sqrt(-2 * torch.log((radius_bits.to(torch.float32) + 1) * 2.0**-32))
    quadrant, rest = angle_bits >> 30, angle_bits << 2 & 0xFFFFFFFF
    offset = (rest - ((rest & 0x80000000) << 1)).to(torch.float32) * (math.pi / 4 * 2.0**-31)
    sin, cos = torch.sin(offset), torch.cos(offset)
    turned = quadrant & 1 == 1
    first = torch.where(turned, sin, cos) * (1 - (quadrant + 1 & 2))
    second = torch.where(turned, cos, sin) * (1 - (quadrant & 2))
    return radius * first, radius * second
