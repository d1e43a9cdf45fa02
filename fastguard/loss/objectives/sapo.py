"""SAPO: a soft gate instead of a clip (arXiv 2511.20347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.loss.objectives.base import EitherLogRatio, Terms, by_sign, check_positive, terms_of, without_idle


@dataclass(frozen=True)
class Sapo(EitherLogRatio):
    """`-a (4 / tau) sigmoid(tau (r - 1))`, with a tau for each sign of the advantage.

    The published taus are for ratios of tokens. At the ratios of a mean over the elements, `1 +- 1e-5`, their gate is
    constant, and this is the surrogate. A tau of 1 / clip range lets it act.
    """

    title: ClassVar[str] = "SAPO"

    tau_positive: float = 1.0
    """steepness of the gate for positive advantages"""
    tau_negative: float = 1.05
    """steepness of the gate for negative advantages"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("tau_positive", self.tau_positive)
        check_positive("tau_negative", self.tau_negative)

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        log_ratio = without_idle(log_ratio, advantages)
        tau = by_sign(advantages, self.tau_positive, self.tau_negative)
        position = tau * torch.expm1(log_ratio)
        # The slope g (1 - g) r as one exponential: far out, 0 times infinity would be NaN.
        log_slope = torch.nn.functional.logsigmoid(position) + torch.nn.functional.logsigmoid(-position) + log_ratio
        return terms_of(-advantages * 4 / tau * torch.sigmoid(position), -advantages * 4 * torch.exp(log_slope))
