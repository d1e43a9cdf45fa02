"""Intervals against scipy's own, and the place of equal proxy against values written out."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from fastguard.report.equal_proxy import first_reach, highest_common, rises, spread, value_at


def test_spread_is_a_t_interval() -> None:
    values = [0.3, -1.2, 2.5, 0.9, 1.1]
    found = spread(values)
    low, high = stats.t.interval(0.95, 4, loc=found.mean, scale=stats.sem(values))
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    three = spread([1.0, 2.0, 3.0])
    assert (three.mean, three.half_width) == pytest.approx((2.0, 4.3027 / math.sqrt(3)), rel=1e-4)
    assert not three.excludes_zero
    assert spread([1.9, 2.0, 2.1]).excludes_zero


def test_one_value_has_no_interval() -> None:
    one = spread([5.0])
    assert one.mean == 5.0
    assert math.isnan(one.half_width)
    assert not one.excludes_zero
    assert math.isnan(spread([]).mean)


def test_the_first_reach_is_interpolated() -> None:
    proxies = [1.0, 2.0, 4.0, 3.0, 5.0]
    assert first_reach(proxies, 3.5) == 1.75
    assert value_at([0.0, 10.0, 20.0, 30.0, 40.0], proxies, 3.5) == 17.5
    assert first_reach(proxies, 5.0) == 4.0
    assert first_reach(proxies, 0.5) == 0.0


def test_the_highest_common_proxy() -> None:
    assert highest_common([[1.0, 4.0, 3.0], [1.0, 6.0]]) == 4.0
    assert highest_common([[1.0, 4.0], [1.0, 0.5]]) is None
    assert highest_common([]) is None
    assert rises([1.0, 0.5, 1.1])
    assert not rises([1.0, 0.5, 1.0])
