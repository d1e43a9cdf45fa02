"""A residual branch joined through a gate per channel, and its gradients.

Axes: B sample; S token; C channel; P programs (partial sums) per sample and channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.column_sums import column_sums
from fastguard.kernels.common import (
    BLOCK_C,
    BLOCK_S,
    LAUNCH,
    cdiv,
    launch,
    tile_of_program,
    tokens_per_program,
    unit_stride,
)


@triton.jit
def _gated_residual_fwd_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    out_ptr,
    stride_x_sample,
    stride_x_token,
    stride_y_sample,
    stride_y_token,
    stride_gate,
    n_tokens,
    n_chunks,
    n_channels,
    tokens_per_program,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`out = x + gate y` in float32: x, y, out (B, S, C); gate (B, C), read once per program.

    Bytes per element: x and y read, out written (bf16: 6). out is contiguous.
    """
    n_tiles = tl.cdiv(n_channels, BLOCK_C)
    sample, _, start, stop, tile = tile_of_program(n_tokens, n_chunks, n_tiles, tokens_per_program)
    channels = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < n_channels
    gate = tl.load(gate_ptr + sample * stride_gate + channels, channel_mask, other=0.0).to(tl.float32)
    x_ptr += sample * stride_x_sample
    y_ptr += sample * stride_y_sample
    out_ptr += sample * n_tokens * n_channels
    for first in range(start, stop, BLOCK_S):
        tokens = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        mask = (tokens < stop) & channel_mask[None, :]
        x = tl.load(x_ptr + tokens * stride_x_token + channels[None, :], mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + tokens * stride_y_token + channels[None, :], mask, other=0.0).to(tl.float32)
        out = x + gate[None, :] * y
        tl.store(out_ptr + tokens * n_channels + channels[None, :], out.to(out_ptr.dtype.element_ty), mask)


@triton.jit
def _gated_residual_bwd_kernel(
    grad_ptr,
    y_ptr,
    gate_ptr,
    grad_y_ptr,
    partials_ptr,
    stride_grad_sample,
    stride_grad_token,
    stride_y_sample,
    stride_y_token,
    stride_gate,
    n_tokens,
    n_chunks,
    n_channels,
    tokens_per_program,
    HAS_Y: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`grad_y = gate grad`; with HAS_Y also each program's share of `grad_gate = sum over tokens of grad y`.

    Bytes per element: grad read, grad_y written, y read if it is there (bf16: 4 or 6). Sums in float32; grad, y, grad_y
    (B, S, C); gate (B, C); partials (B, P, C) float32, one row per chunk of tokens. grad_y is contiguous.
    """
    n_tiles = tl.cdiv(n_channels, BLOCK_C)
    sample, chunk, start, stop, tile = tile_of_program(n_tokens, n_chunks, n_tiles, tokens_per_program)
    channels = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    channel_mask = channels < n_channels
    gate = tl.load(gate_ptr + sample * stride_gate + channels, channel_mask, other=0.0).to(tl.float32)
    grad_ptr += sample * stride_grad_sample
    grad_y_ptr += sample * n_tokens * n_channels
    if HAS_Y:
        y_ptr += sample * stride_y_sample
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(start, stop, BLOCK_S):
        tokens = (first + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None]
        mask = (tokens < stop) & channel_mask[None, :]
        grad = tl.load(grad_ptr + tokens * stride_grad_token + channels[None, :], mask, other=0.0).to(tl.float32)
        if HAS_Y:
            y = tl.load(y_ptr + tokens * stride_y_token + channels[None, :], mask, other=0.0).to(tl.float32)
            total += grad * y
        grad_y = (gate[None, :] * grad).to(grad_y_ptr.dtype.element_ty)
        tl.store(grad_y_ptr + tokens * n_channels + channels[None, :], grad_y, mask)
    if HAS_Y:
        row = sample * n_chunks + chunk
        tl.store(partials_ptr + row * n_channels + channels, tl.sum(total, axis=0), channel_mask)


def gated_residual_fwd(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate y` in x's dtype, contiguous, in one launch: x, y (B, S, C); gate (B, C)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, y, gate = unit_stride(x), unit_stride(y), unit_stride(gate)
    n_samples, n_tokens, n_channels = x.shape
    tokens = tokens_per_program(n_tokens)
    n_chunks = cdiv(n_tokens, tokens)
    launch(
        _gated_residual_fwd_kernel,
        n_samples * n_chunks * cdiv(n_channels, BLOCK_C),
        (x, y, gate, out),
        (x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0), n_tokens, n_chunks, n_channels, tokens),
        BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return out


def gated_residual_bwd(grad: Tensor, y: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y, in grad's dtype and contiguous, and of the gate, (B, C) float32: empty (0,) without y.

    One launch, and one over the partial sums of each sample. The gradient of x is `grad` itself.
    """
    n_samples, n_tokens, n_channels = grad.shape
    tokens = tokens_per_program(n_tokens)
    n_chunks = cdiv(n_tokens, tokens)
    grad_y = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    shape = (0,) if y is None else (n_samples, n_chunks, n_channels)
    partials = torch.empty(shape, dtype=torch.float32, device=grad.device)
    if grad.numel() > 0:
        grad, gate = unit_stride(grad), unit_stride(gate)
        y = None if y is None else unit_stride(y)
        stride_y = (0, 0) if y is None else y.stride()[:2]
        launch(
            _gated_residual_bwd_kernel,
            n_samples * n_chunks * cdiv(n_channels, BLOCK_C),
            (grad, y, gate, grad_y, partials),
            (grad.stride(0), grad.stride(1), *stride_y, gate.stride(0), n_tokens, n_chunks, n_channels, tokens),
            HAS_Y=y is not None, BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=LAUNCH.num_warps,
        )  # fmt: skip
    if y is None:
        return grad_y, partials
    grad_gate = torch.empty((n_samples, n_channels), dtype=torch.float32, device=grad.device)
    column_sums(partials, [grad_gate])
    return grad_y, grad_gate
