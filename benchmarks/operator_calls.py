"""The one list of operator calls: tests, times, bytes, machine code and compute-sanitizer all take theirs from it.

    python benchmarks/operator_calls.py    every operator once on the GPU, against float64: compute-sanitizer runs this

Axes: B sample, S image token, T text token, C channel of a token, H head, D channel of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm
from torch.utils._pytree import tree_leaves, tree_map

from fastguard import ops as loss_ops
from fastguard.blocks import ops as block_ops

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OBJECTIVES, REDUCTIONS = ("grpo_guard", "flow_grpo", "flow_dppo"), ("none", "sum", "mean")
EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """Of what the operators are given."""

    samples: int
    image: int
    """tokens, S"""
    text: int
    """tokens, T"""
    heads: int
    head: int
    """channels of a head, D"""

    @property
    def width(self) -> int:
        return self.heads * self.head


SMALL = Size(samples=2, image=5, text=3, heads=2, head=12)
# Nothing is a multiple of a tile, nor of the 16 bytes of an access.
ODD = Size(samples=2, image=37, text=21, heads=3, head=26)
# As a block of Flux.1-dev has them.
FLUX_512 = Size(samples=1, image=1024, text=512, heads=24, head=128)
FLUX_1024 = Size(samples=1, image=4096, text=512, heads=24, head=128)


@dataclass(frozen=True)
class Call:
    """One call of an operator; the backend is its last argument."""

    name: str
    op: Any
    args: tuple[Any, ...]
    overwrites: bool = False
    """whether it writes its result over its first argument"""
    eager: Callable[..., Any] | None = None
    """the same from the same arguments, as diffusers writes it"""
    unread_bytes: int = 0
    """of tensors that it is given for their place in its signature, or reads half of"""

    def __call__(self) -> list[Tensor]:
        """All that it writes."""
        args = self.args
        if self.overwrites:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        results = [t for t in tree_leaves(self.op(*args)) if t.numel()]
        return [*results, args[0]] if self.overwrites else results

    def run(self) -> Any:
        """As it is timed: without a copy of what it overwrites."""
        return self.op(*self.args)

    def run_eager(self) -> Any:
        return self.eager(*self.args[:-1]) if self.eager else None

    def copied(self) -> Call:
        """The same with tensors of its own."""
        return replace(self, args=tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.args))

    def in_float64(self) -> Call:
        """The same with the plain torch backend in float64."""

        def widen(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.double() if leaf.is_floating_point() else leaf
            return torch.float64 if isinstance(leaf, torch.dtype) else leaf

        return replace(self, args=(*tree_map(widen, self.args[:-1]), "torch"))

    def least_bytes(self) -> int:
        """Bytes that have to be read or written once, whatever the method: all arguments and all results."""
        return _n_bytes(self.args) + _n_bytes(self()) - self.unread_bytes


def _n_bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, Tensor))


def assert_agrees(call: Call) -> None:
    """The operator gives what plain torch gives in float64, and its eager form nearly the same.

    float32 sums of thousands of terms; what is stored is rounded once (in the interpreter truncated: a whole ulp), and
    statistics follow from a sum as it was stored.
    """
    results = call()
    floating = [t.dtype for t in (*tree_leaves(call.args), *results) if isinstance(t, Tensor) and t.is_floating_point()]
    dtype = min(floating, key=lambda kind: kind.itemsize)
    ulp = torch.finfo(dtype).eps
    of_results = {FP32: max(2e-5, ulp / 2), dtype: max(2e-5, ulp), torch.bool: 0.0}
    for got, want in zip(results, call.in_float64()(), strict=True):
        off = _off(got, want)
        assert off <= of_results[got.dtype], f"{call.name}: {off:.1e} off"
    eager = [t for t in tree_leaves(call.run_eager()) if isinstance(t, Tensor)]
    for got, want in zip(eager, results, strict=False):  # an operator's statistics come after what both give
        off = _off(got, want)
        assert off <= 8 * max(ulp, 1e-5), f"{call.name}: the eager form is {off:.1e} off"  # it rounds at every step


def _off(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


class Numbers:
    """Makes tensors of one kind. beside: of latents and noise next to a bf16 velocity, of weights next to activations.

    Not `filled`, they take no time, and hold whatever the memory held.
    """

    def __init__(
        self, dtype: torch.dtype, device: str, beside: torch.dtype | None = None, filled: bool = True, seed: int = 3
    ) -> None:
        self.dtype, self.beside, self._device, self._filled = dtype, beside or dtype, device, filled
        self.wide = torch.promote_types(dtype, FP32)  # of statistics and per-sample numbers
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, of: torch.dtype | None = None) -> Tensor:
        return self._make(torch.randn, shape, of or self.dtype)

    def positive(self, *shape: int, of: torch.dtype | None = None) -> Tensor:
        return self._make(torch.rand, shape, of or self.wide).add_(0.5)

    def _make(self, random: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self._filled:
            return torch.empty(shape, dtype=dtype, device=self._device)
        return random(*shape, generator=self._generator, device=self._device).to(dtype)


def calls(dtype: torch.dtype, device: str, size: Size = SMALL, backend: str = "triton") -> list[Call]:
    """Each operator with each of its optional arguments there and absent, contiguous and strided."""
    n, shape = Numbers(dtype, device), (size.samples, size.image, size.width)
    found = [*_timed_loss(n, shape), *_other_loss(n, shape), *_timed_block(n, size), *_other_block(n, size)]
    return [replace(call, args=(*call.args, backend)) for call in found]


def timed_loss_calls(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, backend: str = "triton"
) -> dict[str, Call]:
    """Loss, its gradient and the rollout's step, as training makes them, by name."""
    found = _timed_loss(Numbers(dtype, device), shape)
    return {call.name: replace(call, args=(*call.args, backend)) for call in found}


