"""LayerNorm + modulate, of x or of a gated residual x + gate y.

Axes: B sample, S token, C channel of a token. Narrow dtypes are computed in float32 and rounded once at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastguard.ops.gated_residual import gated_residual_fwd
from fastguard.ops.registry import backward_of_blocks, operator, widened


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`LayerNorm(x) (1 + scale) + shift`, no affine: x (B, S, C); scale, shift (B, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale[:, None]) + shift[:, None]


@operator(triton="adaln")
def adaln_fwd(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`adaln(x + gate residual)` (B, S, C), that sum (empty without a residual), and float32 mean and rstd (B, S)."""
    summed = x.new_empty(0)
    if residual is not None and gate is not None:
        x = summed = gated_residual_fwd(x, residual, gate, "torch")
    wide, scale, shift = widened(x, scale, shift)
    normed, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    normed = normed.mul_(1 + scale).add_(shift)
    return normed.to(x.dtype), summed, mean.squeeze(-1), rstd.squeeze(-1)


@operator(triton="adaln")
def adaln_apply(x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Recompute the forward's result from what it normalized: (B, S, C).

    A separate operator, because torch.compile would deduplicate a second call of `adaln_fwd` and keep the first result
    alive until backward.
    """
    wide, scale, shift = widened(x, scale, shift)
    return (wide - mean[..., None]).mul_(rstd[..., None]).mul_(1 + scale).add_(shift).to(x.dtype)


@operator(triton="adaln")
def adaln_bwd(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    grad_summed: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    need_modulation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual (B, S, C) and, in float32, of scale, shift, gate (B, C); empty if not asked for."""
    wide, wide_grad, wide_scale = widened(x, grad, scale)
    x_hat = (wide - mean[..., None]).mul_(rstd[..., None])
    grad_scale, grad_shift, grad_gate = (wide.new_empty(0) for _ in range(3))
    grad_residual = x.new_empty(0)
    if need_modulation:
        grad_scale, grad_shift = (wide_grad * x_hat).sum(1), wide_grad.sum(1)
    w = wide_grad * (1 + wide_scale)
    inner = (w * x_hat).mean(-1, keepdim=True)
    total = (w - w.mean(-1, keepdim=True)).sub_(x_hat * inner).mul_(rstd[..., None])
    if grad_summed is not None:
        total += grad_summed
    if gate is not None:
        grad_residual = (gate[:, None] * total).to(x.dtype)
        if residual is not None:
            grad_gate = (total * residual).sum(1)
    return total.to(x.dtype), grad_residual, grad_scale, grad_shift, grad_gate


class AdaLNFunction(torch.autograd.Function):
    """LayerNorm + modulate of x, or of x + gate residual; keeps what it normalizes and two numbers a token.

    Returns (normed, summed, mean, rstd); summed is empty without a residual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        gate: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        eps: float,
        backend: str,
    ) -> tuple[Tensor, ...]:
        normed, summed, mean, rstd = adaln_fwd(x, residual, gate, scale, shift, eps, backend)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(mean, rstd)
        if residual is None:
            ctx.mark_non_differentiable(summed)
        kept_residual = residual if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(x if residual is None else summed, mean, rstd, scale, kept_residual, gate)
        ctx.shift_dtype, ctx.backend = shift.dtype, backend
        return normed, summed, mean, rstd

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, grad: Tensor | None, grad_summed: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        x, mean, rstd, scale, residual, gate = ctx.saved_tensors
        if gate is None:
            grad_summed = None
        need_x, need_residual, need_gate, need_scale, need_shift, *_ = ctx.needs_input_grad
        grad_x, grad_residual, grad_scale, grad_shift, grad_gate = adaln_bwd(
            torch.zeros_like(x) if grad is None else grad,
            x,
            mean,
            rstd,
            scale,
            grad_summed,
            residual,
            gate,
            need_scale or need_shift,
            ctx.backend,
        )
        return (
            grad_x if need_x else None,
            grad_residual if need_residual else None,
            grad_gate.to(gate.dtype) if need_gate else None,
            grad_scale.to(scale.dtype) if need_scale else None,
            grad_shift.to(ctx.shift_dtype) if need_shift else None,
            None,
            None,
        )
