"""GMPO: the geometric mean of clipped ratios (arXiv 2507.20673, Eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import ClipRange, ClipRanged, EitherLogRatio, Scope, Terms, clip_pair, without_idle


@dataclass(frozen=True)
class Gmpo(ClipRanged, EitherLogRatio):
    """`-a exp(mean over the steps of clip(l))`: each step's log-ratio is cut on the side of the advantage.

    A step that is cut has no gradient; the others of the image keep theirs. From the second update of a rollout on,
    each transition takes one more forward pass, since the gradient of a step depends on the ratios of the others.
    """

    title: ClassVar[str] = "GMPO"
    scope: ClassVar[Scope] = "trajectory"

    clip_range: ClipRange = 2e-5
    """largest log-ratio of a step, or (low, high); the paper takes twice that of PPO"""

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        low, high = clip_pair(self.clip_range)
        score = advantages[:, None]
        log_ratio = without_idle(log_ratio, score)
        clipped = ((score > 0) & (log_ratio > high)) | ((score < 0) & (log_ratio < -low))
        loss = -advantages * torch.exp(log_ratio.clamp(-low, high).where(clipped, log_ratio).mean(1))
        each = loss[:, None] / log_ratio.shape[1]
        return Terms(loss, each.masked_fill(clipped, 0.0), torch.zeros_like(log_ratio), clipped)
