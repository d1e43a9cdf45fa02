"""An epoch's images with advantages per denoising step: what is decoded and scored, and where advantages go."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.toys import RECIPE, MemoryRecorder, ToyBackbone, brightness, pool, towards
from torch import Tensor

import fastguard as fg
from fastguard.advantages import build_estimator
from fastguard.config import Recipe, advantages_config, objective_config
from fastguard.rewards import RewardError
from fastguard.schedule import shifted_sigmas
from fastguard.train.collect import SampledEpoch, sample_epoch
from fastguard.train.metrics import Clock
from fastguard.train.minibatches import minibatches
from fastguard.train.rollout import training_schedule
from fastguard.train.state import TrainState, build_state
from fastguard.train.trainer import train
from fastguard.train.update import update_weights

VGPO = replace(
    RECIPE,
    sampler=replace(RECIPE.sampler, batch_size=8),
    advantages=advantages_config("vgpo", rescale="minmax"),
    objective=objective_config("flow_grpo", clip_range=0.5, reweight="none"),
)
SLIDING = replace(VGPO, sampler=replace(VGPO.sampler, window="sliding", window_epochs=1, sde_steps=2))


class Counting(ToyBackbone):
    """Keeps what it decodes, and begins with an image that is not 0."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.policy.image += torch.linspace(-1, 1, 32).view(2, 2, 8)
        self.decoded: list[Tensor] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents)
        return super().decode(latents)


def sampled(recipe: Recipe, reward: Any = towards, epoch: int = 0) -> tuple[TrainState, SampledEpoch, Counting]:
    backbone, accelerator = Counting(), Accelerator(cpu=True)
    state = build_state(backbone, recipe, accelerator, None)
    state.epoch = epoch
    with pool(recipe, backbone, reward) as rewards:
        rolled = sample_epoch(state, rewards, MemoryRecorder(), Clock(accelerator.device))
    assert rolled is not None
    return state, rolled, backbone


@pytest.mark.parametrize(("recipe", "epoch"), [(VGPO, 0), (SLIDING, 0), (SLIDING, 2)])
def test_advantages_are_those_of_the_images_after_each_step(recipe: Recipe, epoch: int) -> None:
    """The toy's one-step image is 0.3 x + image, of the latents x after the step."""
    shapes = []

    def reward(images: Tensor, *rest: Any) -> Tensor:
        shapes.append(images.shape)
        return towards(images, *rest)

    _, rolled, backbone = sampled(recipe, reward, epoch)
    steps, batches = recipe.sampler.sde_steps, 4
    assert recipe.scored_per_image == steps
    assert len(backbone.decoded) == len(shapes) == batches * steps
    schedule = training_schedule(recipe.sampler, partial(shifted_sigmas, shift=3.0), 0, epoch)
    assert schedule.window.start == epoch

    rewards = torch.empty(32, steps)
    for i, batch in enumerate(rolled.transitions):
        prompts = batch.prompt_indices[:8]
        latents = list(batch.latents.split(8))
        for step in range(steps):
            if step + 1 < steps:  # the latents after a step are those before the next one
                image = 0.3 * latents[step + 1] + backbone.policy.image[prompts].detach()
                torch.testing.assert_close(backbone.decoded[i * steps + step], image, rtol=1e-5, atol=1e-5)
            else:
                image = backbone.decoded[i * steps + step]
            metadata = [backbone.prompts[p].metadata for p in prompts.tolist()]
            rewards[i * 8 : i * 8 + 8, step] = towards(ToyBackbone.decode(backbone, image), [], metadata)
    # Grey levels, of which a rounding error may take the next one.
    prompts = torch.cat([batch.prompt_indices[:8] for batch in rolled.transitions])
    expected = build_estimator("vgpo", rescale="minmax")(rewards, prompts)
    values = rolled.advantages.values
    assert values.shape == (32, 5)
    torch.testing.assert_close(values[:, list(schedule.window)], expected, rtol=0.02, atol=0.02)
    assert (values[:, [i for i in range(5) if i not in schedule.window]] == 0).all()
    torch.testing.assert_close(rolled.rewards.float(), rewards[:, -1])  # the log tells of the final images
    assert torch.equal(rolled.scores.values[0], rolled.rewards)
    assert torch.equal(rolled.images, ToyBackbone.decode(backbone, backbone.decoded[steps - 1]))


def test_other_estimators_decode_and_score_each_image_once() -> None:
    recipe = replace(VGPO, advantages=advantages_config("group"))
    _, rolled, backbone = sampled(recipe)
    assert recipe.scored_per_image == 1
    assert len(backbone.decoded) == 4
    assert rolled.advantages.values.shape == (32,)
    _, per_step, other = sampled(VGPO)
    assert torch.equal(other.decoded[3], backbone.decoded[0])  # the same final images
    assert torch.equal(per_step.rewards, rolled.rewards)