def timed_block_calls(
    size: Size, dtype: torch.dtype, device: str, backend: str = "triton", filled: bool = True
) -> dict[str, Call]:
    """As a fused block makes them. The text stream's calls are left out: they are smaller copies of the image's."""
    found = _timed_block(Numbers(dtype, device, filled=filled), size)
    return {call.name: replace(call, args=(*call.args, backend)) for call in found}


def compiled_calls(dtype: torch.dtype, beside: torch.dtype) -> Iterator[Call]:
    """Every combination of options that has machine code of its own, at sizes of Flux; the tensors are not filled."""
    n = Numbers(dtype, "cpu", beside, filled=False)
    size = replace(FLUX_1024, samples=2, image=3072)
    lists = [_timed_block(n, size), _other_block(n, size), _compiled_block(n, size)]
    for tokens in (1024, 4096):  # two tiles of the epilogue
        shape = (2, tokens, 64)
        lists += [_timed_loss(n, shape), _other_loss(n, shape), _compiled_loss(n, shape)]
    for call in itertools.chain(*lists):
        yield replace(call, args=(*call.args, "triton"))


# --- the loss and the step ------------------------------------------------------------------------------------------


def _loss_options(objective: str, reduction: str, kl_weight: float, velocity_kl: bool, invert: bool) -> tuple[Any, ...]:
    """The last arguments of `guard_loss`, as loss_ops.Options has them, up to the backend."""
    return (objective, 0.02, 0.03, 5.0, 1e-3, kl_weight, velocity_kl, invert, reduction)


def _timed_loss(n: Numbers, shape: tuple[int, ...]) -> Iterator[Call]:
    b = shape[0]
    old, noise = n.normal(*shape), n.normal(*shape, of=n.beside)
    velocity = n.normal(*shape).mul_(0.1).add_(old)
    coef, std, dt = n.positive(b), n.positive(b), -n.positive(b)
    advantages = torch.linspace(-1.0, 2.0, b).to(std)
    options = _loss_options("grpo_guard", "mean", 0.0, False, True)
    yield Call("guard_loss", loss_ops.guard_loss, (velocity, old, noise, None, advantages, coef, std, dt, *options))
    of_noise = (n.positive(b)[0], n.positive(3, b), noise, None, None, None, n.dtype, False, False)
    yield Call("transition_bwd", loss_ops.transition_bwd, of_noise)
    step = (torch.arange(b, device=old.device), n.positive(b), coef, std, n.beside)
    yield Call("sde_step", loss_ops.sde_step, (noise, velocity, *step))


