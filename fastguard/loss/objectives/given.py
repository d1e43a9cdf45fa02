"""Derivatives that are known already: the second of the two passes of a trajectory objective."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fastguard.loss.objectives.base import LogRatio, Objective, Terms


@dataclass(frozen=True, eq=False, kw_only=True)
class Given(Objective):
    """`by_log_ratio l + by_drift drift`, with both factors held. It has no name in the table, and no title."""

    by_log_ratio: Tensor
    """(N,)"""
    by_drift: Tensor
    """(N,)"""
    clipped: Tensor
    """(N,) bool"""
    log_ratio: LogRatio = "plain"  # type: ignore[misc]
    """of the objective that they are of"""
    bandwidth: float = 0.0  # type: ignore[misc]
    """as log_ratio"""
    moves_drift: bool = True  # type: ignore[misc]
    """whether by_drift can differ from 0"""

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        for name in ("by_log_ratio", "by_drift", "clipped"):
            found = getattr(self, name)
            if not isinstance(found, Tensor) or found.shape != log_ratio.shape:
                came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{name} must have shape {tuple(log_ratio.shape)}, one per sample; got {came}")
        loss = self.by_log_ratio * log_ratio + self.by_drift * drift
        return Terms(loss, self.by_log_ratio, self.by_drift, self.clipped)
