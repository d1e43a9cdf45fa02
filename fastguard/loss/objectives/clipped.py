"""What objectives with PPO's clipped surrogate share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.loss.objectives.base import (
    ClipRanged,
    FusedEpilogue,
    Terms,
    check_adv_clip,
    clip_pair,
    is_number,
)
from fastguard.ops.transition import clip_advantages, clipped_terms, log1p_of


@dataclass(frozen=True)
class Clipped(ClipRanged):
    """`max(-a r, -a clip(r, 1 - low, 1 + high))` of the ratio r and the advantage a (arXiv 1707.06347)."""

    adv_clip: float | None = 5.0
    """advantages are clipped to +- this many standard deviations; None does not clip them"""
    dual_clip: float | None = None
    """bound above 1 on the ratio of samples with a negative advantage (arXiv 1912.09729), or None for no bound"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_adv_clip(self.adv_clip)
        if self.dual_clip is not None and not (is_number(self.dual_clip) and 1 < self.dual_clip < math.inf):
            raise ValueError(f"dual_clip must be a number above 1, or None for no bound; got {self.dual_clip!r}")

    def limits(self) -> dict[str, float]:
        """clip_low, clip_high and adv_clip, infinite where there is none."""
        low, high = clip_pair(self.clip_range)
        return {
            "clip_low": low,
            "clip_high": high,
            "adv_clip": math.inf if self.adv_clip is None else float(self.adv_clip),
        }

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        terms = clipped_terms(log_ratio, advantages, **self.limits())
        if self.dual_clip is None:
            return terms
        # The clip leaves ratios above 1 alone where the advantage is negative, so these samples are not cut yet.
        over = (advantages < 0) & (log_ratio > log1p_of(1, self.dual_clip - 1, log_ratio))
        bound = -self.dual_clip * clip_advantages(advantages, self.adv_clip)
        return terms._replace(
            loss=torch.where(over, bound, terms.loss),
            by_log_ratio=terms.by_log_ratio.masked_fill(over, 0.0),
            clipped=terms.clipped | over,
        )

    def fused_as(self, code: int) -> FusedEpilogue | None:
        """Parameters for the fused kernel, which knows no dual clip: with one, `terms` runs between two kernels."""
        return FusedEpilogue(code, **self.limits()) if self.dual_clip is None else None
