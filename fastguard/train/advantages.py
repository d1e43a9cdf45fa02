"""The rewards of one rollout as advantages: several rewards, failed images, and what the estimator remembers.

Axes: R reward function, B image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.advantages import Estimator, build_estimator


@dataclass(frozen=True)
class Advantages:
    """Advantages of one rollout."""

    values: Tensor
    """(B,) float32"""
    zero_spread_groups: Tensor
    """0-d int64, on the host: groups whose rewards are all equal; only a running baseline learns from them"""
    baselines: dict[int, float]
    """what the estimator expects of each prompt from now on; empty unless it remembers earlier rollouts"""


def combine_rewards(scores: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum of several rewards, (R, B) -> (B,) float64 on the host. NaN of a failed image stays NaN."""
    return torch.tensor(list(weights), dtype=torch.float64, device="cpu") @ scores.detach().cpu().double()


def standardize_each(scores: Tensor, prompt_indices: Tensor) -> Tensor:
    """Each reward in units of its standard deviation in the group, (R, B) float64 on the host.

    An image that a reward failed on stays out of the statistics, and its NaN stays.
    """
    scores, prompt_indices = scores.detach().cpu().double().clone(), prompt_indices.cpu()
    whole, estimator = ~torch.isnan(scores).any(0), build_estimator("group")
    for row in scores:
        row[whole] = estimator(row[whole], prompt_indices[whole]).double()
    return scores


def advantages_without_failures(
    scores: Tensor,
    prompt_indices: Tensor,
    estimator: Estimator,
    weights: Sequence[float] | None = None,
    baselines: Mapping[int, float] | None = None,
) -> tuple[Advantages, Tensor]:
    """The advantages of the groups without NaN, and 0 for the others; also which images count, (B,) bool.

    Args:
        scores: (R, B); NaN marks an image that a reward failed on.
        prompt_indices: (B,) int64; equal indices form a group.
        weights: R factors on the rewards; all 1 without them.
        baselines: those after the previous rollout.
    """
    scores, prompt_indices = scores.cpu(), prompt_indices.cpu()
    failed = torch.isnan(scores).any(0)
    counted = ~torch.isin(prompt_indices, prompt_indices[failed])
    kept, prompts = scores[:, counted], prompt_indices[counted]
    values = torch.zeros(len(counted), dtype=torch.float32, device="cpu")
    values[counted] = estimator(kept, prompts, weights, baselines)
    flat = estimator.flat_groups(kept, prompts, weights).sum()
    return Advantages(values, flat, estimator.next_baselines(kept, prompts, weights, baselines)), counted
