"""Compares the two objectives at equal proxy reward, with paired statistics over seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fastguard.demo.config import GUARDED, PLAIN
from fastguard.demo.experiment import DemoRun


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and half the width of its 95% t-interval; the latter is NaN for a single seed."""

    mean: float
    half_width: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out 0; False for a single seed, which shows nothing about reliability."""
        return abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Comparison:
    """One quantity when both objectives have reached the same proxy reward."""

    plain: Spread
    guarded: Spread
    difference: Spread
    """GRPO-Guard minus Flow-GRPO, paired by seed"""


def spread(values: list[float]) -> Spread:
    """Mean and 95% t-interval of independent values."""
    n = len(values)
    if n < 2:
        return Spread(float(np.mean(values)), math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Spread(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1)) * error)


def paired_runs(runs: list[DemoRun]) -> list[tuple[DemoRun, DemoRun]]:
    """(Flow-GRPO, GRPO-Guard) runs of the seeds for which both are finished."""
    flow = {run.seed: run for run in runs if run.objective == PLAIN}
    guard = {run.seed: run for run in runs if run.objective == GUARDED}
    return [(flow[seed], guard[seed]) for seed in sorted(flow.keys() & guard.keys())]


def proxies(run: DemoRun) -> list[float]:
    """Proxy reward after 0, 1, ... iterations."""
    return [evaluation.metrics.proxy for evaluation in run.evaluations]


def common_proxy(runs: list[DemoRun]) -> float | None:
    """The highest proxy reward that every run reached; None if some run never rose above its start."""
    level = min((max(proxies(run)) for run in runs), default=-math.inf)
    start = max((proxies(run)[0] for run in runs), default=math.inf)
    return level if level > start else None


def crossing(run: DemoRun, level: float) -> float:
    """Iterations, interpolated linearly, after which the run's proxy first reaches `level` (which it must reach)."""
    values = proxies(run)
    after = next(i for i, value in enumerate(values) if value >= level)
    if after == 0:
        return 0.0
    return after - (values[after] - level) / (values[after] - values[after - 1])


def at_crossing(run: DemoRun, metric: str, level: float) -> float:
    """A metric, interpolated linearly, where the run's proxy first reaches `level`."""
    values = [getattr(evaluation.metrics, metric) for evaluation in run.evaluations]
    return float(np.interp(crossing(run, level), np.arange(len(values)), values))


def compare(pairs: list[tuple[DemoRun, DemoRun]], metric: str, level: float) -> Comparison:
    """A metric (a field of `Metrics`, or "iterations") at equal proxy."""

    def value(run: DemoRun) -> float:
        return crossing(run, level) if metric == "iterations" else at_crossing(run, metric, level)

    flow, guard = [value(a) for a, _ in pairs], [value(b) for _, b in pairs]
    return Comparison(spread(flow), spread(guard), spread([b - a for a, b in zip(flow, guard, strict=True)]))
