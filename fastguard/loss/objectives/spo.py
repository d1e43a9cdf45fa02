"""SPO: Simple Policy Optimization, a quadratic penalty instead of clipping (arXiv 2401.16025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import EitherLogRatio, Terms, check_positive, penalized, terms_of, without_idle


@dataclass(frozen=True)
class Spo(EitherLogRatio):
    """`-a r + |a| (r - 1)^2 / (2 epsilon)`. The gradient is 0 at `r = 1 +- epsilon`, and pulls back beyond."""

    title: ClassVar[str] = "SPO"
    limit_name: ClassVar[str] = "epsilon"

    epsilon: float = 1e-5
    """distance of the ratio from 1 at which the loss of a sample is lowest"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("epsilon", self.epsilon)

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        log_ratio = without_idle(log_ratio, advantages)
        ratio, change = torch.exp(log_ratio), torch.expm1(log_ratio)
        pull = advantages.abs() * change / self.epsilon
        return terms_of(penalized(ratio, advantages, pull * change / 2), (pull - advantages) * ratio)
