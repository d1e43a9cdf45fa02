"""One stochastic denoising step: noise, mean and next latents in one pass.

Axes: B sample; D elements of one sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.common import LAUNCH, as_rows, cdiv, entry_stride, launch


@triton.jit
def _box_muller(radius_bits, angle_bits):
    """Two standard normals from two random uint32.

    The radius takes u in (0, 1], so it reaches 6.66. The two high bits of the angle pick a quadrant, the rest an
    offset within +-pi/4 around its axis, where short Taylor series are exact to float32: the library's sin and cos
    carry a reduction for huge arguments that needs stack memory. The step waits for its arithmetic, not for memory, so
    logarithm and quadrant take as few instructions as they can.
    """
    radius = tl.sqrt(_minus_two_log(radius_bits.to(tl.float32) + 1.0))
    x = (angle_bits << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198167899e-10  # pi / 4 / 2^31
    z = x * x
    sin = x * (1.0 + z * (-1.0 / 6 + z * (1.0 / 120 + z * (-1.0 / 5040 + z * (1.0 / 362880)))))
    cos = 1.0 + z * (-1.0 / 2 + z * (1.0 / 24 + z * (-1.0 / 720 + z * (1.0 / 40320 + z * (-1.0 / 3628800)))))
    turned = (angle_bits & 0x40000000) != 0
    first = _with_sign(tl.where(turned, sin, cos), angle_bits ^ (angle_bits << 1))
    second = _with_sign(tl.where(turned, cos, sin), angle_bits)
    return radius * first, radius * second


@triton.jit
def _minus_two_log(number):
    """`-2 ln(number / 2^32)` of a float32 in [1, 2^32], to 1.5e-7 of it where products and sums are contracted.

    number = 2^k (1 + t) with t in [-1/3, 1/3), and -2 ln(1 + t) = t (t p(t) - 2), with the polynomial p whose largest
    relative error is least (fitted to the series). The library's logarithm branches for 0, infinity and denormals.
    """
    bits = number.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # less the bits of 2/3
    t = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = t * -0.28748124837875366 + 0.3074503540992737
    p = t * p - 0.27841880917549133
    p = t * p + 0.32838794589042664
    p = t * p - 0.4003211557865143
    p = t * p + 0.5001519322395325
    p = t * p - 0.6666621565818787
    p = t * p + 0.9999988079071045
    # 2 ln 2, a power of two times the same float32 twice: at u = 1 they cancel.
    return exponent.to(tl.float32) * (-1.3862943611198906 * 2**-23) + 32 * 1.3862943611198906 + t * (t * p - 2.0)


@triton.jit
def _with_sign(x, bits):
    """x, or -x where the highest bit is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (bits & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _sde_step_kernel(
    latents_ptr,
    velocity_ptr,
    seeds_ptr,
    given_ptr,
    latents_coef_ptr,
    velocity_coef_ptr,
    std_ptr,
    next_ptr,
    noise_ptr,
    stride_latents,
    stride_velocity,
    stride_given,
    stride_step,
    n_elements,
    n_blocks,
    HAS_NOISE: tl.constexpr,
    IS_GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`x' = A x + B v + s eps`, with eps rounded to its storage dtype before use (bf16: 8 bytes an element).

    Element e of a sample takes word `e % 4` of Philox4x32-10 at counter `e // 4`, keyed by the sample's 64-bit seed:
    the noise depends on nothing else. Or eps is given. next, noise: (B, D), contiguous.
    """
    pid = tl.program_id(0)
    sample = (pid // n_blocks).to(tl.int64)
    block = pid % n_blocks
    start = block.to(tl.int64) * BLOCK
    lanes = tl.arange(0, BLOCK)
    mask = lanes < n_elements - start

    latents = tl.load(latents_ptr + sample * stride_latents + start + lanes, mask, other=0.0).to(tl.float32)
    velocity = tl.load(velocity_ptr + sample * stride_velocity + start + lanes, mask, other=0.0).to(tl.float32)
    result = tl.load(latents_coef_ptr + sample * stride_step) * latents
    result += tl.load(velocity_coef_ptr + sample * stride_step) * velocity
    if HAS_NOISE:
        if IS_GIVEN:
            noise = tl.load(given_ptr + sample * stride_given + start + lanes, mask, other=0.0).to(tl.float32)
        else:
            counter = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            bits0, bits1, bits2, bits3 = tl.randint4x(tl.load(seeds_ptr + sample), counter)
            n0, n1 = _box_muller(bits0, bits1)
            n2, n3 = _box_muller(bits2, bits3)
            # join puts its operands last: (n0, n2), (n1, n3) interleave to n0, n1, n2, n3 along the elements.
            noise = tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))
        noise = noise.to(noise_ptr.dtype.element_ty)
        tl.store(noise_ptr + sample * n_elements + start + lanes, noise, mask)
        result += tl.load(std_ptr + sample * stride_step) * noise.to(tl.float32)
    tl.store(next_ptr + sample * n_elements + start + lanes, result.to(next_ptr.dtype.element_ty), mask)


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
    """Next latents in the dtype of `latents`, and the noise in `noise_dtype`, in one launch.

    latents, velocity: (B, ...) bf16/fp16/fp32. seeds: (B,) int64, or given: the noise (B, ...). Without both the noise
    is empty. Coefficients: (B,) or (1,) float32, all of one stride.
    """
    has_noise = seeds is not None or given is not None
    next_latents = torch.empty(latents.shape, dtype=latents.dtype, device=latents.device)
    noise = torch.empty(latents.shape if has_noise else (0,), dtype=noise_dtype, device=latents.device)
    latents, stride_latents = as_rows(latents)
    velocity, stride_velocity = as_rows(velocity)
    given, stride_given = (None, 0) if given is None else as_rows(given)
    n_samples = latents.shape[0]
    n_elements = latents.numel() // n_samples
    n_blocks = cdiv(n_elements, LAUNCH.block)
    launch(
        _sde_step_kernel,
        n_samples * n_blocks,
        (latents, velocity, seeds, given, latents_coef, velocity_coef, std, next_latents, noise),
        (stride_latents, stride_velocity, stride_given, entry_stride(std), n_elements, n_blocks),
        HAS_NOISE=has_noise, IS_GIVEN=given is not None, BLOCK=LAUNCH.block, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return next_latents, noise
