"""Bias + GELU in its tanh form, after a prefix that is not activated.

Axes: B sample, S token, C channel, P channel of the prefix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastguard.ops.registry import backward_of_blocks, compute_dtype, operator

GELU_SLOPE = math.sqrt(2 / math.pi)
GELU_CUBIC = 0.044715


def bias_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """`GELU(x + bias)` in its tanh form, `z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2`: x (..., C), bias (C,)."""
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


@operator(triton="gelu")
def bias_gelu_fwd(x: Tensor, bias: Tensor | None, prefix: Tensor | None) -> Tensor:
    """`[prefix, gelu(x + bias)]` along the channels: (B, S, P + C)."""
    dtype = compute_dtype(x.dtype)
    out = F.gelu(x.to(dtype) if bias is None else x.to(dtype) + bias, approximate="tanh").to(x.dtype)
    return out if prefix is None else torch.cat([prefix, out], dim=-1)


@operator(triton="gelu", mutates=("grad",))
def bias_gelu_bwd_(grad: Tensor, x: Tensor, bias: Tensor | None, need_output: bool) -> Tensor:
    """Turns the gradient of the result (B, S, C), contiguous, into that of x, in place; returns gelu(x + bias) or
    nothing (empty)."""
    dtype = compute_dtype(x.dtype)
    z = x.to(dtype) if bias is None else x.to(dtype) + bias
    # z sigmoid(2 u) with u = slope (z + cubic z^3); its derivative is s + z s (1 - s) 2 u'.
    s = torch.sigmoid(2 * GELU_SLOPE * (z + GELU_CUBIC * z**3))
    slope = 2 * GELU_SLOPE * (1 + 3 * GELU_CUBIC * z * z)
    grad.copy_(grad.to(dtype) * (s + z * s * (1 - s) * slope))
    return (z * s).to(x.dtype) if need_output else x.new_empty(0)


class BiasGeluFunction(torch.autograd.Function):
    """`[prefix, gelu(x + bias)]`; keeps x, not the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, prefix: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.n_prefix, ctx.backend = 0 if prefix is None else prefix.shape[-1], backend
        return bias_gelu_fwd(x, bias, prefix, backend)

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        grad_prefix, grad_x = grad.split_with_sizes([ctx.n_prefix, x.shape[-1]], dim=-1)
        grad_x = grad_x.clone(memory_format=torch.contiguous_format)  # the caller's gradient stays as it is
        bias_gelu_bwd_(grad_x, x, bias, False, ctx.backend)
        grad_bias = grad_x.flatten(0, -2).sum(0).to(bias.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, grad_prefix.contiguous() if ctx.needs_input_grad[2] else None, None
