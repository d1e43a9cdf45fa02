"""Runs compared at equal proxy: where a run first reaches a proxy, what it had there, and intervals over seeds.

A run is a sequence of evaluations, and each of its metrics a sequence of as many numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Spread:
    """Mean over seeds and half the width of its 95% t-interval; the latter is NaN for a single seed."""

    mean: float
    half_width: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out 0; False for a single seed, which shows nothing about reliability."""
        return abs(self.mean) > self.half_width


def spread(values: Sequence[float]) -> Spread:
    """Mean and 95% t-interval of independent values; NaN without any."""
    n = len(values)
    if n < 2:
        return Spread(float(np.mean(values)) if n else math.nan, math.nan)
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    return Spread(float(np.mean(values)), float(stats.t.ppf(0.975, n - 1)) * error)


def rises(proxies: Sequence[float]) -> bool:
    """Whether a run's proxy was ever above its start."""
    return max(proxies) > proxies[0]


def highest_common(runs: Iterable[Sequence[float]]) -> float | None:
    """The highest proxy that every run reached, from their proxies; None if that is no more than one's start."""
    runs = list(runs)
    level = min((max(proxies) for proxies in runs), default=-math.inf)
    start = max((proxies[0] for proxies in runs), default=math.inf)
    return level if level > start else None


def first_reach(proxies: Sequence[float], level: float) -> float:
    """Evaluations, interpolated linearly, after which the proxy first reaches `level` (which it must reach)."""
    after = next(i for i, value in enumerate(proxies) if value >= level)
    if after == 0:
        return 0.0
    return after - (proxies[after] - level) / (proxies[after] - proxies[after - 1])


def value_at(values: Sequence[float], proxies: Sequence[float], level: float) -> float:
    """A metric, interpolated linearly, where the run's proxy first reaches `level` (which it must reach)."""
    return float(np.interp(first_reach(proxies, level), np.arange(len(values)), values))
