"""Choosing the images that an update trains on: unbiased for every batch, and better than a uniform choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastguard.train.subsample import FLOOR, choose, probabilities, systematic

ADVANTAGES = [
    [1.0, -2.0, 0.5, 0.0],
    [0.0, 0.0, 0.0],
    [5.0, 0.1, 0.1, 0.1, 0.1, 0.1],
    [1.0] * 7,
    [0.3, -0.9, 1e-9, 2.0, -1.1],
]


def every_choice(chances: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """All choices that a start leads to, with the lengths of their ranges of starts."""
    edges = np.unique(np.concatenate([[0.0, 1.0], np.cumsum(chances) % 1]))
    return [(b - a, systematic(chances, (a + b) / 2)) for a, b in itertools.pairwise(edges) if b - a > 1e-12]


@pytest.mark.parametrize("advantages", ADVANTAGES, ids=str)
def test_no_choice_is_biased(advantages: list[float]) -> None:
    """By enumeration: the expectation of the weighted mean of the chosen is the mean of all."""
    scores = np.random.default_rng(0).normal(size=(len(advantages), 3))
    for count in range(1, len(advantages) + 1):
        chances = probabilities(np.array(advantages), count)
        assert chances.sum() == pytest.approx(count)
        assert (chances > 0).all()
        assert (chances <= 1).all()
        expected, inclusion = np.zeros(3), np.zeros(len(advantages))
        for length, picked in every_choice(chances):
            assert len(set(picked.tolist())) == count
            inclusion[picked] += length
            weights = count / (len(advantages) * chances[picked])
            expected += length * (weights[:, None] * scores[picked]).mean(0)
        np.testing.assert_allclose(inclusion, chances, atol=1e-9)
        np.testing.assert_allclose(expected, scores.mean(0), atol=1e-9)


def test_probabilities_follow_the_advantages_above_a_floor() -> None:
    chances = probabilities(np.array([1.0, -2.0, 0.0, 1.0]), 1)
    np.testing.assert_allclose(chances, 0.9 * np.array([0.25, 0.5, 0.0, 0.25]) + FLOOR / 4)
    assert probabilities(np.array([100.0, 1.0, 1.0]), 2)[0] == 1
    np.testing.assert_array_equal(probabilities(np.zeros(4), 2), np.full(4, 0.5))
    np.testing.assert_array_equal(probabilities(np.array([3.0, 1.0]), 2), np.ones(2))


def test_the_spread_is_smaller_than_that_of_a_uniform_choice() -> None:
    """For gradients of advantage times a score of one size."""
    generator = np.random.default_rng(0)
    advantages = generator.normal(size=16)
    angles = generator.uniform(0, 2 * np.pi, size=16)
    gradients = advantages[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)

    def spread(by: np.ndarray) -> float:
        found = []
        for _ in range(1000):
            picked, weights = choose(by, 8, generator)
            found.append((weights[:, None] * gradients[picked]).mean(0))
        return float(np.square(np.array(found) - gradients.mean(0)).sum(1).mean())

    assert spread(advantages) < 0.7 * spread(np.ones(16))
