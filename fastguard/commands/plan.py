"""`fastguard plan`: what follows from a recipe, and its memory by phase."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastguard.commands import RecipeFields
from fastguard.config import Recipe
from fastguard.recipe import totals

if TYPE_CHECKING:
    from fastguard.memory import MemoryPlan


@dataclass(frozen=True)
class Plan:
    """Predict a recipe's peak memory, phase by phase, without a GPU."""

    recipe: RecipeFields
    kept: bool = False
    """show what an update saves for backward instead, tensor by tensor, at each level of model.recompute"""

    def __call__(self) -> int:
        return print_plan(self.recipe, self.kept)


def print_plan(recipe: Recipe, kept: bool = False) -> int:
    """Print what follows from the recipe and its memory by phase; exit code 1 if it does not fit.

    Args:
        kept: print what an update saves for backward instead, by level of model.recompute.
    """
    from fastguard.memory import compare_kept, plan
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
    return 0 if predicted.fits else 1


def blocks(recipe: Recipe, predicted: MemoryPlan) -> Iterator[tuple[str, str]]:
    """How the blocks will run, as (name, value) lines."""
    report = predicted.fused
    yield "fused blocks", "no" if report is None else f"{len(report.fused)} of {len(report.fused) + len(report.left)}"
    yield "recompute", predicted.recompute + (" (auto)" if recipe.model.recompute == "auto" else "")


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    for name, value in lines:
        print(f"{name:>24}: {value}")