def _other_loss(n: Numbers, shape: tuple[int, ...]) -> Iterator[Call]:
    b = shape[0]
    old, noise, ref = n.normal(*shape), n.normal(*shape, of=n.beside), n.normal(*shape)
    velocity = n.normal(*shape).mul_(0.1).add_(old)
    strided = n.normal(b, *reversed(shape[1:])).transpose(1, -1)
    coef, std, dt = n.positive(b), n.positive(b), -n.positive(b)
    advantages = torch.linspace(-1.0, 2.0, b).to(std)
    for from_means, reference in itertools.product((False, True), (None, ref)):
        tensors, kl = (velocity, old, noise, reference), reference is not None
        flags = f"{' means' if from_means else ''}{' reference' if kl else ''}"
        yield Call(f"transition_sums{flags}", loss_ops.transition_sums, (*tensors, from_means))
        for objective in OBJECTIVES:
            velocity_kl = kl and objective == "flow_grpo" and not from_means
            options = _loss_options(objective, "mean", 0.1 * kl, velocity_kl, objective == "grpo_guard")
            weight = None if objective == "flow_dppo" else dt
            args = (*tensors, advantages, None if from_means else coef, std, weight, *options)
            yield Call(f"guard_loss {objective}{flags}", loss_ops.guard_loss, args)
    yield Call("transition_sums strided", loss_ops.transition_sums, (velocity, strided, noise, None, False))
    bwd, grads = loss_ops.transition_bwd, (n.positive(b), n.positive(3, b), noise)
    yield Call("transition_bwd everything", bwd, (*grads, velocity, old, ref, n.dtype, False, True))
    yield Call("transition_bwd means", bwd, (*grads, velocity, old, None, n.dtype, True, True))
    step = (None, n.positive(b), coef, std, n.beside)
    yield Call("sde_step strided, without noise", loss_ops.sde_step, (strided.to(n.beside), velocity, *step))


def _compiled_loss(n: Numbers, shape: tuple[int, ...]) -> Iterator[Call]:
    b, booleans = shape[0], (False, True)
    velocity, old, ref, noise = n.normal(*shape), n.normal(*shape), n.normal(*shape), n.normal(*shape, of=n.beside)
    coef, weight, grads = n.positive(b), n.positive(b), (n.positive(b), n.positive(3, b), noise)
    for from_means, drift, reference in itertools.product(booleans, booleans, (None, ref)):
        v = velocity if drift or reference is not None else None
        args = (*grads, v, old if from_means or drift else None, reference, n.dtype, from_means, drift)
        yield Call("transition_bwd", loss_ops.transition_bwd, args)
    weights = ((None, False), (weight, False), (weight, True))
    every = itertools.product(OBJECTIVES, REDUCTIONS, booleans, (None, ref), booleans, weights)
    for objective, reduction, from_means, reference, velocity_kl, (weighted, invert) in every:
        if velocity_kl and (from_means or reference is None):
            continue  # nobody can ask for it
        options = _loss_options(objective, reduction, 0.1, velocity_kl, invert)
        per_sample = (coef, None if from_means else coef, coef, weighted)
        args = (velocity, old, noise, reference, *per_sample, *options)
        yield Call("guard_loss", loss_ops.guard_loss, args)


# --- the kernels of a Flux block ------------------------------------------------------------------------------------


def _timed_block(n: Numbers, size: Size) -> Iterator[Call]:
    b, tokens, c = size.samples, size.image + size.text, size.width
    x, y, grad = (n.normal(b, tokens, c) for _ in range(3))
    scale, shift, gate = (n.normal(b, c, of=n.beside) for _ in range(3))
    mean, rstd = n.positive(b, tokens), n.positive(b, tokens)
    fwd, bwd = block_ops.adaln_fwd, block_ops.adaln_bwd
    yield Call("adaln_fwd", fwd, (x, None, None, scale, shift, EPS), eager=_eager_adaln)
    yield Call("adaln_fwd residual", fwd, (x, y, gate, scale, shift, EPS), eager=_eager_adaln)
    yield Call("adaln_apply", block_ops.adaln_apply, (x, mean, rstd, scale, shift))
    yield Call("adaln_bwd", bwd, (grad, x, mean, rstd, scale, None, None, None, False))
    yield Call("adaln_bwd residual", bwd, (grad, x, mean, rstd, scale, y, None, gate, False))
    yield Call("adaln_bwd modulation", bwd, (grad, x, mean, rstd, scale, y, y.clone(), gate, True))
    gated_bwd = block_ops.gated_residual_bwd
    yield Call("gated_residual_fwd", block_ops.gated_residual_fwd, (x, y, gate), eager=_eager_gated_residual)
    yield Call("gated_residual_bwd", gated_bwd, (grad, None, gate), eager=lambda g, _, gate: gate[:, None] * g)
    yield Call("gated_residual_bwd gate", gated_bwd, (grad, y, gate))
    yield from _timed_attention(n, size)
    hidden, grad_hidden = n.normal(b, tokens, 4 * c), n.normal(b, tokens, 4 * c)
    bias, act = n.normal(4 * c, of=n.beside), block_ops.bias_gelu_bwd_
    yield Call("bias_gelu_fwd", block_ops.bias_gelu_fwd, (hidden, bias, None), eager=_eager_gelu)
    yield Call("bias_gelu_fwd prefix", block_ops.bias_gelu_fwd, (hidden, bias, x), eager=_eager_gelu)
    yield Call("bias_gelu_bwd_", act, (grad_hidden, hidden, bias, False), overwrites=True)
    yield Call("bias_gelu_bwd_ output", act, (grad_hidden, hidden, bias, True), overwrites=True)


