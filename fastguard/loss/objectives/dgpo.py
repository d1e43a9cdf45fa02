"""DGPO: the preference of a group's good images over its bad ones (arXiv 2510.08425)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastguard.loss.objectives.base import Anchor, Scope, Terms, check_positive
from fastguard.loss.objectives.matching import MatchingObjective, Noised


@dataclass(frozen=True)
class Dgpo(MatchingObjective):
    """`-log sigmoid(beta sum of a_i l_i over a group)`, with the log-ratio l to the model before training.

    The images of a group are noised at the same time. The derivative of each depends on the others' log-ratios, so
    a pass without gradients comes before each update.
    """

    title: ClassVar[str] = "DGPO"
    scope: ClassVar[Scope] = "group"
    anchor: ClassVar[Anchor] = "reference"

    beta: float = 100.0
    """how sharp the preference is; large values stay close to the model before training"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)

    def terms(
        self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int, noised: Noised | None = None
    ) -> Terms:
        preference = self.beta * (advantages * log_ratio).sum(1)
        by_log_ratio = -self.beta * advantages * torch.sigmoid(-preference)[:, None]
        nothing = torch.zeros_like(by_log_ratio)
        return Terms(softplus(-preference), by_log_ratio, nothing, nothing.bool())
