"""Rewards without the mean of their group, in their own unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastguard.advantages.base import Estimator, Groups


@dataclass(frozen=True)
class Centered(Estimator):
    """`r - mean` of the group, in the unit of the reward (Dr. GRPO, arXiv 2503.20783).

    Without a division, groups that the model scores nearly equally on get no more weight than others.
    """

    title: ClassVar[str] = "Centred"

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        return groups.centered(reward)


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """`r` minus the mean of the other images of the group, `n / (n - 1) (r - mean)` (arXiv 2603.01162).

    With it the policy gradient of a group is a U-statistic over its pairs of images, which has no bias at any group
    size. So groups of unequal sizes weigh alike. A group of one image gets 0.
    """

    title: ClassVar[str] = "Leave one out"

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        others = (groups.count - 1).clamp(min=1)
        return groups.centered(reward) * (groups.count / others.double())[groups.index]