def _timed_attention(n: Numbers, size: Size) -> Iterator[Call]:
    b, s, t, h, d, c = size.samples, size.image, size.text, size.heads, size.head, size.width
    image, text, alone = ([n.normal(b, count, c) for _ in range(3)] for count in (s, t, t + s))
    norms = [n.positive(d, of=n.beside) for _ in range(4)]
    angles = n.positive(t + s, d // 2, of=FP32).repeat_interleave(2, dim=1)
    cos, sin = angles.cos(), angles.sin()
    grads, joined = ([n.normal(b, t + s, h, d) for _ in range(count)] for count in (3, 2))
    split = [tensor.unflatten(-1, (h, d)) for tensor in (*image[:2], *text[:2])]
    rstd = n.positive(2, b, t + s, h)
    fwd, bwd, table = block_ops.qk_norm_rope_fwd, block_ops.qk_norm_rope_bwd, cos.nbytes  # one of each pair of angles
    two, one = (*image, *text, norms, cos, sin, EPS), (*alone, None, None, None, norms[:2], cos, sin, EPS)
    of_two, of_one = (*grads, *split, rstd, norms), (*grads[:2], None, *joined, None, None, rstd, norms[:2])
    yield Call("qk_norm_rope_fwd two streams", fwd, two, eager=_eager_rope, unread_bytes=table)
    yield Call("qk_norm_rope_bwd two streams", bwd, (*of_two, cos, sin, True, False), unread_bytes=table)
    value = alone[2].nbytes
    yield Call("qk_norm_rope_fwd one stream", fwd, one, eager=_eager_rope, unread_bytes=table + value)
    yield Call("qk_norm_rope_bwd one stream", bwd, (*of_one, cos, sin, True, False), unread_bytes=table)
    yield Call("qk_norm_rope_bwd one stream, norms", bwd, (*of_one, cos, sin, False, True), unread_bytes=table)


def _other_block(n: Numbers, size: Size) -> Iterator[Call]:
    b, s, t, h, d, c = size.samples, size.image, size.text, size.heads, size.head, size.width
    x, scale, shift, gate = n.normal(b, s, c), *(n.normal(b, c, of=n.beside) for _ in range(3))
    strided = [n.normal(b, c, s).transpose(1, 2) for _ in range(2)]
    statistics = (n.positive(b, s), n.positive(b, s))
    yield Call("adaln_fwd strided", block_ops.adaln_fwd, (*strided, gate, scale, shift, EPS))
    yield Call("adaln_apply strided", block_ops.adaln_apply, (strided[0], *statistics, scale, shift))
    yield Call("adaln_bwd strided", block_ops.adaln_bwd, (*strided, *statistics, scale, None, None, gate, True))
    yield Call("gated_residual_fwd strided", block_ops.gated_residual_fwd, (*strided, gate))
    yield Call("gated_residual_bwd strided", block_ops.gated_residual_bwd, (*strided, gate))
    grads, norms = [n.normal(b, t + s, h, d) for _ in range(3)], [n.positive(d, of=n.beside) for _ in range(4)]
    split = [n.normal(b, count, h, d) for count in (s, s, t, t)]
    table = n.positive(t + s, d // 2, of=FP32).repeat_interleave(2, dim=1)
    args = (*grads, *split, n.positive(2, b, t + s, h), norms, table.cos(), table.sin(), False, True)
    yield Call("qk_norm_rope_bwd norms", block_ops.qk_norm_rope_bwd, args)
    hidden, grad_hidden = n.normal(b, s, 4 * c), n.normal(b, s, 4 * c)
    yield Call("bias_gelu_fwd prefix, without bias", block_ops.bias_gelu_fwd, (hidden, None, x))
    yield Call("bias_gelu_fwd strided", block_ops.bias_gelu_fwd, (strided[0], None, None))
    args = (grad_hidden, hidden, None, False)
    yield Call("bias_gelu_bwd_ without bias", block_ops.bias_gelu_bwd_, args, overwrites=True)


def _compiled_block(n: Numbers, size: Size) -> Iterator[Call]:
    b, s, h, d, c, booleans = size.samples, size.image, size.heads, size.head, size.width, (False, True)
    x, scale, statistics = n.normal(b, s, c), n.normal(b, c, of=n.beside), (n.positive(b, s), n.positive(b, s))
    for summed, residual, gate, modulation in itertools.product((None, x), (None, x), (None, scale), booleans):
        if residual is None or gate is not None:
            args = (x, x, *statistics, scale, summed, residual, gate, modulation)
            yield Call("adaln_bwd", block_ops.adaln_bwd, args)
    hidden = n.normal(b, s, 4 * c)
    yield Call("bias_gelu_bwd_ output, without bias", block_ops.bias_gelu_bwd_, (hidden, hidden, None, True), True)
    heads, norm, cos = n.normal(b, s, h, d), n.positive(d, of=n.beside), n.positive(s, d, of=FP32)
    rstd = n.positive(2, b, s, h)
    one_stream = (heads, heads, None, heads, heads, None, None, rstd, [norm, norm], cos, cos, False, False)
    yield Call("qk_norm_rope_bwd one stream, not rotated", block_ops.qk_norm_rope_bwd, one_stream)
    half = [heads[:, : s // 2].contiguous() for _ in range(4)]
    two_streams = (heads, heads, heads, *half, rstd, [norm] * 4, cos, cos, False, False)
    yield Call("qk_norm_rope_bwd two streams, not rotated", block_ops.qk_norm_rope_bwd, two_streams)


# --- as diffusers writes them ---------------------------------------------------------------------------------------


def _eager_adaln(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, ...]:
    source = x if y is None or gate is None else _eager_gated_residual(x, y, gate)
    normed = layer_norm(source, (x.shape[-1],), eps=eps) * (1 + scale[:, None]) + shift[:, None]
    return (normed,) if y is None else (normed, source)


def _eager_gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def _eager_gelu(x: Tensor, bias: Tensor, prefix: Tensor | None) -> Tensor:
    hidden = gelu(x + bias, approximate="tanh")
    return hidden if prefix is None else torch.cat([prefix, hidden], dim=-1)


def _eager_rope(*args: Any) -> list[Tensor]:
    """Query and key of each stream normalized, the streams joined, query and key rotated."""
    from diffusers.models.embeddings import apply_rotary_emb  # takes seconds, which most users of this list can spare

    streams, (norms, cos, sin, eps) = [args[:3], args[3:6]], args[6:]
    parts = []
    for stream, weights in ((streams[1], norms[2:]), (streams[0], norms[:2])):
        if stream[0] is not None:
            query, key, value = (tensor.unflatten(-1, (-1, cos.shape[-1])) for tensor in stream)
            normed = [rms_norm(t, t.shape[-1:], w, eps) for t, w in zip((query, key), weights, strict=True)]
            parts.append([*normed, value])
    joined = [torch.cat(tensors, dim=1) if len(parts) > 1 else tensors[0] for tensors in zip(*parts, strict=True)]
    table: Any = (cos, sin)  # diffusers' annotation says a tuple of one
    rotated = [apply_rotary_emb(part, table, sequence_dim=1) for part in joined[:2]]
    return [*rotated, joined[2]] if len(parts) > 1 else rotated


if __name__ == "__main__":
    everything = calls(BF16, "cuda" if torch.cuda.is_available() else "cpu", ODD)
    for operator_call in everything:
        assert_agrees(operator_call)
    print(f"{len(everything)} passed: calls of every operator agree with float64")
