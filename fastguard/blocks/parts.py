"""The parts of which the forward of a fused adaLN transformer block is made.

`fusion` says how the block runs. Axes: B sample, S token, T text token, C channel, H head, D head channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from fastguard.blocks.architecture import Fusion, part_of, qk_norms
from fastguard.blocks.linear import (
    Activation,
    AdaLNSources,
    Hidden,
    HiddenSources,
    LinearWeights,
    Normed,
    activated_linear,
    linear_weights,
    projections,
)
from fastguard.blocks.quantized import detached
from fastguard.ops.adaln import AdaLNFunction
from fastguard.ops.gated_residual import GatedResidualFunction
from fastguard.ops.gelu import BiasGeluFunction
from fastguard.ops.qk_norm_rope import QKNormRopeFunction
from fastguard.ops.registry import autocast_to
from fastguard.ops.swiglu import SwiGLUFunction

# --- LayerNorm + modulate, gated residual ---------------------------------------------------------------------------


def modulate(
    x: Tensor,
    norm: nn.LayerNorm,
    scale: Tensor,
    shift: Tensor,
    fusion: Fusion,
    residual: tuple[Tensor, Tensor] | None = None,
) -> tuple[Normed, Tensor]:
    """`LayerNorm(x) (1 + scale) + shift`, of `x + gate y` with residual = (y, gate); and what was normalized.

    x, y: (B, S, C); scale, shift, gate: (B, C).
    """
    y, gate = residual or (None, None)
    value, summed, mean, rstd = AdaLNFunction.apply(x, y, gate, scale, shift, norm.eps, fusion.backend)
    x = x if y is None else summed
    sources = AdaLNSources(x.detach(), mean, rstd, scale.detach(), shift.detach())
    return Normed(value, None if fusion.recompute == "none" else sources), x


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, fusion: Fusion) -> Tensor:
    """`x + gate y`: x, y (B, S, C); gate (B, C)."""
    return GatedResidualFunction.apply(x, y, gate, fusion.backend)


def per_sample(temb: Tensor, x: Tensor) -> Tensor:
    """One row of temb for each sample of x, also where one row (1, C) is broadcast to the batch: a batch of any size
    then runs the same way and gives the same bits."""
    return temb.expand(len(x), -1) if temb.ndim == 2 and len(temb) == 1 else temb


def within_float16(x: Tensor) -> Tensor:
    """Clipped to float16's range, as diffusers does: its blocks may overflow there."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


# --- linear layers --------------------------------------------------------------------------------------------------


def project(normed: Normed, modules: Sequence[nn.Module], fusion: Fusion) -> list[Tensor]:
    """The outputs of linear layers that share the input `normed`."""
    linears = _weights_of(modules, normed.value)
    if linears is None:
        return [module(normed.value) for module in modules]
    return projections(_cast(normed), linears, fusion.backend)[0]


