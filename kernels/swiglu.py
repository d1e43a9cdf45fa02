"""The gate of a SwiGLU feed-forward, written beside what the next layer reads with it.

Axes: B sample; S token; F channel of each half of x; P channel of the prefix.
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
def _sigmoid(z):
    """`s = sigmoid(z)` and `s (1 - s)`."""
    return logistic(z, tl.exp2(tl.abs(z) * -1.4426950408889634))


@triton.jit
def _swiglu_fwd_kernel(
    x_ptr,
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
    HAS_PREFIX: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`out = [prefix, a sigmoid(a) b]` in float32: x = [a, b] (B, S, 2 F), prefix (B, S, P), out (B, S, P + F).

    Bytes per element of out: a and b, or prefix, read, and out written (bf16: 6, or 4). out is contiguous.
    """
    n_prefix_tiles = tl.cdiv(n_prefix, BLOCK_C)
    n_tiles = n_prefix_tiles + tl.cdiv(n_channels, BLOCK_C)
    sample, _, start, stop, tile = tile_of_program(n_tokens, n_chunks, n_tiles, tokens_per_program)
    is_gated = tile >= n_prefix_tiles
    source_ptr = x_ptr + sample * stride_x_sample
    stride_token = tl.cast(stride_x_token, tl.int64)
    if HAS_PREFIX:
        source_ptr = tl.where(is_gated, source_ptr, prefix_ptr + sample * stride_prefix_sample)
        stride_token = tl.where(is_gated, stride_token, stride_prefix_token)
    width = tl.where(is_gated, n_channels, n_prefix)
    channels = tl.where(is_gated, tile - n_prefix_tiles, tile) * BLOCK_C + tl.arange(0, BLOCK_C)
    n_row = n_prefix + n_channels
    out_ptr += sample * n_tokens * n_row + tl.where(is_gated, n_prefix, 0)
    for first in range(start, stop, BLOCK_S):
        tokens = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        mask = (tokens < stop) & (channels < width)[None, :]
        offsets = tokens * stride_token + channels[None, :]
        value = tl.load(source_ptr + offsets, mask, other=0.0).to(tl.float32)
        if is_gated:
            s, _product = _sigmoid(value)
            value *= s * tl.load(source_ptr + n_channels + offsets, mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + tokens * n_row + channels[None, :], value.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _swiglu_bwd_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    stride_x_sample,
    stride_x_token,
    n_tokens,
    n_chunks,
    n_channels,
    tokens_per_program,
    NEED_OUTPUT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`da = g b (s + a s (1 - s))`, `db = g a s` for `s = sigmoid(a)`; with NEED_OUTPUT `grad <- a s b`; in float32.

    Bytes per element of grad: grad, a and b read, da and db written, with NEED_OUTPUT grad written (bf16: 10 or 12).
    grad (B, S, F), contiguous; x = [a, b] (B, S, 2 F); grad_x = [da, db] (B, S, 2 F) is contiguous.
    """
    n_tiles = tl.cdiv(n_channels, BLOCK_C)
    sample, _, start, stop, tile = tile_of_program(n_tokens, n_chunks, n_tiles, tokens_per_program)
    channels = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += sample * stride_x_sample
    grad_ptr += sample * n_tokens * n_channels
    grad_x_ptr += sample * n_tokens * n_channels * 2
    for first in range(start, stop, BLOCK_S):
        tokens = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        mask = (tokens < stop) & (channels < n_channels)[None, :]
        offsets, of_x = tokens * n_channels + channels[None, :], tokens * stride_x_token + channels[None, :]
        a = tl.load(x_ptr + of_x, mask, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + n_channels + of_x, mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + offsets, mask, other=0.0).to(tl.float32)
        s, product = _sigmoid(a)
        of_grad_x = tokens * (2 * n_channels) + channels[None, :]
        grad_a, grad_b = grad * b * (s + a * product), grad * (a * s)
        tl.store(grad_x_ptr + of_grad_x, grad_a.to(grad_x_ptr.dtype.element_ty), mask)
        tl.store(grad_x_ptr + n_channels + of_grad_x, grad_b.to(grad_x_ptr.dtype.element_ty), mask)
        if NEED_OUTPUT:
            tl.store(grad_ptr + offsets, (a * (s * b)).to(grad_ptr.dtype.element_ty), mask)


def swiglu_fwd(x: Tensor, prefix: Tensor | None) -> Tensor:
    """`[prefix, silu(a) b]`, (B, S, P + F) in x's dtype, contiguous, in one launch.

    x = [a, b]: (B, S, 2 F). prefix: (B, S, P) or None.
    """
    n_samples, n_tokens, n_channels = x.shape[0], x.shape[1], x.shape[2] // 2
    n_prefix = 0 if prefix is None else prefix.shape[-1]
    out = torch.empty((n_samples, n_tokens, n_prefix + n_channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x = unit_stride(x)
    prefix = unit_stride(prefix.to(x.dtype)) if prefix is not None and n_prefix > 0 else None
    stride_prefix = (0, 0) if prefix is None else prefix.stride()[:2]
    tokens = tokens_per_program(n_tokens)
    n_chunks = cdiv(n_tokens, tokens)
    n_tiles = cdiv(n_channels, BLOCK_C) + cdiv(n_prefix, BLOCK_C)
    launch(
        _swiglu_fwd_kernel,
        n_samples * n_chunks * n_tiles,
        (x, prefix, out),
        (x.stride(0), x.stride(1), *stride_prefix, n_tokens, n_chunks, n_channels, n_prefix, tokens),
        HAS_PREFIX=prefix is not None, BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return out


def swiglu_bwd_(grad: Tensor, x: Tensor, need_output: bool) -> Tensor:
    """The gradient of x, (B, S, 2 F) in x's dtype; grad is overwritten with `silu(a) b` if that is needed.

    grad: (B, S, F), contiguous. x = [a, b]: (B, S, 2 F). One launch.
    """
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad.numel() == 0:
        return grad_x
    x = unit_stride(x)
    n_samples, n_tokens, n_channels = grad.shape
    tokens = tokens_per_program(n_tokens)
    n_chunks = cdiv(n_tokens, tokens)
    launch(
        _swiglu_bwd_kernel,
        n_samples * n_chunks * cdiv(n_channels, BLOCK_C),
        (grad, x, grad_x),
        (x.stride(0), x.stride(1), n_tokens, n_chunks, n_channels, tokens),
        NEED_OUTPUT=need_output, BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return grad_x
