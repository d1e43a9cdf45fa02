"""`fuse_flux` and `unfuse_flux`: exchange the forward passes of a model's blocks, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from diffusers import FluxControlNetModel, FluxTransformer2DModel
from torch.distributed.tensor import DTensor

from fastguard.blocks.flux import (
    FORWARDS,
    FusedBlock,
    Fusion,
    class_of,
    fuse_block,
    has_values,
    linear_layers,
    norms_of,
    recoverable,
    unfit,
    unfuse_block,
)
from fastguard.blocks.linear import has_own_forward, linear_weights
from fastguard.config import Recompute
from fastguard.ops.registry import Backend

MODELS = (FluxTransformer2DModel, FluxControlNetModel)
WRAPPED = ("module", "_orig_mod", "base_model", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names by which wrappers hold a model: DDP, `torch.compile`, peft (two), FSDP1, PyTorch's checkpoint wrapper."""


@dataclass(frozen=True)
class FuseReport:
    """What `fuse_flux` did. Names are those of `named_modules`."""

    fused: tuple[str, ...]
    """blocks that run fused"""
    left: dict[str, str]
    """blocks that run as diffusers wrote them, and why"""
    kept: dict[str, str]
    """parts of fused blocks that keep more for the backward pass than they could, and why"""

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.left)} blocks fused"]
        for what, found in (("left as it is", self.left), ("keeps more", self.kept)):
            for reason, count in Counter(found.values()).items():
                first = next(name for name, why in found.items() if why == reason)
                others = f" and {count - 1} more" if count > 1 else ""
                lines.append(f"{what}: {first}{others}: {reason}")
        return "\n".join(lines)


def fuse_flux(transformer: Any, recompute: Recompute = "pointwise", backend: str = "auto") -> FuseReport:
    """Run a Flux transformer's blocks with fused kernels, in place; results agree up to rounding.

    Parameters, their names and the `state_dict` stay as they are; nothing outside this model changes. Works before or
    after peft's adapters are added, with gradient checkpointing, `torch.compile`, DDP, FSDP1 and FSDP2, and every
    attention backend of diffusers, for training and inference. Layers with hooks, quantized weights, DoRA or dropout
    run unchanged, and their inputs are saved for backward. A block with another attention processor (IP-Adapter), with
    hooks inside or with parts of other classes runs as diffusers wrote it, also if it changes after this call. So do
    all blocks under `torch.func` transforms, under global module hooks, and while a class or function that they bypass
    is patched.

    Load the weights first: small weights of the query and key norms decide what can be recovered in backward. They are
    looked at again by the `load_state_dict` of the model or of a block; after other changes to them, fuse anew.

    Args:
        transformer: a diffusers `FluxTransformer2DModel` or `FluxControlNetModel`, bfloat16, float16 or float32; in a
            wrapper (DDP, FSDP1, `torch.compile`, peft's `PeftModel`) or not.
        recompute: what the backward pass computes again instead of keeping it.
            `none`: nothing that a linear layer reads.
            `pointwise`: LayerNorm + modulate, GELU and normalized query and key: no extra matmul.
            `mlp`: also the first feed-forward layer: one extra matmul of each feed-forward.
            `block`: everything (gradient checkpointing of whole blocks, switched on here if it is off): a whole
            extra forward pass.
        backend: `auto` (Triton on CUDA, plain torch elsewhere), `triton` or `torch`.

    Raises:
        TypeError: not such a model.
        ValueError: fused already, or an unknown `recompute` or `backend`.
    """
    model = _unwrapped(transformer)
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}; got {recompute!r}")
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    blocks = dict(_blocks(model))
    if any("fusion" in vars(block) for block in blocks.values()):
        raise ValueError(
            "this transformer is fused already; to fuse it differently, call unfuse_flux(transformer) first"
        )
    checkpointing = recompute == "block" and not model.is_gradient_checkpointing
    fused: list[str] = []
    left: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, block in blocks.items():
        reason = unfit(block) if has_own_forward(block) else "its forward was replaced (by an offloading hook?)"
        if reason is not None:
            left[name] = reason
            continue
        fuse_block(block, Fusion(recompute, backend, recoverable(block.attn), checkpointing))
        block.register_load_state_dict_post_hook(_decide_again)
        fused.append(name)
        kept |= {f"{name}.{part}": why for part, why in _keeps_more(block)}
    for name in left:
        # Wrap policies take the class of the first block that has a name for that of all.
        if fused and type(blocks[name]).forward is class_of(blocks[name]).forward:
            fuse_block(blocks[name], None)
    if checkpointing and fused:
        model.enable_gradient_checkpointing()
    return FuseReport(tuple(fused), left, kept)


def unfuse_flux(transformer: Any) -> None:
    """Undo `fuse_flux`, in place. If that switched gradient checkpointing on, it is switched off.

    Raises:
        TypeError: not a Flux transformer.
        ValueError: not fused, or something else has replaced a block's forward since.
    """
    model = _unwrapped(transformer)
    blocks = dict(_blocks(model))
    fused = {name: block for name, block in blocks.items() if "fusion" in vars(block)}
    if not fused:
        raise ValueError("this transformer is not fused: fuse_flux was not called, or could fuse none of its blocks")
    for name, block in fused.items():
        if not has_own_forward(block):
            raise ValueError(
                f"the forward of {name} was replaced after fuse_flux (by an offloading hook?); remove that first"
            )
    if any(block.fusion.checkpointing for block in fused.values()):
        model.disable_gradient_checkpointing()
    for block in fused.values():
        hooks = block._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _decide_again]:
            del hooks[key]
    for block in blocks.values():
        if isinstance(block, FusedBlock):
            unfuse_block(block)


def _unwrapped(model: Any) -> Any:
    """The Flux model inside the wrappers of others."""
    inner = model
    while not isinstance(inner, MODELS):
        children = vars(inner).get("_modules", {})
        wrapped = [children[key] for key in WRAPPED if key in children]
        if not wrapped:
            names = " or ".join(cls.__name__ for cls in MODELS)
            hint = "; pass its transformer: pipeline.transformer" if hasattr(model, "transformer") else ""
            raise TypeError(f"expected diffusers' {names}, got {type(model).__name__}{hint}")
        inner = wrapped[0]
    return inner


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, tuple(FORWARDS)):
            yield name, module


def _decide_again(block: Any, _: Any) -> None:
    """New weights were loaded: can x_hat still be recovered?"""
    block.fusion.rotated = recoverable(block.attn)


def _keeps_more(block: Any) -> Iterator[tuple[str, str]]:
    norms = norms_of(block.attn)
    if not all(has_values(norm) for norm in norms):
        yield "attn", "keeps query and key: the weights of their norms are sharded; fuse before FSDP wraps the model"
    elif not block.fusion.rotated:
        yield "attn", "keeps query and key: a weight of their norms is too small, beside its partner's, to divide by"
    # FSDP1 can leave a block without parameters.
    dtype = next((p.dtype for p in block.parameters() if p.is_floating_point()), norms[0].weight.dtype)
    for name, module in linear_layers(block):
        if any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            continue  # FSDP gives whole weights to a running block
        found = linear_weights(module, dtype, autocast=False)
        if isinstance(found, str):
            yield name, f"keeps its input: it {found}"
