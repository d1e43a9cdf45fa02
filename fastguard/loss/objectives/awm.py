"""AWM: flow matching weighted by advantages, under PPO's clip (arXiv 2509.25050)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from fastguard.loss.objectives.base import ClipRange, Terms
from fastguard.loss.objectives.clipped import Clipped
from fastguard.loss.objectives.matching import MatchingObjective, Noised

TimeWeight = Literal["none", "sigma", "sigma_squared"]


@dataclass(frozen=True)
class Awm(Clipped, MatchingObjective):
    """`max(-a r, -a clip(r, 1 - low, 1 + high))` of the ratio `r = exp(w (|v_old - target|^2 - |v - target|^2) / D)`.

    The first update after a rollout is flow matching on the sampled images, each weighted by its advantage.
    """

    title: ClassVar[str] = "AWM"

    clip_range: ClipRange = 1e-2
    """distance of the ratio from 1, or (low, high); about 5e-3 clips 10% on the digits, and public recipes take 1"""
    time_weight: TimeWeight = "none"
    """w, a factor on the log-ratio: none, the flow time, or its square, with which errors are those of x0"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_weight not in get_args(TimeWeight):
            known = ", ".join(get_args(TimeWeight))
            raise ValueError(f"time_weight must be one of {known}; got {self.time_weight!r}")

    def time_factor(self, sigma: Tensor) -> Tensor | None:
        return {"none": None, "sigma": sigma, "sigma_squared": sigma**2}[self.time_weight]

    def terms(
        self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int, noised: Noised | None = None
    ) -> Terms:
        return super().terms(log_ratio, drift, advantages, n_elements=n_elements)
