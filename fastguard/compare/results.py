"""What the runs of a comparison left in their folders, and what follows from it: one row of numbers for each arm."""

# ruff: noqa: RUF001 (the dash is meant)
from __future__ import annotations

import dataclasses
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from fastguard.compare.arms import Arm
from fastguard.compare.processes import cost_of
from fastguard.config import ObjectiveConfig
from fastguard.errors import UserError
from fastguard.recipe import as_dict, differences
from fastguard.report.data import read_run
from fastguard.report.equal_proxy import Spread, highest_common, rises, spread, value_at
from fastguard.train.metrics import EpochLog
from fastguard.train.monitor import EvaluationLog

METRICS = ("gold", "diversity")
"""What is compared at equal proxy, beside the epochs that it took."""


@dataclass(frozen=True)
class FinishedRun:
    """What a finished run left."""

    arm: str
    seed: int
    evaluations: list[EvaluationLog]
    """in order, without those whose proxy or gold score is not finite"""
    epochs: list[EpochLog]
    peak_bytes: int | None
    """of the GPU where there is one, else of the process (its resident set); None where it was not written down"""
    wall_s: float | None
    """of its processes, with the loading of models, evaluations and checkpoints; None where it was not written down"""

    @property
    def proxies(self) -> list[float]:
        return self.values("proxy")

    def values(self, metric: str) -> list[float]:
        """A metric at each evaluation; NaN where it was not measured."""
        found = (getattr(evaluation, metric) for evaluation in self.evaluations)
        return [math.nan if value is None else float(value) for value in found]

    @property
    def at(self) -> list[float]:
        """Epochs done before each evaluation."""
        return [float(evaluation.epoch) for evaluation in self.evaluations]

    def clip_fraction(self, sign: str) -> float:
        """Share of the transitions with a positive or a negative advantage that were clipped, mean over the epochs."""
        return fmean(getattr(log, f"clip_fraction_{sign}") for log in self.epochs)

    def seconds(self) -> dict[str, float]:
        """Seconds per epoch by phase."""
        phases = dict.fromkeys(phase for log in self.epochs for phase in log.seconds)
        return {phase: fmean(log.seconds.get(phase, 0.0) for log in self.epochs) for phase in phases}


def read_finished(arm: str, seed: int, folder: Path) -> FinishedRun:
    """Read a run's folder. Raises UserError if it is no run, or its metrics are lost."""
    run = read_run(folder)
    if not run.epochs:
        raise UserError(f"{folder / 'metrics.jsonl'} cannot be read any more: remove {folder}, and its run is repeated")
    evaluations = [e for e in run.evaluations if math.isfinite(e.proxy) and math.isfinite(e.gold)]
    peaks = [log.peak_memory_gib for log in run.epochs if log.peak_memory_gib is not None]
    cost = cost_of(folder)
    peak = int(max(peaks) * 2**30) if peaks else None if cost is None else cost.peak_bytes
    return FinishedRun(arm, seed, evaluations, run.epochs, peak, None if cost is None else cost.seconds)


@dataclass(frozen=True)
class Compared:
    """A quantity of one arm."""

    mean: Spread
    difference: Spread | None
    """this arm minus the first, paired by seed; None for the first arm, and without a common seed"""


@dataclass(frozen=True)
class Row:
    """An arm in numbers; means over its seeds."""

    arm: str
    seeds: int
    """finished runs"""
    final: dict[str, Compared]
    """proxy, gold and diversity at the last evaluation"""
    equal: dict[str, Compared]
    """epochs, gold and diversity at equal proxy; empty if no seed has such a proxy for this arm"""
    clip_fraction: dict[str, float]
    """by the sign of the advantage"""
    seconds: dict[str, float]
    """per epoch, by phase"""
    peak_bytes: int | None
    """the largest of its runs"""
    wall_s: float | None
    """of a run"""


