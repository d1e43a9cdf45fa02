"""A baseline that remembers earlier rollouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastguard.advantages.base import Estimator, Groups
from fastguard.options import check_share


@dataclass(frozen=True)
class Running(Estimator):
    """`r - b`, with b a running mean of the prompt's rewards in earlier rollouts.

    After a rollout b becomes `momentum b + (1 - momentum) mean`. In its first rollout a prompt has its own mean for b.
    A group of equal rewards teaches as well, namely that it is better or worse than before. SuperFlow (arXiv
    2512.17951) tracks each prompt too, with a Beta distribution; the plain mean is ours. The estimator itself does not
    change: `next_baselines` returns the baselines for the next call, and a trainer's checkpoint holds them.
    """

    title: ClassVar[str] = "Running baseline"
    within_groups: ClassVar[bool] = False

    momentum: float = 0.9
    """share of a baseline that stays after a rollout"""

    def __post_init__(self) -> None:
        check_share("momentum", self.momentum)

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        means = groups.mean(reward)
        known = [
            baselines.get(prompt, mean) for prompt, mean in zip(groups.prompts.tolist(), means.tolist(), strict=True)
        ]
        return reward - means.new_tensor(known)[groups.index]

    def next_baseline(self, mean: float, before: float | None) -> float:
        return mean if before is None else self.momentum * before + (1 - self.momentum) * mean
