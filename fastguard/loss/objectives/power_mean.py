"""The power-mean importance weight of RPG (arXiv 2506.06178)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import EitherLogRatio, Terms, is_number, terms_of, without_idle


@dataclass(frozen=True)
class PowerMean(EitherLogRatio):
    """`-a log(1 - lam + lam r) / lam`, whose gradient is `-a r / (1 - lam + lam r)`: a weight of at most 1 / lam.

    lam = 1 is the plain policy gradient, lam = 0 the importance-weighted one, `-a (r - 1)`. The formula of the weight
    is from memory of the paper; that of the loss is its integral.
    """

    title: ClassVar[str] = "Power mean"

    lam: float = 0.3
    """share of the policy now in the mixture that the ratio is relative to, in [0, 1]"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.lam) and 0 <= self.lam <= 1):
            raise ValueError(f"lam must be a number in [0, 1]; got {self.lam!r}")

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        log_ratio = without_idle(log_ratio, advantages)
        lam = self.lam
        if lam == 0:
            return terms_of(-advantages * torch.expm1(log_ratio), -advantages * torch.exp(log_ratio))
        # Two forms of log(1 - lam + lam r), for ratios up to and from e: neither loses digits or overflows.
        small = torch.log1p(lam * torch.expm1(log_ratio.clamp(max=1)))
        large = log_ratio + torch.log1p((1 - lam) * torch.expm1(-log_ratio.clamp(min=1)))
        grow, shrink = torch.exp(log_ratio.clamp(max=0)), torch.exp(-log_ratio.clamp(min=0))
        weight = grow / (lam * grow + (1 - lam) * shrink)
        return terms_of(-advantages * torch.where(log_ratio > 1, large, small) / lam, -advantages * weight)
