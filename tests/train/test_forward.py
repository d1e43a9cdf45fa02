"""Training on final latents with fresh noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import matching_formulas
from helpers.toys import RECIPE, MemoryRecorder, ToyBackbone, ToyPolicy, cpu, pool, run, state_of, towards, with_
from torch import Tensor

from fastguard.config import Recipe, objective_config
from fastguard.errors import UserError
from fastguard.train.collect import images_to_sample, noised_batch
from fastguard.train.forward import draw_times, noised
from fastguard.train.minibatches import minibatches
from fastguard.train.policy_loss import joint_derivatives, policy_loss
from fastguard.train.rollout import RolloutBatch, sample_seeds
from fastguard.train.trainer import train


def of(name: str, recipe: Recipe = RECIPE, **options: Any) -> Recipe:
    return replace(recipe, objective=objective_config(name, **options))


def test_times_cover_each_pass_and_are_those_of_the_prompt() -> None:
    prompts = torch.tensor([3, 0, 3])
    times = draw_times(7, 2, prompts, passes=2, draws=5, shift=3.0)
    assert times.shape == (3, 10)
    assert times.dtype == torch.float32
    assert torch.equal(times[0], times[2])
    assert not torch.equal(times[0], times[1])
    uniform = times.double() / (3 - 2 * times.double())  # the inverse of the shift
    places = uniform.view(3, 2, 5) * 5 - torch.arange(5)
    assert ((places >= 0) & (places < 1)).all()
    torch.testing.assert_close(places, places[..., :1].expand_as(places), rtol=0, atol=1e-5)
    assert not torch.allclose(places[:, 0], places[:, 1], atol=1e-3)
    later = draw_times(7, 3, prompts, passes=2, draws=5, shift=3.0)
    assert not torch.isclose(times, later).any()
    many = draw_times(0, 0, torch.arange(4000), passes=1, draws=1, shift=1.0)
    assert abs(many.mean().item() - 0.5) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_noised_latents_lie_on_the_line_to_their_target(dtype: torch.dtype) -> None:
    final = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    prompts, policy = torch.tensor([0, 1, 1]), ToyPolicy()
    seeds = sample_seeds(0, 0, prompts, torch.arange(3), 4)[:, 1:]
    times = draw_times(0, 0, prompts, passes=2, draws=2, shift=3.0)
    batch = noised(policy, prompts, final, seeds, times, draws=2)
    assert batch.denoising_step.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert batch.sample.tolist() == [0, 1, 2] * 4
    torch.testing.assert_close(batch.sigma, times.T.flatten())
    assert batch.latents.dtype == batch.noise.dtype == dtype
    line = final.repeat(4, 1, 1).float() + batch.sigma[:, None, None] * batch.noise.float()
    assert torch.equal(batch.latents, line.to(dtype))
    noise = batch.noise.float() + final.repeat(4, 1, 1).float()
    assert abs(noise.std().item() - 1) < 0.2
    assert torch.equal(batch.velocity, policy(batch.latents, batch.sigma, batch.prompt_indices))
    some = noised(policy, prompts[1:], final[1:], seeds[1:], times[1:], draws=2)
    rows = torch.tensor([i for i in range(12) if i % 3])
    assert torch.equal(some.noise, batch.noise[rows])  # an image's draws are its own, in any batch


def test_every_pass_has_its_own_draws() -> None:
    recipe = with_(of("awm", clip_range=5e-2), update={"inner_epochs": 2, "minibatches": 2, "draws": 4})
    index = [minibatch.index for minibatch in minibatches(state_of(ToyBackbone(), recipe), torch.zeros(32))]
    assert [len(part) for part in index] == [64, 64, 64, 64]
    first, second = torch.cat(index[:2]).sort().values, torch.cat(index[2:]).sort().values
    assert torch.equal(first, torch.arange(128))
    assert torch.equal(second, torch.arange(128, 256))


def test_images_of_a_group_are_in_one_update() -> None:
    recipe = with_(of("dgpo"), sampler={"batch_size": 8}, update={"minibatches": 4, "draws": 4})
    state = state_of(ToyBackbone(), recipe)
    for minibatch in minibatches(state, torch.zeros(32)):
        draws = minibatch.index % (8 * recipe.stored_steps) // 8
        assert len(draws.unique()) == 1  # of all 4 rollout batches
        assert len(minibatch.index) == 32


@pytest.mark.parametrize("name", ["dgpo", "dpo"])
def test_a_group_objective_has_the_gradient_of_one_graph(name: str) -> None:
    """In rollout batches and micro-batches that cut through the groups, against the model before training."""
    recipe = of(name, with_(sampler={"group_size": 6, "batch_size": 4}, update={"micro_batch": 5, "minibatches": 2}))
    backbone = ToyBackbone()
    state = state_of(backbone, recipe)
    with torch.no_grad():
        backbone.policy.image += 0.1 * torch.randn(
            backbone.policy.image.shape, generator=torch.Generator().manual_seed(1)
        )
    prompts, seeds = images_to_sample(state)
    final = torch.randn(12, 2, 8, generator=torch.Generator().manual_seed(2))
    transitions = []
    for first in (0, 4, 8):
        part = slice(first, first + 4)
        batch = noised_batch(state, final[part], prompts[part], seeds[part, 1:])
        transitions.append(replace(batch, sample=batch.sample + first))
    advantages = torch.randn(12, generator=torch.Generator().manual_seed(3))
    index = next(minibatches(state, advantages)).index

    batch = RolloutBatch.select(transitions, index)
    order = torch.argsort((batch.prompt_indices * 4 + batch.denoising_step) * 12 + batch.sample)
    velocity = backbone.policy(batch.latents, batch.sigma, batch.prompt_indices)
    rows = [x[order].reshape(4, 6, *x.shape[1:]) for x in (velocity.flatten(1), batch.velocity.flatten(1),
            batch.noise.flatten(1), batch.sigma, advantages[batch.sample])]  # fmt: skip
    velocity, old, target, sigma, of_group = rows
    assert (old != velocity).all()  # of the weights before they moved
    formula = matching_formulas.FORMULAS[name]
    loss = formula(velocity, old, torch.zeros_like(target), target, sigma, of_group).mean()
    (want,) = torch.autograd.grad(loss, backbone.policy.image)

    parts = index.split(recipe.micro_batch)
    for part, given in zip(parts, joint_derivatives(state, transitions, parts, advantages, moved=False), strict=True):
        batch = RolloutBatch.select(transitions, part)
        result = policy_loss(backbone.policy, batch, advantages[batch.sample], recipe.objective, given)
        (result.loss * (len(part) / len(index))).backward()
    torch.testing.assert_close(backbone.policy.image.grad, want, rtol=1e-4, atol=1e-6)


def test_sampling_draws_no_noise_and_velocities_cost_one_pass() -> None:
    calls: list[bool] = []

    class Counted(ToyPolicy):
        def forward(self, *args: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return super().forward(*args)

    recipe = with_(of("awm", clip_range=5e-2), run={"epochs": 1}, update={"inner_epochs": 1, "draws": 4, "parity": 0})
    logs, _, _ = run(recipe, ToyBackbone(Counted()))
    assert calls.count(False) == recipe.sampler.num_steps + 4
    assert calls.count(True) == len(logs[0].updates) == 4
    assert logs[0].steps == (0, 1, 2, 3)
    assert all(step.std == 0 for step in [logs[0].updates[0].ratio])


def test_the_old_policy_is_an_average_that_samples() -> None:
    recipe = with_(of("diffusion_nft", adv_clip=1.0, decay_rate=0.25), run={"epochs": 3})
    backbone, recorder = ToyBackbone(), MemoryRecorder()
    weights: list[Tensor] = []

    class Watch(MemoryRecorder):
        def end_epoch(self, log: Any, images: Tensor, state: Any) -> None:
            super().end_epoch(log, images, state)
            weights.append(backbone.policy.image.detach().clone())
            self.old = state.old.tensors["image"].clone()

    recorder = Watch()
    with pool(recipe, backbone) as rewards:
        train(backbone, recipe, rewards, recorder, cpu())
    old = torch.zeros(2, 2, 8)
    for decay, weight in zip((0.25, 0.5, 0.5), weights, strict=True):  # decay_rate * epoch, at most largest_decay
        old = decay * old + (1 - decay) * weight
    torch.testing.assert_close(recorder.old, old)
    assert not torch.allclose(old, weights[-1])


def test_the_reference_of_a_preference_serves_its_kl() -> None:
    """The model before training: its velocities are computed once."""
    logs, backbone, _ = run(with_(of("dgpo", beta=1.0, kl_weight=10.0), run={"epochs": 3}))
    free, other, _ = run(with_(of("dgpo", beta=1.0), run={"epochs": 3}))
    assert logs[0].per_step[0].kl is not None
    assert free[0].per_step[0].kl is None
    assert backbone.policy.image.abs().max() < other.policy.image.abs().max()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dgpo", {"subsample": 0.5}, "takes all images of a group in one update: set update.subsample = 1"),
        ("dpo", {"draws": 3}, "update.minibatches = 4 must divide update.draws = 3"),
        ("awm", {"draws": 0}, "draws must be at least 1"),
        (
            "dgpo",
            {"stop": "espo"},
            "update.stop = espo measures how far denoising steps are .* set update.stop to none",
        ),
        ("awm", {"draws": 1000, "inner_epochs": 1000}, "draws of noise must be at most"),
    ],
)
def test_draws_that_do_not_fit_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_(with_(of(name), sampler={"group_size": 256}), update=changes)


@pytest.mark.parametrize("name", ["awm", "dgpo"])
def test_images_that_are_compared_get_the_same_noise(name: str) -> None:
    recipe = of(name, with_(sampler={"group_size": 4, "batch_size": 8}))
    state = state_of(ToyBackbone(), recipe)
    prompts, seeds = images_to_sample(state)
    assert len(seeds[:, 0].unique()) == 8  # their initial latents differ
    final = torch.randn(8, 2, 8, generator=torch.Generator().manual_seed(0))
    batch = noised_batch(state, final, prompts, seeds[:, 1:])
    noise = (batch.noise + final.repeat(recipe.stored_steps, 1, 1)).view(-1, 2, 4, 2, 8)  # draw, group, image
    same = (noise - noise[:, :, :1]).abs().amax() < 1e-6
    assert bool(same) == (name == "dgpo")
    assert (noise[:, 0] - noise[:, 1]).abs().amin() > 0  # of another prompt it is another
    torch.testing.assert_close(batch.sigma.view(-1, 2, 4), batch.sigma.view(-1, 2, 4)[..., :1].expand(-1, -1, 4))


@pytest.mark.parametrize("name", ["diffusion_nft", "awm", "grpo_guard", "rpg"])
def test_a_group_whose_reward_failed_teaches_nothing(name: str) -> None:
    """Neither by a penalty nor by a KL, which ask for no advantage; and not as an earlier rollout either."""

    weights: list[Tensor] = []

    class Watch(MemoryRecorder):
        def end_epoch(self, log: Any, images: Tensor, state: Any) -> None:
            super().end_epoch(log, images, state)
            weights.append(backbone.policy.image.detach().clone())

    def fails(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        dropped = torch.tensor([prompt == "dark" and len(weights) > 0 for prompt in prompts])
        return torch.where(dropped, torch.nan, towards(images, prompts, metadata))

    # Its window holds the failed rollouts alone in the last epoch.
    recipe = with_(of(name, kl_weight=1.0), run={"epochs": 4}, scoring={"on_failure": "drop_group"})
    recipe = with_(recipe, update={"betas": (0.0, 0.99)})  # so that no momentum moves a weight
    backbone = ToyBackbone()
    with pool(recipe, backbone, fails) as rewards:
        train(backbone, recipe, rewards, Watch(), cpu())
    before, after = weights[1], weights[3]  # the second epoch may train on the first one, which did not fail
    assert before[1].abs().min() > 0
    assert torch.equal(before[1], after[1])
    assert (before[0] != after[0]).all()


def test_an_ode_needs_no_stochastic_step() -> None:
    assert with_(of("awm"), sampler={"sde_steps": 0}).trained_steps == 4
    with pytest.raises(UserError, match="sde_steps must be at least 1"):
        with_(sampler={"sde_steps": 0})
