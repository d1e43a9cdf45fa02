"""tanh-GELU of a linear layer's output plus its bias, written beside what the next layer reads with it.

Axes: B sample; S token; C channel; P channel of the prefix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.common import (
    BLOCK_C,
    BLOCK_S,
    LAUNCH,
    cdiv,
    launch,
    logistic,
    tile_of_program,
    tokens_per_program,
    unit_stride,
)


@triton.jit
def _gate_and_square(z):
    """`s = (1 + tanh(u)) / 2 = sigmoid(2 u)` with `u = sqrt(2 / pi) (z + 0.044715 z^3)`; `s (1 - s)`; z^2 up to 144.

    At |z| = 12 the exponential of -|2 u| is 0 in float32: held there, z^2 and z^3 stay in range for every z of the
    storage dtype. A NaN comes back through z, as a factor.
    """
    size = tl.minimum(tl.abs(z), 12.0)
    square = size * size
    # 2 sqrt(2 / pi) / ln(2), and the same times 0.044715.
    power = tl.exp2(-size * (2.302208198144325 + 0.1029432395800235 * square))
    gate, product = logistic(z, power)
    return gate, product, square


@triton.jit
def _bias_gelu_fwd_kernel(
    x_ptr,
    bias_ptr,
    prefix_ptr,
    out_ptr,
    stride_x_sample,
    stride_x_token,
    stride_prefix_sample,
    stride_prefix_token,
    n_tokens,
    n_chunks,
    n_channels,
    n_prefix,
    tokens_per_program,
    HAS_BIAS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`out = [prefix, gelu(x + bias)]` in float32: x (B, S, C), bias (C,), prefix (B, S, P), out (B, S, P + C).

    Bytes per element: x or prefix read, out written (bf16: 4); the bias is read once per program. out is contiguous.
    """
    n_prefix_tiles = tl.cdiv(n_prefix, BLOCK_C)
    n_tiles = n_prefix_tiles + tl.cdiv(n_channels, BLOCK_C)
    sample, _, start, stop, tile = tile_of_program(n_tokens, n_chunks, n_tiles, tokens_per_program)
    is_gelu = tile >= n_prefix_tiles
    source_ptr = x_ptr + sample * stride_x_sample
    stride_token = tl.cast(stride_x_token, tl.int64)
    if HAS_PREFIX:
        source_ptr = tl.where(is_gelu, source_ptr, prefix_ptr + sample * stride_prefix_sample)
        stride_token = tl.where(is_gelu, stride_token, stride_prefix_token)
    width = tl.where(is_gelu, n_channels, n_prefix)
    channels = tl.where(is_gelu, tile - n_prefix_tiles, tile) * BLOCK_C + tl.arange(0, BLOCK_C)
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, (channels < n_channels) & is_gelu, other=0.0).to(tl.float32)
    n_row = n_prefix + n_channels
    out_ptr += sample * n_tokens * n_row + tl.where(is_gelu, n_prefix, 0)
    for first in range(start, stop, BLOCK_S):
        tokens = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        mask = (tokens < stop) & (channels < width)[None, :]
        value = tl.load(source_ptr + tokens * stride_token + channels[None, :], mask, other=0.0).to(tl.float32)
        if is_gelu:
            value += bias[None, :]
            gate, _product, _square = _gate_and_square(value)
            value *= gate
        tl.store(out_ptr + tokens * n_row + channels[None, :], value.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    grad_ptr,
    x_ptr,
    bias_ptr,
    output_ptr,
    stride_x_sample,
    stride_x_token,
    n_tokens,
    n_chunks,
    n_channels,
    tokens_per_program,
    HAS_BIAS: tl.constexpr,
    NEED_OUTPUT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`grad <- grad gelu'(z)`, `gelu'(z) = s + z s (1 - s) (2 u)'` for `z = x + bias` and s, u as above, in float32.

    Bytes per element: grad read and written, x read, with NEED_OUTPUT gelu(z) written (bf16: 6 or 8). grad (B, S, C),
    contiguous, is overwritten; x (B, S, C); bias (C,), read once per program; output (B, S, C) is contiguous.
    """
    n_tiles = tl.cdiv(n_channels, BLOCK_C)
    sample, _, start, stop, tile = tile_of_program(n_tokens, n_chunks, n_tiles, tokens_per_program)
    channels = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < n_channels
    bias = tl.zeros((BLOCK_C,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channels, channel_mask, other=0.0).to(tl.float32)
    x_ptr += sample * stride_x_sample
    grad_ptr += sample * n_tokens * n_channels
    if NEED_OUTPUT:
        output_ptr += sample * n_tokens * n_channels
    for first in range(start, stop, BLOCK_S):
        tokens = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        mask = (tokens < stop) & channel_mask[None, :]
        offsets = tokens * n_channels + channels[None, :]
        x = tl.load(x_ptr + tokens * stride_x_token + channels[None, :], mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask, other=0.0).to(tl.float32)
        z = x + bias[None, :]
        gate, product, square = _gate_and_square(z)
        slope = gate + z * product * (1.5957691216057308 + 0.21406444881780075 * square)
        tl.store(grad_ptr + offsets, (grad * slope).to(grad_ptr.dtype.element_ty), mask)
        if NEED_OUTPUT:
            tl.store(output_ptr + offsets, (z * gate).to(output_ptr.dtype.element_ty), mask)


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, prefix: Tensor | None) -> Tensor:
    """`[prefix, gelu(x + bias)]`, (B, S, P + C) in x's dtype, contiguous, in one launch.

    x: (B, S, C). bias: (C,) or None. prefix: (B, S, P) or None.
    """
    n_samples, n_tokens, n_channels = x.shape
    n_prefix = 0 if prefix is None else prefix.shape[-1]
    out = torch.empty((n_samples, n_tokens, n_prefix + n_channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = unit_stride(x)
    bias = None if bias is None else unit_stride(bias)
    prefix = unit_stride(prefix.to(x.dtype)) if prefix is not None and n_prefix > 0 else None
    stride_prefix = (0, 0) if prefix is None else prefix.stride()[:2]
    tokens = tokens_per_program(n_tokens)
    n_chunks = cdiv(n_tokens, tokens)
    n_tiles = cdiv(n_channels, BLOCK_C) + cdiv(n_prefix, BLOCK_C)
    launch(
        _bias_gelu_fwd_kernel,
        n_samples * n_chunks * n_tiles,
        (x, bias, prefix, out),
        (x.stride(0), x.stride(1), *stride_prefix, n_tokens, n_chunks, n_channels, n_prefix, tokens),
        HAS_BIAS=bias is not None, HAS_PREFIX=prefix is not None,
        BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return out


def bias_gelu_bwd_(grad: Tensor, x: Tensor, bias: Tensor | None, need_output: bool) -> Tensor:
    """Overwrite grad with the gradient of x; return `gelu(x + bias)` as the forward gave it, or (0,) if not needed.

    grad: (B, S, C), contiguous. x: (B, S, C). bias: (C,) or None. The output has x's dtype. One launch.
    """
    output = torch.empty(x.shape if need_output else (0,), dtype=x.dtype, device=x.device)
    if grad.numel() == 0:
        return output
    x = unit_stride(x)
    bias = None if bias is None else unit_stride(bias)
    n_samples, n_tokens, n_channels = x.shape
    tokens = tokens_per_program(n_tokens)
    n_chunks = cdiv(n_tokens, tokens)
    launch(
        _bias_gelu_bwd_kernel,
        n_samples * n_chunks * cdiv(n_channels, BLOCK_C),
        (grad, x, bias, output),
        (x.stride(0), x.stride(1), n_tokens, n_chunks, n_channels, tokens),
        HAS_BIAS=bias is not None, NEED_OUTPUT=need_output,
        BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return output
