"""Advantages: how much better an image's reward is than the others of its prompt (GRPO).

Axes: R reward function, B image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EPS = 1e-4
"""Added to the standard deviation, as public trainers do."""


@dataclass(frozen=True)
class Advantages:
    """Advantages of one rollout."""

    values: Tensor
    """(B,) float32"""
    zero_spread_groups: Tensor
    """0-d int64, on the host: groups whose rewards are all equal; they teach nothing and get advantage 0"""


def group_advantages(
    rewards: Tensor, prompt_indices: Tensor, std: Literal["group", "global"] = "group", eps: float = EPS
) -> Advantages:
    """(reward - group mean) / (std + eps), with the population standard deviation (divided by n, not n - 1).

    Args:
        rewards: (B,) finite scores, any floating dtype; computed in float64.
        prompt_indices: (B,) int64; equal indices form a group.
        std: the standard deviation of the image's own group, or of all rewards.

    Raises ValueError for wrong shapes, an unknown `std`, and NaN or infinite rewards (naming their indices).
    """
    if rewards.ndim != 1 or rewards.shape != prompt_indices.shape:
        raise ValueError(
            "rewards and prompt_indices must be 1-d and of equal length, one per image, "
            f"got {tuple(rewards.shape)} and {tuple(prompt_indices.shape)}"
        )
    if std not in ("group", "global"):
        raise ValueError(f'std must be "group" or "global", got {std!r}')
    bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"the reward function returned NaN or infinite scores for the images {bad}")

    # On the host: a handful of numbers, and CUDA's index_add would add them in a new order each time.
    device = rewards.device
    rewards, prompt_indices = rewards.detach().cpu().double(), prompt_indices.cpu()
    groups, group, count = torch.unique(prompt_indices, return_inverse=True, return_counts=True)
    zeros = rewards.new_zeros(len(groups))
    centered = rewards - (zeros.index_add(0, group, rewards) / count)[group]
    if std == "group":
        scale = (zeros.index_add(0, group, centered.square()) / count).sqrt()[group]
    else:
        scale = rewards.std(correction=0)
    # Equality is exact here, where a standard deviation of equal rewards may round to a tiny nonzero number.
    lowest = zeros.scatter_reduce(0, group, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, group, rewards, "amax", include_self=False)
    flat = lowest == highest
    values = torch.where(flat[group], 0.0, centered / (scale + eps))
    return Advantages(values.float().to(device), flat.sum())


def combine_rewards(
    scores: Tensor, weights: Sequence[float], prompt_indices: Tensor, normalize_each: bool = False
) -> Tensor:
    """The weighted sum of several rewards, (B,) float64 on the host.

    Args:
        scores: (R, B) of each reward; NaN (an image that a reward failed on) stays NaN in the sum.
        weights: R factors.
        prompt_indices: (B,) int64; the groups within which `normalize_each` standardizes every reward first.
    """
    scores = scores.detach().cpu().double()
    if normalize_each:
        scores = scores.clone()
        whole = ~torch.isnan(scores).any(0)
        for row in scores:
            row[whole] = group_advantages(row[whole], prompt_indices.cpu()[whole]).values.double()
    return torch.tensor(list(weights), dtype=torch.float64, device="cpu") @ scores


def advantages_without_failures(
    rewards: Tensor, prompt_indices: Tensor, std: Literal["group", "global"]
) -> tuple[Advantages, Tensor]:
    """`group_advantages` of the groups without NaN, and 0 for the others; also which images count, (B,) bool."""
    prompt_indices = prompt_indices.cpu()
    failed = torch.isin(prompt_indices, prompt_indices[torch.isnan(rewards)])
    kept = group_advantages(rewards[~failed], prompt_indices[~failed], std)
    values = kept.values.new_zeros(len(rewards)).masked_scatter_(~failed, kept.values)
    return Advantages(values, kept.zero_spread_groups), ~failed