@dataclass(frozen=True)
class Results:
    """Everything that the page shows."""

    title: str
    """of the recipe"""
    arms: list[Arm]
    seeds: list[int]
    runs: list[FinishedRun]
    failures: dict[tuple[str, int], str]
    """(arm, seed) of runs that failed -> their last words"""
    workers: int

    def of(self, arm: str) -> list[FinishedRun]:
        return [run for run in self.runs if run.arm == arm]

    @cached_property
    def levels(self) -> dict[int, float]:
        """Seed -> the highest proxy that all its runs reached. Runs that never rose above their start are left out.

        So are runs that failed. Only seeds without a run that is yet to come have a level.
        """
        found = {}
        for seed in self.seeds:
            runs = [run for run in self.runs if run.seed == seed and run.evaluations]
            level = highest_common(run.proxies for run in runs if rises(run.proxies))
            failed = sum(at == seed for _, at in self.failures)
            if len(runs) + failed == len(self.arms) and level is not None:
                found[seed] = level
        return found

    def reached(self, run: FinishedRun) -> bool:
        """Whether a run has a place at equal proxy."""
        return run.seed in self.levels and rises(run.proxies)

    @cached_property
    def rows(self) -> list[Row]:
        """One for each arm with a finished run."""
        return [self._row(arm.name) for arm in self.arms if self.of(arm.name)]

    def _row(self, arm: str) -> Row:
        runs = self.of(arm)
        phases = dict.fromkeys(phase for run in runs for phase in run.seconds())
        peaks = [run.peak_bytes for run in runs if run.peak_bytes is not None]
        walls = [run.wall_s for run in runs if run.wall_s is not None]
        return Row(
            arm=arm,
            seeds=len(runs),
            final=dict(self._compared(arm, {name: _last(name) for name in ("proxy", *METRICS)})),
            equal=dict(self._compared(arm, {name: self._at_equal(name) for name in ("epochs", *METRICS)})),
            clip_fraction={sign: fmean(run.clip_fraction(sign) for run in runs) for sign in ("positive", "negative")},
            seconds={phase: fmean(run.seconds().get(phase, 0.0) for run in runs) for phase in phases},
            peak_bytes=max(peaks, default=None),
            wall_s=fmean(walls) if walls else None,
        )

    def _compared(
        self, arm: str, quantities: dict[str, Callable[[FinishedRun], float]]
    ) -> Iterator[tuple[str, Compared]]:
        """Each quantity that some run of the arm has, beside the first arm's of the same seeds."""
        first = self.arms[0].name
        for name, value in quantities.items():
            own, other = ({run.seed: value(run) for run in self.of(a)} for a in (arm, first))
            own, other = ({seed: v for seed, v in by.items() if math.isfinite(v)} for by in (own, other))
            paired = [own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())]
            if own:
                yield name, Compared(spread(list(own.values())), spread(paired) if paired and arm != first else None)

    def _at_equal(self, metric: str) -> Callable[[FinishedRun], float]:
        def value(run: FinishedRun) -> float:
            if not self.reached(run):
                return math.nan
            values = run.at if metric == "epochs" else run.values(metric)
            return value_at(values, run.proxies, self.levels[run.seed])

        return value

    @property
    def slowest(self) -> list[str]:
        """The arms that set the level of some seed: their own highest proxy is the lowest."""
        lowest = {}
        for seed in self.levels:
            runs = [run for run in self.runs if run.seed == seed and self.reached(run)]
            lowest[seed] = min(runs, key=lambda run: max(run.proxies)).arm
        return list(dict.fromkeys(lowest.values()))

    def as_json(self) -> dict[str, Any]:
        """Every number of the page, as JSON values; NaN becomes null."""
        base = as_dict(self.arms[0].recipe)
        content = {
            "title": self.title,
            "epochs": self.arms[0].recipe.run.epochs,
            **_machine(),
            "workers": self.workers,
            "arms": {
                arm.name: {
                    "limit": limit(arm.recipe.objective),
                    "objective": as_dict(arm.recipe)["objective"],
                    "differences": differences(base, as_dict(arm.recipe)),
                }
                for arm in self.arms
            },
            "seeds": self.seeds,
            "levels": {str(seed): level for seed, level in self.levels.items()},
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "failures": [{"arm": arm, "seed": seed, "said": said} for (arm, seed), said in self.failures.items()],
            "runs": [_run_as_json(run) for run in self.runs],
        }
        return _without_nan(content)


def _last(metric: str) -> Callable[[FinishedRun], float]:
    return lambda run: run.values(metric)[-1] if run.evaluations else math.nan


def _run_as_json(run: FinishedRun) -> dict[str, Any]:
    kept = ("epoch", "reward_mean", "clip_fraction_positive", "clip_fraction_negative", "seconds")
    return {
        "arm": run.arm,
        "seed": run.seed,
        "peak_bytes": run.peak_bytes,
        "wall_s": run.wall_s,
        "evaluations": [dataclasses.asdict(evaluation) for evaluation in run.evaluations],
        "epochs": [{name: getattr(log, name) for name in kept} for log in run.epochs],
    }


def limit(objective: ObjectiveConfig) -> str:
    """The option that limits how far a transition may move, with its value."""
    return "–" if objective.limit_name is None else f"{objective.limit_name} {objective.limit:g}"


def _machine() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    return {"device": device, "torch": torch.__version__}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
