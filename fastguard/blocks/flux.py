"""The forward passes of fused Flux blocks; they read as diffusers' do, with its modules and parameters.

A fused block is of a class derived from its own, as with FSDP2, so that copies of it compute with their own weights.

Axes: B sample, S image token, T text token, C channel, H head, D head channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from fastguard.blocks.linear import (
    Hidden,
    LinearWeights,
    Normed,
    gelu_linear,
    has_own_forward,
    is_bare,
    linear_weights,
    project,
)
from fastguard.config import Recompute
from fastguard.ops.adaln import AdaLNFunction
from fastguard.ops.gated_residual import GatedResidualFunction
from fastguard.ops.gelu import BiasGeluFunction
from fastguard.ops.qk_norm_rope import QKNormRopeFunction
from fastguard.ops.registry import autocast_to

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
    checkpointing: bool = False
    """whether `fuse_flux` switched gradient checkpointing on"""


def norms_of(attn: Any) -> list[nn.RMSNorm]:
    """RMSNorms of query, key and, in a double block, of the text's query and key."""
    text = [attn.norm_added_q, attn.norm_added_k] if attn.added_kv_proj_dim is not None else []
    return [attn.norm_q, attn.norm_k, *text]


def has_values(norm: nn.RMSNorm) -> bool:
    """Whether the whole weight is there: FSDP1 has a shard of it, or a view of freed memory, until the block runs."""
    weight = norm.weight
    values = weight.is_meta or isinstance(weight, FakeTensor | DTensor) or weight.untyped_storage().nbytes() > 0
    return values and weight.numel() == norm.normalized_shape[0]


def recoverable(attn: Any) -> bool:
    """Whether x_hat can be had from the rotated `w x_hat` with a gradient as exact as from the projections."""
    for norm in norms_of(attn):
        weight = norm.weight.detach()
        if weight.is_meta or isinstance(weight, FakeTensor):
            continue  # there are no values
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        if not has_values(norm):
            return False
        pairs = weight.float().abs().unflatten(0, (-1, 2))
        smallest, largest = pairs.amin(1), pairs.amax(1)
        if bool((smallest < MIN_NORM_WEIGHT).any() | (largest > MAX_PAIR_RATIO * smallest).any()):
            return False
    return True


# --- what is fit ----------------------------------------------------------------------------------------------------


def _own(owner: Any, name: str) -> Callable[..., Any] | None:
    """A function of a class or module, or None where somebody has replaced it already."""
    function = getattr(owner, name)
    if isinstance(function, BuiltinFunctionType):
        return function
    package = (owner.__name__ if isinstance(owner, ModuleType) else owner.__module__).split(".")[0]
    home = getattr(function, "__globals__", {}).get("__name__", "")  # a decorator can copy all but this
    return function if home.split(".")[0] == package else None


BYPASSED_FUNCTIONS = tuple(
    (owner, name, _own(owner, name))
    for owner, name in (
        (FluxTransformerBlock, "forward"),
        (FluxSingleTransformerBlock, "forward"),
        (FluxAttention, "forward"),
        (FluxAttnProcessor, "__call__"),
        (transformer_flux, "_get_qkv_projections"),
        (transformer_flux, "_get_projections"),
        (transformer_flux, "apply_rotary_emb"),
        (AdaLayerNormZero, "forward"),
        (AdaLayerNormZeroSingle, "forward"),
        (FeedForward, "forward"),
        (GELU, "forward"),
        (GELU, "gelu"),
        (LoraLinear, "forward"),
        (nn.Module, "__call__"),
        (nn.Module, "_call_impl"),
        (nn.Linear, "forward"),
        (nn.LayerNorm, "forward"),
        (nn.RMSNorm, "forward"),
        (nn.GELU, "forward"),
        (nn.Dropout, "forward"),
        (F, "linear"),
        (F, "layer_norm"),
        (F, "rms_norm"),
        (F, "gelu"),
        (F, "dropout"),
    )
)
"""What a fused block does itself: owner, name and function, None if it was replaced before this import."""
BYPASSED_CLASSES = tuple(
    owner
    for owner, name, _ in BYPASSED_FUNCTIONS
    if name == "forward" and owner not in (FluxTransformerBlock, FluxSingleTransformerBlock)
)
"""Classes of the parts that a fused block does not call."""


@torch.compiler.assume_constant_result
def _patched() -> str | None:
    """What was done to all blocks at once, by replacing a function or by global hooks, as a reason; or None."""
    for owner, name, function in BYPASSED_FUNCTIONS:
        if getattr(owner, name) is not function:
            return f"{owner.__name__}.{name} was replaced"
    for cls in BYPASSED_CLASSES:
        if cls.__call__ is not nn.Module.__call__:
            return f"{cls.__name__}.__call__ was replaced"
    if torch_module._has_any_global_hook():
        hooks = (
            *torch_module._global_forward_pre_hooks.values(),
            *torch_module._global_forward_hooks.values(),
            *torch_module._global_backward_pre_hooks.values(),
            *torch_module._global_backward_hooks.values(),
        )
        # PyTorch's own (FlopCounterMode's, MemTracker's) only look on, and are to see what runs without them.
        if not all(type(getattr(hook, "__self__", None)).__module__.startswith("torch.") for hook in hooks):
            return "there are global module hooks"
    return None


