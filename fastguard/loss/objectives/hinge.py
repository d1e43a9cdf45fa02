"""PPO's clip as a hinge loss, and its relatives (arXiv 2110.13799)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from fastguard.loss.objectives.base import EitherLogRatio, Terms, check_positive, terms_of, without_idle

Classifier = Literal["ratio", "log", "root"]


@dataclass(frozen=True)
class Hinge(EitherLogRatio):
    """`|a| max(0, margin - sign(a) f)` of a classifier f: `r - 1`, `l` or `sqrt(r) - 1`.

    With "ratio" the gradient is that of PPO's clip with `clip_range = margin`: the losses differ by `margin |a| + a`.
    With "log" it is that of COPG.
    """

    title: ClassVar[str] = "Hinge"
    limit_name: ClassVar[str] = "margin"

    margin: float = 1e-5
    """value of the classifier from which on a sample that moves along its advantage has no gradient"""
    classifier: Classifier = "ratio"
    """"ratio" is `r - 1`, "log" is `l`, "root" is `sqrt(r) - 1`, which reaches the margin at about twice the `l`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("margin", self.margin)
        if self.classifier not in get_args(Classifier):
            raise ValueError(f"classifier must be one of {', '.join(get_args(Classifier))}; got {self.classifier!r}")

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        log_ratio = without_idle(log_ratio, advantages)
        if self.classifier == "log":
            value, slope = log_ratio, torch.ones_like(log_ratio)
        else:
            power = 1.0 if self.classifier == "ratio" else 0.5
            value, slope = torch.expm1(power * log_ratio), power * torch.exp(power * log_ratio)
        gap = self.margin - advantages.sign() * value
        clipped = (gap <= 0) & (advantages != 0)
        loss = advantages.abs() * gap.clamp(min=0)
        by_log_ratio = (-advantages * slope + 0 * log_ratio).masked_fill(clipped, 0.0)
        return terms_of(loss, by_log_ratio, clipped=clipped)

    def moved(self, log_ratio: Tensor, drift: Tensor, *, n_elements: int) -> Tensor:
        return log_ratio.abs() * (0.5 if self.classifier == "root" else 1.0)
