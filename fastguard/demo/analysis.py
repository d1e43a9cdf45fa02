"""Compares the two objectives at equal proxy reward, with paired statistics over seeds."""

from __future__ import annotations

from dataclasses import dataclass

from fastguard.demo.config import GUARDED, PLAIN
from fastguard.demo.experiment import DemoRun
from fastguard.report.equal_proxy import Spread, first_reach, highest_common, spread, value_at


@dataclass(frozen=True)
class Comparison:
    """One quantity when both objectives have reached the same proxy reward."""

    plain: Spread
    guarded: Spread
    difference: Spread
    """GRPO-Guard minus Flow-GRPO, paired by seed"""


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
    return highest_common(proxies(run) for run in runs)


def crossing(run: DemoRun, level: float) -> float:
    """Iterations, interpolated linearly, after which the run's proxy first reaches `level` (which it must reach)."""
    return first_reach(proxies(run), level)


def at_crossing(run: DemoRun, metric: str, level: float) -> float:
    """A metric, interpolated linearly, where the run's proxy first reaches `level`."""
    return value_at([getattr(evaluation.metrics, metric) for evaluation in run.evaluations], proxies(run), level)


def compare(pairs: list[tuple[DemoRun, DemoRun]], metric: str, level: float) -> Comparison:
    """A metric (a field of `Metrics`, or "iterations") at equal proxy."""

    def value(run: DemoRun) -> float:
        return crossing(run, level) if metric == "iterations" else at_crossing(run, metric, level)

    flow, guard = [value(a) for a, _ in pairs], [value(b) for _, b in pairs]
    return Comparison(spread(flow), spread(guard), spread([b - a for a, b in zip(flow, guard, strict=True)]))
