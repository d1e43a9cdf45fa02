"""`fastguard plan`: what follows from a recipe, its memory by phase, its hours, and what would make it fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastguard.commands import RecipeFields
from fastguard.config import Recipe
from fastguard.errors import UserError
from fastguard.recipe import totals

if TYPE_CHECKING:
    from fastguard.memory import MemoryPlan, Phase, Proposal, RunFlops

UTILISATION = 0.4


@dataclass(frozen=True)
class Plan:
    """Predict a recipe's peak memory, phase by phase, and its hours, without a GPU."""

    recipe: RecipeFields
    kept: bool = False
    """show what an update saves for backward instead, tensor by tensor, at each level of model.recompute"""
    json: bool = False
    """print the plan as one JSON object"""
    utilisation: float = UTILISATION
    """share of hardware.tflops that the hours assume, recomputed FLOPs counted, in (0, 1]"""
    recipe_name: Annotated[str, tyro.conf.Suppress] = ""
    """the recipe as it was called"""

    def __call__(self) -> int:
        if not 0 < self.utilisation <= 1:
            raise UserError(f"--utilisation must lie in (0, 1], got {self.utilisation}")
        if self.json and self.kept:
            raise UserError("--kept prints tables alone: leave out --json")
        if self.json:
            return print_json(self.recipe, self.recipe_name, self.utilisation)
        return print_plan(self.recipe, self.kept, self.utilisation)


def print_plan(recipe: Recipe, kept: bool = False, utilisation: float = UTILISATION) -> int:
    """Print what follows from the recipe, its memory by phase and its hours; exit code 1 if it does not fit.

    Args:
        kept: print what an update saves for backward instead, by level of model.recompute.
        utilisation: share of hardware.tflops that the hours assume.
    """
    from fastguard.memory import compare_kept, plan, propose, run_flops
    from fastguard.train.build import print_exceptions, with_model

    recipe = with_model(recipe)
    if kept:
        print(compare_kept(recipe))
        return 0
    print_lines(totals(recipe))
    predicted = plan(recipe)
    print_lines(blocks(recipe, predicted))
    print_exceptions(predicted.fused)
    print(predicted)
    print("\n".join(work(recipe, run_flops(recipe), utilisation)))
    if predicted.fits:
        return 0
    proposal = propose(recipe)
    print(f"\n{proposal}")
    if proposal.fits and proposal.changes:
        print(next(work(proposal.recipe, run_flops(proposal.recipe), utilisation)))
    return 1


def work(recipe: Recipe, flops: RunFlops, utilisation: float) -> Iterator[str]:
    """The hours of a run, its FLOPs, and what these count, as lines."""
    from fastguard.memory import hours

    epoch, run = (hours(count, recipe.hardware.tflops, utilisation) for count in (flops.epoch.total, flops.total))
    speed = f"an assumed utilisation of {utilisation:.0%} of {recipe.hardware.tflops:g} TFLOP/s"
    yield f"Hours: {epoch:.3g} an epoch, {run:.3g} for {recipe.run.epochs} epochs, at {speed}."
    unit, size = next((u, s) for u, s in UNITS if flops.epoch.total >= s)
    parts = ", ".join(f"{name} {count / size:.1f}" for name, count in dataclasses.asdict(flops.epoch).items())
    yield f"{unit} per epoch and GPU: {parts}; {flops.epoch.total / size:.1f} in all."
    yield from (f"- {note}" for note in assumptions(recipe, flops, utilisation))


UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("FLOP", 1))


def assumptions(recipe: Recipe, flops: RunFlops, utilisation: float) -> Iterator[str]:
    """What hours and FLOPs stand for."""
    peak = f"hardware.tflops = {recipe.hardware.tflops:g}"
    yield f"the hours assume that a GPU does {utilisation:.0%} of {peak}, waiting included: see --utilisation"
    yield from flops.notes


