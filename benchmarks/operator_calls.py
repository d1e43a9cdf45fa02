"""The one list of operator calls: tests, times, bytes, machine code and compute-sanitizer all take theirs from it.

    python benchmarks/operator_calls.py    every operator once on the GPU, against float64: compute-sanitizer runs this

Axes: B sample, S image token, T text token, C channel of a token, H head, D channel of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, rms_norm, silu
from torch.utils._pytree import tree_leaves, tree_map

from fastguard.loss.objectives import OBJECTIVES, build_objective
from fastguard.ops.adaln import adaln_apply, adaln_bwd, adaln_fwd
from fastguard.ops.add_product import add_product_
from fastguard.ops.dequantize import dequantize_blocks, dequantize_rows
from fastguard.ops.gated_residual import gated_residual_bwd, gated_residual_fwd
from fastguard.ops.gelu import bias_gelu_bwd_, bias_gelu_fwd
from fastguard.ops.qk_norm_rope import qk_norm_rope_bwd, qk_norm_rope_fwd
from fastguard.ops.sde_step import sde_step
from fastguard.ops.spaced_rows import over_spaced_rows
from fastguard.ops.swiglu import swiglu_bwd_, swiglu_fwd
from fastguard.ops.transition import guard_loss, transition_bwd, transition_sums

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAMES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
CODES = [fused.code for name in OBJECTIVES if (fused := build_objective(name).fused()) is not None]
"""Of the objectives with a fused epilogue: 0 is RatioNorm's, 1 the plain ratio's, 2 the mask's (`FusedEpilogue`)."""
REDUCTIONS = ("none", "sum", "mean")
EPS = 1e-6


@dataclass(frozen=True)
class Size:
    """Of what the operators are given: B, S, T, H and D."""

    samples: int
    image: int
    text: int
    heads: int
    head: int

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
    use: Literal["timed", "tested", "compiled"] = "tested"
    """timed: as training makes it. compiled: its machine code is looked at, and it is not run."""
    overwrites: bool = False
    """whether it writes its result over its first argument"""
    eager: Callable[..., Any] | None = None
    """the same from the same arguments, as diffusers writes it; None where that takes diffusers, and it is missing"""
    unread_bytes: int = 0
    """of tensors that it is given for their place in its signature, or reads half of"""

    def __call__(self) -> list[Tensor]:
        """All that it writes."""
        args = self.args
        if self.overwrites:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        results = [t for t in tree_leaves(self.op(*args)) if t is not None and t.numel()]
        return [*results, args[0]] if self.overwrites else results

    def on(self, backend: str) -> Call:
        return replace(self, args=(*self.args, backend))

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
        return n_bytes(self.args) + n_bytes(self()) - self.unread_bytes


def n_bytes(tensors: Any) -> int:
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
        off = relative_error(got, want)
        assert off <= of_results[got.dtype], f"{call.name}: {off:.1e} off"
    eager = [t for t in tree_leaves(call.run_eager()) if isinstance(t, Tensor)]
    for got, want in zip(eager, results, strict=False):  # an operator's statistics come after what both give
        off = relative_error(got, want)
        assert off <= 8 * max(ulp, 1e-5), f"{call.name}: the eager form is {off:.1e} off"  # it rounds at every step


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference, of the norm of `want`."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