@pytest.mark.parametrize(("recipe", "epoch"), [(VGPO, 0), (SLIDING, 2)])
@pytest.mark.parametrize("micro_batch", [0, 5])
def test_each_transition_is_trained_with_the_advantage_of_its_step(
    recipe: Recipe, epoch: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On-policy, the gradient of an update is that of -mean(a l), written down with one advantage for each step."""
    recipe = replace(recipe, update=replace(recipe.update, micro_batch=micro_batch))
    state, rolled, backbone = sampled(recipe, epoch=epoch)
    advantages, gradients = rolled.advantages.values, []
    clip = state.accelerator.clip_grad_norm_

    def seen(parameters: Any, norm: float) -> Any:
        gradients.append(backbone.policy.image.grad.clone())
        return clip(parameters, norm)

    monkeypatch.setattr(state.accelerator, "clip_grad_norm_", seen)
    minibatch = next(minibatches(state, advantages))
    whole = type(rolled.transitions[0]).cat(rolled.transitions)[minibatch.index]
    velocity = backbone.policy(whole.latents, whole.sigma, whole.prompt_indices)
    log_ratio = fg.transition_moments(velocity, whole.velocity, whole.noise, whole.step).cross
    losses = []
    for n in range(len(whole)):
        of_image = advantages[int(whole.sample[n])]
        assert (of_image != 0).sum() == recipe.sampler.sde_steps
        losses.append(-of_image[int(whole.denoising_step[n])] * log_ratio[n])
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), backbone.policy.image)
    update = update_weights(state, rolled.transitions, minibatch, advantages, MemoryRecorder(), False)
    torch.testing.assert_close(gradients[0], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())
    torch.testing.assert_close(
        update.advantages.sort().values, advantages[whole.sample, whole.denoising_step].sort().values
    )


def test_images_are_chosen_by_their_advantages_over_all_steps() -> None:
    recipe = replace(
        VGPO,
        sampler=replace(VGPO.sampler, batch_size=32),
        update=replace(VGPO.update, subsample=0.25, inner_epochs=40, minibatches=1),
    )
    state, _, _ = sampled(recipe)
    advantages = torch.full((32, 5), 0.01)
    advantages[7, 3] = -9.0
    chosen = [minibatch.weights for minibatch in minibatches(state, advantages)]
    often = sum(weights[7] > 0 for weights in chosen if weights is not None)
    assert often == 40


def test_a_failed_step_image_drops_its_group() -> None:
    """The last image of the second batch, of the light prompt, after its second step."""
    calls = []

    def fails_once(images: Tensor, *rest: Any) -> Tensor:
        scores = towards(images, *rest)
        calls.append(1)
        if len(calls) == 6:
            scores[-1] = torch.nan
        return scores

    recipe = replace(VGPO, scoring=replace(VGPO.scoring, on_failure="drop_group"))
    _, rolled, _ = sampled(recipe, fails_once)
    assert rolled.dropped_groups == 1
    assert [failure.prompt for failure in rolled.scores.failures] == ["light"]
    assert (rolled.advantages.values[:16] == 0).all()
    assert (rolled.advantages.values[16:, :4] != 0).any(1).all()
    calls.clear()
    with pytest.raises(RewardError, match="towards.*light"):
        sampled(VGPO, fails_once)


def test_negative_rewards_save_and_stop_by_name() -> None:
    recipe, where = replace(VGPO, advantages=advantages_config("vgpo")), MemoryRecorder()
    message = (
        r"advantages: vgpo takes rewards that are not negative; reward function 0 gave -.*Set rescale = \"minmax\".*"
        r"\(reward function 0 is \"towards\", prompt 0 is 'light'\)"
    )
    with pool(recipe, ToyBackbone()) as rewards, pytest.raises(RewardError, match=message):
        train(ToyBackbone(), recipe, rewards, where, Accelerator(cpu=True))
    assert where.saved == [0]
    sampled(recipe, brightness)  # which is never negative


def test_equal_final_images_count_as_a_group_without_spread() -> None:
    calls = []

    def same_in_the_end(images: Tensor, *rest: Any) -> Tensor:
        calls.append(1)
        return torch.ones(len(images)) if len(calls) % 4 == 0 else brightness(images, *rest)

    _, rolled, _ = sampled(VGPO, same_in_the_end)
    assert rolled.advantages.zero_spread_groups.item() == 2
    assert (rolled.rewards == 1).all()
    assert rolled.advantages.values[:, :3].std() > 0.1
