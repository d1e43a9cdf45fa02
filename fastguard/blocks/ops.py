"""The Flux kernels as registered operators, and the autograd Functions that keep no more than backward needs.

Axes as in `fastguard.blocks.reference`. Each operator takes the backend ("auto", "triton", "torch") last; the functions
in `fastguard.blocks.flux` see to it that inputs fit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fastguard.blocks import torch_backend
from fastguard.ops import device_guard, operator, refuse_double_backward, resolve_backend
from fastguard.torch_backend import compute_dtype


def _module(kernel: str, backend: str, tensor: Tensor) -> Any:
    """The module that has this kernel's functions: `fastguard.kernels.<kernel>`, or the plain ones."""
    if resolve_backend(backend, tensor) == "triton":
        return importlib.import_module(f"fastguard.kernels.{kernel}")
    return torch_backend


def _wide(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=compute_dtype(like.dtype))


def autocast_to(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives matmuls now, or None where it is off."""
    kind = device.type
    # Autocast does not know the meta device, and raises.
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def backward_of_blocks(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of a Function: it runs in the dtypes of its forward, whatever autocast says by then, and
    once."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_double_backward("a fused Flux block")
        device = next(grad.device for grad in grads if grad is not None)
        if autocast_to(device) is None:
            return backward(ctx, *grads)
        with torch.autocast(device.type, enabled=False):
            return backward(ctx, *grads)

    return run


# --- LayerNorm + modulate, after a gated residual or without one ----------------------------------------------------


@operator
def adaln_fwd(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`adaln(x + gate residual)` (B, S, C), that sum (empty without a residual), and float32 mean and rstd (B, S)."""
    with device_guard(x):
        return _module("adaln", backend, x).adaln_fwd(x, residual, gate, scale, shift, eps)


@torch.library.register_fake("fastguard::adaln_fwd")
def _(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    summed = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), summed, _wide(x, *x.shape[:2]), _wide(x, *x.shape[:2])


@operator
def adaln_apply(x: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor, shift: Tensor, backend: str) -> Tensor:
    """The forward's result once more, from what it normalized.

    An operator of its own: a compiler would merge a second call of the forward's with the first, and keep its result.
    """
    with device_guard(x):
        return _module("adaln", backend, x).adaln_apply(x, mean, rstd, scale, shift)


@torch.library.register_fake("fastguard::adaln_apply")
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@operator
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual (B, S, C) and, in float32, of scale, shift, gate (B, C); empty if not asked for."""
    with device_guard(x):
        return _module("adaln", backend, x).adaln_bwd(
            grad, x, mean, rstd, scale, grad_summed, residual, gate, need_modulation
        )


@torch.library.register_fake("fastguard::adaln_bwd")
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    scale: Tensor,
    grad_summed: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    need_modulation: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    row = (x.shape[0], x.shape[2])
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if gate is None else x.shape),
        _wide(x, *(row if need_modulation else (0,))),
        _wide(x, *(row if need_modulation else (0,))),
        _wide(x, *(row if residual is not None else (0,))),
    )


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


# --- gated residual -------------------------------------------------------------------------------------------------


@operator
def gated_residual_fwd(x: Tensor, y: Tensor, gate: Tensor, backend: str) -> Tensor:
    """`x + gate y`, (B, S, C)."""
    with device_guard(x):
        return _module("gated_residual", backend, x).gated_residual_fwd(x, y, gate)


@torch.library.register_fake("fastguard::gated_residual_fwd")
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


@operator
def gated_residual_bwd(grad: Tensor, y: Tensor | None, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of y (B, S, C) and, with y given, of the gate: (B, C) in float32."""
    with device_guard(grad):
        return _module("gated_residual", backend, grad).gated_residual_bwd(grad, y, gate)


@torch.library.register_fake("fastguard::gated_residual_bwd")
def _(grad: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), _wide(grad, *((0,) if y is None else (grad.shape[0], grad.shape[2])))


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


# --- RMSNorm of query and key + rotary embedding --------------------------------------------------------------------


@operator
def qk_norm_rope_fwd(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    text_query: Tensor | None,
    text_key: Tensor | None,
    text_value: Tensor | None,
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key and value as attention reads them, (B, T + S, H, D), and 1 / rms: (2, B, T + S, H) in float32.

    Without a text stream value is empty: attention can read the projection itself.
    """
    with device_guard(query):
        return _module("qk_norm_rope", backend, query).qk_norm_rope_fwd(
            query, key, value, text_query, text_key, text_value, norms, cos, sin, eps
        )


@torch.library.register_fake("fastguard::qk_norm_rope_fwd")
def _(
    query: Tensor, key: Tensor, value: Tensor, text_query: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = rest[2][0].shape[0]
    tokens = query.shape[1] + (0 if text_query is None else text_query.shape[1])
    shape = (query.shape[0], tokens, query.shape[2] // size, size)
    joined = query.new_empty((0,) if text_query is None else shape)
    return query.new_empty(shape), query.new_empty(shape), joined, _wide(query, 2, *shape[:3])


@operator
def qk_norm_rope_bwd(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor | None,
    query: Tensor,
    key: Tensor,
    text_query: Tensor | None,
    text_key: Tensor | None,
    rstd: Tensor,
    norms: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    rotated: bool,
    need_norms: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six projections (B, S or T, H D), and of the norms' weights: (2 or 4, D) in float32.

    query, key (B, S or T, H, D) are the projections or, `rotated`, the forward's results.
    """
    with device_guard(query):
        return _module("qk_norm_rope", backend, query).qk_norm_rope_bwd(
            grad_q,
            grad_k,
            grad_v,
            query,
            key,
            text_query,
            text_key,
            rstd,
            norms,
            cos,
            sin,
            rotated,
            need_norms,
        )


@torch.library.register_fake("fastguard::qk_norm_rope_bwd")
def _(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor | None,
    query: Tensor,
    key: Tensor,
    text_query: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    need_norms, norms = rest[-2], rest[2]
    image = (*query.shape[:2], query.shape[2] * query.shape[3])
    text = (0,) if text_query is None else (*text_query.shape[:2], image[2])
    shapes = [image, image, (0,) if grad_v is None else image, text, text, (0,) if grad_v is None else text]
    grads = [query.new_empty(shape) for shape in shapes]
    return (*grads, _wide(query, *((len(norms), query.shape[3]) if need_norms else (0,))))


class QKNormRopeFunction(torch.autograd.Function):
    """Normalize and rotate query and key, and join the streams.

    Keeps 1 / rms and, with `rotated`, its own results, which attention keeps anyway: their gradients need the
    normalized value, which is the result turned back over the norm's weight. Without, it keeps the projections.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        text_query: Tensor | None,
        text_key: Tensor | None,
        text_value: Tensor | None,
        norm_query: Tensor,
        norm_key: Tensor,
        norm_text_query: Tensor | None,
        norm_text_key: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        eps: float,
        rotated: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        norms = [norm for norm in (norm_query, norm_key, norm_text_query, norm_text_key) if norm is not None]
        q, k, v, rstd = qk_norm_rope_fwd(
            query, key, value, text_query, text_key, text_value, norms, cos, sin, eps, backend
        )
        if text_value is None:
            ctx.mark_non_differentiable(v)
        sources = (q, k, None, None) if rotated else (query, key, text_query, text_key)
        ctx.save_for_backward(*sources, rstd, cos, sin, *norms)
        ctx.n_text = None if text_query is None else text_query.shape[1]
        ctx.rotated, ctx.backend = rotated, backend
        return q, k, v

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        query, key, text_query, text_key, rstd, cos, sin, *norms = ctx.saved_tensors
        if ctx.rotated and ctx.n_text is not None:
            text_query, text_key = query[:, : ctx.n_text], key[:, : ctx.n_text]
            query, key = query[:, ctx.n_text :], key[:, ctx.n_text :]
        elif not ctx.rotated:
            heads = (-1, norms[0].shape[0])
            query, key = query.unflatten(-1, heads), key.unflatten(-1, heads)
            if text_query is not None:
                text_query, text_key = text_query.unflatten(-1, heads), text_key.unflatten(-1, heads)
        need_norms = ctx.needs_input_grad[6:10]
        *grads, grad_norms = qk_norm_rope_bwd(
            grad_q,
            grad_k,
            None if ctx.n_text is None else grad_v,
            query,
            key,
            text_query,
            text_key,
            rstd,
            norms,
            cos,
            sin,
            ctx.rotated,
            any(need_norms),
            ctx.backend,
        )
        results = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[:6], strict=True)]
        if ctx.n_text is None:
            results[2:] = [None] * 4
        of_norms: list[Tensor | None] = [None] * 4
        for i, norm in enumerate(norms):
            if need_norms[i]:
                of_norms[i] = grad_norms[i].to(norm.dtype)
        return (*results, *of_norms, None, None, None, None, None)


# --- bias + tanh-GELU -----------------------------------------------------------------------------------------------


@operator
def bias_gelu_fwd(x: Tensor, bias: Tensor | None, prefix: Tensor | None, backend: str) -> Tensor:
    """`[prefix, gelu(x + bias)]` along the channels: (B, S, P + C)."""
    with device_guard(x):
        return _module("gelu", backend, x).bias_gelu_fwd(x, bias, prefix)


@torch.library.register_fake("fastguard::bias_gelu_fwd")
def _(x: Tensor, bias: Tensor | None, prefix: Tensor | None, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] + (0 if prefix is None else prefix.shape[-1])))


def bias_gelu_bwd_(grad: Tensor, x: Tensor, bias: Tensor | None, need_output: bool, backend: str) -> Tensor:
    """Turns the gradient of the result (B, S, C), contiguous, into that of x, in place; returns gelu(x + bias) or
    nothing (empty)."""
    with device_guard(x):
        return _module("gelu", backend, x).bias_gelu_bwd_(grad, x, bias, need_output)


bias_gelu_bwd_ = operator(bias_gelu_bwd_, mutates=("grad",))


@torch.library.register_fake("fastguard::bias_gelu_bwd_")
def _(grad: Tensor, x: Tensor, bias: Tensor | None, need_output: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape if need_output else 0)


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
        return grad_x, grad_bias, grad_prefix if ctx.needs_input_grad[2] else None, None
