"""Sums over the programs that shared the rows of a sample: the end of a gradient that adds over tokens.

Axes: R sum; P partial sums; K chunks of them; C channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastguard.kernels.common import cdiv, launch

# A program adds 128 partial sums of 32 channels, 128 bytes of each. A thread has four 16-byte accesses in flight, and
# waits for memory once. More partial sums take a second launch.
BLOCK_P = 128
BLOCK_C = 32
NUM_WARPS = 8


@triton.jit
def _column_sums_kernel(
    partials_ptr,
    first_ptr,
    second_ptr,
    third_ptr,
    stride_row,
    stride_partial,
    n_rows,
    n_partials,
    n_chunks,
    n_channels,
    N_RESULTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`result[r, k] = sum over p of chunk k of partials[r, p]`, in float32: partials (N_RESULTS n_rows, P, C) with unit
    stride between channels; results (n_rows, K, C) each, contiguous."""
    n_tiles = tl.cdiv(n_channels, BLOCK_C)
    pid = tl.program_id(0)
    row = pid // n_tiles // n_chunks
    chunk = pid // n_tiles % n_chunks
    channels = pid % n_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = (parts < n_partials)[:, None] & (channels < n_channels)[None, :]
    partials_ptr += row.to(tl.int64) * stride_row
    parts = parts.to(tl.int64)[:, None] * stride_partial
    total = tl.sum(tl.load(partials_ptr + parts + channels[None, :], mask, other=0.0), axis=0)
    result_ptr = first_ptr
    if N_RESULTS > 1:
        result_ptr = tl.where(row >= n_rows, second_ptr, result_ptr)
    if N_RESULTS > 2:
        result_ptr = tl.where(row >= 2 * n_rows, third_ptr, result_ptr)
    place = (row % n_rows).to(tl.int64) * n_chunks + chunk
    tl.store(result_ptr + place * n_channels + channels, total, channels < n_channels)


def column_sums(partials: Tensor, results: Sequence[Tensor]) -> None:
    """Write the sums of partials over P, always in the same order, to 1 to 3 results.

    partials: (R, P, C) float32, of any strides but the last, with R shared out among the results in turn. Results:
    R / len(results) C elements each, float32, contiguous. One launch for each power of 128 in P.
    """
    n_sums, n_partials, n_channels = partials.shape
    if partials.numel() == 0:
        for result in results:
            result.zero_()
        return
    n_chunks = cdiv(n_partials, BLOCK_P)
    targets = results
    if n_chunks > 1:
        chunks = torch.empty((n_sums, n_chunks, n_channels), dtype=torch.float32, device=partials.device)
        targets = [chunks]
    others = (*targets[1:], None, None)[:2]
    launch(
        _column_sums_kernel,
        n_sums * n_chunks * cdiv(n_channels, BLOCK_C),
        (partials, targets[0], *others),
        (*partials.stride()[:2], n_sums // len(targets), n_partials, n_chunks, n_channels),
        N_RESULTS=len(targets), BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
    )  # fmt: skip
    if n_chunks > 1:
        column_sums(chunks, results)
