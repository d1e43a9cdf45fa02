"""Group statistics against hand-computed numbers, and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastguard.rewards.base import call_reward
from fastguard.train.advantages import advantages_without_failures, combine_rewards, group_advantages


def test_group_mean_and_population_std() -> None:
    rewards = torch.tensor([1.0, 10.0, 3.0, 14.0])
    result = group_advantages(rewards, torch.tensor([7, 2, 7, 2]))
    # Group 7: mean 2, population std 1 (unbiased would be 1.41); group 2: mean 12, std 2.
    expected = torch.tensor([-1 / 1.0001, -2 / 2.0001, 1 / 1.0001, 2 / 2.0001])
    assert torch.allclose(result.values, expected, rtol=1e-6)
    assert result.values.dtype == torch.float32
    assert result.zero_spread_groups.item() == 0


def test_global_std_keeps_group_means() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 14.0])
    result = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), std="global")
    std = math.sqrt(((1 - 7) ** 2 + (3 - 7) ** 2 + (10 - 7) ** 2 + (14 - 7) ** 2) / 4)
    expected = torch.tensor([-1.0, 1.0, -2.0, 2.0]) / (std + 1e-4)
    assert torch.allclose(result.values, expected, rtol=1e-6)


@pytest.mark.parametrize("std", ["group", "global"])
def test_groups_without_spread_are_counted_and_get_zero(std: str) -> None:
    # The mean of seven times 0.1 rounds away from 0.1 in float64: only an exact comparison sees equality.
    rewards = torch.cat([torch.full((7,), 0.1, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)])
    prompts = torch.tensor([4] * 7 + [9] * 2)
    result = group_advantages(rewards, prompts, std=std, eps=0.0)
    assert result.zero_spread_groups.item() == 1
    assert (result.values[:7] == 0).all()
    assert (result.values[7:] != 0).all()


def test_a_shuffled_batch_gives_shuffled_advantages() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, prompts = torch.randn(30, generator=generator), torch.arange(30) % 5
    order = torch.randperm(30, generator=generator)
    straight = group_advantages(rewards, prompts).values[order]
    assert torch.allclose(straight, group_advantages(rewards[order], prompts[order]).values, rtol=1e-6)


def test_large_rewards_keep_their_differences() -> None:
    """1e7 and 1e7 + 1: float32 statistics would lose the group's spread."""
    rewards = torch.tensor([1e7, 1e7 + 1, 1e7 + 2])
    expected = torch.tensor([-1.0, 0.0, 1.0]) * math.sqrt(1.5)
    assert torch.allclose(group_advantages(rewards, torch.zeros(3, dtype=torch.long)).values, expected, rtol=1e-3)


def test_the_defaults_of_torch_do_not_matter(other_defaults) -> None:
    """From what rewards return to advantages."""
    images, prompts = torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    returned = ([0.1, 0.3, math.nan, 0.2], np.array([1 / 3, 0.1, 0.2, 0.3], np.float32), torch.rand(4))

    def results() -> list[torch.Tensor]:
        scores = torch.stack([call_reward(lambda *_, r=r: r, images, [""] * 4, [{}] * 4) for r in returned])
        summed = combine_rewards(scores, [0.1, 0.2, 0.3], prompts)
        standardized = combine_rewards(scores, [0.1, 0.2, 0.3], prompts, normalize_each=True)
        advantages, counted = advantages_without_failures(summed, prompts, "group")
        assert counted.tolist() == [True, True, False, False]
        plain = group_advantages(scores[1].float(), prompts, "global")
        return [scores, summed, standardized, advantages.values, plain.values, plain.zero_spread_groups]

    expected = results()
    with other_defaults():
        came = results()
    for a, b in zip(came, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rewards_are_named(bad: float) -> None:
    rewards = torch.tensor([0.0, bad, 1.0, bad])
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        group_advantages(rewards, torch.zeros(4, dtype=torch.long))


def test_wrong_shapes_and_names_are_refused() -> None:
    prompts = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"\(3,\) and \(4,\)"):
        group_advantages(torch.zeros(3), prompts)
    with pytest.raises(ValueError, match="1-d"):
        group_advantages(torch.zeros(4, 1), prompts[:, None])
    with pytest.raises(ValueError, match="'batch'"):
        group_advantages(torch.arange(4.0), prompts, std="batch")  # type: ignore[arg-type]
