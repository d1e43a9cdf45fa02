"""What the forward pass of an update keeps for its backward pass, by kind of block and of tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from fastguard.config import Recipe, Recompute, recompute_levels
from fastguard.memory.live import Label
from fastguard.memory.passes import dtype_of, update_pass, weights_of
from fastguard.memory.phases import GIB, check_plannable, resolve_recompute, update_settings
from fastguard.memory.planner import executed_flops

SMALL = 0.05
"""units below which a table does not show a tensor by itself"""


@dataclass(frozen=True)
class KeptTensor:
    """Equal tensors of one kind of block."""

    block: str
    """kind of block ("double" or "single" of Flux), or outside: all that no block made"""
    operator: str
    """what made it: linear, attention, an operator of PyTorch (aten::...) or of this package (fastguard::...)"""
    shape: tuple[int, ...]
    dtype: torch.dtype
    count: int
    """in a block"""
    n_bytes: int
    """of all of them in a block"""
    blocks: int
    """blocks that keep so many"""

    @property
    def total(self) -> int:
        return self.n_bytes * self.blocks


@dataclass(frozen=True)
class KeptActivations:
    """Bytes that wait for the backward pass of one micro-batch."""

    fused: bool
    recompute: Recompute
    unit: int
    """bytes of one number per token (image and text) and channel: tokens x width x 2 in bfloat16"""
    blocks: dict[str, int]
    """number of blocks of each kind; 1 outside"""
    tensors: tuple[KeptTensor, ...]

    @property
    def total(self) -> int:
        return sum(tensor.total for tensor in self.tensors)

    def units(self, block: str) -> float:
        """What a block of this kind keeps on average, in units."""
        return sum(t.total for t in self.tensors if t.block == block) / self.blocks[block] / self.unit

    def table(self) -> str:
        """All tensors of a noticeable size as text, and the rest in one line for each kind of block."""
        lines = [
            f"{self.title}: {self.total / GIB:.2f} GiB, of which",
            f"{'block':<9}{'made by':<31}{'shape':<18}{'dtype':<10}{'count':>5}{'units':>8}{'blocks':>8}{'GiB':>7}",
        ]
        for block, number in self.blocks.items():
            mine = [t for t in self.tensors if t.block == block]
            small = [t for t in mine if t.n_bytes < SMALL * self.unit]
            for t in mine:
                if t in small:
                    continue
                shape, dtype = "x".join(map(str, t.shape)), str(t.dtype).removeprefix("torch.")
                lines.append(
                    f"{block:<9}{t.operator:<31}{shape:<18}{dtype:<10}{t.count:>5}{t.n_bytes / self.unit:>8.2f}"
                    f"{t.blocks:>8}{t.total / GIB:>7.2f}"
                )
            rest = sum(t.total for t in small)
            lines.append(
                f"{block:<9}{'smaller ones':<64}{rest / number / self.unit:>8.2f}{number:>8}{rest / GIB:>7.2f}"
            )
            lines.append(
                f"{block:<9}{'all':<64}{self.units(block):>8.2f}{number:>8}{sum(t.total for t in mine) / GIB:>7.2f}"
            )
        return "\n".join(lines)

    @property
    def title(self) -> str:
        return f"{'fused' if self.fused else 'unfused'} blocks, recompute = {self.recompute}"

    def __str__(self) -> str:
        return self.table()


def kept_activations(recipe: Recipe) -> KeptActivations:
    """What the forward pass of one micro-batch keeps for backward, from the real program on fake tensors.

    Raises UserError as `plan` does.
    """
    check_plannable(recipe)
    settings = update_settings(recipe, resolve_recompute(recipe))
    weights = weights_of(settings.model, settings.lora)
    tokens = settings.micro_batch * weights.branches * (weights.tokens + settings.max_tokens)
    unit = tokens * weights.width * dtype_of(settings.model).itemsize
    blocks = {**weights.blocks, "outside": 1}
    tensors = _grouped(update_pass(settings).kept_tensors, list(blocks))
    return KeptActivations(recipe.model.fuse, settings.recompute, unit, blocks, tuple(tensors))


def compare_kept(recipe: Recipe) -> str:
    """`kept_activations` of unfused blocks and of fused ones at each level, and what each level costs, as text."""
    cases = [(False, "none"), *((True, level) for level in recompute_levels(fuse=True))]
    recipes = [replace(recipe, model=replace(recipe.model, fuse=fuse, recompute=level)) for fuse, level in cases]
    found = [kept_activations(each) for each in recipes]
    flops = [executed_flops(each) for each in recipes]
    kinds = [kind for kind in found[0].blocks if kind != "outside"]
    titles = [f"{'' if i else 'units a '}{kind} block" for i, kind in enumerate(kinds)]
    widths = [max(len(title) + 1, 14) for title in titles]
    header = "".join(f"{title:>{width}}" for title, width in zip(titles, widths, strict=True))
    lines = [
        f"Kept for the backward pass of a micro-batch of {recipe.micro_batch}; a unit is tokens x width x "
        f"{dtype_of(recipe.model).itemsize} bytes = {found[0].unit / 2**20:.1f} MiB",
        f"{'':<37}{header}{'GiB':>8}{'FLOPs':>8}",
    ]
    for kept, done in zip(found, flops, strict=True):
        units = "".join(f"{kept.units(kind):>{width}.2f}" for kind, width in zip(kinds, widths, strict=True))
        lines.append(f"{kept.title:<37}{units}{kept.total / GIB:>8.2f}{done / flops[0]:>8.3f}")
    lines.append("FLOPs: matmuls and attention of the update, in terms of the first line's")
    return "\n\n".join(["\n".join(lines), *map(str, found)])


def _grouped(labels: Iterable[Label], kinds: Sequence[str]) -> list[KeptTensor]:
    """Equal tensors of a block counted, then blocks that keep as many of them."""
    in_block = Counter(labels)
    groups = Counter(
        (label.place.partition(" ")[0] or "outside", label.operator, label.shape, label.dtype, count, label.n_bytes)
        for label, count in in_block.items()
    )
    found = [
        KeptTensor(block, operator, shape, dtype, count, count * n_bytes, blocks)
        for (block, operator, shape, dtype, count, n_bytes), blocks in groups.items()
    ]
    return sorted(found, key=lambda tensor: kinds.index(tensor.block))  # stable: as they are made
