"""What an architecture says about its blocks, which blocks are fit, and the classes of fused blocks.

A fused block has a class derived from its own, as with FSDP2, so that its copies compute with their own weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from types import BuiltinFunctionType, ModuleType
from typing import Any, ClassVar

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from fastguard.blocks.linear import QuantizedLinear, has_own_forward, is_bare
from fastguard.ops.registry import Recompute, autocast_to

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
    """How one block runs fused."""

    recompute: Recompute
    backend: str
    rotated: bool
    """recover the normalized query and key from the rotated ones; the weights of their norms decide"""
    checkpointing: bool = False
    """whether `fuse` switched gradient checkpointing on, or replaced its function"""
    function_before: Callable[..., Any] | None = None
    """the checkpoint function that it replaced"""


# --- what an architecture says --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlockSpec:
    """What one kind of block is made of. Names of parts are paths in the block, such as `ff.net.0`.

    The fused forward does the work of these parts itself, so each has to be of exactly the class given here.
    """

    block: type
    """class of the blocks"""
    parts: Mapping[str, type]
    """other parts and their classes; a part of a part comes after it"""
    layer_norms: tuple[str, ...]
    """`nn.LayerNorm` without weights, each followed by a modulation"""
    linears: tuple[str, ...]
    """linear layers; those that `linear_weights` does not know are called"""
    qk_norms: tuple[str, ...] = ()
    """RMSNorms of query and key; then those of a stream that is joined before the first, and of further attentions"""
    qk_norm: type = nn.RMSNorm
    """their class: PyTorch's or diffusers'"""
    rope: bool = True
    """whether a rotary embedding follows them"""
    unfit: Callable[[Any], str | None] = lambda block: None
    """a further reason why a block, whose parts are of the right classes, is left unfused; or None"""
    classes: Mapping[str, type] = field(init=False)
    """`parts` and the norms"""

    def __post_init__(self) -> None:
        norms = {**dict.fromkeys(self.layer_norms, nn.LayerNorm), **dict.fromkeys(self.qk_norms, self.qk_norm)}
        object.__setattr__(self, "classes", {**self.parts, **norms})


class FusedBlock:
    """Base of the fused forwards of an architecture, one class for each kind of block.

    A subclass gives `spec` and `forward`, which has the arguments of the block's own forward. It first asks
    `runs_fused`; if the answer is no, it returns `super().forward(...)`, which is the block's own.
    Where blocks of one class are not all made of the same parts, it also gives `variants` and `spec_of`.
    """

    spec: ClassVar[BlockSpec]
    variants: ClassVar[tuple[BlockSpec, ...]] = ()
    """all that `spec_of` gives, where that is not always `spec`"""
    architecture: ClassVar[Architecture]
    """set by the architecture that has this kind"""
    kind: ClassVar[Any]
    """the subclass in which `forward` stands"""
    unfused_class: ClassVar[Any]
    """the class that the block had"""
    forward: Callable[..., Any]
    fusion: Fusion

    @classmethod
    def spec_of(cls, block: Any) -> BlockSpec:
        """What this block is made of."""
        return cls.spec

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles: a class that was made at run time cannot be found by its name."""
        reduced: Any = super().__reduce_ex__(protocol)
        if type(self) is not _fused_class(self.unfused_class, self.kind):
            return reduced  # of a class that somebody has derived from ours
        return (_new_fused, (self.unfused_class, self.kind), *reduced[2:])


