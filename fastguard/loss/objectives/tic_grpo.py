"""TIC-GRPO: one ratio for a whole trajectory (arXiv 2508.02833)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import EitherLogRatio, Scope, Terms, beyond_clip, check_positive, without_idle


@dataclass(frozen=True)
class TicGrpo(EitherLogRatio):
    """`max(-a r, -a min(r, 1 + clip_range))` of the ratio `r = exp(mean of l over the steps)` of an image.

    Published with a sum over elements and steps, which no float can hold for images, and clipped above alone. With
    `low` it is clipped on both sides, as GSPO is (arXiv 2507.18071). From the second update of a rollout on, each
    transition takes one more forward pass, since the gradient of a step depends on the ratios of the others.
    """

    title: ClassVar[str] = "TIC-GRPO"
    scope: ClassVar[Scope] = "trajectory"
    limit_name: ClassVar[str] = "clip_range"

    clip_range: float = 1e-5
    """distance of the ratio above 1 from which on an image with a positive advantage has no gradient"""
    low: float | None = None
    """the same below 1, for a negative advantage; None does not clip there"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("clip_range", self.clip_range)
        if self.low is not None:
            check_positive("low", self.low)

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        whole = without_idle(log_ratio.mean(1), advantages)
        cut, edge = beyond_clip(whole, advantages, 1.0 if self.low is None else self.low, self.clip_range)
        loss = -advantages * torch.exp(torch.where(cut, edge, whole))
        each = loss.masked_fill(cut, 0.0) / log_ratio.shape[1]
        return Terms(loss, *(x[:, None].expand_as(log_ratio) for x in (each, torch.zeros_like(each), cut)))
