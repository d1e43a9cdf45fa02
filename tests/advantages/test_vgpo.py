"""Advantages per denoising step against their formula in NumPy, and against what must hold for them."""

from __future__ import annotations

import math
import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
import torch
from helpers.estimator_formulas import value_anchored
from torch import Tensor

from fastguard.advantages import ESTIMATOR_OPTIONS, NegativeRewardError, build_estimator

PROMPTS = np.array([4, 9, 4, 2, 9, 9, 4, 2, 9, 4, 4])
STEPS = 5
WEIGHTS = [0.7, 2.0]
RELATIVE = {"k": 0.0, "eps": 0.0}


def some_rewards(rows: int = 1, steps: int = STEPS) -> np.ndarray:
    """(rows, N, T), positive."""
    return np.random.default_rng(0).uniform(0.1, 3.0, size=(rows, len(PROMPTS), steps))


def estimate(rewards: Any, prompts: Any = PROMPTS, weights: Any = None, **options: Any) -> Tensor:
    return build_estimator("vgpo", **options)(torch.as_tensor(rewards), torch.as_tensor(prompts), weights)


def formula(rewards: np.ndarray, prompts: np.ndarray = PROMPTS, **options: Any) -> np.ndarray:
    return value_anchored(rewards, prompts, **options)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("share", "absolute"), [(0.0, 0), (0.5, 2), (0.6, 3), (1.0, 5)])
@pytest.mark.parametrize("rows", [1, 2])
def test_it_is_its_formula(rows: int, share: float, absolute: int, gamma: float) -> None:
    rewards, weights = some_rewards(rows), WEIGHTS[:rows]
    result = estimate(rewards, weights=weights, gamma=gamma, k=0.3, absolute_share=share)
    total = np.einsum("r,rnt->nt", np.array(weights), rewards)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, formula(total, gamma=gamma, k=0.3, absolute=absolute), rtol=3e-6, atol=1e-7)


def test_the_defaults_are_the_formula_in_the_first_half_of_the_steps() -> None:
    np.testing.assert_allclose(estimate(some_rewards()[0]), formula(some_rewards()[0]), rtol=3e-6, atol=1e-7)


def test_one_step_by_hand() -> None:
    """omega is 1, and the prompt's mean 2 and standard deviation 1, another's mean 12 and 2."""
    rewards = [[1.0], [10.0], [3.0], [14.0]]
    relative = estimate(rewards, [7, 2, 7, 2], **RELATIVE)
    assert relative.tolist() == [[-1.0], [-1.0], [1.0], [1.0]]
    both = estimate(rewards, [7, 2, 7, 2], k=0.5, eps=0.0, absolute_share=1.0)
    assert both.tolist() == [[-0.5], [4.0], [2.5], [8.0]]
    assert torch.equal(estimate(rewards, [7, 2, 7, 2], k=0.5, eps=0.0), relative)  # half of one step is none


def test_two_steps_by_hand() -> None:
    """Q = (1 + 2 / 2, 2) and (3 + 4 / 2, 4), means (3.5, 3), std (1.5, 1), omega (1, 1) and (10 / 9, 8 / 9)."""
    result = estimate([[1.0, 2.0], [3.0, 4.0]], [0, 0], gamma=0.5, **RELATIVE)
    np.testing.assert_allclose(result, [[-1, -1], [10 / 9, 8 / 9]], rtol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_ends_of_gamma(gamma: float) -> None:
    """At 0 a step's value is its own reward; at 1 it is the sum of all later rewards."""
    rewards = some_rewards()[0]
    q = rewards if gamma == 0 else np.cumsum(rewards[:, ::-1], 1)[:, ::-1]
    group = build_estimator("group", eps=0.0)
    columns = [group(torch.as_tensor(q[:, t].copy()), torch.as_tensor(PROMPTS)) for t in range(STEPS)]
    omega = torch.as_tensor(q / q.mean(1, keepdims=True)).float()
    expected = omega * torch.stack(columns, 1)
    torch.testing.assert_close(estimate(rewards, gamma=gamma, **RELATIVE), expected, rtol=2e-6, atol=1e-7)


def test_a_flat_group_is_pushed_up_by_its_absolute_term_alone() -> None:
    """All rewards are 0.7: Q = (2.1, 1.4, 0.7) and omega = (1.5, 1, 0.5); half of the three steps is one."""
    rewards = np.full((4, 3), 0.7)
    result = estimate(rewards, [0] * 4, gamma=1.0, k=0.5)
    np.testing.assert_allclose(result, [[1.5 * 0.5 * 2.1, 0.0, 0.0]] * 4, rtol=1e-6)
    assert (estimate(rewards, [0] * 4, k=0.0) == 0).all()


def test_flat_groups_are_those_of_the_final_image() -> None:
    rewards = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 5.0], [1.0, 6.0]])
    estimator = build_estimator("vgpo")
    assert estimator.flat_groups(rewards, torch.tensor([3, 3, 8, 8])).tolist() == [True, False]
    assert estimator.next_baselines(rewards, torch.tensor([3, 3, 8, 8])) == {}


def test_an_image_without_reward_is_the_limit_of_a_small_one() -> None:
    rewards, prompts = np.full((3, 4), 0.5), [0] * 3
    rewards[0] = 1e-9
    small = estimate(rewards, prompts)
    rewards[0] = 0
    none = estimate(rewards, prompts)
    assert torch.isfinite(none).all()
    torch.testing.assert_close(none, small, rtol=1e-5, atol=1e-6)
    assert (estimate(np.zeros((3, 4)), prompts) == 0).all()


