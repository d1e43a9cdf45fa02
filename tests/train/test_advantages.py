"""The rewards of a rollout as advantages: several rewards, failed images, torch's defaults."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastguard.advantages import build_estimator
from fastguard.rewards.base import call_reward
from fastguard.train.advantages import (
    advantages_of,
    advantages_without_failures,
    combine_rewards,
    over_all_steps,
    scores_by_step,
    size_of_each,
    standardize_each,
)
from fastguard.train.rollout import RolloutBatch, Schedule

NAN = math.nan


def test_rewards_are_weighted_and_a_failed_image_stays_nan() -> None:
    scores = torch.tensor([[1.0, 2.0, NAN], [10.0, 20.0, 30.0]])
    total = combine_rewards(scores, [2.0, 0.5])
    torch.testing.assert_close(total, torch.tensor([7.0, 14.0, NAN], dtype=torch.float64), equal_nan=True)


def test_each_reward_is_standardized_in_its_group_without_failed_images() -> None:
    scores = torch.tensor([[1.0, 3.0, NAN, 4.0, 4.0], [0.0, 0.4, 9.0, 1.0, 3.0]])
    result = standardize_each(scores, torch.tensor([0, 0, 0, 1, 1]))
    expected = [[-1.0, 1.0, NAN, 0.0, 0.0], [-1.0, 1.0, 9.0, -1.0, 1.0]]
    torch.testing.assert_close(result, torch.tensor(expected).double(), rtol=1e-3, atol=0, equal_nan=True)
    assert torch.isnan(scores[0, 2])
    assert scores[0, 0] == 1  # the caller's stay as they were


@pytest.mark.parametrize("name", ["group", "global", "running"])
def test_a_group_with_a_failed_image_counts_for_nothing(name: str) -> None:
    scores = torch.tensor([[1.0, 3.0, 5.0, NAN, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0, 4.0, 4.0]])
    prompts = torch.tensor([7, 7, 5, 5, 9, 9])
    estimator, weights, before = build_estimator(name), [1.0, 2.0], {5: -1.0, 7: 0.0}
    advantages = advantages_without_failures(scores, prompts, estimator, weights, before)
    assert advantages.counted.tolist() == [True, True, False, False, True, True]
    expected = estimator(scores[:, advantages.counted], prompts[advantages.counted], weights, before)
    assert torch.equal(advantages.values[advantages.counted], expected)
    assert (advantages.values[:2] != 0).all()
    assert (advantages.values[~advantages.counted] == 0).all()
    assert advantages.zero_spread_groups.item() == 1
    assert advantages.baselines == (before | {7: pytest.approx(0.3), 9: 10.0} if name == "running" else before)


def test_a_rollout_of_failures_alone_gives_zeros() -> None:
    for name in ("group", "std_scaled", "gdpo", "bnpo"):
        advantages = advantages_without_failures(
            torch.full((2, 4), NAN), torch.tensor([0, 0, 1, 1]), build_estimator(name)
        )
        assert not advantages.counted.any()
        assert torch.equal(advantages.values, torch.zeros(4))


def test_one_failed_step_image_drops_its_group() -> None:
    scores = torch.rand(2, 6, 3, generator=torch.Generator().manual_seed(0))
    scores[1, 3, 0] = NAN
    prompts, estimator = torch.tensor([7, 7, 5, 5, 9, 9]), build_estimator("vgpo")
    advantages = advantages_without_failures(scores, prompts, estimator, [1.0, 2.0])
    assert advantages.counted.tolist() == [True, True, False, False, True, True]
    assert torch.equal(
        advantages.values[advantages.counted],
        estimator(scores[:, advantages.counted], prompts[advantages.counted], [1.0, 2.0]),
    )
    assert (advantages.values[advantages.counted] != 0).all()
    assert torch.equal(advantages.values[~advantages.counted], torch.zeros(2, 3))
    assert advantages.baselines == {}


def test_scores_of_steps_are_put_in_the_order_of_images() -> None:
    """Two rollout batches of three images and two steps: batch by batch, step by step, image by image."""
    asked = [(image, step) for first in (0, 3) for step in range(2) for image in range(first, first + 3)]
    scores = torch.tensor([[100.0 * r + 10 * image + step for image, step in asked] for r in range(2)])
    placed = scores_by_step(scores, batch_size=3, steps=2)
    assert placed.shape == (2, 6, 2)
    expected = [[[100 * r + 10 * image + step for step in range(2)] for image in range(6)] for r in range(2)]
    assert placed.tolist() == expected


def test_a_transition_has_the_advantage_of_its_step_wherever_the_window_lies() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    for start in range(4):
        schedule = Schedule((1.0, 0.8, 0.6, 0.4, 0.2, 0.0), range(start, start + 2))
        placed = over_all_steps(values, schedule)
        assert placed.shape == (2, 5)
        assert placed.abs().sum() == 10
        batch = transitions(sample=[1, 0, 1], denoising_step=[start, start + 1, start + 1])
        assert advantages_of(batch, placed).tolist() == [3.0, 2.0, -4.0]
        assert size_of_each(placed).tolist() == [3.0, 7.0]
    assert advantages_of(batch, torch.tensor([5.0, -6.0])).tolist() == [-6.0, 5.0, -6.0]
    assert size_of_each(torch.tensor([5.0, -6.0])).tolist() == [5.0, 6.0]


def transitions(sample: list[int], denoising_step: list[int]) -> RolloutBatch:
    n, still = len(sample), torch.zeros(len(sample), 1, 1)
    index = torch.zeros(n, dtype=torch.int64)
    step = Schedule((1.0, 0.5, 0.0), range(1), "dance_sde", 0.5).step(0).expand(n)
    return RolloutBatch(
        still, still, still, torch.ones(n), index, torch.tensor(sample), torch.tensor(denoising_step), step
    )


def test_the_defaults_of_torch_do_not_matter(other_defaults) -> None:
    """From what rewards return to advantages."""
    images, prompts = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    returned = ([0.1, 0.3, NAN, 0.2], np.array([1 / 3, 0.1, 0.2, 0.3], np.float32), torch.rand(4))

    def results() -> list[torch.Tensor]:
        scores = torch.stack([call_reward(lambda *_, r=r: r, images, [""] * 4, [{}] * 4) for r in returned])
        standardized = standardize_each(scores, prompts)
        advantages = advantages_without_failures(scores, prompts, build_estimator("group"), [0.1, 0.2, 0.3])
        assert advantages.counted.tolist() == [True, True, False, False]
        return [scores, combine_rewards(scores, [0.1, 0.2, 0.3]), standardized, advantages.values]

    expected = results()
    with other_defaults():
        came = results()
    for a, b in zip(came, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
