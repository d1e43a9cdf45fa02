"""A product of matrices added to a matrix in its place, for compiled code.

Axes: M row, N column, K inner.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.ops.registry import operator


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    total.addmm_(left, right)


@operator(triton=_add_product_, mutates=("total",))
def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left right`: total (M, N), left (M, K), right (K, N); cuBLAS multiplies with either backend.

    An operator, since torch.compile makes of `addmm_` one that writes to other memory, and copies the total there.
    """
    _add_product_(total, left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`total + left right`, in the place of total."""
    if torch.compiler.is_compiling():
        add_product_(total, left, right, "torch")
        return total
    return total.addmm_(left, right)
