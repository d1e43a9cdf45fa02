"""Every registered operator with every kind of arguments, for tests that treat all kernels alike.

Axes: B sample, S image token, T text token, C channel of a token, H head, D channel of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastguard.ops.adaln import adaln_apply, adaln_bwd, adaln_fwd
from fastguard.ops.gated_residual import gated_residual_bwd, gated_residual_fwd
from fastguard.ops.gelu import bias_gelu_bwd_, bias_gelu_fwd
from fastguard.ops.qk_norm_rope import qk_norm_rope_bwd, qk_norm_rope_fwd
from fastguard.ops.sde_step import sde_step
from fastguard.ops.transition import guard_loss, transition_bwd, transition_sums


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
# As a block of Flux.1-dev has them at 512^2.
FLUX = Size(samples=2, image=1024, text=512, heads=24, head=128)


@dataclass(frozen=True)
class Call:
    """One call of an operator; the backend is its last argument."""

    name: str
    op: Any
    args: tuple[Any, ...]
    overwrites: bool = False
    """whether it writes its result over its first argument"""

    def __call__(self) -> list[Tensor]:
        """All that it writes."""
        args = self.args
        if self.overwrites:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        results = [t for t in tree_leaves(self.op(*args)) if t.numel()]
        return [*results, args[0]] if self.overwrites else results

    def in_float64(self) -> Call:
        """The same with the plain torch backend, in float64 on the host."""

        def widen(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.cpu().double() if leaf.is_floating_point() else leaf.cpu()
            return torch.float64 if isinstance(leaf, torch.dtype) else leaf

        return replace(self, args=(*tree_map(widen, self.args[:-1]), "torch"))


def calls(dtype: torch.dtype, device: str, size: Size = SMALL, backend: str = "triton") -> list[Call]:
    """Each operator with each of its optional arguments there and absent, contiguous and strided."""
    generator = torch.Generator().manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)  # of statistics and per-sample numbers

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def positive(*shape: int, of: torch.dtype = wide) -> Tensor:
        return (torch.rand(*shape, generator=generator) + 0.5).to(device, of)

    found = [*_of_the_loss(normal, positive, size), *_of_flux(normal, positive, size)]
    return [replace(call, args=(*call.args, backend)) for call in found]


def _of_the_loss(normal: Callable[..., Tensor], positive: Callable[..., Tensor], size: Size) -> Iterator[Call]:
    b, shape = size.samples, (size.samples, size.image, size.width)
    old, noise, ref = normal(*shape), normal(*shape), normal(*shape)
    velocity = old + 0.1 * normal(*shape)
    strided = normal(b, size.width, size.image).transpose(1, 2)
    coef, std, dt = positive(b), positive(b), -positive(b)
    advantages = torch.linspace(-1.0, 2.0, b).to(std)
    for from_means in (False, True):
        for ref_or_not in (None, ref):
            tensors = (velocity, old, noise, ref_or_not)
            flags = f"{' means' if from_means else ''}{' reference' if ref_or_not is not None else ''}"
            yield Call(f"transition_sums{flags}", transition_sums, (*tensors, from_means))
            for code in (0, 1, 2):  # of FusedEpilogue
                kl_weight = 0.1 if ref_or_not is not None else 0.0
                velocity_kl = ref_or_not is not None and code == 1 and not from_means
                options = (code, 0.02, 0.03, 5.0, 1e-3, kl_weight, velocity_kl, code == 0, "mean")
                weight = None if code == 2 else dt
                per_sample = (advantages, None if from_means else coef, std, weight)
                yield Call(f"guard_loss {code}{flags}", guard_loss, (*tensors, *per_sample, *options))
    coefs, grad_loss = positive(3, b), positive(b)
    yield Call("transition_sums strided", transition_sums, (velocity, strided, noise, None, False))
    yield Call(
        "transition_bwd noise", transition_bwd,
        (grad_loss[0], coefs, noise, None, None, None, noise.dtype, False, False),
    )  # fmt: skip
    yield Call(
        "transition_bwd everything", transition_bwd,
        (grad_loss, coefs, noise, velocity, old, ref, noise.dtype, False, True),
    )  # fmt: skip
    yield Call(
        "transition_bwd means", transition_bwd,
        (grad_loss, coefs, noise, velocity, old, None, noise.dtype, True, True),
    )  # fmt: skip
    seeds = torch.arange(b, device=noise.device)
    step = (positive(b), coef, std)
    yield Call("sde_step", sde_step, (old, velocity, seeds, *step, noise.dtype))
    yield Call("sde_step strided, without noise", sde_step, (strided, velocity, None, *step, noise.dtype))


def _of_flux(normal: Callable[..., Tensor], positive: Callable[..., Tensor], size: Size) -> Iterator[Call]:
    b, s, c = size.samples, size.image, size.width
    x, y, grad = normal(b, s, c), normal(b, s, c), normal(b, s, c)
    scale, shift, gate = normal(b, c), normal(b, c), normal(b, c)
    mean, rstd = positive(b, s), positive(b, s)
    strided = [normal(b, c, s).transpose(1, 2) for _ in range(2)]
    yield Call("adaln_fwd", adaln_fwd, (x, None, None, scale, shift, 1e-6))
    yield Call("adaln_fwd residual", adaln_fwd, (x, y, gate, scale, shift, 1e-6))
    yield Call("adaln_fwd strided", adaln_fwd, (*strided, gate, scale, shift, 1e-6))
    yield Call("adaln_apply", adaln_apply, (x, mean, rstd, scale, shift))
    yield Call("adaln_apply strided", adaln_apply, (strided[0], mean, rstd, scale, shift))
    statistics = (mean, rstd, scale)
    yield Call("adaln_bwd", adaln_bwd, (grad, x, *statistics, None, None, None, False))
    yield Call("adaln_bwd everything", adaln_bwd, (grad, x, *statistics, y, y, gate, True))
    yield Call("adaln_bwd strided", adaln_bwd, (*strided, *statistics, None, None, gate, True))
    yield Call("gated_residual_fwd", gated_residual_fwd, (x, y, gate))
    yield Call("gated_residual_fwd strided", gated_residual_fwd, (*strided, gate))
    yield Call("gated_residual_bwd", gated_residual_bwd, (grad, None, gate))
    yield Call("gated_residual_bwd gate", gated_residual_bwd, (grad, y, gate))
    yield Call("gated_residual_bwd strided", gated_residual_bwd, (*strided, gate))
    yield from _of_attention(normal, positive, size)
    hidden, grad_hidden, bias = normal(b, s, 4 * c), normal(b, s, 4 * c), normal(4 * c)
    yield Call("bias_gelu_fwd", bias_gelu_fwd, (hidden, bias, None))
    yield Call("bias_gelu_fwd prefix", bias_gelu_fwd, (hidden, None, x))
    yield Call("bias_gelu_fwd strided", bias_gelu_fwd, (strided[0], None, None))
    yield Call("bias_gelu_bwd_", bias_gelu_bwd_, (grad_hidden, hidden, None, False), overwrites=True)
    yield Call("bias_gelu_bwd_ output", bias_gelu_bwd_, (grad_hidden, hidden, bias, True), overwrites=True)


def _of_attention(normal: Callable[..., Tensor], positive: Callable[..., Tensor], size: Size) -> Iterator[Call]:
    b, s, t, h, d, c = size.samples, size.image, size.text, size.heads, size.head, size.width
    image, text = [normal(b, s, c) for _ in range(3)], [normal(b, t, c) for _ in range(3)]
    norms = [positive(d, of=image[0].dtype) for _ in range(4)]
    angles = positive(t + s, d // 2, of=torch.float32).repeat_interleave(2, dim=1)
    cos, sin = angles.cos(), angles.sin()
    alone = (cos[:s], sin[:s])
    yield Call("qk_norm_rope_fwd two streams", qk_norm_rope_fwd, (*image, *text, norms, cos, sin, 1e-6))
    one_stream = (*image, None, None, None, norms[:2], *alone, 1e-6)
    yield Call("qk_norm_rope_fwd one stream", qk_norm_rope_fwd, one_stream)
    grads = [normal(b, t + s, h, d) for _ in range(3)]
    heads = [tensor.unflatten(-1, (h, d)) for tensor in (*image[:2], *text[:2])]
    rstd = positive(2, b, t + s, h)
    bwd = qk_norm_rope_bwd
    yield Call("qk_norm_rope_bwd two streams", bwd, (*grads, *heads, rstd, norms, cos, sin, True, False))
    yield Call("qk_norm_rope_bwd norms", bwd, (*grads, *heads, rstd, norms, cos, sin, False, True))
    single = [grad[:, :s].contiguous() for grad in grads[:2]]
    alone_args = (*single, None, *heads[:2], None, None, rstd[:, :, :s].contiguous(), norms[:2], *alone, True, False)
    yield Call("qk_norm_rope_bwd one stream", bwd, alone_args)
