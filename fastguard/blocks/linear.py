"""Linear layers with their LoRA adapters, whose input is recomputed in backward instead of being saved.

A layer is `y = n W^T + b + (n A^T) B^T`. Its backward needs n only for the gradients of W and A. There n is cheap to
recompute: it is LayerNorm + modulate, or the activation, of a tensor that is saved for backward anyway.

A frozen weight in 8 or 4 bits is dequantized for each matmul and dropped; backward saves its codes, which exist anyway.

Axes: B sample, S token, C input channel, N output channel, R rank (of all adapters of a group of layers, side by side).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from fastguard.blocks.quantized import (
    BlockScaled,
    RowScaled,
    Weight,
    dense,
    dequantizes,
    four_bit_weight,
    kind_of,
    size_of,
    tensors_of,
    weight_of,
    weights_of,
)
from fastguard.ops.adaln import adaln_apply
from fastguard.ops.add_product import add_product
from fastguard.ops.gelu import bias_gelu_bwd_, bias_gelu_fwd
from fastguard.ops.registry import autocast_to, backward_of_blocks
from fastguard.ops.spaced_rows import over_spaced_rows
from fastguard.ops.swiglu import swiglu_bwd_, swiglu_fwd

PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor)


class LowPrecisionLinear(nn.Linear):
    """A float32 linear layer that computes in its input's dtype.

    peft would cast the input to the adapter's float32 instead: a copy of every activation, and slow matmuls.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


ADAPTER_LAYERS = (nn.Linear, LowPrecisionLinear)
Activation = Literal["gelu", "swiglu"]
"""GELU in its tanh form, and the gate that halves the channels."""


class LinearWeights(NamedTuple):
    """One layer in the dtype of the arithmetic, and its active adapters side by side."""

    weight: Weight
    """(N, C)"""
    bias: Tensor | None
    """(N,)"""
    down: Tensor | None
    """(R, C), the adapters' A"""
    up: Tensor | None
    """(N, R), their B times their scaling"""


def backward_needs_input(linear: LinearWeights) -> bool:
    """A function, since the compiler of torch 2.9 cannot trace properties of named tuples."""
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (linear.weight, linear.down)
    )


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
    bias: Tensor | None
    """(N,); None as well where the activation adds it"""
    low: Tensor | None
    """`input down^T`, (B, S, R)"""
    up: Tensor | None
    """(N, R)"""
    weight: Weight
    """(M, C), of which the last N rows are the layer's"""


class Hidden(NamedTuple):
    """A feed-forward between its two linear layers, before the activation."""

    value: Tensor
    """(B, S, N)"""
    bias: Tensor | None
    """(N,), of the first layer, where the activation adds it"""
    sources: HiddenSources | None
    """what backward recomputes the value from; None: the value itself is saved"""
    activation: Activation


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: no hooks, no replaced forward."""
    hooked = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return not hooked and has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether nobody has replaced the forward of this one module. A hook that was removed may leave the class's forward
    behind, bound to the module."""
    forward = module.__dict__.get("forward")
    return forward is None or (
        getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    )


def linear_weights(module: Any, dtype: torch.dtype, autocast: bool) -> LinearWeights | str:
    """The weights that a call of the module computes with, or the reason why it has to be called.

    It knows `nn.Linear` and peft's LoRA around it, without hooks, sharded weights, dropout, DoRA or other variants.
    Frozen weights may be quantized: those of a `QuantizedLinear`, of bitsandbytes' 4-bit layers, and of tensors that
    can dequantize themselves. Under autocast, weights are cast to `dtype`. Otherwise they must have it, except for
    float32 adapters that compute in the dtype of their input (peft's `cast_input_dtype_enabled = False`).
    """
    has_adapters = _is_lora(type(module))
    base = module.base_layer if has_adapters else module
    if not (is_bare(module) and is_bare(base)):
        return "has hooks"
    weight = _weight(base, dtype, autocast)
    if isinstance(weight, str):
        return weight
    bias = None if base.bias is None else base.bias.to(dtype)
    plain = LinearWeights(weight, bias, None, None)
    if not has_adapters:
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


def _is_lora(layer: type) -> bool:
    """Whether a class is peft's LoRA around `nn.Linear`, or around one of its quantized kinds."""
    if layer in (LoraLinear, TorchaoLoraLinear):
        return True
    return (layer.__module__, layer.__name__) == ("peft.tuners.lora.bnb", "Linear4bit")  # importing it takes seconds


