"""What the folder of a run holds; works for unfinished runs as well.

"epoch" counts rollouts from 0, as in metrics.jsonl and the names of images: rollout 12, and the evaluation at 12, are
of the policy after 12 epochs of training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastguard.config import Recipe
from fastguard.metrics import EpochLog, RatioLog, RewardLog, UpdateLog
from fastguard.monitor import EvaluationLog
from fastguard.recipe import parse_recipe
from fastguard.run import read_rows


@dataclass(frozen=True)
class TrainingRun:
    """What the folder of a run holds."""

    path: Path
    recipe: Recipe
    epochs: list[EpochLog]
    evaluations: list[EvaluationLog]
    skipped: list[str]
    """messages of skipped updates"""
    unread: int
    """rows that do not hold what this version writes"""

    @property
    def done(self) -> int:
        """Epochs done."""
        return self.epochs[-1].epoch + 1 if self.epochs else 0

    @property
    def best(self) -> EvaluationLog | None:
        """The evaluation with the highest gold score."""
        return max((e for e in self.evaluations if math.isfinite(e.gold)), key=lambda e: e.gold, default=None)


def read_run(path: Path) -> TrainingRun:
    """Read a run's files. Raises ValueError if it is no run, or its recipe cannot be read."""
    if not (path / "recipe.json").is_file():
        raise ValueError(
            f"{path} is not the folder of a run: expected recipe.json in it, which `fastguard train` writes; "
            "give the run.dir of a recipe"
        )
    try:
        content = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path / 'recipe.json'} is damaged: {error}") from None
    recipe = parse_recipe(content, str(path / "recipe.json"))
    epochs, odd = _logs(path / "metrics.jsonl", _epoch_log)
    evaluations, more = _logs(path / "evaluations.jsonl", lambda row: EvaluationLog(**row))
    skipped = [str(row.get("message", row)) for row in read_rows(path / "skipped.jsonl")]
    return TrainingRun(path, recipe, epochs, evaluations, skipped, odd + more)


def _logs(file: Path, build: Callable[[dict[str, Any]], Any]) -> tuple[list[Any], int]:
    """Logs in the order of their epochs, the last written one of each; and how many rows are none."""
    found: dict[int, Any] = {}
    unread = 0
    for row in read_rows(file):
        try:
            log = build(row)
            found[log.epoch] = log
        except (TypeError, KeyError, AttributeError):  # written by another version
            unread += 1
    return [found[epoch] for epoch in sorted(found)], unread


def _epoch_log(row: dict[str, Any]) -> EpochLog:
    """The inverse of `dataclasses.asdict`."""
    nested = {
        "rewards": {name: RewardLog(**reward) for name, reward in row["rewards"].items()},
        "updates": tuple(UpdateLog(**{**update, "ratio": RatioLog(**update["ratio"])}) for update in row["updates"]),
        "steps": tuple(row["steps"]),
        "per_step": tuple(RatioLog(**ratio) for ratio in row["per_step"]),
    }
    return EpochLog(**{**row, **nested})
