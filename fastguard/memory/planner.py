"""Peak memory of a recipe, phase by phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fastguard.blocks import FuseReport
from fastguard.config import Recipe, Recompute
from fastguard.memory import passes
from fastguard.memory.phases import (
    GIB,
    RESERVE,
    Phase,
    buffer_bytes,
    check_plannable,
    gib,
    leaves_reserve,
    limit_bytes,
    planned_phases,
    resolve_recompute,
    sampling_settings,
    update_settings,
)


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak memory of one GPU."""

    phases: tuple[Phase, ...]
    limit: int
    """bytes of the GPU, from hardware.memory_gb"""
    recompute: Recompute
    """as planned: "auto" is resolved"""
    fused: FuseReport | None
    """blocks that will run fused, as far as that follows from the configuration; None with model.fuse = false"""
    notes: tuple[str, ...]
    """what was decided and assumed"""

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
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()


def plan(recipe: Recipe) -> MemoryPlan:
    """Predict the peak memory of each phase by running the program on fake tensors; needs no GPU and no weights.

    `propose` finds changes that make a recipe fit.

    Raises UserError for a model that is too small to plan, and for a `model.path` whose configuration is not at hand.
    """
    check_plannable(recipe)
    recompute = resolve_recompute(recipe)
    found = planned_phases(recipe, recompute)
    fused = passes.weights_of(passes.as_built(recipe.model), recipe.lora).fused
    notes = tuple(_notes(recipe, recompute, leaves_reserve(recipe, found[-1])))
    return MemoryPlan(found, limit_bytes(recipe), recompute, fused, notes)


def choose_recompute(recipe: Recipe) -> Recompute:
    """`model.recompute`; for "auto" the fastest level whose update leaves 5% of the memory free, else the smallest.

    Raises UserError as `plan` does.
    """
    check_plannable(recipe)
    return resolve_recompute(recipe)


def update_flops(recipe: Recipe) -> int:
    """FLOPs that the forward and backward pass of one micro-batch needs: matmuls, attention and convolutions.

    What is computed again does not count, and frozen weights need no gradient; divide by `recipe.micro_batch` for those
    of one transition.
    """
    check_plannable(recipe)
    return passes.update_pass(update_settings(recipe, "none")).flops


def executed_flops(recipe: Recipe) -> int:
    """As `update_flops`, with what the level of model.recompute computes again."""
    check_plannable(recipe)
    return passes.update_pass(update_settings(recipe, resolve_recompute(recipe))).flops


def rollout_flops(recipe: Recipe) -> int:
    """FLOPs of the transformer in one denoising step of a rollout batch, `sampler.batch_size` images; counted alike."""
    check_plannable(recipe)
    return passes.rollout_pass(sampling_settings(recipe)).flops


def update_bytes(recipe: Recipe) -> tuple[int, int]:
    """Bytes that the operators of the forward and backward pass of one micro-batch read and write, as the model runs
    without a compiler; and how many of these dequantize weights: codes and scales read, weights written."""
    check_plannable(recipe)
    return passes.update_bytes(update_settings(recipe, resolve_recompute(recipe)))


def _notes(recipe: Recipe, recompute: Recompute, roomy: bool) -> Iterator[str]:
    if recipe.model.recompute == "auto":
        reason = "the fastest that leaves" if roomy else "the smallest; none leaves"
        yield f'model.recompute = "auto" is "{recompute}": {reason} {RESERVE:.0%} of the memory free in the update'
    if recipe.model.compile == "blocks":
        yield "compiled blocks are taken to save what they save uncompiled; in a rollout, one block does so at a time"
    if recipe.update.optimizer == "adamw8bit":
        yield "the compiled 8-bit step is taken to hold four float32 copies of the largest parameter"
    if recipe.hardware.sharding == "fsdp2":
        yield "FSDP2: blocks are shared out, two are gathered at once, gradients are summed in float32"
    elif recipe.hardware.processes > 1:
        yield "DDP keeps its buckets, one more copy of the trained gradients"
    if recipe.advantages.per_step:
        each, images = recipe.scored_per_image, recipe.images_per_epoch
        yield (
            f"advantages.name = {recipe.advantages.name}: {each} images per sample wait on the GPU to be decoded and "
            f"scored, {each * images} per epoch in place of {images}"
        )
    if recipe.objective.rollouts > 1:
        where = "on the GPU" if recipe.sampler.store == "device" else "in host memory"
        saved = "them once" if recipe.objective.reuse == "best" else "those of all processes"
        yield (
            f"objective.window = {recipe.objective.rollouts}: the earlier rollouts take {gib(buffer_bytes(recipe))} "
            f"per process {where} once they are all there; a checkpoint holds {saved}"
        )
    yield "convolutions are taken to copy their input, weight and output to channels last"
    yield "not counted: the CUDA context, NCCL, fragmentation, and reward models on the same GPU"
