"""FR-PPO: a penalty by the Fisher-Rao distance (arXiv 2506.03757), in closed form for Gaussian steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import EitherLogRatio, Terms, check_positive, terms_of, without_idle


@dataclass(frozen=True)
class FrPpo(EitherLogRatio):
    """`-a r + (1 - exp(-drift / 4)) / tau`.

    The published penalty samples the integral of `(pi - pi_old)^2`, whose densities have no floating-point numbers in
    65,536 dimensions. For two Gaussians of one standard deviation the integral of one element is `1 - exp(-drift / 4)`,
    up to a constant that tau takes. It limits every sample, also one without an advantage.
    """

    title: ClassVar[str] = "FR-PPO"
    moves_drift: ClassVar[bool] = True

    tau: float = 1e-3
    """size of a step: for small drifts the penalty is `drift / (4 tau)`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tau", self.tau)

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        log_ratio = without_idle(log_ratio, advantages)
        policy = -advantages * torch.exp(log_ratio)
        penalty, slope = -torch.expm1(-drift / 4) / self.tau, torch.exp(-drift / 4) / (4 * self.tau)
        return terms_of(policy + penalty, policy, by_drift=slope)
