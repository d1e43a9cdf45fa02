"""What the folder of a run holds; works for unfinished runs as well.

"epoch" counts rollouts from 0, as in metrics.jsonl and the names of images: rollout 12, and the evaluation at 12, are
of the policy after 12 epochs of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from fastguard.config import LARGEST_FLOAT, LARGEST_INT, Recipe
from fastguard.errors import UserError
from fastguard.recipe import parse_recipe
from fastguard.train.metrics import EpochLog
from fastguard.train.monitor import EvaluationLog
from fastguard.utils.files import parse_json
from fastguard.utils.rows import parse_row, read_lines

Log = TypeVar("Log", EpochLog, EvaluationLog)


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
    """Read a run's files. Raises UserError if it is no run, or its recipe cannot be read."""
    if not (path / "recipe.json").is_file():
        raise UserError(
            f"{path} is not the folder of a run: expected recipe.json in it, which `fastguard train` writes; "
            "give the run.dir of a recipe"
        )
    try:
        content = parse_json((path / "recipe.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path / 'recipe.json'} is damaged: {error}") from None
    recipe = parse_recipe(content, str(path / "recipe.json"))
    epochs, odd = _logs(path / "metrics.jsonl", EpochLog)
    evaluations, more = _logs(path / "evaluations.jsonl", EvaluationLog)
    rows = [parse_row(line) for line in read_lines(path / "skipped.jsonl")]
    skipped = [_text(row.get("message", row)) for row in rows if row is not None]
    return TrainingRun(path, recipe, epochs, evaluations, skipped, odd + more + rows.count(None))


def _text(value: Any) -> str:
    """A value as text that a page can hold; JSON knows halves of characters, UTF-8 does not."""
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def _logs(file: Path, kind: type[Log]) -> tuple[list[Log], int]:
    """Logs in the order of their epochs, the last written one of each; and how many rows are none."""
    build = TypeAdapter(kind)
    found: dict[int, Log] = {}
    unread = 0
    for line in read_lines(file):
        try:
            log = build.validate_json(line, strict=True)
        except ValidationError:  # odd, or written by another version
            unread += 1
            continue
        if _could_be_written(log):
            found[log.epoch] = log
        else:
            unread += 1
    return [found[epoch] for epoch in sorted(found)], unread


def _could_be_written(log: EpochLog | EvaluationLog) -> bool:
    """Whether its numbers are float32's, and fit each other: what draws and computes with them relies on that."""
    if not 0 <= log.epoch <= LARGEST_INT or any(LARGEST_FLOAT < abs(x) != math.inf for x in _numbers(asdict(log))):
        return False
    if isinstance(log, EvaluationLog):
        return True
    ranges = [log.clip_range_for_10_percent, log.clip_range_for_30_percent]
    return len(log.steps) == len(log.per_step) and all(r is None or not r < 0 for r in ranges)


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in nested values."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
