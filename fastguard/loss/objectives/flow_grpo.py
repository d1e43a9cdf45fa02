"""Flow-GRPO: PPO's clipped surrogate on the plain ratio (arXiv 2505.05470)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastguard.loss.objectives.base import FusedEpilogue, LogRatio
from fastguard.loss.objectives.clipped import Clipped


@dataclass(frozen=True)
class FlowGrpo(Clipped):
    """The log-ratio is `cross - drift / 2`, averaged over the elements. It was published with `reweight="none"`.

    A clip range of 1e-5 to 1e-4 is typical at D = 65,536.
    """

    title: ClassVar[str] = "Flow-GRPO"
    log_ratio: ClassVar[LogRatio] = "plain"

    def fused(self) -> FusedEpilogue | None:
        return self.fused_as(1)
