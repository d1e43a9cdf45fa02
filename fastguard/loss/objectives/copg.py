"""COPG: the policy gradient itself, clipped where PPO clips (arXiv 2311.05846)."""

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
    beyond_clip,
    clip_pair,
    terms_of,
    without_idle,
)


@dataclass(frozen=True)
class Copg(ClipRanged, EitherLogRatio):
    """`-a l`, held at the edge of PPO's clip range. The gradient is `-a` inside, without PPO's factor r."""

    title: ClassVar[str] = "COPG"

    clip_range: ClipRange = 1e-5
    """distance of the ratio from 1, or (low, high)"""

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        log_ratio = without_idle(log_ratio, advantages)
        beyond, edge = beyond_clip(log_ratio, advantages, *clip_pair(self.clip_range))
        loss = -advantages * torch.where(beyond, edge, log_ratio)
        # A NaN stays, also in the derivative.
        return terms_of(loss, (-advantages + 0 * log_ratio).masked_fill(beyond, 0.0), clipped=beyond)
