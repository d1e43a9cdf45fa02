"""Linear layers with their LoRA adapters, whose input is recomputed in backward instead of being saved.

A layer is `y = n W^T + b + (n A^T) B^T`. Its backward needs n only for the gradients of W and A. There n is cheap to
recompute: it is LayerNorm + modulate, or the GELU, of a tensor that is saved for backward anyway.

Axes: B sample, S token, C input channel, N output channel, R rank (of all adapters of a group of layers, side by side).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from fastguard.ops.adaln import adaln_apply
from fastguard.ops.gelu import bias_gelu_bwd_, bias_gelu_fwd
from fastguard.ops.registry import NAMESPACE, backward_of_blocks

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)


class LowPrecisionLinear(nn.Linear):
    """A float32 linear layer that computes in its input's dtype.

    peft would cast the input to the adapter's float32 instead: a copy of every activation, and slow matmuls.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


ADAPTER_LAYERS = (nn.Linear, LowPrecisionLinear)


class LinearWeights(NamedTuple):
    """One layer in the dtype of the arithmetic, and its active adapters side by side."""

    weight: Tensor
    """(N, C)"""
    bias: Tensor | None
    """(N,)"""
    down: Tensor | None
    """(R, C), the adapters' A"""
    up: Tensor | None
    """(N, R), their B times their scaling"""


