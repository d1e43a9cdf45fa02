"""Scores when several processes sample: a failure on one of them is a failure on all."""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import gather_object

from fastguard.rewards.base import RewardError
from fastguard.rewards.pool import RewardPool, Scores


def collect_scores(rewards: RewardPool, accelerator: Accelerator) -> Scores:
    """The scores of this process; a reward that failed on one process raises RewardError on all of them."""
    scores, problem = None, ""
    try:
        scores = rewards.collect()
    except RewardError as error:
        problem = str(error)
    problems = [p for p in gather_object([problem]) if p]
    if scores is None or problems:
        raise RewardError(problems[0])
    return scores
