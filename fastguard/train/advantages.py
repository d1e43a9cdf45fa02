"""The rewards of one rollout as advantages: several rewards, failed images, and what the estimator remembers.

Axes: R reward function, B image, T trained denoising step, S denoising step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastguard.advantages import Estimator, build_estimator
from fastguard.train.rollout import RolloutBatch, Schedule


@dataclass(frozen=True)
class Advantages:
    """Advantages of one rollout."""

    values: Tensor
    """(B,) float32; (B, T) by an estimator with `per_step`, and (B, S) once `over_all_steps` has placed them"""
    zero_spread_groups: Tensor
    """0-d int64, on the host: groups of equal rewards of final images; only `running` and `vgpo` learn from them"""
    baselines: dict[int, float]
    """what the estimator expects of each prompt from now on; empty unless it remembers earlier rollouts"""
    counted: Tensor
    """(B,) bool: whether no reward failed on an image of the group; others are not trained on"""


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
) -> Advantages:
    """The advantages of the groups without NaN, and 0 for the others.

    Args:
        scores: (R, B), or (R, B, T) per step; NaN marks an image that a reward failed on.
        prompt_indices: (B,) int64; equal indices form a group.
        weights: R factors on the rewards; all 1 without them.
        baselines: those after the previous rollout.
    """
    scores, prompt_indices = scores.cpu(), prompt_indices.cpu()
    failed = torch.isnan(scores).any(0)
    failed = failed.any(1) if estimator.per_step else failed
    counted = ~torch.isin(prompt_indices, prompt_indices[failed])
    kept, prompts = scores[:, counted], prompt_indices[counted]
    values = torch.zeros(scores.shape[1:], dtype=torch.float32, device="cpu")
    values[counted] = estimator(kept, prompts, weights, baselines)
    flat = estimator.flat_groups(kept, prompts, weights).sum()
    return Advantages(values, flat, estimator.next_baselines(kept, prompts, weights, baselines), counted)


# --- advantages per step


def scores_by_step(scores: Tensor, batch_size: int, steps: int) -> Tensor:
    """Scores in the order in which they were asked for, (R, batches * T * batch_size), as (R, B, T).

    A rollout batch is scored step by step.
    """
    return scores.unflatten(1, (-1, steps, batch_size)).movedim(2, 3).flatten(1, 2)


def over_all_steps(values: Tensor, schedule: Schedule) -> Tensor:
    """(B, T) of the trained steps as (B, S), wherever the window lies; 0 at steps that are not trained."""
    placed = values.new_zeros(len(values), len(schedule))
    placed[:, list(schedule.window)] = values
    return placed


def advantages_of(batch: RolloutBatch, advantages: Tensor) -> Tensor:
    """The advantage of each transition, (N,) on its device, from (B,) or (B, S) on the host."""
    sample = batch.sample.cpu()
    of_each = advantages[sample] if advantages.ndim == 1 else advantages[sample, batch.denoising_step.cpu()]
    return of_each.to(batch.sample.device)


def size_of_each(advantages: Tensor) -> Tensor:
    """How large the advantage of each image is, (B,): |a|, or its sum over the steps of (B, S)."""
    return advantages.abs() if advantages.ndim == 1 else advantages.abs().sum(1)
