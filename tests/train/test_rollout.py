"""Rollouts: the schedule, the seeds, and transitions that replay exactly."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastguard as fg
from fastguard.config import SamplerConfig
from fastguard.schedule import shifted_sigmas
from fastguard.train.rollout import (
    Rollout,
    RolloutBatch,
    Schedule,
    epoch_prompts,
    evaluation_images,
    ode_schedule,
    predict_velocity,
    rollout,
    sample_seeds,
    training_schedule,
)

SHAPE = (3, 5)
CONFIG = SamplerConfig(num_steps=6, shift=2.0, noise_level=0.7, sde_steps=5)
OWN = partial(shifted_sigmas, shift=1.0)
SCHEDULE = training_schedule(CONFIG, OWN, 0, 0)


def policy(latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
    """Element by element, so that an image cannot depend on its neighbours in the batch."""
    return latents * sigma[:, None, None] + 0.1 * prompt_indices[:, None, None]


def sample(prompts: list[int], members: list[int], schedule: Schedule = SCHEDULE, epoch: int = 0) -> Rollout:
    indices = torch.tensor(prompts)
    seeds = sample_seeds(11, epoch, indices, torch.tensor(members), len(schedule))
    return rollout(policy, indices, seeds, SHAPE, schedule)


def test_schedule() -> None:
    assert shifted_sigmas(4, 1.0) == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert shifted_sigmas(4, 3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])


def test_seeds_belong_to_the_image_and_never_repeat() -> None:
    prompts, members = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    every = [sample_seeds(run, epoch, prompts, members, 6) for run, epoch in itertools.product(range(3), range(3))]
    assert torch.cat(every).unique().numel() == 9 * 4 * 7
    assert every[0].dtype == torch.int64
    assert all((seeds >= 0).all() for seeds in every)
    alone = sample_seeds(0, 0, prompts[2:3], members[2:3], 6)
    assert torch.equal(alone, every[0][2:3])


def test_transitions_replay_the_rollout() -> None:
    """Each step's A x + B v + s eps is the next step's latents, and the last deterministic step gives the image."""
    result = sample([0, 3], [0, 0])
    sigmas = shifted_sigmas(CONFIG.num_steps, CONFIG.shift)
    assert len(result.transitions) == CONFIG.sde_steps
    following = [t.latents for t in result.transitions[1:]]
    for i, (now, after) in enumerate(zip(result.transitions, following, strict=False)):
        step = fg.flow_sde(sigmas[i], sigmas[i + 1], noise_level=0.7, sigma_max=sigmas[1])
        drawn = step.latents_coef * now.latents + step.velocity_coef * now.velocity + step.std * now.noise
        assert torch.allclose(drawn, after, rtol=1e-6, atol=1e-6)
        assert torch.equal(now.velocity, policy(now.latents, now.sigma, now.prompt_indices))
        assert now.denoising_step.tolist() == [i, i]
        assert torch.equal(now.step.std, step.std.expand(2))
    last = result.transitions[-1]
    step = fg.flow_sde(sigmas[4], sigmas[5], noise_level=0.7, sigma_max=sigmas[1])
    x = step.latents_coef * last.latents + step.velocity_coef * last.velocity + step.std * last.noise
    image = x - sigmas[5] * predict_velocity(policy, x, sigmas[5], torch.tensor([0, 3]))
    assert torch.allclose(result.latents, image, rtol=1e-5, atol=1e-6)


def test_an_image_does_not_depend_on_its_batch() -> None:
    together = sample([0, 1, 2, 2], [0, 0, 0, 1])
    apart = sample([2], [1])
    assert torch.equal(together.latents[3:], apart.latents)
    for many, one in zip(together.transitions, apart.transitions, strict=True):
        assert torch.equal(many.noise[3:], one.noise)


def test_noise_is_standard_normal_and_fresh_in_every_draw() -> None:
    result = sample([0] * 40, list(range(40)))
    draws = torch.stack([result.transitions[0].latents, *(t.noise for t in result.transitions)]).flatten(1)
    correlation = torch.corrcoef(draws)
    # 600 elements: the correlation of independent draws has standard deviation 0.04.
    assert (correlation - torch.eye(len(draws))).abs().max() < 0.2
    assert draws.mean().abs() < 0.1
    assert (draws.std() - 1).abs() < 0.1
    other = sample([0] * 40, list(range(40)), epoch=1)
    assert not torch.equal(other.transitions[0].latents, result.transitions[0].latents)


def test_without_sde_steps_sampling_is_the_euler_ode() -> None:
    result = sample([1], [0], ode_schedule(CONFIG, OWN, CONFIG.num_steps))
    assert result.transitions == ()
    x = sample([1], [0]).transitions[0].latents  # the initial latents share their seed
    sigmas = shifted_sigmas(CONFIG.num_steps, CONFIG.shift)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = x + (sigma_next - sigma) * policy(x, torch.tensor([sigma]), torch.tensor([1]))
    assert torch.allclose(result.latents, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [range(6), range(5), range(1, 4), range(2, 3)])
def test_images_after_each_step_are_those_of_the_velocity_that_follows(window: range) -> None:
    """`x - sigma v` of the latents after the step, without another evaluation of the policy."""
    schedule = replace(SCHEDULE, window=window)
    calls = []

    def counted(latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        calls.append(latents)
        return policy(latents, sigma, prompt_indices)

    prompts = torch.tensor([3, 1])
    seeds = sample_seeds(11, 0, prompts, torch.tensor([0, 4]), len(schedule))
    rolled = rollout(counted, prompts, seeds, SHAPE, schedule, one_step=True)
    assert len(calls) == len(schedule)
    assert len(rolled.one_step) == len(window)
    for step, image in zip(window[:-1], rolled.one_step, strict=False):
        after, sigma = calls[step + 1], schedule.sigmas[step + 1]
        velocity = after * sigma + 0.1 * prompts[:, None, None]
        torch.testing.assert_close(image, after - sigma * velocity, rtol=1e-6, atol=1e-6)
    assert torch.equal(rolled.one_step[-1], rolled.latents)
    if window.stop == 5:  # what the policy's last, deterministic step makes of the latents
        torch.testing.assert_close(rolled.latents, calls[5] - schedule.sigmas[5] * policy(
            calls[5], torch.full((2,), schedule.sigmas[5]), prompts
        ))  # fmt: skip

    plain = rollout(policy, prompts, seeds, SHAPE, schedule)
    assert plain.one_step == ()
    assert torch.equal(plain.latents, rolled.latents)
    for ours, theirs in zip(plain.transitions, rolled.transitions, strict=True):
        assert torch.equal(ours.latents, theirs.latents)
        assert torch.equal(ours.noise, theirs.noise)


def test_cat_and_selection_keep_rows_together() -> None:
    result = sample([4, 5], [0, 0])
    joined = RolloutBatch.cat(result.transitions)
    assert len(joined) == 10
    picked = joined[torch.tensor([9, 2])]
    assert picked.denoising_step.tolist() == [4, 1]
    assert picked.prompt_indices.tolist() == [5, 4]
    assert picked.sample.tolist() == [1, 0]
    assert torch.equal(picked.noise[0], result.transitions[4].noise[1])
    assert torch.equal(picked.step.dt[1:], result.transitions[1].step.dt[:1])


def test_selection_across_parts_equals_selection_from_the_whole() -> None:
    parts = sample([4, 5, 6], [0, 0, 1]).transitions
    index = torch.tensor([14, 0, 7, 3, 8])
    picked, whole = RolloutBatch.select(parts, index), RolloutBatch.cat(parts)
    assert torch.equal(picked.noise, whole[index.sort().values].noise)
    assert torch.equal(picked.step.std, whole[index.sort().values].step.std)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
def test_every_step_of_a_window_has_a_density_and_no_other_step(kind: Any) -> None:
    for window in ("fixed", "random", "sliding"):
        config = SamplerConfig(num_steps=8, shift=3.0, kind=kind, sde_steps=3, window=window, window_start=1)
        for epoch in range(30):
            schedule = training_schedule(config, OWN, 0, epoch)
            densities = [i for i in range(8) if schedule.step(i).has_density]
            assert densities == list(schedule.window)
            assert all(1 <= i <= 6 for i in densities) or window == "fixed"


def test_windows_move_as_they_should() -> None:
    def starts(**fields: Any) -> list[int]:
        config = SamplerConfig(num_steps=6, sde_steps=2, **fields)
        return [training_schedule(config, OWN, seed=3, epoch=epoch).window.start for epoch in range(12)]

    assert starts(window_start=2) == [2] * 12
    assert starts(window="sliding", window_epochs=2, window_start=1) == [1, 1, 2, 2, 3, 3, 1, 1, 2, 2, 3, 3]
    drawn = starts(window="random")
    assert set(drawn) == {0, 1, 2, 3}
    assert drawn == starts(window="random")


def test_the_model_decides_the_shift_unless_the_recipe_does() -> None:
    own, config = partial(shifted_sigmas, shift=3.0), SamplerConfig(num_steps=4, sde_steps=3)
    assert training_schedule(config, own, 0, 0).sigmas == shifted_sigmas(4, 3.0)
    assert training_schedule(replace(config, shift=1.0), own, 0, 0).sigmas == shifted_sigmas(4, 1.0)


def test_a_schedule_of_the_model_that_does_not_fall_is_refused() -> None:
    """As of an image so large that the shift leaves only 1, in float32."""
    with pytest.raises(ValueError, match=r"own schedule, which for 2 steps .* is \(1.0, 1.0, 0.0\), and does not fall"):
        ode_schedule(SamplerConfig(), lambda steps: (1.0, 1.0, 0.0), 2)


@pytest.mark.parametrize(("prompts", "per_epoch"), [(10, 10), (10, 3), (7, 5), (100, 7), (5, 1)])
def test_every_prompt_comes_once_before_any_comes_again(prompts: int, per_epoch: int) -> None:
    epochs = [epoch_prompts(prompts, per_epoch, seed=1, epoch=epoch) for epoch in range(4 * prompts)]
    assert all(len(set(epoch)) == per_epoch for epoch in epochs)
    counts = torch.bincount(torch.tensor(epochs).flatten(), minlength=prompts)
    assert counts.tolist() == [4 * per_epoch] * prompts  # a whole number of permutations was used up
    for done in range(1, len(epochs)):
        seen = torch.bincount(torch.tensor(epochs[:done]).flatten(), minlength=prompts)
        assert seen.max() - seen.min() <= 1
    if per_epoch < prompts:
        assert epochs[0] != epoch_prompts(prompts, per_epoch, seed=2, epoch=0) or prompts < 8


def test_the_defaults_of_torch_do_not_matter(other_defaults) -> None:
    prompts, members = torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1])
    scaled = lambda latents, sigma, prompt_indices: latents * sigma[:, None, None]  # noqa: E731

    def results() -> list[Tensor]:
        rolled = rollout(scaled, prompts, sample_seeds(11, 0, prompts, members, len(SCHEDULE)), SHAPE, SCHEDULE)
        joined = RolloutBatch.cat(rolled.transitions)
        kept = [joined.latents, joined.velocity, joined.noise, joined.sigma, joined.step.std, joined.step.dt]
        return [rolled.latents, *kept, *evaluation_images(2, 3, 4)]

    expected = results()
    with other_defaults():
        came = results()
    for a, b in zip(came, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_wrong_shapes_are_refused() -> None:
    prompts = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"\(2, 7\).*\(2, 6\)"):
        rollout(policy, prompts, torch.zeros(2, 6, dtype=torch.long), SHAPE, SCHEDULE)
    with pytest.raises(ValueError, match=r"the policy returned \(2, 3\)"):
        predict_velocity(lambda x, s, p: x[..., 0], torch.zeros(2, 3, 5), 0.5, prompts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sde_steps": 7}, "num_steps = 6"),
        ({"kind": "cps", "sde_steps": 6}, "last step of cps"),
        ({"shift": 0.0}, "shift"),
        ({"num_steps": 0}, "num"),
    ],
)
def test_config_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
