"""DiffusionNFT: a velocity that leads to good images and one that leads to bad ones (arXiv 2509.16117)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import Anchor, Terms, check_at_least_0, check_positive
from fastguard.loss.objectives.matching import MatchingObjective, Noised
from fastguard.options import check_share

SMALLEST_ERROR = 1e-5
"""of x0, by which a squared error is divided"""


@dataclass(frozen=True)
class DiffusionNft(MatchingObjective):
    """`adv_clip / beta (r |x0+ - x0|^2 / e+ + (1 - r) |x0- - x0|^2 / e-)`, with `v+- = v_old +- beta (v - v_old)`.

    `x0+- = x_t - t v+-` are the images that the two velocities lead to, e+- their mean absolute errors, which take no
    gradient, and `r = 1/2 + a / (2 adv_clip)`, within [0, 1]. An advantage of 0 pulls towards v_old. Images are sampled
    by an average of the policies so far, which is v_old too. The average moves after each epoch, with a decay of
    `min(decay_rate epoch, largest_decay)`.
    """

    title: ClassVar[str] = "DiffusionNFT"
    anchor: ClassVar[Anchor] = "average"
    moves_drift: ClassVar[bool] = True

    beta: float = 1.0
    """how far v+ and v- are from v_old, in units of v - v_old"""
    adv_clip: float = 5.0
    """the advantage from which on an image counts as wholly good, and minus this as wholly bad"""
    decay_rate: float = 1e-3
    """by how much the decay of the average grows with each epoch"""
    largest_decay: float = 0.5
    """decay of the average in the long run, below 1; 0 samples with the policy itself"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_positive("adv_clip", self.adv_clip)
        check_at_least_0("decay_rate", self.decay_rate)
        check_share("largest_decay", self.largest_decay)

    def error_spread(self) -> float:
        return self.beta

    def decay_of_average(self, epoch: int) -> float:
        return min(self.decay_rate * epoch, self.largest_decay)

    def terms(
        self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int, noised: Noised | None = None
    ) -> Terms:
        assert noised is not None
        t, square, towards, away = noised
        assert square is not None
        assert towards is not None
        assert away is not None
        good = (advantages / (2 * self.adv_clip) + 0.5).clamp(0, 1)
        scale = self.adv_clip / self.beta * t**2
        plus = scale * good / (t * towards).clamp(min=SMALLEST_ERROR)
        minus = scale * (1 - good) / (t * away).clamp(min=SMALLEST_ERROR)
        # |v+- - target|^2 / D = square -+ beta (log_ratio + drift / 2) + beta^2 drift / 2
        shift, spread = self.beta * (log_ratio + drift / 2), self.beta**2 * drift / 2
        loss = plus * (square - shift + spread) + minus * (square + shift + spread)
        by_log_ratio = self.beta * (minus - plus)
        by_drift = by_log_ratio / 2 + self.beta**2 / 2 * (plus + minus)
        return Terms(loss, by_log_ratio, by_drift, torch.zeros_like(loss, dtype=torch.bool))
