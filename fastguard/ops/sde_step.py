"""One rollout step: the noise of a seed, and the next latents.

Axes: B sample; all further axes are elements.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastguard.ops.registry import compute_dtype, operator
from fastguard.ops.transition import per_sample, transition_mean
from fastguard.sde import Transition


def naive_sde_step(latents: Tensor, velocity: Tensor, noise: Tensor, step: Transition) -> Tensor:
    """`x' = mu + s eps`, (B, ...)."""
    return transition_mean(latents, velocity, step) + per_sample(step.std, latents) * noise


@operator(triton="sde_step")
def sde_step(
    latents: Tensor,
    velocity: Tensor,
    seeds: Tensor | None,
    given: Tensor | None,
    latents_coef: Tensor,
    velocity_coef: Tensor,
    std: Tensor,
    noise_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`x' = A x + B v + s eps`: next latents in the dtype of `latents` and the noise in `noise_dtype`.

    The noise is that of the seeds, or the given one. Without both `x' = A x + B v`, and the noise is empty.
    """
    shape = (-1, *([1] * (latents.ndim - 1)))
    dtype = torch.promote_types(compute_dtype(latents.dtype), std.dtype)
    mean = latents_coef.view(shape) * latents.to(dtype) + velocity_coef.view(shape) * velocity.to(dtype)
    if given is not None:
        noise = given.to(noise_dtype, copy=True)
    elif seeds is not None:
        noise = philox_normal(seeds, latents[0].numel()).view(latents.shape).to(noise_dtype)
    else:
        return mean.to(latents.dtype), latents.new_empty((0,), dtype=noise_dtype)
    return (mean + std.view(shape) * noise.to(dtype)).to(latents.dtype), noise


def philox_normal(seeds: Tensor, n_elements: int) -> Tensor:
    """Standard normals (B, n_elements) float32: the stream of the kernel, up to rounding.

    Philox4x32-10 (Salmon et al., 2011) keyed by a 64-bit seed per sample; counter i gives elements 4 i to 4 i + 3
    by Box-Muller.
    int64 arithmetic wraps, and the masks cut out the 32-bit words.
    """
    word = 0xFFFFFFFF
    key0, key1 = (seeds & word)[:, None], ((seeds >> 32) & word)[:, None]
    c0 = torch.arange(-(-n_elements // 4), device=seeds.device).expand(seeds.shape[0], -1)
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
