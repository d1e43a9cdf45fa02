"""Scores when several processes sample: a failure on one of them is a failure on all."""

from __future__ import annotations

from accelerate import Accelerator

from fastguard.rewards.base import RewardError
from fastguard.rewards.pool import RewardPool, Scores
from fastguard.utils.processes import on_all


def collect_scores(rewards: RewardPool, accelerator: Accelerator) -> Scores:
    """The scores of this process; a reward that failed on one process raises RewardError on all of them."""
    return on_all(accelerator, RewardError, rewards.collect)
