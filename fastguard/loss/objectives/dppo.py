"""DPPO: a mask by a divergence instead of clipping (arXiv 2602.04879)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from fastguard.loss.objectives.base import EitherLogRatio, Terms, check_at_least_0, terms_of, without_idle
from fastguard.ops.transition import total_variation

Divergence = Literal["tv", "kl"]


@dataclass(frozen=True)
class Dppo(EitherLogRatio):
    """`-a r`, or 0 where the divergence from the rollout policy has reached the threshold and `l` moves along `a`.

    Both divergences are exact: the steps are Gaussians of one standard deviation. The published truncation of the ratio
    at 20 is left out, since a log-ratio that is a mean over the elements does not come near it.
    """

    title: ClassVar[str] = "DPPO"
    limit_name: ClassVar[str] = "threshold"

    divergence: Divergence = "tv"
    """"tv" is the total variation of the whole latent, erf(sqrt(D drift / 8)); "kl" is drift / 2, per element"""
    threshold: float = 0.15
    """divergence from which a sample that moves away has no gradient; 0.15 of "tv" is 1.1e-6 of "kl" at D = 65,536"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}; got {self.divergence!r}")
        check_at_least_0("threshold", self.threshold)

    def terms(self, log_ratio: Tensor, drift: Tensor, advantages: Tensor, *, n_elements: int) -> Terms:
        log_ratio = without_idle(log_ratio, advantages)
        away = advantages * log_ratio.sign() > 0
        masked = away & (self.moved(log_ratio, drift, n_elements=n_elements) >= self.threshold)
        loss = -advantages * torch.where(masked, 0.0, torch.exp(log_ratio))
        return terms_of(loss, loss, clipped=masked)

    def moved(self, log_ratio: Tensor, drift: Tensor, *, n_elements: int) -> Tensor:
        return drift / 2 if self.divergence == "kl" else total_variation(drift, n_elements)
