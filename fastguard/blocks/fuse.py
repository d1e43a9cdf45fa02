"""`fuse` and `unfuse`: exchange the forward passes of a transformer's blocks, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, get_args

from torch import nn
from torch.distributed.tensor import DTensor

from fastguard.blocks.architecture import (
    Architecture,
    FusedBlock,
    Fusion,
    fuse_block,
    has_values,
    part_of,
    qk_norms,
    recoverable,
    unfit,
    unfuse_block,
)
from fastguard.blocks.linear import has_own_forward, linear_weights
from fastguard.blocks.offload import OffloadedCheckpoints
from fastguard.ops.registry import Backend, Recompute

ARCHITECTURES = {
    "flux": "fastguard.blocks.flux:FLUX",
    "flux2": "fastguard.blocks.flux2:FLUX2",
    "sd3": "fastguard.blocks.sd3:SD3",
    "qwen_image": "fastguard.blocks.qwen_image:QWEN_IMAGE",
}
"""Where each architecture lives; its module, and what that imports, waits until a transformer is fused."""

CHECKPOINTED = ("block", "offload")
"""Levels of recompute that are gradient checkpointing."""

WRAPPED = ("module", "_orig_mod", "base_model", "model", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names by which wrappers hold a model: DDP, `torch.compile`, peft (two), FSDP1, PyTorch's checkpoint wrapper."""


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did. Names are those of `named_modules`."""

    fused: tuple[str, ...]
    """blocks that run fused"""
    left: dict[str, str]
    """blocks that run unfused, and why"""
    kept: dict[str, str]
    """parts of fused blocks that save more for backward than they could, and why"""

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.fused) + len(self.left)} blocks fused"]
        for what, found in (("unfused, because ", self.left), ("", self.kept)):
            for reason, count in Counter(found.values()).items():
                first = next(name for name, why in found.items() if why == reason)
                others = f" and {count - 1} more" if count > 1 else ""
                lines.append(f"{what}{reason}: {first}{others}")
        return "\n".join(lines)


def fuse(transformer: Any, *, recompute: Recompute = "pointwise", backend: str = "auto") -> FuseReport:
    """Run the blocks of a transformer with fused kernels, in place. Results agree up to rounding.

    Parameters, their names and the `state_dict` stay as they are; nothing outside this model changes. It works before
    or after peft's adapters are added, with gradient checkpointing, `torch.compile`, DDP, FSDP1 and FSDP2, for training
    and inference. For all but SD3, which has none to choose, it works with every attention backend of diffusers.

    Frozen weights may be quantized, as those of torchao and, in 4 bits, of bitsandbytes: each is dequantized for its
    matmul, forward and backward, and nothing of its size is saved. Linear layers with hooks, DoRA, dropout, or of other
    kinds (bitsandbytes' in 8 bits) run unchanged, and their inputs are saved for backward.
    A block with hooks inside or with parts of other classes (such as the attention processor of an IP-Adapter) runs its
    own forward, even if it changes after this call. All blocks do so under `torch.func` transforms, under global module
    hooks, and while a class or function that they bypass is patched.

    Load the weights first, because small weights of the query and key norms decide what backward can recover. A
    `load_state_dict` of the model or of a block decides this again. After other changes to these weights, unfuse the
    model and fuse it again.

    Args:
        transformer: of a known architecture, or one of its blocks; bfloat16, float16 or float32; in a wrapper (DDP,
            FSDP1, `torch.compile`, peft's `PeftModel`) or not. Known are diffusers' `FluxTransformer2DModel`,
            `Flux2Transformer2DModel`, `SD3Transformer2DModel` (Stable Diffusion 3 and 3.5),
            `QwenImageTransformer2DModel`, and the ControlNets of all but FLUX.2.
        recompute: what backward recomputes instead of saving it.
            `none`: nothing; the input of every linear layer is saved.
            `pointwise`: LayerNorm + modulate, GELU or SwiGLU, and normalized query and key. It costs no extra matmul.
            `mlp`: also the first layer of each feed-forward. It costs one extra matmul for each feed-forward.
            `block`: everything. It costs a second forward pass. This is gradient checkpointing of whole blocks, which
            is switched on here if it is off.
            `offload`: as `block`, and the inputs of blocks, which `block` saves on the GPU, wait in pinned host memory
            until their backward. Copies overlap with compute. A checkpoint function of your own is replaced.
        backend: `auto` (Triton on CUDA, plain torch elsewhere), `triton` or `torch`.

    Raises:
        TypeError: the model is of no known architecture.
        ValueError: it is fused already, `recompute` or `backend` is unknown, or the model has no gradient checkpointing
            for `recompute="block"` or `"offload"`.
    """
    return _fuse(*_find(transformer, ARCHITECTURES), recompute, backend)


def fusible(transformer: Any) -> bool:
    """Whether `fuse` knows the architecture."""
    try:
        _find(transformer, ARCHITECTURES)
    except TypeError:
        return False
    return True


def unfuse(transformer: Any) -> None:
    """Undo `fuse`, in place. If it changed gradient checkpointing, that becomes what it was.

    Raises:
        TypeError: the model is of no known architecture.
        ValueError: it is not fused, or something else has replaced the forward of a block since.
    """
    _unfuse(*_find(transformer, ARCHITECTURES))


def fuse_flux(transformer: Any, recompute: Recompute = "pointwise", backend: str = "auto") -> FuseReport:
    """`fuse` for a Flux transformer; it raises TypeError for any other."""
    return _fuse(*_find(transformer, ["flux"]), recompute, backend)


def unfuse_flux(transformer: Any) -> None:
    """`unfuse` for a Flux transformer; it raises TypeError for any other."""
    _unfuse(*_find(transformer, ["flux"]))


def _find(transformer: Any, names: Iterable[str]) -> tuple[Any, Architecture]:
    """The model inside the wrappers of others, and which of the named architectures it has."""
    known: dict[str, Architecture] = {}
    for name in names:
        module, _, attribute = ARCHITECTURES[name].partition(":")
        known[name] = getattr(import_module(module), attribute)
    model = transformer
    while True:
        for architecture in known.values():
            if isinstance(model, architecture.models) or architecture.kind_of(model):
                return model, architecture
        children = getattr(model, "_modules", {})
        inside = [children[key] for key in WRAPPED if key in children]
        if not inside:
            raise TypeError(_unknown(transformer, known))
        model = inside[0]


def _unknown(transformer: Any, known: dict[str, Architecture]) -> str:
    classes = [cls for architecture in known.values() for cls in architecture.models]
    listed = " or ".join(f"{cls.__module__.split('.')[0]}.{cls.__name__}" for cls in classes)
    hint = "; pass its transformer: pipeline.transformer" if hasattr(transformer, "transformer") else ""
    return f"expected {listed}, got {type(transformer).__name__}; known architectures: {', '.join(known)}{hint}"


def _fuse(model: Any, architecture: Architecture, recompute: Recompute, backend: str) -> FuseReport:
    if recompute not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}; got {recompute!r}")
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    if recompute in CHECKPOINTED and not hasattr(model, "enable_gradient_checkpointing"):
        raise ValueError(
            f'recompute="{recompute}" needs gradient checkpointing, but {type(model).__name__} has no method '
            "enable_gradient_checkpointing; choose another level of recompute"
        )
    blocks = dict(_blocks(model, architecture))
    if any("fusion" in vars(block) for block in blocks.values()):
        raise ValueError("this transformer is fused already; to fuse it differently, call unfuse(transformer) first")
    checkpointed = recompute in CHECKPOINTED and model.is_gradient_checkpointing
    checkpointing = recompute == "offload" or (recompute == "block" and not checkpointed)
    before = model._gradient_checkpointing_func if checkpointed else None
    fused: list[str] = []
    left: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name, block in blocks.items():
        kind: Any = architecture.kind_of(block)
        reason = unfit(block, kind) if has_own_forward(block) else "its forward was replaced (by an offloading hook?)"
        if reason is not None:
            left[name] = reason
            continue
        spec = kind.spec_of(block)
        rotated = recoverable(qk_norms(block, spec), spec.rope)
        fusion = Fusion(recompute, backend, rotated=rotated, checkpointing=checkpointing, function_before=before)
        fuse_block(block, kind, fusion)
        block.register_load_state_dict_post_hook(_decide_again)
        fused.append(name)
        kept |= {f"{name}.{part}".rstrip("."): why for part, why in _saves_more(block)}
    for name in left:
        kind = architecture.kind_of(blocks[name])
        # Wrap policies take the class of the first block that has a name for that of all.
        if fused and type(blocks[name]).forward is kind.spec.block.forward:
            fuse_block(blocks[name], kind, None)
    if checkpointing and fused:
        model.enable_gradient_checkpointing(OffloadedCheckpoints() if recompute == "offload" else None)
    return FuseReport(tuple(fused), left, kept)


def _unfuse(model: Any, architecture: Architecture) -> None:
    blocks = dict(_blocks(model, architecture))
    fused = {name: block for name, block in blocks.items() if "fusion" in vars(block)}
    if not fused:
        raise ValueError("this transformer is not fused: fuse was not called, or could fuse none of its blocks")
    for name, block in fused.items():
        if not has_own_forward(block):
            raise ValueError(
                f"the forward of {name} was replaced after fuse (by an offloading hook?); remove that first"
            )
    for fusion in [block.fusion for block in fused.values() if block.fusion.checkpointing][:1]:
        if fusion.function_before is None:
            model.disable_gradient_checkpointing()
        else:
            model.enable_gradient_checkpointing(fusion.function_before)
    for block in fused.values():
        hooks = block._load_state_dict_post_hooks
        for key in [key for key, hook in hooks.items() if hook is _decide_again]:
            del hooks[key]
    for block in blocks.values():
        if isinstance(block, FusedBlock):
            unfuse_block(block)


def _blocks(model: nn.Module, architecture: Architecture) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if architecture.kind_of(module):
            yield name or type(module).__name__, module


def _decide_again(block: Any, _: Any) -> None:
    """New weights were loaded: can x_hat still be recovered?"""
    spec = block.spec_of(block)
    block.fusion.rotated = recoverable(qk_norms(block, spec), spec.rope)


def _saves_more(block: Any) -> Iterator[tuple[str, str]]:
    """The parts of a fused block that save more for backward than they could, and why."""
    spec = block.spec_of(block)
    norms = qk_norms(block, spec)
    attention = spec.qk_norms[0].rpartition(".")[0] if norms else ""  # empty: the block itself holds the norms
    if not all(has_values(norm) for norm in norms):
        yield attention, "saves query and key, because the weights of their norms are sharded; fuse before FSDP wraps"
    elif not block.fusion.rotated:  # by itself, or beside the other weight of its pair
        yield attention, "saves query and key, because a weight of their norms is too small to divide by"
    layers = {name: part_of(block, name) for name in spec.linears}
    dtypes = [parameter.dtype for parameter in block.parameters() if parameter.is_floating_point()]
    # FSDP1 can leave a block without parameters.
    dtype = dtypes[0] if dtypes else next(iter(layers.values())).weight.dtype
    for name, layer in layers.items():
        if any(isinstance(parameter, DTensor) for parameter in layer.parameters()):
            continue  # FSDP gives unsharded weights to a running block
        found = linear_weights(layer, dtype, autocast=False)
        if isinstance(found, str):
            yield name, f"saves its input, because it {found}"
