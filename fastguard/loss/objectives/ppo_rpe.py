"""PPO-RPE: a penalty by the relative Pearson divergence (arXiv 2010.03290)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import (
    EitherLogRatio,
    Terms,
    by_sign,
    check_positive,
    is_number,
    penalized,
    terms_of,
    without_idle,
)


@dataclass(frozen=True)
class PpoRpe(EitherLogRatio):
    """`-a r + gain (1 - beta)^2 (r - 1)^2 / (2 (1 - beta + beta r))`.

    The relative ratio is `r / (1 - beta + beta r)`. The gain makes the gradient vanish where it is `1 + threshold` (1 -
    threshold for a negative advantage). Beyond, the gradient turns around and pulls back, where PPO's is 0. The gain's
    form is a reconstruction: the paper's text was not at hand.
    """

    title: ClassVar[str] = "PPO-RPE"
    limit_name: ClassVar[str] = "threshold"

    threshold: float = 5e-6
    """distance of the relative ratio from 1 where the loss is lowest; the log-ratio there is threshold / (1 - beta)"""
    beta: float = 0.5
    """share of the policy now in the mixture that the ratio is relative to, below 1"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("threshold", self.threshold)
        if not (is_number(self.beta) and 0 <= self.beta < 1):
            raise ValueError(f"beta must be a number in [0, 1); got {self.beta!r}")
        if not (self.threshold < 1 and self.beta * (1 + self.threshold) < 1):
            raise ValueError(
                f"threshold = {self.threshold} is out of reach: the relative ratio stays in 0 to 1 / beta = "
                f"{1 / self.beta if self.beta else float('inf'):g}"
            )

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        log_ratio = without_idle(log_ratio, advantages)
        beta = self.beta
        gain = advantages.abs() / by_sign(advantages, self._slope_at_edge(1), self._slope_at_edge(-1))
        ratio, change = torch.exp(log_ratio), torch.expm1(log_ratio)
        # (r - 1) / (1 - beta + beta r), where r does not overflow
        shrink = torch.exp(-log_ratio.clamp(min=0))
        mixture = (1 - beta) * shrink + beta * torch.exp(log_ratio.clamp(max=0))
        relative = torch.where(log_ratio > 0, -torch.expm1(-log_ratio), change) / mixture
        half = 0.5 * (1 - beta) ** 2
        slope = half * relative * (1 + shrink / mixture)
        loss = penalized(ratio, advantages, gain * half * change * relative)
        return terms_of(loss, (gain * slope - advantages) * ratio)

    def moved(self, log_ratio: Tensor, drift: Tensor, *, n_elements: int) -> Tensor:
        return (1 - self.beta) * log_ratio.abs()

    def _slope_at_edge(self, sign: int) -> float:
        """Of the divergence by the ratio, in size, where the relative ratio is 1 + sign threshold."""
        beta, change = self.beta, sign * self.threshold / (1 - self.beta * (1 + sign * self.threshold))  # r - 1
        mixture = 1 + beta * change
        return abs(0.5 * (1 - beta) ** 2 * change * (1 + mixture) / mixture**2)
