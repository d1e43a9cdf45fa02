"""The forward passes of fused Flux blocks; they read as diffusers' do, with its modules and parameters.

Axes: B sample, S image token, T text token, C channel, H head, D head channel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from fastguard.config import Recompute
from fastguard.flux.linear import (
    Hidden,
    LinearWeights,
    Normed,
    gelu_linear,
    is_bare,
    linear_weights,
    project,
)
from fastguard.flux.ops import AdaLNFunction, BiasGeluFunction, GatedResidualFunction, QKNormRopeFunction

MAX_WIDTH = 16384
"""channels of a token: a row of them lies in the registers of one program"""
MAX_HEAD_DIM = 256
# With the weights w_i, w_j of a pair of channels, rounding the rotated values moves x_hat_i by up to 2^-8 |w_j / w_i|
# of its size. It enters the gradient only through a mean over the head (of order 1 / sqrt(D)), so a ratio of 8 stays
# below the rounding of the gradient itself. The smallest weight keeps float16 out of its subnormal numbers.
MAX_PAIR_RATIO = 8.0
MIN_NORM_WEIGHT = 1e-3


@dataclass
class Fusion:
    """How a block runs; `fuse_flux` puts one on each block it fuses."""

    recompute: Recompute
    backend: str
    rotated: bool
    """recover the normalized query and key from the rotated ones; decided by the norms' weights"""


def norms_of(attn: Any) -> list[nn.RMSNorm]:
    """RMSNorms of query, key and, in a double block, of the text's query and key."""
    text = [attn.norm_added_q, attn.norm_added_k] if attn.added_kv_proj_dim is not None else []
    return [attn.norm_q, attn.norm_k, *text]


def recoverable(attn: Any) -> bool:
    """Whether x_hat can be had from the rotated `w x_hat` with a gradient as exact as from the projections."""
    for norm in norms_of(attn):
        weight = norm.weight.detach()
        if weight.is_meta or isinstance(weight, FakeTensor):
            continue  # there are no values
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        pairs = weight.float().abs().unflatten(0, (-1, 2))
        smallest, largest = pairs.amin(1), pairs.amax(1)
        if bool((smallest < MIN_NORM_WEIGHT).any() | (largest > MAX_PAIR_RATIO * smallest).any()):
            return False
    return True


# --- what is fit ----------------------------------------------------------------------------------------------------


def unfit(block: Any) -> str | None:
    """Why this block runs as diffusers wrote it, or None. Cheap: asked at every call, since models change."""
    attn = block.attn
    if type(block).forward is not class_of(block).forward or type(attn) is not FluxAttention:
        return "it is of a class of its own"
    if type(attn.processor) is not FluxAttnProcessor:
        return f"its attention processor is a {type(attn.processor).__name__}, not FluxAttnProcessor"
    if attn.fused_projections:
        return "its query, key and value projections are fused by diffusers"
    norms = norms_of(attn)
    if any(type(norm) is not nn.RMSNorm or norm.weight is None for norm in norms):
        return "its query and key norms are not RMSNorms with weights"
    if any(norm.eps is None or norm.eps != norms[0].eps for norm in norms):
        return "its query and key norms have different eps"
    if any(type(norm) is not nn.LayerNorm or norm.elementwise_affine for norm in norms_before(block)):
        return "its norms are not LayerNorms without weights"
    if not all(_is_tanh_gelu(activation) for activation in _activations(block)):
        return "its activation is not the GELU with tanh"
    if attn.head_dim > MAX_HEAD_DIM or attn.head_dim % 2:
        return f"its head size is {attn.head_dim}, not an even number up to {MAX_HEAD_DIM}"
    width = norms_before(block)[0].normalized_shape[0]
    if width > MAX_WIDTH:
        return f"its width is {width}, more than {MAX_WIDTH}"
    dropouts = _dropouts(block)
    if any(type(layer) is not nn.Dropout or (layer.p > 0 and layer.training) for layer in dropouts):
        return "it has dropout"
    if not all(is_bare(module) for module in _bypassed(block)):
        return "one of its parts has hooks"
    return None