@dataclass(frozen=True, eq=False)
class Architecture:
    """A family of transformers and the kinds of blocks that they are made of."""

    models: tuple[type, ...]
    """classes of the transformers"""
    kinds: tuple[type[FusedBlock], ...]
    functions: tuple[tuple[Any, str], ...] = ()
    """further functions that the fused forwards bypass, as (class or module, name)"""
    bypassed_functions: tuple[tuple[Any, str, Any], ...] = field(init=False)
    """all functions that fused blocks do not call: owner, name and function, or None if it had been replaced by then"""
    bypassed_classes: tuple[type, ...] = field(init=False)
    """classes of the parts that fused blocks do not call"""

    def __post_init__(self) -> None:
        specs = [spec for kind in self.kinds for spec in (kind.spec, *kind.variants)]
        parts = [cls for spec in specs for cls in spec.classes.values()]
        classes = tuple(dict.fromkeys(cls for cls in (*parts, *LAYERS) if issubclass(cls, nn.Module)))
        owners = (*(kind.spec.block for kind in self.kinds), *classes)
        names = (*((owner, "forward") for owner in owners), *self.functions, *FUNCTIONS)
        functions = tuple((owner, name, _own(owner, name)) for owner, name in names)
        object.__setattr__(self, "bypassed_functions", functions)
        object.__setattr__(self, "bypassed_classes", classes)
        for kind in self.kinds:
            kind.architecture = self

    def kind_of(self, block: Any) -> type[FusedBlock] | None:
        """Which kind of block a module is, fused or not; None if it is none."""
        return next((kind for kind in self.kinds if isinstance(block, kind.spec.block)), None)


LAYERS = (LoraLinear, QuantizedLinear, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.Dropout)
"""Classes that every architecture bypasses."""
FUNCTIONS = (
    (nn.Module, "__call__"),
    (nn.Module, "_call_impl"),
    (F, "linear"),
    (F, "layer_norm"),
    (F, "rms_norm"),
    (F, "gelu"),
    (F, "dropout"),
)
"""Functions that every architecture bypasses."""


def _own(owner: Any, name: str) -> Callable[..., Any] | None:
    """A function of a class or module, or None where somebody has replaced it already."""
    function = getattr(owner, name)
    if isinstance(function, BuiltinFunctionType):
        return function
    package = (owner.__name__ if isinstance(owner, ModuleType) else owner.__module__).split(".")[0]
    home = getattr(function, "__globals__", {}).get("__name__", "")  # a decorator can copy all but this
    return function if home.split(".")[0] == package else None


# --- which blocks are fit -------------------------------------------------------------------------------------------


def runs_fused(block: Any, *inputs: Tensor) -> bool:
    """Whether a call of a fused block with these inputs, (B, ..., C) each, runs fused; else its own forward has to run.

    A kernel trusts the shapes it is given, so they are compared here; broadcasting and errors are the own forward's.
    """
    if "fusion" not in vars(block) or unfit(block, block.kind):
        return False
    if torch._C._are_functorch_transforms_active():
        return False  # torch.func differentiates and maps what it can look into
    first, width = inputs[0], part_of(block, block.spec_of(block).layer_norms[0]).normalized_shape[0]
    if any(t.shape[0] != first.shape[0] or t.shape[-1] != width for t in inputs):
        return False
    same = all(t.dtype == first.dtype and t.device == first.device for t in inputs)
    return same or autocast_to(first.device) is not None


def unfit(block: Any, kind: type[FusedBlock]) -> str | None:
    """Why this block is left unfused, or None. Cheap, since it is asked at every call: models change."""
    if reason := _patched(kind):
        return reason
    spec: Any = kind.spec_of(block)
    forward = spec.block.forward
    if type(block).forward not in (forward, kind.forward) or unfused_class(block).forward is not forward:
        return "it is of a class of its own"
    parts: dict[str, Any] = {}
    for name, expected in spec.classes.items():
        part = parts[name] = part_of(block, name)
        if type(part) is not expected:
            return f"its {name} is a {type(part).__name__}, not a {expected.__name__}"
        if isinstance(part, nn.Module) and not is_bare(part):
            return f"its {name} has hooks"
        if isinstance(part, nn.Dropout) and part.p > 0 and part.training:
            return f"its {name} has dropout"
    norms = [parts[name] for name in spec.qk_norms]
    if any(norm.weight is None for norm in norms):
        return "its query and key norms have no weights"
    if any(getattr(norm, "bias", None) is not None for norm in norms):
        return "its query and key norms have a bias"
    if any(norm.eps is None or norm.eps != norms[0].eps for norm in norms):
        return "its query and key norms have different eps"
    if norms and ((size := norm_size(norms[0])) > MAX_HEAD_DIM or size % 2):
        return f"its head size is {size}, not an even number up to {MAX_HEAD_DIM}"
    before = [parts[name] for name in spec.layer_norms]
    if any(norm.elementwise_affine for norm in before):
        return "its norms are not LayerNorms without weights"
    if (width := before[0].normalized_shape[0]) > MAX_WIDTH:
        return f"its width is {width}, more than {MAX_WIDTH}"
    return spec.unfit(block)