class Numbers:
    """Makes tensors of one kind. beside: of latents and noise next to a bf16 velocity, of weights next to activations.

    Not `filled`, they take no time, and hold whatever the memory held.
    """

    def __init__(self, dtype: torch.dtype, device: str, beside: torch.dtype | None = None, filled: bool = True) -> None:
        self.dtype, self.beside, self.device, self._filled = dtype, beside or dtype, device, filled
        self.wide = torch.promote_types(dtype, FP32)  # of statistics and per-sample numbers
        self._generator = torch.Generator(device).manual_seed(3)

    def normal(self, *shape: int, of: torch.dtype | None = None) -> Tensor:
        return self._make(torch.randn, shape, of or self.dtype)

    def positive(self, *shape: int, of: torch.dtype | None = None) -> Tensor:
        return self._make(torch.rand, shape, of or self.wide).add_(0.5)

    def bytes(self, *shape: int) -> Tensor:
        if not self._filled:
            return torch.empty(shape, dtype=torch.uint8, device=self.device)
        return torch.randint(256, shape, generator=self._generator, device=self.device, dtype=torch.uint8)

    def _make(self, random: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if not self._filled:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return random(*shape, generator=self._generator, device=self.device).to(dtype)


def calls(dtype: torch.dtype, device: str, size: Size = SMALL, backend: str = "triton") -> list[Call]:
    """Each operator with each of its optional arguments there and absent, contiguous and strided."""
    n = Numbers(dtype, device)
    found = [*_loss(n, (size.samples, size.image, size.width)), *_block(n, size), *_frozen_weights(n, size)]
    return [call.on(backend) for call in found if call.use != "compiled"]


def timed_loss_calls(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Loss, its gradient and the rollout's step, as training makes them, by name."""
    return {call.name: call.on("triton") for call in _loss(Numbers(dtype, device), shape) if call.use == "timed"}


def timed_block_calls(size: Size, dtype: torch.dtype, device: str, filled: bool = True) -> dict[str, Call]:
    """As a fused block makes them. The text stream's calls are left out: they are smaller copies of the image's."""
    n = Numbers(dtype, device, filled=filled)
    return {
        call.name: call.on("triton") for call in (*_block(n, size), *_frozen_weights(n, size)) if call.use == "timed"
    }


def compiled_calls(dtype: torch.dtype, beside: torch.dtype) -> Iterator[Call]:
    """Every combination of options that has machine code of its own, at sizes of Flux; the tensors are not filled."""
    n = Numbers(dtype, "cpu", beside, filled=False)
    size = replace(FLUX_512, samples=2)
    lists = [_block(n, size), _frozen_weights(n, size), *(_loss(n, (2, tokens, 64)) for tokens in (1024, 4096))]
    for call in itertools.chain(*lists):  # the two sizes of latents have a tile of the epilogue each
        if call.op not in (over_spaced_rows, add_product_):  # which have no kernel of ours
            yield call.on("triton")


def _loss_options(
    code: int, reduction: str, kl_weight: float, velocity_kl: bool, invert: bool, from_means: bool = False
) -> tuple[Any, ...]:
    """The last arguments of `guard_loss`, up to the backend."""
    return (code, 0.02, 0.03, 5.0, 1e-3, from_means, kl_weight, velocity_kl, invert, reduction)


def _loss(n: Numbers, shape: tuple[int, ...]) -> Iterator[Call]:
    b, device = shape[0], n.device
    old, ref, noise = n.normal(*shape), n.normal(*shape), n.normal(*shape, of=n.beside)
    velocity = n.normal(*shape).mul_(0.1).add_(old)
    coef, std, dt, one, coefs = n.positive(b), n.positive(b), -n.positive(b), n.positive(b), n.positive(3, b)
    advantages, seeds = torch.linspace(-1.0, 2.0, b).to(device, n.wide), torch.arange(b, device=device)
    sums, loss, bwd, step = transition_sums, guard_loss, transition_bwd, sde_step
    options = _loss_options(CODES[0], "mean", 0.0, False, True)
    yield Call("guard_loss", loss, (velocity, old, noise, None, advantages, coef, std, dt, None, *options), "timed")
    yield Call("transition_bwd", bwd, (one[0], coefs, noise, None, None, None, n.dtype, False, False), "timed")
    yield Call("sde_step", step, (noise, velocity, seeds, None, one, coef, std, n.beside), "timed")
    yield Call("sde_step of given noise", step, (noise, velocity, None, strided(old), one, coef, std, n.beside))
    yield Call("sde_step strided, no noise", step, (strided(noise), velocity, None, None, one, coef, std, n.beside))
    yield Call("transition_sums strided", sums, (velocity, strided(old), noise, None, False, None))
    for from_means, reference in itertools.product((False, True), (None, ref)):
        tensors, kl = (velocity, old, noise, reference), reference is not None
        flags = f"{' means' if from_means else ''}{' reference' if kl else ''}"
        for spread in (None, 0.5) if from_means else (None,):
            errors = "" if spread is None else " errors"
            yield Call(f"transition_sums{flags}{errors}", sums, (*tensors, from_means, spread))
        usual = {(0, True, True), (1, True, False), (2, False, False)}
        weights = ((None, False), (dt, False), (dt, True))
        for code, reduction, (weight, invert) in itertools.product(CODES, REDUCTIONS, weights):
            mean = reduction == "mean"
            kinds = [(False, None)] + [(True, None)] * (kl and (mean or not from_means))
            # A weight of the KL per sample is one load more: with the mean alone.
            for velocity_kl, kl_weights in kinds + [(velocity_kl, one) for velocity_kl, _ in kinds] * (kl and mean):
                tested = (code, weight is not None, invert) in usual and mean
                tested &= velocity_kl == (code == 1 and kl) and (kl_weights is not None) == (code == 2 and kl)
                options = _loss_options(code, reduction, 0.1 * kl, velocity_kl, invert, from_means)
                args = (*tensors, advantages, coef, std, weight, kl_weights, *options)
                yield Call(f"guard_loss {code}{flags}", loss, args, "tested" if tested else "compiled")
        for drift in (False, True):
            needs = (velocity if drift or kl else None, old if drift or from_means else None, reference)
            tested = drift and kl != from_means
            args = (one, coefs, noise, *needs, n.dtype, from_means, drift)
            yield Call(f"transition_bwd{flags}", bwd, args, "tested" if tested else "compiled")


def _block(n: Numbers, size: Size) -> Iterator[Call]:
    b, s, t, h, d, c = size.samples, size.image, size.text, size.heads, size.head, size.width
    x, y, z, grad = (n.normal(b, t + s, c) for _ in range(4))
    scale, shift, gate = (n.normal(b, c, of=n.beside) for _ in range(3))
    rows = (n.positive(b, t + s), n.positive(b, t + s))
    fwd, apply, bwd = adaln_fwd, adaln_apply, adaln_bwd
    yield Call("adaln_fwd", fwd, (x, None, None, scale, shift, EPS), "timed", eager=_eager_adaln)
    yield Call("adaln_fwd residual", fwd, (x, y, gate, scale, shift, EPS), "timed", eager=_eager_adaln)
    yield Call("adaln_fwd strided", fwd, (strided(x), strided(y), gate, scale, shift, EPS))
    yield Call("adaln_apply", apply, (x, *rows, scale, shift), "timed")
    yield Call("adaln_apply strided", apply, (strided(x), *rows, scale, shift))
    yield Call("adaln_bwd", bwd, (grad, x, *rows, scale, None, None, None, False), "timed")
    yield Call("adaln_bwd residual", bwd, (grad, x, *rows, scale, y, None, gate, False), "timed")
    yield Call("adaln_bwd modulation", bwd, (grad, x, *rows, scale, y, z, gate, True), "timed")
    yield Call("adaln_bwd strided", bwd, (strided(grad), strided(x), *rows, scale, None, None, gate, True))
    for summed, residual, gated, modulation in itertools.product((None, y), (None, z), (None, gate), (False, True)):
        if residual is None or gated is not None:
            yield Call("adaln_bwd", bwd, (grad, x, *rows, scale, summed, residual, gated, modulation), "compiled")
    fwd, bwd = gated_residual_fwd, gated_residual_bwd
    yield Call("gated_residual_fwd", fwd, (x, y, gate), "timed", eager=_eager_gated_residual)
    yield Call("gated_residual_fwd strided", fwd, (strided(x), strided(y), gate))
    yield Call("gated_residual_bwd", bwd, (grad, None, gate), "timed", eager=lambda g, _, gate: gate[:, None] * g)
    yield Call("gated_residual_bwd gate", bwd, (grad, y, gate), "timed")
    yield Call("gated_residual_bwd strided", bwd, (strided(grad), strided(y), gate))
    image, text = ([n.normal(b, count, c) for _ in range(3)] for count in (s, t))
    norms = [n.positive(d, of=n.beside) for _ in range(4)]
    angles = n.positive(t + s, d // 2, of=FP32).repeat_interleave(2, dim=1)
    cos, sin, rstd = angles.cos(), angles.sin(), n.positive(2, b, t + s, h)
    fwd, bwd, table = qk_norm_rope_fwd, qk_norm_rope_bwd, cos.nbytes  # one of each pair of angles
    one, split = [part.unflatten(-1, (h, d)) for part in (x, y, z, grad)], [*image[:2], *text[:2]]
    of_two = (*one[:3], *(part.unflatten(-1, (h, d)) for part in split), rstd, norms)
    of_one = (*one[:2], None, *one[2:], None, None, rstd, norms[:2])
    args: tuple[Any, ...] = (*image, *text, norms, cos, sin, EPS)
    eager_rope = _eager_rope if find_spec("diffusers") else None
    yield Call("qk_norm_rope_fwd two streams", fwd, args, "timed", eager=eager_rope, unread_bytes=table)
    yield Call("qk_norm_rope_bwd two streams", bwd, (*of_two, cos, sin, True, False), "timed", unread_bytes=table)
    args, unread = (x, y, z, None, None, None, norms[:2], cos, sin, EPS), table + z.nbytes
    yield Call("qk_norm_rope_fwd one stream", fwd, args, "timed", eager=eager_rope, unread_bytes=unread)
    yield Call("qk_norm_rope_bwd one stream", bwd, (*of_one, cos, sin, True, False), "timed", unread_bytes=table)
    yield Call("qk_norm_rope_bwd one stream, norms", bwd, (*of_one, cos, sin, False, True), "timed", unread_bytes=table)
    yield Call("qk_norm_rope_bwd two streams, norms", bwd, (*of_two, cos, sin, False, True))
    yield Call("qk_norm_rope_bwd two streams, not rotated", bwd, (*of_two, cos, sin, False, False), "compiled")
    yield Call("qk_norm_rope_bwd one stream, not rotated", bwd, (*of_one, cos, sin, False, False), "compiled")
    args = (*image, *text, norms, None, None, EPS)
    yield Call("qk_norm_rope_fwd two streams, no rope", fwd, args, "timed", eager=_eager_norm)
    yield Call("qk_norm_rope_bwd two streams, no rope", bwd, (*of_two, None, None, True, False), "timed")
    yield Call("qk_norm_rope_bwd two streams, no rope, norms", bwd, (*of_two, None, None, False, True))
    args = (x, y, z, None, None, None, norms[:2], None, None, EPS)
    yield Call("qk_norm_rope_fwd one stream, no rope", fwd, args, eager=_eager_norm)
    yield Call("qk_norm_rope_bwd one stream, no rope", bwd, (*of_one, None, None, True, False))
    yield Call("qk_norm_rope_bwd one stream, no rope, norms", bwd, (*of_one, None, None, False, True))
    for streams, of in (("two streams", of_two), ("one stream", of_one)):
        call = f"qk_norm_rope_bwd {streams}, no rope, not rotated"
        yield Call(call, bwd, (*of, None, None, False, False), "compiled")
    wide, grad_wide, bias = n.normal(b, t + s, 4 * c), n.normal(b, t + s, 4 * c), n.normal(4 * c, of=n.beside)
    fwd, inplace = bias_gelu_fwd, bias_gelu_bwd_
    joined = n.normal(b, t + s, c)
    yield Call("over_spaced_rows", over_spaced_rows, (n.normal(b * s, c), joined[:, t:]))
    low, up = n.normal(b * s, 4), n.normal(c, 4)
    yield Call("add_product_", add_product_, (n.normal(b * s, c), low, up.T), overwrites=True)
    yield Call("bias_gelu_fwd", fwd, (wide, bias, None), "timed", eager=_eager_gelu)
    yield Call("bias_gelu_fwd prefix", fwd, (wide, bias, x), "timed", eager=_eager_gelu)
    yield Call("bias_gelu_fwd prefix, without bias", fwd, (wide, None, x))
    yield Call("bias_gelu_fwd strided", fwd, (strided(x), None, None))
    yield Call("bias_gelu_bwd_", inplace, (grad_wide, wide, bias, False), "timed", overwrites=True)
    yield Call("bias_gelu_bwd_ output", inplace, (grad_wide, wide, bias, True), "timed", overwrites=True)
    yield Call("bias_gelu_bwd_ without bias", inplace, (grad_wide, wide, None, False), overwrites=True)
    yield Call("bias_gelu_bwd_ output, no bias", inplace, (grad_wide, wide, None, True), "compiled", overwrites=True)
    gated, grad_gated = n.normal(b, t + s, 6 * c), n.normal(b, t + s, 3 * c)
    fwd, bwd = swiglu_fwd, swiglu_bwd_
    yield Call("swiglu_fwd", fwd, (gated, None), "timed", eager=_eager_swiglu)
    yield Call("swiglu_fwd prefix", fwd, (gated, x), "timed", eager=_eager_swiglu)
    yield Call("swiglu_fwd strided", fwd, (strided(gated), strided(x)))
    yield Call("swiglu_bwd_", bwd, (grad_gated, gated, False), "timed")
    yield Call("swiglu_bwd_ output", bwd, (grad_gated, gated, True), "timed", overwrites=True)
    yield Call("swiglu_bwd_ strided", bwd, (grad_gated, strided(gated), True), overwrites=True)


def _frozen_weights(n: Numbers, size: Size) -> Iterator[Call]:
    """The first layer of a feed-forward, (4 C, C), in 8 and in 4 bits."""
    rows, channels = 4 * size.width, size.width
    scale = n.positive(rows, of=FP32)
    codes = n.bytes(rows, channels)
    float8 = codes.where(codes & 0x7F != 0x7F, codes - 1)  # which are its NaN
    yield Call("dequantize_rows int8", dequantize_rows, (scale, codes.view(torch.int8), n.dtype, False), "timed")
    yield Call("dequantize_rows float8", dequantize_rows, (scale, float8, n.dtype, False), "timed")
    largest = next(power for power in (64, 32, 16, 8, 4, 2) if rows * channels % power == 0)
    blocks = rows * channels // largest
    table, codes = n.normal(16, of=FP32), n.bytes(rows, channels // 2)
    outer = n.positive(-(-blocks // 256), of=FP32)
    nested = (n.bytes(blocks), n.normal(256, of=FP32), n.positive(1, of=FP32)[0])
    args: tuple[Any, ...] = (outer, codes, table, *nested, blocks, 256, n.dtype, False)
    yield Call("dequantize_blocks", dequantize_blocks, args, "timed")
    args = (n.positive(blocks, of=FP32), codes, table, None, None, None, blocks, 256, n.dtype, True)
    yield Call("dequantize_blocks, one level", dequantize_blocks, args)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers, laid out with the second axis innermost."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _eager_adaln(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, ...]:
    source = x if y is None or gate is None else _eager_gated_residual(x, y, gate)
    normed = layer_norm(source, (x.shape[-1],), eps=eps) * (1 + scale[:, None]) + shift[:, None]
    return (normed,) if y is None else (normed, source)


def _eager_gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate[:, None] * y


def _eager_swiglu(x: Tensor, prefix: Tensor | None) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    hidden = silu(a) * b
    return hidden if prefix is None else torch.cat([prefix, hidden], dim=-1)


def _eager_gelu(x: Tensor, bias: Tensor, prefix: Tensor | None) -> Tensor:
    hidden = gelu(x + bias, approximate="tanh")
    return hidden if prefix is None else torch.cat([prefix, hidden], dim=-1)


def _eager_norm(*args: Any) -> list[Tensor]:
    """Query and key of each stream normalized, and the streams joined."""
    streams, (norms, _, _, eps) = [args[:3], args[3:6]], args[6:]
    parts: list[list[Tensor]] = []
    for stream, weights in ((streams[1], norms[2:]), (streams[0], norms[:2])):
        if stream[0] is not None:
            query, key, value = (tensor.unflatten(-1, (-1, len(norms[0]))) for tensor in stream)
            normed = [rms_norm(t, t.shape[-1:], w, eps) for t, w in zip((query, key), weights, strict=True)]
            parts.append([*normed, value])
    return [torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)] if len(parts) > 1 else parts[0][:2]


def _eager_rope(*args: Any) -> list[Tensor]:
    """`_eager_norm`, and query and key rotated."""
    from diffusers.models.embeddings import apply_rotary_emb  # takes seconds, which most users of this list can spare

    joined = _eager_norm(*args)
    table: Any = args[7:9]  # diffusers' annotations say a tuple of one, and a tuple of results
    rotated: list[Any] = [apply_rotary_emb(part, table, sequence_dim=1) for part in joined[:2]]
    return [*rotated, *joined[2:]]


if __name__ == "__main__":
    everything = calls(BF16, "cuda" if torch.cuda.is_available() else "cpu", ODD)
    for operator_call in everything:
        assert_agrees(operator_call)
    print(f"{len(everything)} passed: calls of every operator agree with float64")
