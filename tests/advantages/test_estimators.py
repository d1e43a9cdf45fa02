"""Every estimator against its formula in NumPy, and against what must hold for it."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
import torch
from helpers.estimator_formulas import (
    BASELINES,
    EPS,
    MEMBERS,
    OPTIONS,
    PATH,
    PROMPTS,
    WEIGHTS,
    cases,
    reference,
    some_rewards,
    trimmed,
)
from torch import Tensor

from fastguard.advantages import DEFAULT_ESTIMATOR, ESTIMATOR_OPTIONS, ESTIMATORS, build_estimator

OF_IMAGES = [name for name, kind in ESTIMATORS.items() if not kind.per_step]
"""Those that take one reward of an image; `test_vgpo.py` has the other one."""


def estimate(name: str, rewards: Any, prompts: Any = PROMPTS, weights: Any = None, **options: Any) -> Tensor:
    estimator = build_estimator(name, **(OPTIONS.get(name, {}) | options))
    return estimator(torch.as_tensor(rewards), torch.as_tensor(prompts), weights, BASELINES)


CASES = json.loads(PATH.read_text())


def test_the_golden_cases_are_those_of_the_formulas() -> None:
    assert {case["estimator"] for case in CASES} == set(ESTIMATORS)
    for made, stored in zip(json.loads(json.dumps(cases())), CASES, strict=True):
        np.testing.assert_allclose(made.pop("advantages"), stored["advantages"], rtol=1e-12)
        assert made == {key: value for key, value in stored.items() if key != "advantages"}


@pytest.mark.parametrize("case", CASES, ids=[case["estimator"] for case in CASES])
def test_advantages_of_golden_cases(case: dict[str, Any]) -> None:
    result = build_estimator(case["estimator"], **case["options"])(
        torch.tensor(case["rewards"], dtype=torch.float64), torch.as_tensor(PROMPTS), case["weights"], BASELINES
    )
    np.testing.assert_allclose(result.numpy(), case["advantages"], rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_it_is_its_formula(name: str, rows: int) -> None:
    rewards, weights = some_rewards(rows), WEIGHTS[:rows]
    result = estimate(name, rewards, weights=weights)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), reference(name, rewards, weights), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_one_row_is_no_row_and_weights_are_1_without_them(name: str) -> None:
    rewards = some_rewards(3)
    assert torch.equal(estimate(name, rewards[0]), estimate(name, rewards[:1]))
    assert torch.equal(estimate(name, rewards), estimate(name, rewards, weights=[1.0, 1.0, 1.0]))
    assert not torch.equal(estimate(name, rewards), estimate(name, rewards, weights=[1.0, 1.0, -1.0]))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_shuffled_images_have_shuffled_advantages(name: str) -> None:
    rewards, order = some_rewards(3), np.random.default_rng(1).permutation(len(PROMPTS))
    shuffled = estimate(name, rewards[:, order], PROMPTS[order], WEIGHTS)
    torch.testing.assert_close(shuffled, estimate(name, rewards, weights=WEIGHTS)[order], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("name", OF_IMAGES)
def test_rewards_of_any_dtype_are_computed_in_float64(name: str, dtype: torch.dtype) -> None:
    rewards = (
        torch.as_tensor(some_rewards(3, scale=(10.0, 30.0, 50.0))).to(dtype).requires_grad_(dtype.is_floating_point)
    )
    result = estimate(name, rewards)
    assert torch.equal(result, estimate(name, rewards.detach().double()))
    assert result.dtype == torch.float32
    assert not result.requires_grad


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_flat_group_gets_exactly_0(name: str) -> None:
    """The mean of seven times 0.1 rounds away from 0.1, and a weighted sum may round by its place."""
    rewards = np.concatenate([np.tile([[0.1], [0.7], [1 / 3]], 7), some_rewards(3, scale=(1.0, 1.0, 1.0))], axis=1)
    prompts = np.concatenate([np.full(7, 1), PROMPTS])
    options = {"eps": 1e-30} if "eps" in ESTIMATOR_OPTIONS[name] else {}
    result = estimate(name, rewards, prompts, WEIGHTS, **options)
    flat = build_estimator(name).flat_groups(torch.as_tensor(rewards), torch.as_tensor(prompts), WEIGHTS)
    assert flat.tolist() == [True, False, False, False, False]  # prompts 1, 2, 4, 7, 9
    if name == "running":  # its first rollout; later ones compare with earlier ones
        assert result[:7].abs().max() < 1e-15
    else:
        assert (result[:7] == 0).all()
    assert (result[7:] != 0).any()


@pytest.mark.parametrize("name", OF_IMAGES)
def test_a_rollout_without_spread_teaches_nothing(name: str) -> None:
    rewards = np.full(len(PROMPTS), 0.3)
    prompts = PROMPTS + 100  # without a baseline
    np.testing.assert_allclose(estimate(name, rewards, prompts), 0, atol=1e-15)
    assert estimate(name, np.zeros(0), np.zeros(0, np.int64)).shape == (0,)


@pytest.mark.parametrize("name", ["group", "trim", "global"])
def test_large_rewards_keep_their_differences(name: str) -> None:
    """1e7 and 1e7 + 1: float32 statistics would lose the group's spread."""
    result = estimate(name, [1e7, 1e7 + 1, 1e7 + 2], [0, 0, 0], **({"share": 0.0} if name == "trim" else {}))
    np.testing.assert_allclose(result, np.array([-1, 0, 1]) * math.sqrt(1.5), rtol=1e-3)