@torch.compiler.assume_constant_result
def _patched(kind: type[FusedBlock]) -> str | None:
    """What was done to all blocks at once, by replacing a function or by global hooks, as a reason; or None.

    It is given a class: torch.compile in torch 2.11 takes an `Architecture`, a frozen dataclass, for no constant.
    """
    architecture = kind.architecture
    for owner, name, function in architecture.bypassed_functions:
        if getattr(owner, name) is not function:
            return f"{owner.__name__}.{name} was replaced"
    for cls in architecture.bypassed_classes:
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


def part_of(block: Any, name: str) -> Any:
    """The part of a block that a path such as `ff.net.0` leads to, or None; not every part is a module."""
    for key in name.split("."):
        block = getattr(block, key, None)
    return block


def qk_norms(block: Any, spec: BlockSpec) -> list[Any]:
    """The RMSNorms of query and key of a block."""
    return [part_of(block, name) for name in spec.qk_norms]


def norm_size(norm: Any) -> int:
    """The channels of a head, of which an RMSNorm of PyTorch or of diffusers takes the mean."""
    return (norm.normalized_shape if isinstance(norm, nn.RMSNorm) else norm.dim)[0]


def recoverable(norms: list[Any], rope: bool) -> bool:
    """Whether x_hat can be had from `w x_hat`, rotated where there is a rope, with a gradient as exact as from the
    projections."""
    for norm in norms:
        weight = norm.weight.detach()
        if weight.is_meta or isinstance(weight, FakeTensor):
            continue  # there are no values
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        if not has_values(norm):
            return False
        pairs = weight.float().abs().unflatten(0, (-1, 2))  # a rotation mixes the rounding of a pair
        smallest, largest = pairs.amin(1), pairs.amax(1)
        uneven = rope and bool((largest > MAX_PAIR_RATIO * smallest).any())
        if uneven or bool((smallest < MIN_NORM_WEIGHT).any()):
            return False
    return True


def has_values(norm: Any) -> bool:
    """Whether the unsharded weight is there: FSDP1 holds a shard of it, or a view of freed memory, until the block
    runs."""
    weight = norm.weight
    values = weight.is_meta or isinstance(weight, FakeTensor | DTensor) or weight.untyped_storage().nbytes() > 0
    return values and weight.numel() == norm_size(norm)


# --- classes of fused blocks ----------------------------------------------------------------------------------------


def fuse_block(block: Any, kind: Any, fusion: Fusion | None) -> None:
    """Give a block the class of fused ones. With a `fusion` it runs fused, without one it runs as before."""
    if has_own_forward(block):
        vars(block).pop("forward", None)  # left by a hook that was removed
    if fusion is not None:
        block.fusion = fusion
    if not isinstance(block, FusedBlock):
        cls: Any = type(block)
        block.__class__ = _fused_class(cls, kind)


def unfuse_block(block: Any) -> None:
    """Undo `fuse_block`. The class stays where a hook holds the forward or FSDP2 has derived from it: without a fusion
    the block runs as before."""
    vars(block).pop("fusion", None)
    if has_own_forward(block):
        vars(block).pop("forward", None)
        if type(block) is _fused_class(block.unfused_class, block.kind):
            block.__class__ = block.unfused_class


def unfused_class(block: Any) -> Any:
    """The class whose forward runs where a block does not run fused."""
    return block.unfused_class if isinstance(block, FusedBlock) else type(block)


@cache
def _fused_class(cls: Any, kind: Any) -> Any:
    """The class of fused blocks that were of the class `cls`; it has the same name, as some look for that."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    fused = type(cls.__name__, (kind, cls), {"kind": kind, "unfused_class": cls, **names})
    known = TransformerBlockRegistry._registry
    TransformerBlockRegistry._register()
    if cls in known:  # for diffusers' caching hooks, which look for the class
        TransformerBlockRegistry.register(fused, replace(known[cls]))
    return fused


def _new_fused(cls: Any, kind: Any) -> Any:
    return object.__new__(_fused_class(cls, kind))
