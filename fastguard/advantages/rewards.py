"""Several rewards of unlike scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.advantages.base import EPS, Estimator, Groups
from fastguard.options import check_positive


@dataclass(frozen=True)
class Gdpo(Estimator):
    """Each reward `(r_k - mean_k) / (std_k + eps)` in its group, weighted and added, then standardized over all images.

    From GDPO, arXiv 2601.05242. The scale of a reward does not matter, and a reward that is equal throughout a group
    adds nothing there.
    """

    title: ClassVar[str] = "GDPO"

    eps: float = EPS
    """added to every standard deviation"""

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)

    def combine(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        return weights @ torch.stack([groups.standardized(row, self.eps) for row in rewards])

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        return (reward - reward.mean()) / (reward.std(correction=0) + self.eps)


@dataclass(frozen=True)
class StdScaled(Estimator):
    """`(s - mean) / (std + eps)` of the group, of the sum `s = sum_k w_k r_k / std_k` with the std of all images.

    From FlowSE-GRPO, arXiv 2601.16483. Unlike with `gdpo`, a reward counts more in the groups where it varies more. A
    reward that is equal for all images adds nothing.
    """

    title: ClassVar[str] = "Scaled rewards"

    eps: float = EPS
    """added to the standard deviation of the group"""

    def __post_init__(self) -> None:
        check_positive("eps", self.eps)

    def combine(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        varies = rewards.amax(1) > rewards.amin(1)
        scale = rewards.std(1, correction=0)
        return (weights[varies] / scale[varies]) @ rewards[varies]

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        return groups.standardized(reward, self.eps)