def print_json(recipe: Recipe, name: str, utilisation: float = UTILISATION) -> int:
    """Print the plan as one JSON object, see docs/plan.md; exit code as `print_plan`.

    Args:
        name: the recipe as it was called.
        utilisation: share of hardware.tflops that the hours assume.
    """
    from fastguard.memory import plan, propose, run_flops
    from fastguard.train.build import with_model

    recipe = with_model(recipe)
    predicted, flops = plan(recipe), run_flops(recipe)
    report = predicted.fused
    proposal = None if predicted.fits else propose(recipe)
    print(
        json.dumps(
            {
                "recipe": name,
                "totals": _totals(recipe),
                "blocks": None if report is None else {"fused": len(report.fused), "unfused": report.left},
                "recompute": predicted.recompute,
                "phases": [_phase(phase) for phase in predicted.phases],
                "peak_gib": _gib(predicted.peak),
                "limit_gib": _gib(predicted.limit),
                "fits": predicted.fits,
                "notes": predicted.notes,
                "flops": _flops(flops),
                "hours": _hours(recipe, flops, utilisation),
                "assumptions": list(assumptions(recipe, flops, utilisation)),
                "proposal": None if proposal is None else _proposal(proposal, utilisation),
            },
            indent=2,
        )
    )
    return 0 if predicted.fits else 1


def _totals(recipe: Recipe) -> dict[str, int]:
    updates = recipe.update.inner_epochs * recipe.update.minibatches
    return {
        "epochs": recipe.run.epochs,
        "gpus": recipe.hardware.processes,
        "images_per_epoch": recipe.images_per_epoch,
        "images_per_gpu": recipe.images_per_process,
        "updates_per_epoch": updates,
        "transitions_per_update_and_gpu": recipe.transitions_per_update,
        "micro_batch": recipe.micro_batch,
        "images": recipe.images_per_epoch * recipe.run.epochs,
        "updates": updates * recipe.run.epochs,
    }


def _gib(n_bytes: int) -> float:
    return n_bytes / 2**30


def _phase(phase: Phase) -> dict[str, Any]:
    """Its name, its parts and its peak."""
    parts = {name: value for name, value in dataclasses.asdict(phase).items() if name != "name"}
    return {"name": phase.name, **{f"{part}_gib": _gib(n) for part, n in parts.items()}, "peak_gib": _gib(phase.peak)}


def _flops(flops: RunFlops) -> dict[str, Any]:
    epoch = {**dataclasses.asdict(flops.epoch), "total": flops.epoch.total}
    return {"epoch": epoch, "parity": flops.parity, "run": flops.total}


def _hours(recipe: Recipe, flops: RunFlops, utilisation: float) -> dict[str, float]:
    from fastguard.memory import hours

    tflops = recipe.hardware.tflops
    return {
        "epoch": hours(flops.epoch.total, tflops, utilisation),
        "run": hours(flops.total, tflops, utilisation),
        "assumed_utilisation": utilisation,
        "tflops": tflops,
    }


def _proposal(proposal: Proposal, utilisation: float) -> dict[str, Any]:
    from fastguard.memory import run_flops

    return {
        "fits": proposal.fits,
        "changes": dict(proposal.changes),
        "toml": proposal.toml,
        "options": proposal.options,
        "recompute": proposal.recompute,
        "phases": [_phase(phase) for phase in proposal.phases],
        "peak_gib": _gib(proposal.peak),
        "hours": _hours(proposal.recipe, run_flops(proposal.recipe), utilisation),
        "tried": [
            {
                "field": tried.field,
                "value": tried.value,
                "peaks_gib": {name: _gib(peak) for name, peak in tried.peaks.items()},
                "peak_gib": _gib(tried.peak),
                "fits": tried.fits,
                "kept": tried.kept,
            }
            for tried in proposal.tried
        ],
    }


def blocks(recipe: Recipe, predicted: MemoryPlan) -> Iterator[tuple[str, str]]:
    """How the blocks will run, as (name, value) lines."""
    report = predicted.fused
    yield "fused blocks", "no" if report is None else f"{len(report.fused)} of {len(report.fused) + len(report.left)}"
    yield "recompute", predicted.recompute + (" (auto)" if recipe.model.recompute == "auto" else "")


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    for name, value in lines:
        print(f"{name:>24}: {value}")