def backward_needs_input(linear: LinearWeights) -> bool:
    """A function, since the compiler of torch 2.9 cannot trace properties of named tuples."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (linear.weight, linear.down))


class AdaLNSources(NamedTuple):
    """What LayerNorm + modulate can be recomputed from."""

    x: Tensor
    """(B, S, C)"""
    mean: Tensor
    """(B, S)"""
    rstd: Tensor
    """(B, S)"""
    scale: Tensor
    """(B, C)"""
    shift: Tensor
    """(B, C)"""


class Normed(NamedTuple):
    """The output of LayerNorm + modulate."""

    value: Tensor
    """(B, S, C)"""
    sources: AdaLNSources | None
    """what backward recomputes the value from; None: the value itself is saved"""


class HiddenSources(NamedTuple):
    """What the first linear layer of a feed-forward can be recomputed from."""

    normed: AdaLNSources
    """of its input"""
    weight: Tensor
    """(N, C)"""
    low: Tensor | None
    """`input down^T`, (B, S, R)"""
    up: Tensor | None
    """(N, R)"""


class Hidden(NamedTuple):
    """A feed-forward between its two linear layers: before the activation, and without the first layer's bias."""

    value: Tensor
    """(B, S, N)"""
    bias: Tensor | None
    """(N,)"""
    sources: HiddenSources | None
    """what backward recomputes the value from; None: the value itself is saved"""


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: no hooks, no replaced forward."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether nobody has replaced the forward of this one module. A hook that was removed may leave the class's forward
    behind, bound to the module."""
    forward = module.__dict__.get("forward")
    return forward is None or (
        getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    )


def linear_weights(module: nn.Module, dtype: torch.dtype, autocast: bool) -> LinearWeights | str:
    """The weights that a call of the module computes with, or the reason why it has to be called.

    It knows `nn.Linear` and peft's LoRA around it, without hooks, quantized or sharded weights, dropout, DoRA or other
    variants. Under autocast, weights are cast to `dtype`. Otherwise they must have it, except for float32 adapters that
    compute in the dtype of their input (peft's `cast_input_dtype_enabled = False`).
    """
    base = module.base_layer if type(module) is LoraLinear else module
    if type(base) is not nn.Linear:
        return f"is a {type(base).__name__}"
    if not (is_bare(module) and is_bare(base)):
        return "has hooks"
    if type(base.weight) not in PLAIN_TENSORS:
        return f"has a weight of type {type(base.weight).__name__}"
    if base.weight.dtype != dtype and not autocast:
        return f"has a {base.weight.dtype} weight for {dtype} inputs"
    bias = None if base.bias is None else base.bias.to(dtype)
    plain = LinearWeights(base.weight.to(dtype), bias, None, None)
    if type(module) is not LoraLinear:
        return plain
    if module.disable_adapters or module.merged:
        return "has merged adapters that are switched off" if module.disable_adapters and module.merged else plain
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        a, b = module.lora_A[name], module.lora_B[name]
        dropout = module.lora_dropout[name]
        if name in module.lora_variant:
            return f"has an adapter of the kind {type(module.lora_variant[name]).__name__}"
        if type(dropout) is not nn.Identity and (
            type(dropout) is not nn.Dropout or (dropout.p > 0 and dropout.training)
        ):
            return "has an adapter with dropout"
        if type(a) not in ADAPTER_LAYERS or type(b) not in ADAPTER_LAYERS:
            return "has an adapter of other layers"
        if b.bias is not None:
            return "has an adapter with a bias"
        if not (is_bare(a) and is_bare(b) and is_bare(dropout)):
            return "has an adapter with hooks"
        if a.weight.dtype != dtype and not autocast and module.cast_input_dtype_enabled:
            return f"has a {a.weight.dtype} adapter for {dtype} inputs"
        scaling = module.scaling[name]
        downs.append(a.weight.to(dtype))
        # Some of peft's scalings are tensors: asking for their values would wait for the GPU.
        ups.append((b.weight if isinstance(scaling, (float, int)) and scaling == 1 else b.weight * scaling).to(dtype))
    if not downs:
        return plain
    return plain._replace(down=_join(downs, 0), up=_join(ups, 1))


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


# --- several layers of one input ------------------------------------------------------------------------------------


def projections(normed: Normed, linears: Sequence[LinearWeights], backend: str) -> tuple[list[Tensor], Tensor]:
    """The outputs (B, S, N_i) of layers with the same input, and `n down^T` of all their adapters, (B, S, sum of R_i);
    without adapters that is empty."""
    downs = [linear.down for linear in linears if linear.down is not None]
    needs_input = any(backward_needs_input(linear) for linear in linears)
    sources: Sequence[Tensor | None] = (None,) * 5
    if needs_input and normed.sources is not None:
        sources = normed.sources
    *outputs, low = ProjectionsFunction.apply(
        normed.value,
        needs_input and normed.sources is None,
        *sources,
        _join(downs, 0) if downs else None,
        len(linears),
        backend,
        *(linear.weight for linear in linears),
        *(linear.bias for linear in linears),
        *(linear.up for linear in linears),
    )
    return outputs, low


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None) -> Tensor:
    """`x W^T + b + low up^T` of matrices.

    Matrices, because F.linear of a batch whose rows are not contiguous adds the bias in a second rounding. A batch and
    its samples one by one would then not give the same bits.
    """
    out = F.linear(x, weight, bias)
    if low is None or up is None:
        return out
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        # A dispatch mode may have saved the first result, as that of selective checkpointing does.
        return torch.addmm(out, low, up.T)
    return out.addmm_(low, up.T)


def _rows(tensor: Tensor) -> Tensor:
    """(..., C) as a matrix; a copy where its rows are not evenly spaced."""
    return tensor.reshape(-1, tensor.shape[-1])


def _like_rows_of(matrix: Tensor, tensor: Tensor) -> Tensor:
    """A matrix with a row for each of tensor (..., C), as (..., its columns)."""
    return matrix.view(*tensor.shape[:-1], matrix.shape[-1])


def _over_rows(grad: Tensor, n: Tensor) -> Tensor:
    """`grad^T n`, (N, C), over the rows of grad (B S, N) and n (B, S, C)."""
    if torch.compiler.is_compiling() and not n.is_contiguous():
        return _over_spaced_rows(grad, n)
    return grad.T @ _rows(n)


@torch.library.custom_op(f"{NAMESPACE}::over_spaced_rows", mutates_args=())
def _over_spaced_rows(grad: Tensor, n: Tensor) -> Tensor:
    """An operator, since torch.compile would keep the forward's copy of the rows until backward, beside n."""
    return grad.T @ _rows(n)


@_over_spaced_rows.register_fake
def _(grad: Tensor, n: Tensor) -> Tensor:
    return grad.new_empty(grad.shape[1], n.shape[-1])


def _slices(ups: Sequence[Tensor | None]) -> list[slice]:
    """Where each layer's adapters lie along R."""
    ends, end = [], 0
    for up in ups:
        start, end = end, end + (0 if up is None else up.shape[1])
        ends.append(slice(start, end))
    return ends


class ProjectionsFunction(torch.autograd.Function):
    """The outputs of several layers of one input n, and n A^T. Saves the sources of n, if it has them, instead of n.

    One matmul serves the adapters' A of all layers, so that n is read once for all of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        n: Tensor,
        save_n: bool,
        x: Tensor | None,
        mean: Tensor | None,
        rstd: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        down: Tensor | None,
        count: int,
        backend: str,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        weights, biases, ups = flat[:count], flat[count : 2 * count], flat[2 * count :]
        rows = _rows(n)
        low = n.new_empty(0) if down is None else _like_rows_of(F.linear(rows, down), n)
        outputs = []
        for weight, bias, up, part in zip(weights, biases, ups, _slices(ups), strict=True):
            assert weight is not None
            out = _linear(rows, weight, bias, None if up is None else _rows(low)[:, part], up)
            outputs.append(_like_rows_of(out, n))
        ctx.mark_non_differentiable(low)
        ctx.save_for_backward(n if save_n else None, x, mean, rstd, scale, shift, down, low, *weights, *ups)
        ctx.count, ctx.backend = count, backend
        return (*outputs, low)

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n, x, mean, rstd, scale, shift, down, low, *flat = ctx.saved_tensors
        weights, ups = flat[: ctx.count], flat[ctx.count :]
        if x is not None:
            n = adaln_apply(x, mean, rstd, scale, shift, ctx.backend).to(weights[0].dtype)  # narrower under autocast
        need_n, need_down = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
        need = ctx.needs_input_grad[10:]
        rows = [_rows(grad) for grad in grads[: ctx.count]]
        grad_low = None if down is None else torch.empty_like(low)
        grad_flat: list[Tensor | None] = [None] * (3 * ctx.count)
        grad_n: Tensor | None = None
        for i, (dy, weight, up, part) in enumerate(zip(rows, weights, ups, _slices(ups), strict=True)):
            if need[i]:
                grad_flat[i] = _over_rows(dy, n)
            if need[ctx.count + i]:
                grad_flat[ctx.count + i] = dy.sum(0)
            if up is not None and grad_low is not None:
                _rows(grad_low)[:, part] = dy @ up
                if need[2 * ctx.count + i]:
                    grad_flat[2 * ctx.count + i] = dy.T @ _rows(low)[:, part]
            if need_n:
                grad_n = dy @ weight if grad_n is None else grad_n.addmm_(dy, weight)
        grad_down = None
        if grad_low is not None:
            if need_down:
                grad_down = _over_rows(_rows(grad_low), n)
            if grad_n is not None:
                grad_n.addmm_(_rows(grad_low), down)
        if grad_n is not None:
            grad_n = _like_rows_of(grad_n, grads[0])
        return (grad_n, *(None,) * 6, grad_down, None, None, *grad_flat)


# --- activation and the layer after it ------------------------------------------------------------------------------


def gelu_linear(
    hidden: Hidden, prefix: Tensor | None, linear: LinearWeights, save_activation: bool, backend: str
) -> Tensor:
    """`linear([prefix, gelu(hidden + bias)])`, (B, S, N); prefix (B, S, P) stands before it along the channels."""
    sources = hidden.sources
    return GeluLinearFunction.apply(
        hidden.value,
        hidden.bias,
        prefix,
        *linear,
        backward_needs_input(linear),
        save_activation,
        backend,
        *(() if sources is None else (*sources.normed, sources.weight, sources.low, sources.up)),
    )


class GeluLinearFunction(torch.autograd.Function):
    """Saves the layer before its activation, or the sources of that, instead of the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        bias: Tensor | None,
        prefix: Tensor | None,
        weight: Tensor,
        out_bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        needs_input: bool,
        save_activation: bool,
        backend: str,
        *sources: Tensor | None,
    ) -> Tensor:
        joined = bias_gelu_fwd(hidden, bias, prefix, backend)
        low = None if down is None else F.linear(_rows(joined), down)
        saved_joined = joined if needs_input and save_activation else None
        saved_prefix = prefix if needs_input and not save_activation else None
        saved_hidden = None if sources else hidden
        ctx.save_for_backward(saved_hidden, bias, saved_prefix, saved_joined, weight, down, up, low, *sources)
        ctx.n_prefix = 0 if prefix is None else prefix.shape[-1]
        ctx.needs_input, ctx.backend = needs_input, backend
        return _like_rows_of(_linear(_rows(joined), weight, out_bias, low, up), joined)

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, bias, prefix, joined, weight, down, up, low, *sources = ctx.saved_tensors
        if sources:
            *of_input, source_weight, source_low, source_up = sources
            n = adaln_apply(*of_input, ctx.backend).to(source_weight.dtype)
            low_rows = None if source_low is None else _rows(source_low)
            hidden = _like_rows_of(_linear(_rows(n), source_weight, None, low_rows, source_up), n)
        need_bias, need_prefix, need_weight, need_out_bias, need_down, need_up = ctx.needs_input_grad[1:7]
        dy, p = _rows(grad), ctx.n_prefix
        grad_low = None if down is None else dy @ up

        def of_input_part(columns: slice) -> Tensor:
            part = dy @ weight[:, columns]
            if grad_low is not None:
                part.addmm_(grad_low, down[:, columns])
            return _like_rows_of(part, grad)

        grad_hidden = of_input_part(slice(p, None))
        # In place, since nothing else holds this gradient.
        recompute = ctx.needs_input and joined is None
        activation = bias_gelu_bwd_(grad_hidden, hidden, bias, recompute, ctx.backend)
        parts = [joined] if joined is not None else [prefix, activation] if p else [activation]

        def of_weight(left: Tensor) -> Tensor:
            return torch.cat([left.T @ _rows(part) for part in parts], dim=1)

        return (
            grad_hidden,
            _rows(grad_hidden).sum(0) if need_bias else None,
            of_input_part(slice(p)) if need_prefix else None,
            of_weight(dy) if need_weight else None,
            dy.sum(0) if need_out_bias else None,
            of_weight(grad_low) if need_down and grad_low is not None else None,
            dy.T @ low if need_up else None,
            *(None,) * (3 + len(sources)),
        )
