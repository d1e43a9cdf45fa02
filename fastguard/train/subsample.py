"""Training on some of the images of a rollout batch, so chosen that the gradient keeps its expectation.

An image is chosen with a probability in proportion to |advantage|, and what it adds is divided by that probability. So
the gradient varies less than with a uniform choice. The idea is that of active importance sampling (arXiv 2405.05630).
Here images are chosen that were drawn already, since steps with another standard deviation have log-ratios of the size
of the latent.

Axes: B image of a rollout batch, m chosen ones.
"""

from __future__ import annotations

import numpy as np

FLOOR = 0.1
"""share of the choice that does not ask for advantages, so that no weight exceeds 1 / FLOOR"""


def probabilities(advantages: np.ndarray, count: int) -> np.ndarray:
    """How likely each image is to be among `count` chosen ones: (B,) float64 in (0, 1] that add up to count."""
    size = np.abs(advantages).astype(np.float64)
    share = np.full(len(size), 1 / len(size))
    if size.sum() > 0:
        share = (1 - FLOOR) * size / size.sum() + FLOOR * share
    chosen = np.zeros(len(size))
    free = np.ones(len(size), dtype=bool)
    # An image that is certain leaves the others to share the rest, which may make another one certain.
    while True:
        chosen[free] = (count - (~free).sum()) * share[free] / share[free].sum()
        certain = free & (chosen >= 1)
        if not certain.any():
            return chosen
        chosen[certain], free = 1.0, free & ~certain
        if not free.any():
            return chosen


def systematic(chances: np.ndarray, start: float) -> np.ndarray:
    """The images whose stretch of the line holds start, start + 1, ...: each at most once, with its own probability.

    Args:
        chances: (B,) of `probabilities`.
        start: uniform in [0, 1).
    """
    ends = np.cumsum(chances)
    count = round(float(ends[-1]))
    ends[-1] = count  # against rounding
    return np.searchsorted(ends, start + np.arange(count), side="right")


def choose(advantages: np.ndarray, count: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The chosen images (m,), and the weights (m,) that make their mean one over all B images, in expectation."""
    order = generator.permutation(len(advantages))
    chances = probabilities(advantages[order], count)
    picked = systematic(chances, generator.random())
    return order[picked], count / (len(advantages) * chances[picked])
