"""What all kernels share: the launch table, and how a tensor is seen as rows of one sample each."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True)
class Launch:
    """Elements per program and iteration, and warps per program."""

    block: int
    num_warps: int


# 8 warps x 32 threads x 16 elements: each thread has two 16-byte accesses of bf16, or four of float32, in flight
# for every tensor that is read. Not autotuned: one table, changed only with a measurement beside it.
LAUNCH = Launch(block=4096, num_warps=8)

# Upper bound on the partial sums of one sample, and so on the programs that share its elements: enough to fill a
# GPU with a single large sample, few enough for one program to add up. It depends on the size of a sample
# alone, so a sample's sums are bitwise the same in every batch (of the same strides and alignment).
MAX_PARTIALS = 1024


def interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors (TRITON_INTERPRET=1 before the first import of triton)."""
    return isinstance(_probe, InterpretedFunction)


@triton.jit
def _probe():
    pass


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """See (B, ...) as B rows of contiguous elements: the tensor and its row stride.

    Any stride between samples is taken as it is; a tensor that is strided within a sample is copied once.
    """
    rows = tensor.reshape(tensor.shape[0], -1)
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        rows = rows.contiguous()
    return rows, rows.stride(0)
