"""CISPO: a clipped importance weight on the policy gradient (arXiv 2506.13585)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import (
    ClipRange,
    ClipRanged,
    EitherLogRatio,
    Terms,
    clip_pair,
    terms_of,
    without_idle,
)
from fastguard.ops.transition import log1p_of


@dataclass(frozen=True)
class Cispo(ClipRanged, EitherLogRatio):
    """`-a sg(clip(r, 1 - low, 1 + high)) l`, where sg takes no gradient: the weight is clipped, and no sample loses its
    gradient.
    """

    title: ClassVar[str] = "CISPO"

    clip_range: ClipRange = 1e-5
    """distance of the weight from 1, or (low, high)"""

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        log_ratio = without_idle(log_ratio, advantages)
        low, high = clip_pair(self.clip_range)
        weight = torch.exp(log_ratio.clamp(log1p_of(-1, low, log_ratio), log1p_of(1, high, log_ratio)))
        return terms_of(-advantages * weight * log_ratio, -advantages * weight)
