"""An objective around another policy than the one that drew the transitions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastguard.loss.objectives.base import LogRatio, Objective, Terms


@dataclass(frozen=True, eq=False)
class Shifted(Objective):
    """The terms at `l - offset`. The offset is a constant. It has no name in the table, and no title."""

    objective: Objective
    offset: Tensor
    """(N,): the log-ratio of the policy that is meant to the policy that drew the transitions"""

    @property
    def log_ratio(self) -> LogRatio:  # type: ignore[override]
        return self.objective.log_ratio

    @property
    def bandwidth(self) -> float:  # type: ignore[override]
        return self.objective.bandwidth

    @property
    def moves_drift(self) -> bool:  # type: ignore[override]
        return self.objective.moves_drift

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        return self.objective.terms(log_ratio - self.offset, drift, advantages, n_elements=n_elements)
