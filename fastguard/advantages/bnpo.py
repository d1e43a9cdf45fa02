"""Beta normalization (BNPO, arXiv 2506.02864)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.advantages.base import Estimator, Groups
from fastguard.options import check_number, check_positive

SMALLEST_VARIANCE = 1e-12
"""Of group means in [0, 1]; less is the rounding of equal ones, which fit no Beta distribution."""


@dataclass(frozen=True)
class Bnpo(Estimator):
    """`(x - p) / Beta(p; alpha, beta)`, with x the reward mapped to [0, 1] and p its group mean (arXiv 2506.02864).

    The Beta distribution of parameters (a, b) has the mean and the unbiased variance of the group means, and
    `alpha = max(1, 1 + a / 3)`, `beta = max(1, 1 + b / 3)`. With both 3/2 the density is `8 / pi sqrt(p (1 - p))`, so
    that rewards of 0 and 1 have GRPO's advantages up to this factor. Both are 1, and the weight is 1, for one group
    or equal group means. The variance argument is about rewards of 0 and 1; others are an adaptation.
    """

    title: ClassVar[str] = "BNPO"

    low: float = 0.0
    """lowest possible reward, after the weighted sum; a lower one is an error"""
    high: float = 1.0
    """highest possible reward, after the weighted sum; a higher one is an error"""
    cap: float = 10.0
    """largest weight `1 / Beta(p; alpha, beta)`, which is infinite at p of 0 and 1"""

    def __post_init__(self) -> None:
        check_number("low", self.low)
        check_number("high", self.high)
        if not (math.isfinite(self.low) and self.low < self.high < math.inf):
            raise ValueError(f"low must be below high, and both finite; got low = {self.low} and high = {self.high}")
        check_positive("cap", self.cap)

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        outside = ((reward < self.low) | (reward > self.high)).nonzero().flatten()
        if len(outside):
            raise ValueError(
                f"bnpo takes rewards in [low, high] = [{self.low}, {self.high}]; the images {outside.tolist()} have "
                f"{reward[outside].tolist()}. Set low and high to the bounds of the weighted sum of the rewards"
            )
        x = (reward - self.low) / (self.high - self.low)
        p = groups.mean(x)
        weight = (-log_beta_density(p.clamp(0, 1), *beta_parameters(p))).exp().clamp(max=self.cap)
        return groups.centered(x) * weight[groups.index]


def beta_parameters(p: Tensor) -> tuple[float, float]:
    """(alpha, beta) for the group means p in [0, 1], by their two moments."""
    variance = p.var().item() if len(p) > 1 else 0.0
    if variance < SMALLEST_VARIANCE:
        return 1.0, 1.0
    mean = p.mean().item()
    both = mean * (1 - mean) / variance - 1  # a + b
    return max(1.0, 1 + both * mean / 3), max(1.0, 1 + both * (1 - mean) / 3)


def log_beta_density(p: Tensor, alpha: float, beta: float) -> Tensor:
    """log of the Beta density, -inf at the ends where it is 0."""
    scale = math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta)
    return scale + torch.special.xlogy(alpha - 1, p) + torch.special.xlog1py(beta - 1, -p)
