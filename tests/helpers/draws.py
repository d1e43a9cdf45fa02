"""The kernel of a rollout step's noise, from random bits of one's own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.sde_step import _box_muller, _minus_two_log


@triton.jit
def _draw_kernel(radius_ptr, angle_ptr, log_ptr, first_ptr, second_ptr, n, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < n
    radius = tl.load(radius_ptr + lanes, mask, other=0).to(tl.uint32, bitcast=True)
    angle = tl.load(angle_ptr + lanes, mask, other=0).to(tl.uint32, bitcast=True)
    first, second = _box_muller(radius, angle)
    tl.store(log_ptr + lanes, _minus_two_log(radius.to(tl.float32) + 1.0), mask)
    tl.store(first_ptr + lanes, first, mask)
    tl.store(second_ptr + lanes, second, mask)


def draw(radius_bits: Tensor, angle_bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`-2 ln u` and the two normals, float32, of 32-bit words (N,) int64."""
    words = [bits.to(torch.int32) for bits in (radius_bits, angle_bits)]  # keeps the low 32 bits
    results = [torch.empty(len(radius_bits), device=radius_bits.device) for _ in range(3)]
    _draw_kernel[(-(-len(radius_bits) // 1024),)](*words, *results, len(radius_bits), BLOCK=1024)
    return results[0], results[1], results[2]
