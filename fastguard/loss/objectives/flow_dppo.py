"""Flow-DPPO: a mask by KL instead of clipping (arXiv 2606.11025, Eqs. 14 and 18)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastguard.loss.objectives.base import FusedEpilogue, LogRatio, Objective, Terms, check_at_least_0
from fastguard.ops.transition import masked_terms


@dataclass(frozen=True)
class FlowDppo(Objective):
    """`-a r`, without a gradient where KL(new || old) has reached the threshold and the transition moves away.

    Advantages are not clipped. It was published with `reweight="none"`.
    """

    title: ClassVar[str] = "Flow-DPPO"
    log_ratio: ClassVar[LogRatio] = "plain"
    limit_name: ClassVar[str] = "kl_threshold"

    kl_threshold: float = 1e-5
    """KL from the rollout policy, per element, from which on a sample that moves away has no gradient"""

    def __post_init__(self) -> None:
        check_at_least_0("kl_threshold", self.kl_threshold)

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        return masked_terms(log_ratio, drift, advantages, self.kl_threshold)

    def fused(self) -> FusedEpilogue:
        return FusedEpilogue(2, kl_threshold=float(self.kl_threshold))

    def moved(self, log_ratio: Tensor, drift: Tensor, *, n_elements: int) -> Tensor:
        return drift / 2