def norms_before(block: Any) -> list[nn.LayerNorm]:
    """The block's LayerNorms."""
    if isinstance(block, FluxSingleTransformerBlock):
        return [block.norm.norm]
    return [block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context]


def class_of(block: Any) -> Any:
    """diffusers' class of a block, which FSDP derives from."""
    return FluxSingleTransformerBlock if isinstance(block, FluxSingleTransformerBlock) else FluxTransformerBlock


def _activations(block: Any) -> list[nn.Module]:
    """What stands for the GELU: the module itself, or diffusers' layer and GELU in one."""
    if isinstance(block, FluxSingleTransformerBlock):
        return [block.act_mlp]
    return [block.ff.net[0], block.ff_context.net[0]]


def _is_tanh_gelu(activation: nn.Module) -> bool:
    return type(activation) in (nn.GELU, GELU) and activation.approximate == "tanh"


def _dropouts(block: Any) -> list[nn.Module]:
    if isinstance(block, FluxSingleTransformerBlock):
        return []
    return [block.attn.to_out[1], *block.ff.net[1:-1], *block.ff_context.net[1:-1]]


def linear_layers(block: Any) -> Iterator[tuple[str, nn.Module]]:
    """The layers that the fused forward works with, by their names in the block."""
    names = ["attn.to_q", "attn.to_k", "attn.to_v"]
    if isinstance(block, FluxSingleTransformerBlock):
        names += ["proj_mlp", "proj_out"]
    else:
        names += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out"]
        names += [f"{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")]
    for name in names:
        yield name, block.get_submodule(name)


def _bypassed(block: Any) -> Iterator[nn.Module]:
    """Modules whose work the fused forward does itself, linear layers (which are asked one by one) left out."""
    yield block.attn
    yield from norms_of(block.attn)
    yield from norms_before(block)
    yield from _activations(block)
    yield from _dropouts(block)
    if isinstance(block, FluxSingleTransformerBlock):
        yield block.norm
    else:
        yield from (block.norm1, block.norm1_context, block.ff, block.ff_context)


