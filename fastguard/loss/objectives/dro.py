"""DRO: a quadratic penalty on the log-ratio (arXiv 2405.19107)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastguard.loss.objectives.base import EitherLogRatio, Terms, check_positive, terms_of


@dataclass(frozen=True)
class Dro(EitherLogRatio):
    """`-a l + beta l^2 / 2`, which is lowest at `l = a / beta`. A sample without an advantage is pulled back to 0."""

    title: ClassVar[str] = "DRO"

    beta: float = 1e5
    """strength of the penalty: the advantage over the log-ratio that it asks for"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        pull = self.beta * log_ratio
        return terms_of((pull / 2 - advantages) * log_ratio, pull - advantages)
