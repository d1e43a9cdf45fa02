"""Rewards in units of a standard deviation: of the group, of all images, or of the better part of the group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastguard.advantages.base import EPS, Estimator, Groups
from fastguard.options import check_at_least_0, check_positive, check_share


@dataclass(frozen=True)
class Group(Estimator):
    """`(r - mean) / (std + eps)`, both of the group (GRPO, arXiv 2402.03300).

    The std divides by n, not by n - 1. Every group with a spread has the same share of the gradient.
    """

    title: ClassVar[str] = "Group"

    eps: float = EPS
    """added to the standard deviation"""

    def __post_init__(self) -> None:
        check_at_least_0("eps", self.eps)

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        return groups.standardized(reward, self.eps)


@dataclass(frozen=True)
class Global(Estimator):
    """`(r - mean) / (std + eps)`, with the mean of the group and the std of all images (Flow-GRPO, arXiv 2505.05470).

    A group of nearly equal rewards keeps its small advantages.
    """

    title: ClassVar[str] = "Global"

    eps: float = EPS
    """added to the standard deviation"""

    def __post_init__(self) -> None:
        check_at_least_0("eps", self.eps)

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        return groups.centered(reward) / (reward.std(correction=0) + self.eps)


@dataclass(frozen=True)
class Trim(Estimator):
    """`(r - mean) / (std + eps)` of the group without its lowest rewards (MixGRPO, arXiv 2507.21802).

    `floor(share n)` of the n images are left out of mean and std. They still get an advantage. It is large where the
    rest of the group is nearly flat, so limit it by the objective's `adv_clip`.
    """

    title: ClassVar[str] = "Trimmed group"

    share: float = 0.2
    """share of the images of a group, those of the lowest rewards, that its mean and std leave out"""
    eps: float = EPS
    """added to the standard deviation"""

    def __post_init__(self) -> None:
        check_share("share", self.share)
        check_positive("eps", self.eps)

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        kept = _rank(reward, groups) >= _whole(groups.count * self.share)[groups.index]
        count = groups.sum(kept.double())
        centered = reward - (groups.sum(torch.where(kept, reward, 0.0)) / count)[groups.index]
        variance = groups.sum(torch.where(kept, centered.square(), 0.0)) / count
        return centered / (variance.sqrt()[groups.index] + self.eps)


def _rank(reward: Tensor, groups: Groups) -> Tensor:
    """The place of each image in its group, the lowest reward first, (N,)."""
    order = reward.argsort(stable=True)
    order = order[groups.index[order].argsort(stable=True)]  # by group, and by reward within it
    first = (groups.count.cumsum(0) - groups.count)[groups.index[order]]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device="cpu") - first)


def _whole(x: Tensor) -> Tensor:
    """Rounded down, but 2.9999999999 is 3: a share of 0.29 leaves out 29 of 100."""
    return (x.double() + 1e-9).floor()
