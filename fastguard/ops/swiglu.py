"""The gate of a SwiGLU feed-forward, after a prefix that is not gated.

SwiGLU is that of Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202, Eq. 6), with the two projections side by
side in one layer: x = [a, b] gives `silu(a) b`.

Axes: B sample, S token, F channel of each half of x, P channel of the prefix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastguard.ops.registry import backward_of_blocks, compute_dtype, operator


def swiglu(x: Tensor) -> Tensor:
    """`silu(a) b` with `silu(a) = a sigmoid(a)`: x = [a, b] (..., 2 F); the result is (..., F)."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


@operator(triton="swiglu")
def swiglu_fwd(x: Tensor, prefix: Tensor | None) -> Tensor:
    """`[prefix, silu(a) b]` along the channels: (B, S, P + F)."""
    out = swiglu(x.to(compute_dtype(x.dtype))).to(x.dtype)
    return out if prefix is None else torch.cat([prefix.to(x.dtype), out], dim=-1)


@operator(triton="swiglu", mutates=("grad",))
def swiglu_bwd_(grad: Tensor, x: Tensor, need_output: bool) -> Tensor:
    """The gradient of x, (B, S, 2 F), from that of the result, (B, S, F) and contiguous; the latter becomes
    `silu(a) b` if that is needed."""
    dtype = compute_dtype(x.dtype)
    a, b = x.to(dtype).chunk(2, dim=-1)
    s, g = torch.sigmoid(a), grad.to(dtype)
    grad_x = torch.cat([g * b * (s + a * s * (1 - s)), g * a * s], dim=-1).to(x.dtype)
    if need_output:
        grad.copy_(a * s * b)
    return grad_x


class SwiGLUFunction(torch.autograd.Function):
    """`[prefix, silu(a) b]`; keeps x = [a, b], not the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, prefix: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.n_prefix, ctx.backend = 0 if prefix is None else prefix.shape[-1], backend
        return swiglu_fwd(x, prefix, backend)

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_prefix, grad_out = grad.split_with_sizes([ctx.n_prefix, x.shape[-1] // 2], dim=-1)
        grad_out = grad_out.clone(memory_format=torch.contiguous_format)  # the caller's gradient stays as it is
        return (
            swiglu_bwd_(grad_out, x, False, ctx.backend),
            grad_prefix.contiguous() if ctx.needs_input_grad[1] else None,
            None,
        )
