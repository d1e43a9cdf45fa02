"""The surrogate without a trust region: PPO's objective (arXiv 1707.06347, Eq. 6) before it is clipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import EitherLogRatio, Terms, terms_of, without_idle


@dataclass(frozen=True)
class Surrogate(EitherLogRatio):
    """`-a r`. Nothing limits how far a transition moves, so train it with one update per rollout, or with a rule that
    ends the updates of a rollout (ESPO, arXiv 2202.00079).
    """

    title: ClassVar[str] = "Surrogate"

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        loss = -advantages * torch.exp(without_idle(log_ratio, advantages))
        return terms_of(loss, loss)
