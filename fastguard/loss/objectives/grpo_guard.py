"""GRPO-Guard: PPO's clipped surrogate on the normalized ratio (arXiv 2510.22319, Eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastguard.loss.objectives.base import FusedEpilogue, LogRatio
from fastguard.loss.objectives.clipped import Clipped


@dataclass(frozen=True)
class GrpoGuard(Clipped):
    """RatioNorm: the log-ratio is `s cross`. Its mean is 0, and the step's standard deviation cancels in its spread.

    The gradient reweighting of the paper (Eq. 12) is `reweight="inverse_dt"` of the loss.
    """

    title: ClassVar[str] = "GRPO-Guard"
    log_ratio: ClassVar[LogRatio] = "normalized"

    def fused(self) -> FusedEpilogue | None:
        return self.fused_as(0)