def _weight(base: Any, dtype: torch.dtype, autocast: bool) -> Any:
    """The weight of a layer without adapters, or the reason why the layer has to be called."""
    if type(base) is QuantizedLinear:
        return base.quantized
    if (four_bit := four_bit_weight(base)) is not None:
        return four_bit
    if type(base) is not nn.Linear:
        return f"is a {type(base).__name__}"
    if type(base.weight) not in PLAIN_TENSORS:
        if dequantizes(base.weight) and not base.weight.requires_grad:
            return base.weight
        return f"has a weight of type {type(base.weight).__name__}"
    if base.weight.dtype != dtype and not autocast:
        return f"has a {base.weight.dtype} weight for {dtype} inputs"
    return base.weight.to(dtype)


def _join(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


# --- several layers of one input ------------------------------------------------------------------------------------


def projections(
    normed: Normed, linears: Sequence[LinearWeights], backend: str, last_sizes: tuple[int, ...] = ()
) -> tuple[list[Tensor], Tensor]:
    """The outputs (B, S, N_i) of layers with the same input, and `n down^T` of all their adapters, (B, S, sum of R_i);
    without adapters that is empty.

    last_sizes: the last layer gives several outputs, of these N. They are made apart, so that backward can save one of
    them alone, and its gradients come without being joined.
    """
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
        tuple([kind_of(linear.weight) for linear in linears]),
        last_sizes,
        backend,
        *(tensor for linear in linears for tensor in tensors_of(linear.weight)),
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
    return add_product(out, low, up.T)


def _rows(tensor: Tensor) -> Tensor:
    """(..., C) as a matrix; a copy where its rows are not evenly spaced."""
    return tensor.reshape(-1, tensor.shape[-1])


def _like_rows_of(matrix: Tensor, tensor: Tensor) -> Tensor:
    """A matrix with a row for each of tensor (..., C), as (..., its columns)."""
    return matrix.view(*tensor.shape[:-1], matrix.shape[-1])


def _over_rows(grad: Tensor, n: Tensor, backend: str) -> Tensor:
    """`grad^T n`, (N, C), over the rows of grad (B S, N) and n (B, S, C)."""
    if torch.compiler.is_compiling() and not n.is_contiguous():
        return over_spaced_rows(grad, n, backend)
    return grad.T @ _rows(n)


def _parts(tensor: Tensor | None, sizes: Sequence[int]) -> Sequence[Any]:
    """A weight, bias or up of a layer for each of its outputs, N along the first axis."""
    if tensor is None:
        return (None,) * max(len(sizes), 1)
    return tensor.split_with_sizes(sizes) if sizes else (tensor,)


def _outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, up: Tensor | None, sizes: Sequence[int]
) -> list[Tensor]:
    """`_linear`, of each output of a layer."""
    parts = zip(_parts(weight, sizes), _parts(bias, sizes), _parts(up, sizes), strict=True)
    return [_linear(x, w, b, low, u) for w, b, u in parts]