def project_with_hidden(
    normed: Normed,
    modules: Sequence[nn.Module],
    hidden_layer: nn.Module,
    fusion: Fusion,
    activation: Activation = "gelu",
    sizes: tuple[int, ...] = (),
) -> tuple[list[Tensor], Hidden]:
    """`project`, and the output of a feed-forward's first layer that shares the input, before its activation.

    sizes: the layer gives outputs of these sizes side by side, of which the last is the feed-forward's.
    """
    linears = _weights_of([*modules, hidden_layer], normed.value)
    if linears is None:
        outputs = [module(normed.value) for module in (*modules, hidden_layer)]
        if sizes:
            width = outputs[-1].shape[-1]  # a process of tensor parallelism has its share of each
            outputs[-1:] = outputs[-1].split_with_sizes([width * size // sum(sizes) for size in sizes], dim=-1)
        return outputs[:-1], Hidden(outputs[-1], None, None, activation)
    normed, last = _cast(normed), linears[-1]
    # The kernel of GELU adds the bias of a layer that has one output.
    bias, later = (None, last.bias) if activation == "gelu" and not sizes else (last.bias, None)
    outputs, low = projections(normed, [*linears[:-1], last._replace(bias=bias)], fusion.backend, sizes)
    sources = None
    if fusion.recompute == "mlp" and normed.sources is not None:
        mine = None if last.up is None else low[..., low.shape[-1] - last.up.shape[1] :]
        own_bias, up = (None if t is None else t.detach()[-outputs[-1].shape[-1] :] for t in (bias, last.up))
        sources = HiddenSources(normed.sources, own_bias, mine, up, detached(last.weight))
    return outputs[:-1], Hidden(outputs[-1], later, sources, activation)


def activate(hidden: Hidden, module: nn.Module, fusion: Fusion, prefix: Tensor | None = None) -> Tensor:
    """`module([prefix, activation(hidden)])`; prefix (B, S, P)."""
    linears = _weights_of([module], hidden.value)
    if linears is not None:
        return activated_linear(hidden, prefix, linears[0], fusion.recompute == "none", fusion.backend)
    if hidden.activation == "gelu":
        return module(BiasGeluFunction.apply(hidden.value, hidden.bias, prefix, fusion.backend))
    return module(SwiGLUFunction.apply(hidden.value, prefix, fusion.backend))


def linear(x: Tensor, module: nn.Module, fusion: Fusion) -> Tensor:
    """A linear layer whose input is saved for backward anyway, such as attention's output."""
    linears = _weights_of([module], x)
    if linears is None:
        return module(x.contiguous())  # as diffusers does; F.linear rounds twice where it is not
    return projections(_cast(Normed(x, None)), linears, fusion.backend)[0][0]


def _weights_of(modules: Sequence[nn.Module], x: Tensor) -> list[LinearWeights] | None:
    """The weights of all of these layers, or None if one of them has to be called."""
    narrow = autocast_to(x.device)
    found = [linear_weights(module, narrow or x.dtype, narrow is not None) for module in modules]
    return None if any(isinstance(weights, str) for weights in found) else found  # type: ignore[return-value]


def _cast(normed: Normed) -> Normed:
    """In the dtype of the matmuls, which is narrower under autocast."""
    value = normed.value
    return normed._replace(value=value.to(autocast_to(value.device) or value.dtype))


# --- attention ------------------------------------------------------------------------------------------------------


IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
"""Names of the projections of attention over image and text, for `BlockSpec.linears`."""


def qk_norm_rope(
    stream: Sequence[Tensor],
    before: Sequence[Tensor] | None,
    norms: Sequence[Any],
    rope: tuple[Tensor, Tensor] | None,
    fusion: Fusion,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as attention reads them, (B, T + S, H, D): query and key are normalized and rotated.

    stream: the projections (query, key, value), (B, S, H D) each. before: those of a second stream, (B, T, H D), which
    comes first in the joined sequence; or None. norms: RMSNorms of the stream's query and key, then of `before`'s.
    rope: cos and sin, (T + S, D), equal in each pair of channels (2i, 2i + 1); None rotates nothing.
    """
    weights = [norm.weight for norm in norms]
    rotated = fusion.rotated and not any(weight.requires_grad for weight in weights)
    query, key, value = stream
    tables = [table.to(device=query.device, dtype=torch.float32) for table in rope] if rope else [None, None]
    passed = value.detach() if before is None else value  # alone it is not joined: attention reads the projection
    streams = (query, key, passed, *(before or (None,) * 3), *weights, *(() if before else (None,) * 2))
    q, k, v = QKNormRopeFunction.apply(*streams, *tables, norms[0].eps, rotated, fusion.backend)
    return q, k, value.unflatten(-1, (-1, q.shape[-1])) if before is None else v


def attention(
    block: Any,
    library: Any,
    image: Sequence[Tensor],
    text: Sequence[Tensor] | None,
    rope: tuple[Tensor, Tensor],
    mask: Tensor | None,
) -> Tensor:
    """(B, T + S, H D) from the projections (query, key, value) of the streams, text first.

    library: the module of diffusers that has the block. Its function of attention is looked up there, where others
    replace it.
    """
    q, k, v = qk_norm_rope(image, text, qk_norms(block, block.spec), rope, block.fusion)
    processor = block.attn.processor
    out: Tensor = library.dispatch_attention_fn(
        q, k, v, attn_mask=mask, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    return out.flatten(2, 3).to(q.dtype)


def fits_rope(rope: Any, tokens: int, head_dim: int) -> bool:
    """Whether rope is a pair of tables for `qk_norm_rope`, which gives them no gradient."""
    return isinstance(rope, tuple) and all(t.shape == (tokens, head_dim) and not t.requires_grad for t in rope)


# --- a stream of its own, with diffusers' FeedForward ----------------------------------------------------------------


def modulation(norm: Any, temb: Tensor, count: int = 6) -> Sequence[Tensor]:
    """The parts, (B, C), of diffusers' AdaLayerNormZero and its kind: shift, scale and gate of attention, then of the
    feed-forward."""
    return norm.linear(norm.silu(temb)).chunk(count, dim=1)


def into_attention(
    x: Tensor, norm: nn.LayerNorm, scale: Tensor, shift: Tensor, layers: Sequence[nn.Module], fusion: Fusion
) -> list[Tensor]:
    """A stream up to its query, key and value."""
    normed, _ = modulate(x, norm, scale, shift, fusion)
    return project(normed, layers, fusion)


def feed_forward(normed: Normed, ff: Any, fusion: Fusion) -> Tensor:
    """diffusers' FeedForward with GELU."""
    _, hidden = project_with_hidden(normed, [], ff.net[0].proj, fusion)
    return activate(hidden, ff.net[2], fusion)


def out_of_attention(
    x: Tensor,
    attended: Tensor,
    layer: nn.Module,
    norm: nn.LayerNorm,
    ff: Any,
    later: Sequence[Tensor],
    fusion: Fusion,
    run: Callable[[Normed, Any, Fusion], Tensor] = feed_forward,
) -> Tensor:
    """The stream's end: attention's output layer, then the feed-forward, each with its gated residual.

    later: the gate of attention, then shift, scale and gate of the feed-forward. run: the fused feed-forward.
    """
    gate, shift, scale, ff_gate = later
    normed, x = modulate(x, norm, scale, shift, fusion, residual=(linear(attended, layer, fusion), gate))
    return gated_residual(x, run(normed, ff, fusion), ff_gate, fusion)


def feed_forward_parts(name: str) -> dict[str, type]:
    """Parts of diffusers' FeedForward, for `BlockSpec.parts`; its linear layers are `net.0.proj` and `net.2`."""
    return {name: FeedForward, f"{name}.net": nn.ModuleList, f"{name}.net.0": GELU, f"{name}.net.1": nn.Dropout}


def unfit_feed_forward(block: Any, name: str) -> str | None:
    """Why diffusers' FeedForward of this name is not `out_of_attention`'s, or None."""
    net = block.get_submodule(name).net
    if "gelu" in vars(net[0]):
        return f"the gelu of its {name}.net.0 was replaced"
    if len(net) != 3:
        return f"its {name}.net has {len(net)} layers, not 3"
    return unfit_gelu(net[0])


def unfit_adaln(block: Any, *names: str) -> str | None:
    """Why diffusers' AdaLayerNormZeros (and their kind) of these names are not `modulation`'s, or None."""
    embeds = any(part_of(block, f"{name}.emb") is not None for name in names)
    return "its norms embed the timestep themselves" if embeds else None


def unfit_gelu(activation: Any) -> str | None:
    """Why an activation is not that of `activate`, or None."""
    return None if activation.approximate == "tanh" else "its activation is not the GELU with tanh"