def test_group_by_hand() -> None:
    # Prompt 7: mean 2, std 1 (1.41 if divided by n - 1). Prompt 2: mean 12, std 2.
    result = estimate("group", [1.0, 10.0, 3.0, 14.0], [7, 2, 7, 2])
    np.testing.assert_allclose(result, [-1 / 1.0001, -2 / 2.0001, 1 / 1.0001, 2 / 2.0001], rtol=1e-6)


def test_global_is_none_over_one_number() -> None:
    rewards = some_rewards(3)
    ratio = estimate("none", rewards, weights=WEIGHTS) / estimate("global", rewards, weights=WEIGHTS)
    np.testing.assert_allclose(ratio, (np.array(WEIGHTS) @ rewards).std() + EPS, rtol=1e-5)


def test_trim_without_a_share_is_group_to_the_bit() -> None:
    rewards = some_rewards()[0]
    assert torch.equal(estimate("trim", rewards, share=0.0), estimate("group", rewards))
    assert not torch.equal(estimate("trim", rewards), estimate("group", rewards))


def test_trim_leaves_out_whole_images_and_not_their_advantage() -> None:
    """29% of 100 are 29, though 100 * 0.29 rounds to 28.999999999999996; of equal rewards any may be left out."""
    rewards = np.arange(100.0)[::-1].copy()
    result = estimate("trim", rewards, np.zeros(100, np.int64), share=0.29)
    np.testing.assert_allclose(result, trimmed(rewards, 0.2900001), rtol=1e-6)
    assert (result[-29:] < -1.7).all()
    tied = estimate("trim", [0.0, 0.0, 0.0, 1.0], [0] * 4, share=0.5)
    np.testing.assert_allclose(tied, [-1 / 1.0002, -1 / 1.0002, -1 / 1.0002, 1 / 1.0002], rtol=1e-6)


def test_loo_is_the_gradient_of_the_u_statistic() -> None:
    """Mean over pairs (i, j) of a group of (r_i - r_j) (s_i - s_j) / 2, for any scores s."""
    generator = np.random.default_rng(2)
    rewards, scores = some_rewards()[0], generator.normal(size=(len(PROMPTS), 6))
    advantages = estimate("loo", rewards).double().numpy()
    for own in MEMBERS.values():
        pairs = [(i, j) for i in own for j in own if i < j]
        expected = np.mean([(rewards[i] - rewards[j]) * (scores[i] - scores[j]) / 2 for i, j in pairs], axis=0)
        np.testing.assert_allclose(advantages[own] @ scores[own] / len(own), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(OF_IMAGES) - {"running", "bnpo"}))