def _add_products(total: Tensor | None, lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """`total + sum left right`, in place."""
    for left, right in zip(lefts, rights, strict=True):
        total = left @ right if total is None else add_product(total, left, right)
    assert total is not None
    return total


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
        kinds: tuple[str, ...],
        last_sizes: tuple[int, ...],
        backend: str,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count, n_held = len(kinds), sum(map(size_of, kinds))
        held, biases, ups = flat[:n_held], flat[n_held : n_held + count], flat[n_held + count :]
        rows = _rows(n)
        low = n.new_empty(0) if down is None else _like_rows_of(F.linear(rows, down), n)
        sizes = [()] * (count - 1) + [last_sizes]
        outputs: list[Tensor] = []
        for weight, bias, up, part, each in zip(weights_of(kinds, held), biases, ups, _slices(ups), sizes, strict=True):
            low_rows = None if up is None else _rows(low)[:, part]
            found = _outputs(rows, dense(weight, n.dtype, backend), bias, low_rows, up, each)
            outputs.extend(_like_rows_of(out, n) for out in found)
        ctx.mark_non_differentiable(low)
        ctx.save_for_backward(n if save_n else None, x, mean, rstd, scale, shift, down, low, *held, *ups)
        ctx.kinds, ctx.sizes, ctx.dtype, ctx.backend = kinds, sizes, n.dtype, backend
        return (*outputs, low)

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n, x, mean, rstd, scale, shift, down, low, *flat = ctx.saved_tensors
        held = [size_of(kind) for kind in ctx.kinds]
        count, n_held = len(held), sum(held)
        weights, ups = weights_of(ctx.kinds, flat[:n_held]), flat[n_held:]
        if x is not None:
            n = adaln_apply(x, mean, rstd, scale, shift, ctx.backend).to(ctx.dtype)  # narrower under autocast
        need_n, need_down = ctx.needs_input_grad[0], ctx.needs_input_grad[7]
        need = ctx.needs_input_grad[11:]
        rows = [_rows(grad) for grad in grads[:-1]]
        grad_low = None if down is None else torch.empty_like(low)
        grad_flat: list[Tensor | None] = [None] * (n_held + 2 * count)
        grad_n: Tensor | None = None
        for i, (weight, up, part, each) in enumerate(zip(weights, ups, _slices(ups), ctx.sizes, strict=True)):
            dys = rows[i:] if i == count - 1 else [rows[i]]
            first = sum(held[:i])  # of the tensors that hold the weight: only a plain one can need a gradient
            if need[first]:
                grad_flat[first] = _join([_over_rows(dy, n, ctx.backend) for dy in dys], 0)
            if need[n_held + i]:
                grad_flat[n_held + i] = _join([dy.sum(0) for dy in dys], 0)
            if up is not None and grad_low is not None:
                _rows(grad_low)[:, part] = _add_products(None, dys, _parts(up, each))
                if need[n_held + count + i]:
                    grad_flat[n_held + count + i] = _join([dy.T @ _rows(low)[:, part] for dy in dys], 0)
            if need_n:  # a dequantized weight is freed before the next one is made
                grad_n = _add_products(grad_n, dys, _parts(dense(weight, ctx.dtype, ctx.backend, again=True), each))
        grad_down = None
        if grad_low is not None:
            if need_down:
                grad_down = _over_rows(_rows(grad_low), n, ctx.backend)
            if grad_n is not None:
                grad_n = add_product(grad_n, _rows(grad_low), down)
        if grad_n is not None:
            grad_n = _like_rows_of(grad_n, grads[0])
        return (grad_n, *(None,) * 6, grad_down, None, None, None, *grad_flat)


class QuantizedLinear(nn.Linear):
    """A linear layer whose frozen weight is dequantized for each matmul, forward and backward, and dropped.

    Its parameters are the tensors of the weight, with the codes as `weight`, and `bias`. They keep their dtypes when
    the module is cast, but for the bias.
    """

    def __init__(self, weight: RowScaled | BlockScaled, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.kind = kind_of(weight)
        self.out_features, self.in_features = weight.shape
        for name, tensor in weight._asdict().items():
            held = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter("weight" if name == "codes" else name, held)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @property
    def quantized(self) -> RowScaled | BlockScaled:
        held: Any = self
        if self.kind == "rows":
            return RowScaled(held.scale, held.weight)
        nested = (held.absmax_codes, held.absmax_table, held.absmax_offset)
        return BlockScaled(held.absmax, held.weight, held.table, *nested)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(autocast_to(x.device) or x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weights = LinearWeights(self.quantized, bias, None, None)
        return projections(Normed(x, None), [weights], "auto")[0][0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        bias = self.bias

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if tensor is bias or new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight in {self.kind}"


# --- activation and the layer after it ------------------------------------------------------------------------------


def _activation_fwd(
    activation: Activation, hidden: Tensor, bias: Tensor | None, prefix: Tensor | None, backend: str
) -> Tensor:
    """`[prefix, activation(hidden + bias)]`; SwiGLU has no bias here."""
    if activation == "gelu":
        return bias_gelu_fwd(hidden, bias, prefix, backend)
    return swiglu_fwd(hidden, prefix, backend)


def _activation_bwd(
    activation: Activation, grad: Tensor, hidden: Tensor, bias: Tensor | None, need_output: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradient of hidden, and `activation(hidden + bias)` if it is needed; one of them in the memory of grad."""
    if activation == "gelu":
        output = bias_gelu_bwd_(grad, hidden, bias, need_output, backend)
        return grad, output
    return swiglu_bwd_(grad, hidden, need_output, backend), grad


def activated_linear(
    hidden: Hidden, prefix: Tensor | None, linear: LinearWeights, save_activation: bool, backend: str
) -> Tensor:
    """`linear([prefix, activation(hidden + bias)])`, (B, S, N); prefix (B, S, P) comes first along the channels."""
    sources = hidden.sources
    return ActivatedLinearFunction.apply(
        hidden.value,
        hidden.bias,
        prefix,
        linear.bias,
        linear.down,
        linear.up,
        kind_of(linear.weight),
        backward_needs_input(linear),
        save_activation,
        backend,
        hidden.activation,
        "" if sources is None else kind_of(sources.weight),
        *tensors_of(linear.weight),
        *(() if sources is None else (*sources.normed, *sources[1:4], *tensors_of(sources.weight))),
    )


class ActivatedLinearFunction(torch.autograd.Function):
    """Saves the layer before its activation, or the sources of that, instead of the activation."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        bias: Tensor | None,
        prefix: Tensor | None,
        out_bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        kind: str,
        needs_input: bool,
        save_activation: bool,
        backend: str,
        activation: Activation,
        source_kind: str,
        *flat: Tensor | None,
    ) -> Tensor:
        held, sources = flat[: size_of(kind)], flat[size_of(kind) :]
        joined = _activation_fwd(activation, hidden, bias, prefix, backend)
        low = None if down is None else F.linear(_rows(joined), down)
        saved_joined = joined if needs_input and save_activation else None
        saved_prefix = prefix if needs_input and not save_activation else None
        saved_hidden = None if sources else hidden
        ctx.save_for_backward(saved_hidden, bias, saved_prefix, saved_joined, down, up, low, *flat)
        ctx.n_prefix, ctx.n_hidden = 0 if prefix is None else prefix.shape[-1], hidden.shape[-1]
        ctx.kind, ctx.source_kind, ctx.activation = kind, source_kind, activation
        ctx.needs_input, ctx.backend = needs_input, backend
        matrix = dense(weight_of(kind, held), joined.dtype, backend)
        return _like_rows_of(_linear(_rows(joined), matrix, out_bias, low, up), joined)

    @staticmethod
    @backward_of_blocks
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, bias, prefix, joined, down, up, low, *flat = ctx.saved_tensors
        held, sources = flat[: size_of(ctx.kind)], flat[size_of(ctx.kind) :]
        dy, p = _rows(grad), ctx.n_prefix
        if sources:
            of_input, (source_bias, source_low, source_up) = sources[:5], sources[5:8]
            n = adaln_apply(*of_input, ctx.backend).to(dy.dtype)  # narrower under autocast
            low_rows = None if source_low is None else _rows(source_low)
            matrix = dense(weight_of(ctx.source_kind, sources[8:]), dy.dtype, ctx.backend, again=True)
            hidden_rows = _linear(_rows(n), matrix[-ctx.n_hidden :], source_bias, low_rows, source_up)
            hidden = _like_rows_of(hidden_rows, n)
            del n, matrix
        need_bias, need_prefix, need_out_bias, need_down, need_up = ctx.needs_input_grad[1:6]
        need_weight = ctx.needs_input_grad[12]
        weight = dense(weight_of(ctx.kind, held), dy.dtype, ctx.backend, again=True)
        grad_low = None if down is None else dy @ up

        def of_input_part(columns: slice) -> Tensor:
            part = dy @ weight[:, columns]
            if grad_low is not None:
                part = add_product(part, grad_low, down[:, columns])
            return _like_rows_of(part, grad)

        recompute = ctx.needs_input and joined is None
        # In place, since nothing else holds this gradient.
        grad_hidden, activation = _activation_bwd(
            ctx.activation, of_input_part(slice(p, None)), hidden, bias, recompute, ctx.backend
        )
        parts = [joined] if joined is not None else [prefix, activation] if p else [activation]

        def of_weight(left: Tensor) -> Tensor:
            return torch.cat([left.T @ _rows(part) for part in parts], dim=1)

        return (
            grad_hidden,
            _rows(grad_hidden).sum(0) if need_bias else None,
            of_input_part(slice(p)) if need_prefix else None,
            dy.sum(0) if need_out_bias else None,
            of_weight(grad_low) if need_down and grad_low is not None else None,
            dy.T @ low if need_up else None,
            *(None,) * 6,
            of_weight(dy) if need_weight else None,
            *(None,) * (len(flat) - 1),
        )
