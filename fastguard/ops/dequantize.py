"""Frozen weights in 8 or 4 bits, written out for a matmul.

Codes and scales are those of torchao (8 bits) and bitsandbytes (4 bits; QLoRA, arXiv 2305.14314, section 3). A weight
is multiplied in float32 and rounded once, to the dtype of the matmul.

`again` tells the call of a backward pass from that of its forward pass: torch.compile would make one of two equal
calls, and save the dequantized weight for backward.

Axes: N output channel, C input channel, G block of weights that share a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.registry import operator


@operator(triton="dequantize")
def dequantize_rows(scale: Tensor, codes: Tensor, dtype: torch.dtype, again: bool) -> Tensor:
    """`scale codes`, (N, C) in `dtype`: scale (N,) float32; codes (N, C) int8, or uint8 with the bits of float8 e4m3fn.

    Both contiguous.
    """
    numbers = codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes
    return (numbers.to(torch.float32) * scale[:, None]).to(dtype)


@operator(triton="dequantize")
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
    """`absmax[g] table[code]`, (N, C) in `dtype`, of G = n_blocks blocks that divide the weight, row by row.

    codes (N, C / 2) uint8: two in a byte, the first one in its high bits. table (16,) float32. absmax (G,) float32, or
    in 8 bits: `absmax[g // n_nested] absmax_table[absmax_codes[g]] + absmax_offset` with absmax_codes (G,) uint8,
    absmax_table (256,) and absmax_offset () float32. All contiguous. The size of a block is a power of two.
    """
    largest = absmax
    if absmax_codes is not None and absmax_table is not None and absmax_offset is not None:
        outer = absmax.repeat_interleave(n_nested)[:n_blocks]
        largest = absmax_table[absmax_codes.int()] * outer + absmax_offset
    both = torch.stack([codes >> 4, codes & 15], dim=-1).int()
    values = table[both].view(n_blocks, -1) * largest[:, None]
    return values.view(codes.shape[0], -1).to(dtype)