def test_a_group_of_one_gets_0(name: str) -> None:
    result = estimate(name, [5.0, 1.0, 2.0], [3, 8, 8])
    assert result[0] == 0
    assert (result[1:] != 0).all()


@pytest.mark.parametrize(("factor", "shift"), [(3.0, 0.0), (0.1, -7.0), (1e3, 1e3)])
def test_bnpo_is_unchanged_by_an_affine_map_of_rewards_and_bounds(factor: float, shift: float) -> None:
    rewards = np.random.default_rng(3).uniform(size=len(PROMPTS))
    mapped = estimate("bnpo", factor * rewards + shift, low=shift, high=factor + shift)
    torch.testing.assert_close(mapped, estimate("bnpo", rewards, low=0.0, high=1.0), rtol=1e-5, atol=1e-7)


def test_bnpo_is_group_times_pi_over_8_where_alpha_and_beta_are_three_halves() -> None:
    """Group means of 1/4, 1/2 and 3/4 have the mean and the variance, 1/16, of Beta(3/2, 3/2), so alpha = beta = 3/2.

    Its density is 8 / pi sqrt(p (1 - p)), and sqrt(p (1 - p)) is the standard deviation of zeros and ones.
    """
    ones = (2, 4, 6)
    rewards = [1.0 if image < count else 0.0 for count in ones for image in range(8)]
    prompts = [prompt for prompt in range(3) for _ in range(8)]
    result = estimate("bnpo", rewards, prompts, low=0.0, high=1.0)
    torch.testing.assert_close(result, estimate("group", rewards, prompts, eps=0.0) * math.pi / 8, rtol=1e-6, atol=0)


