"""The gated residual `x + gate y`.

Axes: B sample, S token, C channel of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastguard.ops.registry import backward_of_blocks, operator, widened


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate y`: x, y (B, S, C); gate (B, C)."""
    return x + gate[:, None] * y


@operator(triton="gated_residual")
def gated_residual_fwd(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`x + gate y`, (B, S, C)."""
    wide, y, gate = widened(x, y, gate)
    return (wide + gate * y).to(x.dtype)


@operator(triton="gated_residual")
def gated_residual_bwd(grad: Tensor, y: Tensor | None, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y (B, S, C) and, with y given, of the gate: (B, C) in float32."""
    wide, gate = widened(grad, gate)
    grad_gate = wide.new_empty(0) if y is None else (wide * y).sum(1)
    return (gate * wide).to(grad.dtype), grad_gate


class GatedResidualFunction(torch.autograd.Function):
    """`x + gate y`; keeps y only for a gate that needs its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[2] else None, gate)
        ctx.backend = backend
        return gated_residual_fwd(x, y, gate, backend)

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gate = ctx.saved_tensors
        grad_y, grad_gate = gated_residual_bwd(grad, y, gate, ctx.backend)
        return grad, grad_y, grad_gate.to(gate.dtype) if y is not None else None, None
