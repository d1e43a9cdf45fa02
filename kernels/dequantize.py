"""Frozen weights in 8 or 4 bits, written out for a matmul.

Axes: N output channel, C input channel, G block of weights that share a scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.common import LAUNCH, cdiv, launch

BLOCK_C = 1024
BLOCK_N = LAUNCH.block // BLOCK_C
"""Rows and channels of a program for weights with a scale per row; the channels of a warp lie side by side."""


@triton.jit
def _float8(bits):
    """The value of an e4m3fn number (without NaN) from its bits, uint8; GPUs before capability 8.9 lack the conversion.

    Its exponent and mantissa stand where float16 has them, whose exponent has a bias of 15 in place of 7.
    """
    wide = bits.to(tl.uint16)
    half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _dequantize_rows_kernel(
    scale_ptr,
    codes_ptr,
    out_ptr,
    n_rows,
    n_channels,
    n_tiles,
    IS_FLOAT8: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`out = scale codes` in float32: scale (N,) float32; codes (N, C) int8, or uint8 that holds e4m3fn; out (N, C).

    Bytes per element: codes read, out written (bf16: 3).
    """
    pid = tl.program_id(0)
    rows = (pid // n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = (pid % n_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (rows < n_rows)[:, None] & (channels < n_channels)[None, :]
    offsets = rows.to(tl.int64)[:, None] * n_channels + channels[None, :]
    codes = tl.load(codes_ptr + offsets, mask, other=0)
    value = _float8(codes) if IS_FLOAT8 else codes.to(tl.float32)
    value *= tl.load(scale_ptr + rows, rows < n_rows, other=0.0)[:, None]
    tl.store(out_ptr + offsets, value.to(out_ptr.dtype.element_ty), mask)


def dequantize_rows(scale: Tensor, codes: Tensor, dtype: torch.dtype, again: bool) -> Tensor:
    """`scale codes`, (N, C) in `dtype`: scale (N,) float32; codes (N, C) int8, or uint8 with the bits of float8 e4m3fn.

    Both contiguous. One launch; `again` changes nothing.
    """
    n_rows, n_channels = codes.shape
    out = torch.empty((n_rows, n_channels), dtype=dtype, device=codes.device)
    n_tiles = cdiv(n_channels, BLOCK_C)
    launch(
        _dequantize_rows_kernel,
        cdiv(n_rows, BLOCK_N) * n_tiles,
        (scale, codes, out),
        (n_rows, n_channels, n_tiles),
        IS_FLOAT8=codes.dtype == torch.uint8,
        BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return out


@triton.jit
def _dequantize_blocks_kernel(
    absmax_ptr,
    codes_ptr,
    table_ptr,
    absmax_codes_ptr,
    absmax_table_ptr,
    absmax_offset_ptr,
    out_ptr,
    n_blocks,
    n_nested,
    NESTED: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`out = absmax[g] table[code]` in float32, two codes in a byte, the first one in its high bits.

    Bytes per element: codes read, out written (bf16: 2.5). codes (G, HALF_BLOCK) uint8; out (G, 2 HALF_BLOCK).
    NESTED: `absmax[g] = absmax_ptr[g / n_nested] absmax_table[absmax_codes[g]] + absmax_offset`. The tables, of 16 and
    256 numbers, stay in the L1 cache.
    """
    blocks = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = blocks < n_blocks
    offsets = blocks[:, None] * HALF_BLOCK + tl.arange(0, HALF_BLOCK)[None, :]
    codes = tl.load(codes_ptr + offsets, there[:, None], other=0)
    if NESTED:
        absmax = tl.load(absmax_table_ptr + tl.load(absmax_codes_ptr + blocks, there, other=0).to(tl.int32))
        absmax = absmax * tl.load(absmax_ptr + blocks // n_nested, there, other=0.0) + tl.load(absmax_offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + blocks, there, other=0.0)
    first = tl.load(table_ptr + (codes >> 4).to(tl.int32)) * absmax[:, None]
    second = tl.load(table_ptr + (codes & 15).to(tl.int32)) * absmax[:, None]
    value = tl.interleave(first.to(out_ptr.dtype.element_ty), second.to(out_ptr.dtype.element_ty))
    out_offsets = blocks[:, None] * (2 * HALF_BLOCK) + tl.arange(0, 2 * HALF_BLOCK)[None, :]
    tl.store(out_ptr + out_offsets, value, there[:, None])


def dequantize_blocks(
    absmax: Tensor,
    codes: Tensor,
    table: Tensor,
    absmax_codes: Tensor | None,
    absmax_table: Tensor | None,
    absmax_offset: Tensor | None,
    n_blocks: int,
    n_nested: int,
    dtype: torch.dtype,
    again: bool,
) -> Tensor:
    """`absmax[g] table[code]` of G = n_blocks equal blocks, (N, C) in `dtype`; see the operator. One launch.

    All contiguous. The size of a block is a power of two.
    """
    n_rows, half_channels = codes.shape
    out = torch.empty((n_rows, 2 * half_channels), dtype=dtype, device=codes.device)
    half_block = codes.numel() // n_blocks
    launch(
        _dequantize_blocks_kernel,
        cdiv(n_blocks, blocks := max(1, LAUNCH.block // half_block)),
        (absmax, codes, table, absmax_codes, absmax_table, absmax_offset, out),
        (n_blocks, n_nested),
        NESTED=absmax_codes is not None, HALF_BLOCK=half_block, BLOCKS=blocks, num_warps=LAUNCH.num_warps,
    )  # fmt: skip
    return out