@pytest.mark.parametrize("weights", [None, [1.0, -0.5]])
def test_minmax_is_the_same_for_all_scales_of_the_rewards(weights: list[float] | None) -> None:
    """The lowest weighted sum of all images and steps becomes 0, the highest 1."""
    rewards = some_rewards(2)
    result = estimate(rewards, weights=weights, rescale="minmax")
    total = np.einsum("r,rnt->nt", np.array(weights or [1.0, 1.0]), rewards)
    mapped = (total - total.min()) / (total.max() - total.min())
    np.testing.assert_allclose(result, formula(mapped), rtol=3e-6, atol=1e-7)
    shifted = estimate(300 * rewards - 1000, weights=weights, rescale="minmax")
    torch.testing.assert_close(shifted, result, rtol=1e-5, atol=1e-6)
    assert (estimate(np.full((4, 3), -2.0), [0, 0, 1, 1], rescale="minmax") == 0).all()


def test_negative_rewards_are_refused_with_their_reward_and_prompt() -> None:
    rewards = some_rewards(2)
    rewards[1, 5, 2] = -4.0
    message = (
        r"reward function 1 gave -4, with the weight 2, to an image of prompt 9 \(trained step 3 of 5\), and the "
        r'weighted sum is -.*Set rescale = "minmax"'
    )
    with pytest.raises(NegativeRewardError, match=message) as caught:
        estimate(rewards, weights=WEIGHTS)
    assert (caught.value.function, caught.value.prompt) == (1, 9)
    assert torch.isfinite(estimate(rewards, weights=WEIGHTS, rescale="minmax")).all()
    # A negative weight makes a sum negative, too; one that another reward outweighs is none.
    with pytest.raises(NegativeRewardError, match="reward function 0 gave 1.*with the weight -10"):
        estimate(some_rewards(2), weights=[-10.0, 1.0])
    assert torch.isfinite(estimate(rewards, weights=[10.0, 1e-2])).all()


def test_shuffled_images_have_shuffled_advantages() -> None:
    rewards, order = some_rewards(2), np.random.default_rng(1).permutation(len(PROMPTS))
    shuffled = estimate(rewards[:, order], PROMPTS[order], WEIGHTS)
    torch.testing.assert_close(shuffled, estimate(rewards, weights=WEIGHTS)[order], rtol=1e-6, atol=1e-7)


def test_one_row_is_no_row_and_any_dtype_is_computed_in_float64() -> None:
    rewards = torch.as_tensor(some_rewards(2))
    assert torch.equal(estimate(rewards[0]), estimate(rewards[:1]))
    assert torch.equal(estimate(rewards), estimate(rewards, weights=[1.0, 1.0]))
    for dtype in (torch.bfloat16, torch.float32):
        rounded = rewards.to(dtype).requires_grad_()
        result = estimate(rounded)
        assert torch.equal(result, estimate(rounded.detach().double()))
        assert not result.requires_grad
    assert estimate(np.zeros((0, 4)), np.zeros(0, np.int64)).shape == (0, 4)


def test_it_is_a_frozen_value() -> None:
    estimator = build_estimator("vgpo")
    assert pickle.loads(pickle.dumps(estimator)) == estimator == build_estimator("vgpo")
    assert tuple(field.name for field in fields(estimator)) == ESTIMATOR_OPTIONS["vgpo"]
    with pytest.raises(FrozenInstanceError):
        estimator.gamma = 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rewards", "prompts", "message"),
    [
        (torch.ones(4), torch.zeros(4), r"must be \(N, T\) of T steps, or \(R, N, T\).*got \(4,\) and \(4,\)"),
        (torch.ones(4, 0), torch.zeros(4), r"got \(4, 0\) and \(4,\)"),
        (torch.ones(4, 3), torch.zeros(3), r"got \(4, 3\) and \(3,\)"),
        (torch.ones(2, 4, 3), torch.zeros(2), r"got \(2, 4, 3\) and \(2,\)"),
        (torch.ones(0, 4, 3), torch.zeros(4), r"got \(0, 4, 3\) and \(4,\)"),
        (torch.tensor([[1.0, 1.0], [1.0, math.nan]]), torch.zeros(2), r"NaN or infinite scores for the images \[1\]"),
    ],
)
def test_wrong_arguments_are_refused(rewards: Tensor, prompts: Tensor, message: str) -> None:
    estimator = build_estimator("vgpo")
    for call in (estimator, estimator.flat_groups, estimator.next_baselines):
        with pytest.raises(ValueError, match=message):
            call(rewards, prompts.long())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"gamma": 1.5}, ValueError, r"gamma must lie in \[0, 1\]; got 1.5"),
        ({"gamma": "1"}, TypeError, "gamma must be a number; got '1'"),
        ({"absolute_share": math.nan}, ValueError, r"absolute_share must lie in \[0, 1\]; got nan"),
        ({"k": -0.1}, ValueError, "k must be >= 0; got -0.1"),
        ({"k": math.inf}, ValueError, "k must be finite; got inf"),
        ({"rescale": "max"}, ValueError, "rescale must be none or minmax; got 'max'"),
        ({"eps": -1.0}, ValueError, "eps must be >= 0; got -1.0"),
        ({"share": 0.5}, ValueError, "vgpo has no option 'share'; it is an option of trim"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build_estimator("vgpo", **options)


def test_the_defaults_of_torch_do_not_matter(other_defaults: Any) -> None:
    rewards, prompts = torch.as_tensor(some_rewards(2)), torch.as_tensor(PROMPTS)
    estimator = build_estimator("vgpo", rescale="minmax")
    expected = estimator(rewards, prompts, WEIGHTS)
    with other_defaults():
        came = estimator(rewards, prompts, WEIGHTS)
    assert torch.equal(came, expected)
