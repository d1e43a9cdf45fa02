"""The gradient of a weight over the rows of an input that are not evenly spaced, such as a stream's part of attention.

Axes: B sample, S token, C input channel, N output channel.
"""

from __future__ import annotations

from torch import Tensor

from fastguard.ops.registry import operator


def _over_rows(grad: Tensor, n: Tensor) -> Tensor:
    return grad.T @ n.reshape(-1, n.shape[-1])


@operator(triton=_over_rows)
def over_spaced_rows(grad: Tensor, n: Tensor) -> Tensor:
    """`grad^T n`, (N, C), over the rows of grad (B S, N) and n (B, S, C); cuBLAS multiplies with either backend.

    An operator, since torch.compile would keep the forward's copy of the rows until backward, beside n.
    """
    return _over_rows(grad, n)