def unfit(block: Any) -> str | None:
    """Why this block runs as diffusers wrote it, or None. Cheap: asked at every call, since models change."""
    if reason := _patched():
        return reason
    cls = class_of(block)
    if type(block).forward not in (cls.forward, FORWARDS[cls]) or unfused_class(block).forward is not cls.forward:
        return "it is of a class of its own"
    for name, part, expected in _parts(block):
        if type(part) is not expected:
            return f"its {name} is a {type(part).__name__}, not a {expected.__name__}"
        if isinstance(part, nn.Module) and not is_bare(part):
            return f"its {name} has hooks"
        if isinstance(part, nn.Dropout) and part.p > 0 and part.training:
            return f"its {name} has dropout"
        if isinstance(part, GELU) and "gelu" in vars(part):
            return f"the gelu of its {name} was replaced"
    attn, norms = block.attn, norms_of(block.attn)
    if attn.fused_projections:
        return "its query, key and value projections are fused by diffusers"
    if any(norm.weight is None for norm in norms):
        return "its query and key norms have no weights"
    if any(norm.eps is None or norm.eps != norms[0].eps for norm in norms):
        return "its query and key norms have different eps"
    if any(norm.elementwise_affine for norm in norms_before(block)):
        return "its norms are not LayerNorms without weights"
    if isinstance(block, FluxSingleTransformerBlock):
        activations = [block.act_mlp]
    else:
        activations = [block.ff.net[0], block.ff_context.net[0]]
        if block.norm1.emb is not None or block.norm1_context.emb is not None:
            return "its norms embed the timestep themselves"
        for name, net in (("ff.net", block.ff.net), ("ff_context.net", block.ff_context.net)):
            if len(net) != 3:
                return f"its {name} has {len(net)} layers, not 3"
    if any(activation.approximate != "tanh" for activation in activations):
        return "its activation is not the GELU with tanh"
    if attn.head_dim > MAX_HEAD_DIM or attn.head_dim % 2:
        return f"its head size is {attn.head_dim}, not an even number up to {MAX_HEAD_DIM}"
    width = norms_before(block)[0].normalized_shape[0]
    if width > MAX_WIDTH:
        return f"its width is {width}, more than {MAX_WIDTH}"
    return None


def _parts(block: Any) -> Iterator[tuple[str, Any, type]]:
    """What the fused forward does the work of, as (name, part, class); linear layers, which are asked one by one, left
    out. A part of a part comes after it: take it once the first is known to be of its class."""
    attn = block.attn
    yield "attn", attn, FluxAttention
    yield "attn.processor", attn.processor, FluxAttnProcessor
    yield "attn.norm_q", attn.norm_q, nn.RMSNorm
    yield "attn.norm_k", attn.norm_k, nn.RMSNorm
    if isinstance(block, FluxSingleTransformerBlock):
        yield "norm", block.norm, AdaLayerNormZeroSingle
        yield "norm.norm", block.norm.norm, nn.LayerNorm
        yield "act_mlp", block.act_mlp, nn.GELU
        return
    yield "attn.norm_added_q", attn.norm_added_q, nn.RMSNorm
    yield "attn.norm_added_k", attn.norm_added_k, nn.RMSNorm
    yield "attn.to_out.1", attn.to_out[1], nn.Dropout
    for name, norm in (("norm1", block.norm1), ("norm1_context", block.norm1_context)):
        yield name, norm, AdaLayerNormZero
        yield f"{name}.norm", norm.norm, nn.LayerNorm
    yield "norm2", block.norm2, nn.LayerNorm
    yield "norm2_context", block.norm2_context, nn.LayerNorm
    for name, ff in (("ff", block.ff), ("ff_context", block.ff_context)):
        yield name, ff, FeedForward
        yield f"{name}.net", ff.net, nn.ModuleList
        yield f"{name}.net.0", ff.net[0], GELU
        yield f"{name}.net.1", ff.net[1], nn.Dropout


def norms_before(block: Any) -> list[nn.LayerNorm]:
    """The block's LayerNorms."""
    if isinstance(block, FluxSingleTransformerBlock):
        return [block.norm.norm]
    return [block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context]


def class_of(block: Any) -> Any:
    """diffusers' class of a block (or of its class), from which those of FSDP2 and of fused blocks derive."""
    cls = block if isinstance(block, type) else type(block)
    return FluxSingleTransformerBlock if issubclass(cls, FluxSingleTransformerBlock) else FluxTransformerBlock


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