def test_bnpo_of_one_group_or_of_equal_means_has_the_weight_1() -> None:
    rewards = [0.1, 0.5, 0.9, 0.3, 0.3, 0.9]
    for prompts in ([0] * 6, [0] * 3 + [1] * 3):
        np.testing.assert_allclose(
            estimate("bnpo", rewards, prompts, low=0.0, high=1.0), np.array(rewards) - 0.5, rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("cap", [2.0, 10.0])
def test_bnpo_limits_its_weight(cap: float) -> None:
    """One image of a hundred has reward 1 where most prompts have a half: the weight would be about 70."""
    rewards = np.array([1.0, *[0.0] * 99, *[0.0, 1.0] * 500])
    prompts = np.repeat(np.arange(11), 100)
    result = estimate("bnpo", rewards, prompts, low=0.0, high=1.0, cap=cap)
    np.testing.assert_allclose(result[:100], cap * (rewards[:100] - 0.01), rtol=1e-6)
    assert (result[100:].abs() < 0.5).all()
    loose = estimate("bnpo", rewards, prompts, low=0.0, high=1.0, cap=1e6)
    assert 20 < loose[0] < 200
    never = estimate("bnpo", np.concatenate([rewards[100:], np.zeros(100)]), prompts, low=0.0, high=1.0)
    assert (never[-100:] == 0).all()  # the density is 0 at p = 0
    assert torch.isfinite(never).all()


@pytest.mark.parametrize("name", ["gdpo", "std_scaled"])
def test_the_scale_of_one_reward_does_not_matter(name: str) -> None:
    rewards = some_rewards(3, scale=(1.0, 1.0, 1.0))
    scaled = rewards * np.array([[1.0], [1e3], [1.0]]) + np.array([[0.0], [50.0], [0.0]])
    options = {"eps": 1e-9}
    expected = estimate(name, rewards, weights=WEIGHTS, **options)
    torch.testing.assert_close(estimate(name, scaled, weights=WEIGHTS, **options), expected, rtol=1e-5, atol=1e-6)
    group = [estimate("group", r, weights=WEIGHTS, **options) for r in (rewards, scaled)]
    assert (group[0] - group[1]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gdpo", "std_scaled"])
def test_a_reward_that_is_the_same_for_all_images_adds_nothing(name: str) -> None:
    rewards = some_rewards(2)
    constant = np.stack([*rewards, np.full(len(PROMPTS), 0.1)])
    torch.testing.assert_close(
        estimate(name, constant, weights=[1.0, 2.0, 1e6]), estimate(name, rewards, weights=[1.0, 2.0])
    )


def test_gdpo_has_a_std_of_1_over_all_images() -> None:
    result = estimate("gdpo", some_rewards(3), weights=WEIGHTS).double()
    assert result.mean().item() == pytest.approx(0, abs=1e-6)
    assert result.std(correction=0).item() == pytest.approx(1, rel=1e-3)


def test_running_baselines_follow_the_means_of_their_prompts() -> None:
    running = build_estimator("running", momentum=0.75)
    prompts = torch.tensor([3, 3, 8])
    first = torch.tensor([[1.0, 3.0, 5.0], [0.0, 2.0, 1.0]])
    baselines: dict[int, float] = {6: -1.0}
    kept = dict(baselines)
    after = running.next_baselines(first, prompts, [1.0, 2.0], baselines)
    assert baselines == kept  # a new one is returned
    assert after == {6: -1.0, 3: 4.0, 8: 7.0}
    assert running(first, prompts, [1.0, 2.0], baselines).tolist() == [-3.0, 3.0, 0.0]
    second = torch.tensor([8.0, 8.0, 7.0])
    assert running(second, prompts, None, after).tolist() == [4.0, 4.0, 0.0]  # equal, and better than before
    assert running.next_baselines(second, prompts, None, after) == {6: -1.0, 3: 0.75 * 4 + 0.25 * 8, 8: 7.0}


@pytest.mark.parametrize("name", sorted(set(OF_IMAGES) - {"running"}))
def test_all_others_remember_nothing_and_read_no_baselines(name: str) -> None:
    estimator = build_estimator(name, **OPTIONS.get(name, {}))
    rewards, prompts = torch.as_tensor(some_rewards()[0]), torch.as_tensor(PROMPTS)
    assert estimator.next_baselines(rewards, prompts) == {}
    assert torch.equal(estimator(rewards, prompts), estimator(rewards, prompts, None, BASELINES))


@pytest.mark.parametrize("name", OF_IMAGES)
def test_an_estimator_is_a_frozen_value(name: str) -> None:
    estimator = build_estimator(name)
    assert estimator == build_estimator(name)
    assert pickle.loads(pickle.dumps(estimator)) == estimator
    assert tuple(field.name for field in fields(estimator)) == ESTIMATOR_OPTIONS[name]
    for option in ESTIMATOR_OPTIONS[name]:
        with pytest.raises(FrozenInstanceError):
            setattr(estimator, option, 1.0)
        assert build_estimator(name, **{option: 0.5}) != estimator


@pytest.mark.parametrize("name", OF_IMAGES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_named(name: str, bad: float) -> None:
    with pytest.raises(ValueError, match=r"the reward function returned NaN or .* the images \[1, 3\]"):
        estimate(name, [0.0, bad, 1.0, bad], [0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"the reward function 1 returned NaN or .* the images \[2\]"):
        estimate(name, [[0.0, 0.0, 1.0], [0.0, 0.0, bad]], [0, 0, 0])


ROLLOUT = (torch.zeros(2, 4), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), ROLLOUT[1]), r"must be \(N,\), or \(R, N\).*got \(3,\) and \(4,\)"),
        ((torch.zeros(4, 1), ROLLOUT[1]), r"got \(4, 1\) and \(4,\)"),
        ((torch.zeros(4, 1), ROLLOUT[1][:, None]), r"got \(4, 1\) and \(4, 1\)"),
        ((torch.zeros(2, 2, 4), ROLLOUT[1]), r"got \(2, 2, 4\) and \(4,\)"),
        ((torch.zeros(0, 4), ROLLOUT[1]), r"got \(0, 4\) and \(4,\)"),
        ((torch.tensor(1.0), torch.tensor(1)), r"got \(\) and \(\)"),
        ((ROLLOUT[0], ROLLOUT[1].float()), "prompt_indices must be whole numbers, int64; got torch.float32"),
        ((ROLLOUT[0].to(torch.complex64), ROLLOUT[1]), "rewards must be real numbers; got torch.complex64"),
        ((*ROLLOUT, [1.0]), r"weights must be 2 finite factors, one per reward function; got \[1.0\]"),
        ((*ROLLOUT, [1.0, math.nan]), r"weights must be 2 finite factors.*got \[1.0, nan\]"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    estimator = build_estimator(DEFAULT_ESTIMATOR)
    for call in (estimator, estimator.flat_groups, estimator.next_baselines):
        with pytest.raises(ValueError, match=message):
            call(*arguments)


def test_bnpo_refuses_rewards_beyond_its_bounds() -> None:
    with pytest.raises(
        ValueError, match=r"\[low, high\] = \[0.0, 1.0\]; the images \[1, 2\] have \[-0.5, 2.0\]. Set low"
    ):
        build_estimator("bnpo")(torch.tensor([1.0, -0.5, 2.0, 0.0]), torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("grup", {}, ValueError, "estimator must be one of group, global, none, .*, running, vgpo; got 'grup'"),
        (
            "none",
            {"eps": 1e-4},
            ValueError,
            "none has no option 'eps'; it is an option of group, .* it has none",
        ),
        ("running", {"eps": 1e-4}, ValueError, "running has no option 'eps'.*Known: momentum"),
        ("group", {"epsilon": 1}, ValueError, "group has no option 'epsilon'. Known: eps"),
        ("group", {"eps": -1.0}, ValueError, "eps must be >= 0; got -1.0"),
        ("global", {"eps": "1"}, TypeError, "eps must be a number; got '1'"),
        ("trim", {"eps": 0.0}, ValueError, "eps must be positive and finite; got 0.0"),
        ("trim", {"share": 1.0}, ValueError, r"share must lie in \[0, 1\); got 1.0"),
        ("gdpo", {"eps": math.nan}, ValueError, "eps must be positive and finite; got nan"),
        ("std_scaled", {"eps": 0}, ValueError, "eps must be positive and finite; got 0"),
        ("running", {"momentum": -0.1}, ValueError, r"momentum must lie in \[0, 1\); got -0.1"),
        ("bnpo", {"low": 1.0}, ValueError, "low must be below high, and both finite; got low = 1.0 and high = 1.0"),
        ("bnpo", {"high": math.inf}, ValueError, "low must be below high, and both finite"),
        ("bnpo", {"low": True}, TypeError, "low must be a number; got True"),
        ("bnpo", {"cap": 0.0}, ValueError, "cap must be positive and finite; got 0.0"),
    ],
)
def test_wrong_names_and_options_are_refused(
    name: str, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        build_estimator(name, **options)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_the_defaults_of_torch_do_not_matter(name: str, other_defaults: Any) -> None:
    rewards, prompts = torch.as_tensor(some_rewards(3)), torch.as_tensor(PROMPTS)
    estimator = build_estimator(name, **OPTIONS.get(name, {}))
    expected = estimator(rewards, prompts, WEIGHTS, BASELINES)
    with other_defaults():
        came = estimator(rewards, prompts, WEIGHTS, BASELINES)
    assert came.dtype == torch.float32
    assert torch.equal(came, expected)
