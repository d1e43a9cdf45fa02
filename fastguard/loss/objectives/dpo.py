"""Online DPO: preferences between pairs of a group (Diffusion-DPO, arXiv 2311.12908, on sampled images)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastguard.loss.objectives.base import Anchor, Scope, Terms, check_positive
from fastguard.loss.objectives.matching import MatchingObjective, Noised

Pairs = Literal["extremes", "all"]


@dataclass(frozen=True)
class Dpo(MatchingObjective):
    """`-log sigmoid(beta / 2 (l_winner - l_loser))`, with the log-ratio l to the model before training.

    The images of a group get the same noise at the same time. Images of the same advantage make no pair. A pass without
    gradients comes before each update. With "extremes", the images between the best and the worst take passes for
    nothing: sample groups of two, or take "all".
    """

    title: ClassVar[str] = "online DPO"
    scope: ClassVar[Scope] = "group"
    anchor: ClassVar[Anchor] = "reference"

    beta: float = 100.0
    """how sharp the preference is; large values stay close to the model before training"""
    pairs: Pairs = "extremes"
    """the best of a group with the worst; or "all": the second best with the second worst too, and so on"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("beta", self.beta)
        if self.pairs not in get_args(Pairs):
            raise ValueError(f"pairs must be one of {', '.join(get_args(Pairs))}; got {self.pairs!r}")

    def terms(
        self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int, noised: Noised | None = None
    ) -> Terms:
        count = 1 if self.pairs == "extremes" else log_ratio.shape[1] // 2
        order = advantages.argsort(dim=1, stable=True)
        losers, winners = order[:, :count], order.flip(1)[:, :count]
        differ = advantages.gather(1, winners) > advantages.gather(1, losers)
        preference = self.beta / 2 * (log_ratio.gather(1, winners) - log_ratio.gather(1, losers))
        share = differ.to(preference.dtype) / count
        slope = -self.beta / 2 * torch.sigmoid(-preference) * share
        nothing = torch.zeros_like(log_ratio)
        by_log_ratio = nothing.scatter(1, winners, slope).scatter(1, losers, -slope)
        return Terms((softplus(-preference) * share).sum(1), by_log_ratio, nothing, nothing.bool())
