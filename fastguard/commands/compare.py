"""`fastguard compare`: several objectives, or settings, on one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastguard.commands import RecipeFields
from fastguard.recipe import find_recipe


@dataclass(frozen=True)
class Compare:
    """Train a recipe with several objectives or settings from the same weights, over seeds, and write one page.

    An arm is a table of a TOML file, whose entries are fields of the recipe: [spo] with objective.epsilon = 1e-4. An
    objective's name without a table is an arm, too. Stopped comparisons resume by the same command.
    """

    recipe: RecipeFields
    objectives: tuple[str, ...] = ()
    """arms, or objectives by name; the others are compared with the first. Without any, all arms of the file"""
    arms: Path | None = None
    """TOML file with a table for each arm; beside RECIPE.toml, RECIPE_arms.toml is taken"""
    seeds: int = 3
    """runs of each arm; their seeds are run.seed and the numbers that follow"""
    out: Path = Path("runs/compare")
    """folder for report.html, its pictures, results.json, and the runs as ARM/seed_N"""
    workers: int | None = None
    """runs at once, with one CPU thread each (2 unless given; 1 on a GPU)"""

    def __call__(self) -> int:
        from fastguard.commands.train import train_recipe
        from fastguard.compare.arms import build_arms
        from fastguard.compare.run import compare

        file = None if self.arms is None else find_recipe(str(self.arms))
        arms = build_arms(self.recipe, self.objectives, file)
        return compare(arms, self.seeds, self.out, train_recipe, self.workers)
