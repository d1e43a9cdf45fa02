"""What objectives with PPO's clipped surrogate share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastguard.loss.objectives.base import ClipRange, Objective, Terms, check_adv_clip, clip_pair
from fastguard.ops.transition import clipped_terms


@dataclass(frozen=True)
class Clipped(Objective):
    """`max(-a r, -a clip(r, 1 - low, 1 + high))` of the ratio r and the advantage a (arXiv 1707.06347)."""

    limit_name: ClassVar[str] = "clip_range"

    clip_range: ClipRange = 2e-6
    """distance of the ratio from 1, or (low, high); depends on the objective and on the number of latent elements"""
    adv_clip: float | None = 5.0
    """advantages are clipped to +- this many standard deviations; None does not clip them"""

    def __post_init__(self) -> None:
        clip_pair(self.clip_range)
        if isinstance(self.clip_range, list):
            object.__setattr__(self, "clip_range", tuple(self.clip_range))  # for equality and hashes
        check_adv_clip(self.adv_clip)

    def limits(self) -> dict[str, float]:
        """clip_low, clip_high and adv_clip, infinite where there is none."""
        low, high = clip_pair(self.clip_range)
        return {
            "clip_low": low,
            "clip_high": high,
            "adv_clip": math.inf if self.adv_clip is None else float(self.adv_clip),
        }

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        return clipped_terms(log_ratio, advantages, **self.limits())
