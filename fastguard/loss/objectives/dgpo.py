"""DGPO: the preference of a group's good images over its bad ones (arXiv 2510.08425)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastguard.loss.objectives.base import Anchor, Scope, Terms, check_adv_clip, check_positive
from fastguard.loss.objectives.matching import MatchingObjective, Noised
from fastguard.ops.transition import clip_advantages


@dataclass(frozen=True)
class Dgpo(MatchingObjective):
    """`-log sigmoid(beta m) / beta`, m the mean of `a l` over a group, l the log-ratio to the model before training.

    The images of a group get the same noise at the same time. The derivative of each depends on the others' log-ratios,
    so a pass without gradients comes before each update.
    """

    title: ClassVar[str] = "DGPO"
    scope: ClassVar[Scope] = "group"
    anchor: ClassVar[Anchor] = "reference"

    beta: float = 100.0
    """how sharp the preference is; large values stay close to the model before training"""
    adv_clip: float | None = 5.0
    """advantages are clipped to +- this many standard deviations; None does not clip them"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        check_adv_clip(self.adv_clip)

    def terms(
        self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int, noised: Noised | None = None
    ) -> Terms:
        advantages = clip_advantages(advantages, self.adv_clip)
        preference = self.beta * (advantages * log_ratio).mean(1)
        by_log_ratio = -advantages * torch.sigmoid(-preference)[:, None] / log_ratio.shape[1]
        nothing = torch.zeros_like(by_log_ratio)
        return Terms(softplus(-preference) / self.beta, by_log_ratio, nothing, nothing.bool())