def _plain(block: Any, image: Tensor, text: Tensor, temb: Tensor, rope: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call has to run as diffusers wrote it, with its broadcasting and its errors.

    A kernel trusts the shapes it is given, so all of them are compared here.
    """
    if unfit(block) or set(kwargs) - {"attention_mask"} or not isinstance(rope, tuple):
        return True
    tables = (text.shape[1] + image.shape[1], block.attn.head_dim)
    if any(table.shape != tables or table.requires_grad for table in rope):
        return True
    width = norms_before(block)[0].normalized_shape[0]
    if any(t.shape[0] != image.shape[0] or t.shape[-1] != width for t in (image, text, temb)):
        return True
    same = all(t.dtype == image.dtype and t.device == image.device for t in (text, temb))
    norms_fit = all(norm.weight.dtype == image.dtype for norm in norms_of(block.attn))
    return not (_autocast(image) or (same and norms_fit))


def _autocast(x: Tensor) -> bool:
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)  # autocast does not know that device, and raises


# --- parts ----------------------------------------------------------------------------------------------------------


def _modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    norm: nn.LayerNorm,
    scale: Tensor,
    shift: Tensor,
    fusion: Fusion,
) -> tuple[Normed, Tensor]:
    """LayerNorm + modulate of x, or of x + gate y; and what was normalized."""
    value, summed, mean, rstd = AdaLNFunction.apply(x, y, gate, scale, shift, norm.eps, fusion.backend)
    x = x if y is None else summed
    sources = None if fusion.recompute == "none" else (x.detach(), mean, rstd, scale.detach(), shift.detach())
    return Normed(value, sources), x


def _dtype(x: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype in which layers compute, and whether autocast says so."""
    if _autocast(x):
        return torch.get_autocast_dtype(x.device.type), True
    return x.dtype, False


def _fit_weights(modules: Sequence[nn.Module], x: Tensor) -> list[LinearWeights] | None:
    """The weights of all of these layers, or None if one of them has to be called."""
    dtype, autocast = _dtype(x)
    found = [linear_weights(module, dtype, autocast) for module in modules]
    return None if any(isinstance(linear, str) for linear in found) else found  # type: ignore[return-value]


def _project(
    normed: Normed, modules: Sequence[nn.Module], mlp: nn.Module | None, fusion: Fusion
) -> tuple[list[Tensor], Hidden | None]:
    """The outputs of `modules` and, before its activation, of the feed-forward layer that shares their input."""
    every = [*modules] if mlp is None else [*modules, mlp]
    linears = _fit_weights(every, normed.value)
    if linears is None:
        outputs = [module(normed.value) for module in every]
        return (outputs, None) if mlp is None else (outputs[:-1], Hidden(outputs[-1], None, None))
    normed = normed._replace(value=normed.value.to(linears[0].weight.dtype))
    if mlp is None:
        return project(normed, linears, fusion.backend)[0], None
    last = linears[-1]
    outputs, low = project(normed, [*linears[:-1], last._replace(bias=None)], fusion.backend)
    sources: tuple[Tensor | None, ...] | None = None
    if fusion.recompute == "mlp" and normed.sources is not None:
        mine = None if last.up is None else low[..., low.shape[-1] - last.up.shape[1] :]
        up = None if last.up is None else last.up.detach()
        sources = (*normed.sources, last.weight.detach(), mine, up)
    return outputs[:-1], Hidden(outputs[-1], last.bias, sources)


def _activate(hidden: Hidden | None, prefix: Tensor | None, module: nn.Module, fusion: Fusion) -> Tensor:
    """`module([prefix, gelu(hidden)])`."""
    assert hidden is not None
    linears = _fit_weights([module], hidden.value)
    if linears is None:
        return module(BiasGeluFunction.apply(hidden.value, hidden.bias, prefix, fusion.backend))
    return gelu_linear(hidden, prefix, linears[0], fusion.recompute == "none", fusion.backend)


def _output(x: Tensor, module: nn.Module, fusion: Fusion) -> Tensor:
    """A layer whose input is kept anyway."""
    linears = _fit_weights([module], x)
    if linears is None:
        return module(x)
    return project(Normed(x.to(linears[0].weight.dtype), None), linears, fusion.backend)[0][0]


def _attention(
    attn: Any,
    image: Sequence[Tensor],
    text: Sequence[Tensor] | None,
    rope: tuple[Tensor, Tensor],
    mask: Tensor | None,
    fusion: Fusion,
) -> Tensor:
    """(B, T + S, H D) from the projections (query, key, value) of the streams, text first."""
    norms = norms_of(attn)
    weights = [norm.weight for norm in norms]
    rotated = fusion.rotated and not any(weight.requires_grad for weight in weights)
    cos, sin = (table.to(device=image[0].device, dtype=torch.float32) for table in rope)
    query, key, value = image
    passed = value.detach() if text is None else value  # alone it is not joined: attention reads the projection itself
    streams = (query, key, passed, *(text or (None,) * 3), *weights, *(() if text else (None,) * 2))
    q, k, v = QKNormRopeFunction.apply(*streams, cos, sin, norms[0].eps, rotated, fusion.backend)
    if text is None:
        v = value.unflatten(-1, (-1, attn.head_dim))
    processor = attn.processor
    out = dispatch_attention_fn(
        q, k, v, attn_mask=mask, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    return out.flatten(2, 3).to(q.dtype)


def _add(x: Tensor, y: Tensor, gate: Tensor, fusion: Fusion) -> Tensor:
    return GatedResidualFunction.apply(x, y, gate, fusion.backend)


def _within_float16(x: Tensor) -> Tensor:
    """As diffusers does: float16 overflows in some blocks of Flux."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


# --- blocks ---------------------------------------------------------------------------------------------------------


def _into_attention(
    x: Tensor, norm: Any, temb: Tensor, layers: Sequence[nn.Module], fusion: Fusion
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """A double block's stream up to its query, key and value; and its modulation after attention."""
    shift, scale, *later = norm.linear(norm.silu(temb)).chunk(6, dim=1)
    normed, _ = _modulate(x, None, None, norm.norm, scale, shift, fusion)
    return _project(normed, layers, None, fusion)[0], later


def _out_of_attention(
    x: Tensor, attended: Tensor, layer: nn.Module, norm: nn.LayerNorm, ff: Any, later: Sequence[Tensor], fusion: Fusion
) -> Tensor:
    """A double block's stream from what attention gave it to its end."""
    gate, shift, scale, ff_gate = later
    normed, x = _modulate(x, _output(attended, layer, fusion), gate, norm, scale, shift, fusion)
    _, hidden = _project(normed, [], ff.net[0].proj, fusion)
    return _add(x, _activate(hidden, None, ff.net[2], fusion), ff_gate, fusion)


def double_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward of `FluxTransformerBlock`: hidden_states (B, S, C), encoder_hidden_states (B, T, C), temb (B, C);
    returns the new encoder_hidden_states and hidden_states."""
    image, text, rope, kwargs = hidden_states, encoder_hidden_states, image_rotary_emb, joint_attention_kwargs or {}
    if rope is None or _plain(self, image, text, temb, rope, kwargs):
        return type(self).forward(self, image, text, temb, rope, joint_attention_kwargs)
    fusion: Fusion = self.fusion
    attn = self.attn
    qkv, later = _into_attention(image, self.norm1, temb, [attn.to_q, attn.to_k, attn.to_v], fusion)
    text_layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
    text_qkv, text_later = _into_attention(text, self.norm1_context, temb, text_layers, fusion)
    joined = _attention(attn, qkv, text_qkv, rope, kwargs.get("attention_mask"), fusion)
    # Not slices: their backward fills a tensor of the joined size with zeros, each.
    text_out, image_out = joined.split_with_sizes([text.shape[1], image.shape[1]], dim=1)
    image = _out_of_attention(image, image_out, attn.to_out[0], self.norm2, self.ff, later, fusion)
    text = _out_of_attention(text, text_out, attn.to_add_out, self.norm2_context, self.ff_context, text_later, fusion)
    return _within_float16(text), image


def single_forward(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward of `FluxSingleTransformerBlock`; arguments and results as in `double_forward`."""
    image, text, rope, kwargs = hidden_states, encoder_hidden_states, image_rotary_emb, joint_attention_kwargs or {}
    if rope is None or _plain(self, image, text, temb, rope, kwargs):
        return type(self).forward(self, image, text, temb, rope, joint_attention_kwargs)
    fusion: Fusion = self.fusion
    attn = self.attn
    joined = torch.cat([text, image], dim=1)
    shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
    normed, _ = _modulate(joined, None, None, self.norm.norm, scale, shift, fusion)
    qkv, hidden = _project(normed, [attn.to_q, attn.to_k, attn.to_v], self.proj_mlp, fusion)
    attended = _attention(attn, qkv, None, rope, kwargs.get("attention_mask"), fusion)
    out = _within_float16(_add(joined, _activate(hidden, attended, self.proj_out, fusion), gate, fusion))
    # Unlike split_with_sizes, it lets its results be changed in place, as diffusers' slices do.
    text, image = torch.unsafe_split_with_sizes(out, [text.shape[1], image.shape[1]], dim=1)
    return text, image


FORWARDS = {FluxTransformerBlock: double_forward, FluxSingleTransformerBlock: single_forward}
