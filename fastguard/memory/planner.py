"""Peak memory of a recipe, phase by phase, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastguard.config import Recipe
from fastguard.memory import passes
from fastguard.memory.phases import (
    GIB,
    RESERVE,
    Phase,
    gib,
    limit_bytes,
    planned_phases,
    resolve_checkpointing,
    update_settings,
)
from fastguard.memory.suggestions import suggest


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak memory of one GPU."""

    phases: tuple[Phase, ...]
    limit: int
    """bytes of the GPU, from hardware.memory_gb"""
    checkpointing: bool
    """as planned: "auto" is resolved"""
    notes: tuple[str, ...]
    """what was decided and assumed"""
    suggestions: tuple[str, ...]
    """changes to the recipe with the peak that each gives; only if it does not fit"""

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit

    def phase(self, name: str) -> Phase:
        """The phase of this name. Raises KeyError."""
        return {phase.name: phase for phase in self.phases}[name]

    def table(self) -> str:
        """The plan as text, in GiB."""
        parts = ("weights", "gradients", "optimizer", "activations", "trajectories", "peak", "host")
        lines = [f"{'GiB per GPU':<12}" + "".join(f"{part:>13}" for part in parts)]
        for phase in self.phases:
            lines.append(f"{phase.name:<12}" + "".join(f"{getattr(phase, part) / GIB:>13.2f}" for part in parts))
        verdict = "fits in" if self.fits else "does not fit in"
        lines += ["", f"Peak {gib(self.peak)}: {verdict} {gib(self.limit)} (hardware.memory_gb)."]
        lines += [f"- {note}" for note in self.notes]
        if self.suggestions:
            lines += ["", "What would help:", *(f"- {suggestion}" for suggestion in self.suggestions)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def plan(recipe: Recipe) -> MemoryPlan:
    """Predict the peak memory of each phase by running the program on fake tensors; needs no GPU and no weights.

    Raises ValueError for the digit model, and for a `model.path` whose configuration is not at hand.
    """
    _check_plannable(recipe)
    checkpointing = resolve_checkpointing(recipe)
    found = planned_phases(recipe, checkpointing)
    limit = limit_bytes(recipe)
    suggestions: tuple[str, ...] = ()
    if max(phase.peak for phase in found) > limit:
        suggestions = tuple(suggest(recipe))
    return MemoryPlan(found, limit, checkpointing, tuple(_notes(recipe, checkpointing)), suggestions)


def choose_checkpointing(recipe: Recipe) -> bool:
    """Whether to checkpoint: as `model.checkpointing` says; "auto" does if the update would leave less than 5%."""
    if recipe.model.kind == "digits":
        return False
    return resolve_checkpointing(recipe)


def update_flops(recipe: Recipe) -> int:
    """FLOPs that the forward and backward pass of one micro-batch needs: matmuls, attention and convolutions.

    Recomputation does not count, and frozen weights need no gradient; divide by `recipe.micro_batch` for those of one
    transition.
    """
    _check_plannable(recipe)
    return passes.update_flops(update_settings(recipe, checkpointing=False))


def _check_plannable(recipe: Recipe) -> None:
    if recipe.model.kind == "digits":
        raise ValueError('model.kind = "digits" takes a few MB: there is nothing to plan')


def _notes(recipe: Recipe, checkpointing: bool) -> Iterator[str]:
    if recipe.model.checkpointing == "auto":
        state = "on" if checkpointing else "off"
        reason = (
            f"the update would leave less than {RESERVE:.0%} free without it" if checkpointing else "it fits without"
        )
        yield f'model.checkpointing = "auto" is {state}: {reason}'
    if recipe.update.optimizer == "adamw8bit":
        yield "the compiled 8-bit step is taken to hold four float32 copies of the largest parameter"
    if recipe.hardware.sharding == "fsdp2":
        yield "FSDP2: blocks are shared out, two are gathered at once, gradients are summed in float32"
    elif recipe.hardware.processes > 1:
        yield "DDP keeps its buckets, one more copy of the trained gradients"
    yield "convolutions are taken to copy their input, weight and output to channels last"
    yield "not counted: the CUDA context, NCCL, fragmentation, and reward models on the same GPU"