def _plain(block: Any, image: Tensor, text: Tensor, temb: Tensor, rope: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call has to run as diffusers wrote it, with its broadcasting and its errors.

    A kernel trusts the shapes it is given, so all of them are compared here.
    """
    if "fusion" not in vars(block) or unfit(block) or set(kwargs) - {"attention_mask"} or not isinstance(rope, tuple):
        return True
    if torch._C._are_functorch_transforms_active():
        return True  # torch.func differentiates and maps what it can look into
    tables = (text.shape[1] + image.shape[1], block.attn.head_dim)
    if any(table.shape != tables or table.requires_grad for table in rope):
        return True
    width = norms_before(block)[0].normalized_shape[0]
    if any(t.shape[0] != image.shape[0] or t.shape[-1] != width for t in (image, text, temb)):
        return True
    same = all(t.dtype == image.dtype and t.device == image.device for t in (text, temb))
    return not same and autocast_to(image.device) is None


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
    narrow = autocast_to(x.device)
    return narrow or x.dtype, narrow is not None


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
        return module(x.contiguous())  # as diffusers does; F.linear rounds twice where it is not
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
    out = transformer_flux.dispatch_attention_fn(  # looked up there, where others replace it
        q, k, v, attn_mask=mask, backend=processor._attention_backend, parallel_config=processor._parallel_config
    )
    return out.flatten(2, 3).to(q.dtype)


def _add(x: Tensor, y: Tensor, gate: Tensor, fusion: Fusion) -> Tensor:
    return GatedResidualFunction.apply(x, y, gate, fusion.backend)


def _within_float16(x: Tensor) -> Tensor:
    """As diffusers does: float16 overflows in some blocks of Flux."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


# --- blocks ---------------------------------------------------------------------------------------------------------


def _per_sample(temb: Tensor, image: Tensor) -> Tensor:
    """One temb for the whole batch, which diffusers broadcasts, as one for each sample: a batch of any size then runs
    the same way, and gives the same bits."""
    return temb.expand(len(image), -1) if temb.ndim == 2 and len(temb) == 1 else temb


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
    temb = _per_sample(temb, image)
    if rope is None or _plain(self, image, text, temb, rope, kwargs):
        return super(FusedBlock, self).forward(image, text, temb, rope, joint_attention_kwargs)
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
    temb = _per_sample(temb, image)
    if rope is None or _plain(self, image, text, temb, rope, kwargs):
        return super(FusedBlock, self).forward(image, text, temb, rope, joint_attention_kwargs)
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


# --- classes of fused blocks ----------------------------------------------------------------------------------------


class FusedBlock:
    """What the classes of fused blocks share; each derives from the class that its blocks had."""

    unfused_class: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles: a class that was made here cannot be found by its name."""
        reduced: Any = super().__reduce_ex__(protocol)
        if type(self) is not _fused_class(self.unfused_class):
            return reduced  # of a class that somebody has derived from ours
        return (_new_fused, (self.unfused_class,), *reduced[2:])


@cache
def _fused_class(cls: Any) -> Any:
    """The class of fused blocks that were of the class `cls`; its name is the same, as some look for that."""
    fields = {"forward": FORWARDS[class_of(cls)], "unfused_class": cls, "__module__": cls.__module__}
    fused = type(cls.__name__, (FusedBlock, cls), {**fields, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__})
    known = TransformerBlockRegistry._registry
    TransformerBlockRegistry._register()
    if cls in known:  # for diffusers' caching hooks, which look for the class
        TransformerBlockRegistry.register(fused, replace(known[cls]))
    return fused


def _new_fused(cls: type) -> Any:
    return object.__new__(_fused_class(cls))


def unfused_class(block: Any) -> Any:
    """The class whose forward a block runs where it does not run fused."""
    return block.unfused_class if isinstance(block, FusedBlock) else type(block)


def fuse_block(block: Any, fusion: Fusion | None) -> None:
    """Give a block the class of fused ones; it runs fused if it gets a `fusion`, else as it did."""
    if has_own_forward(block):
        vars(block).pop("forward", None)  # left by a hook that was removed
    if fusion is not None:
        block.fusion = fusion
    cls: Any = type(block)
    if not isinstance(block, FusedBlock):
        block.__class__ = _fused_class(cls)


def unfuse_block(block: Any) -> None:
    """Undo `fuse_block`. Where a hook holds the forward, or FSDP2 has derived from the class, the class stays: without
    a fusion it runs as the block did."""
    vars(block).pop("fusion", None)
    if has_own_forward(block):
        vars(block).pop("forward", None)
        if type(block) is _fused_class(unfused_class(block)):
            block.__class__ = unfused_class(block)
