"""Updates on earlier rollouts: gradients against autograd, what is kept and replayed, and equal shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.epochs import Epochs, recipe_of
from helpers.objective_formulas import ppo, rpg
from helpers.toys import RECIPE, MemoryRecorder, ToyBackbone, pool, towards
from torch import Tensor

from fastguard.config import advantages_config, objective_config
from fastguard.errors import UserError
from fastguard.loss.objectives import build_objective
from fastguard.train.replay import best_of, log_ratios, training_set
from fastguard.train.rollout import RolloutBatch, epoch_prompts
from fastguard.train.trainer import train

N_ELEMENTS = 16


def log_prob(batch: RolloutBatch, velocity: Tensor) -> Tensor:
    """(N,) float64, of what the rollout drew, a mean over the elements."""
    a, b, s = (c.double()[:, None, None] for c in (batch.step.latents_coef, batch.step.velocity_coef, batch.step.std))
    drawn = a * batch.latents.double() + b * batch.velocity.double() + s * batch.noise.double()
    mean = a * batch.latents.double() + b * velocity.double()
    return torch.distributions.Normal(mean, s).log_prob(drawn).mean((1, 2))


def naive_log_ratio(batch: RolloutBatch, image: Tensor) -> Tensor:
    """log pi / pi_b of the toy policy with this image."""
    velocity = (0.7 * batch.latents.double() - image[batch.prompt_indices]) / batch.sigma.double()[:, None, None]
    return log_prob(batch, velocity) - log_prob(batch, batch.velocity)


@pytest.mark.parametrize(
    ("name", "options", "twin"),
    [("rpg", {"lam": 0.4}, "power_mean"), ("op_grpo", {"keep": 1.0, "clip_range": 2e-2}, "flow_grpo")],
)
def test_without_earlier_rollouts_it_is_its_twin_to_the_bit(name: str, options: dict[str, Any], twin: str) -> None:
    def trained(objective: Any) -> Tensor:
        backbone, recipe = ToyBackbone(), replace(RECIPE, objective=objective)
        recipe = replace(recipe, run=replace(recipe.run, epochs=3))
        with pool(recipe, backbone) as rewards:
            train(backbone, recipe, rewards, MemoryRecorder(), Accelerator(cpu=True))
        return backbone.policy.image.detach()

    own = trained(objective_config(name, window=1, **options))
    shared = {key: value for key, value in options.items() if key != "keep"}
    assert torch.equal(own, trained(objective_config(twin, **shared)))
    assert not torch.equal(own, trained(objective_config(name, window=2, **options)))


def test_rpg_has_the_gradient_of_a_mean_over_its_rollouts() -> None:
    """Each transition against the policy that drew it, with the advantages of its own group; float64 autograd."""
    epochs = Epochs(recipe_of("rpg", lam=0.4, window=3))
    rollouts = []
    for _ in range(3):
        rollouts.append(epochs.sample())
        trained = training_set(epochs.state, rollouts[-1], rollouts[-1].transitions)
        epochs.move(0.3)
        if len(rollouts) < 3:
            epochs.remember(rollouts[-1])
    got, update = epochs.gradient(trained)
    assert len(update.log_ratio) == 3 * 16 * 4

    image: Tensor = epochs.state.backbone.policy.image.detach().double().requires_grad_()  # type: ignore[union-attr]
    losses = []
    for rolled in rollouts:
        batch = RolloutBatch.cat(rolled.transitions)
        scores = rolled.advantages.values[batch.sample].double()
        losses.append(rpg(naive_log_ratio(batch, image), torch.zeros(0), scores, N_ELEMENTS, lam=0.4).mean())
    (want,) = torch.autograd.grad(torch.stack(losses).mean(), image)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("cap", [2.0, 1.01])
def test_op_grpo_has_the_gradient_of_its_formula(cap: float) -> None:
    """Clipped around the policy at the start of the updates, weighted once for each image, on the kept steps alone."""
    clip = (0.002, 0.003)
    epochs = Epochs(recipe_of("op_grpo", window=2, replayed=0.25, keep=0.5, cap=cap, clip_range=clip))
    old = epochs.sample()
    epochs.remember(old)
    epochs.move(0.3)
    new = epochs.sample()
    trained = training_set(epochs.state, new, new.transitions)
    old_image = epochs.state.backbone.policy.image.detach().double()  # type: ignore[union-attr]
    epochs.move(0.2)
    got, update = epochs.gradient(trained)

    assert update.denoising_step.unique().tolist() == [0, 1]  # of 4; the later steps are in no loss
    assert len(update.log_ratio) == (16 + 4) * 2
    rewards = old.rewards.view(2, 8)
    best = rewards.argsort(dim=1, descending=True)[:, :2] + torch.tensor([[0], [8]])
    joined = torch.cat([new.rewards.view(2, 8), old.rewards[best]], 1)
    advantages = (joined - joined.mean(1, keepdim=True)) / (joined.std(1, correction=0, keepdim=True) + 1e-4)

    image = epochs.state.backbone.policy.image.detach().double().requires_grad_()  # type: ignore[union-attr]
    losses, weights = [], []
    for rolled, images, scores in (
        (new, torch.arange(16), advantages[:, :8].flatten()),
        (old, best.flatten(), advantages[:, 8:].flatten()),
    ):
        whole = RolloutBatch.cat(rolled.transitions)
        for sample, score in zip(images.tolist(), scores, strict=True):
            batch = whole[((whole.sample == sample) & (whole.denoising_step < 2)).nonzero()[:, 0]]
            offset = naive_log_ratio(batch, old_image)
            weight = offset.mean().exp().clamp(max=cap)
            weights.append(weight.item())
            ratio = naive_log_ratio(batch, image)
            losses.append(weight * ppo(ratio - offset, torch.zeros(0), score.expand(2), N_ELEMENTS, clip_range=clip))
    (want,) = torch.autograd.grad(torch.cat(losses).mean(), image)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-5 * float(want.abs().max()))
    assert weights[:16] == pytest.approx([1.0] * 16)
    assert trained.replayed is not None
    assert sorted(trained.replayed.weights[:-1].tolist()) == pytest.approx(sorted(weights[16:]), rel=1e-5)
    assert max(weights) == pytest.approx(1.01) if cap == 1.01 else max(weights) > 1.011
    assert 0 < update.clipped.sum() < len(update.clipped)
    # What is logged is the ratio to the policy at the start of the updates, for every image.
    assert update.log_ratio.abs().max() < 0.5 * naive_log_ratio(whole, image).abs().max()


def test_the_ratio_to_the_policy_now_is_exactly_1_at_first() -> None:
    epochs = Epochs(recipe_of("op_grpo", window=3, clip_range=1e-2))
    for _ in range(3):
        rolled = epochs.sample()
        trained = training_set(epochs.state, rolled, rolled.transitions)
        assert (epochs.gradient(trained)[1].log_ratio == 0).all()
        epochs.remember(rolled)
        epochs.move(0.2)
    assert (log_ratios(epochs.state, epochs.state.buffer.rollouts[0].transitions) != 0).all()


def test_weights_and_offsets_of_the_objective_are_the_formula() -> None:
    objective = build_objective("op_grpo", cap=1.2)
    ratios = torch.tensor([[0.1, 0.2], [-0.4, 0.1], [1.0, 800.0]], dtype=torch.float64)
    want = torch.tensor([0.15, -0.15, 0.0], dtype=torch.float64).exp()
    want[2] = 1.2
    torch.testing.assert_close(objective.trajectory_weights(ratios), want)
    assert (objective.trajectory_weights(torch.zeros(3, 2)) == 1).all()
    assert (build_objective("flow_grpo").trajectory_weights(ratios) == 1).all()


def test_the_images_kept_are_the_best_of_their_prompts_and_lie_step_by_step() -> None:
    epochs = Epochs(recipe_of("op_grpo", window=3, replayed=0.4, keep=0.75))
    rolled = epochs.sample()
    epochs.remember(rolled)
    (stored,) = epochs.state.buffer.rollouts
    (batch,) = stored.transitions
    best = torch.cat([row.topk(3).indices.sort().values for row in rolled.rewards.view(2, 8)])
    images = best + torch.tensor([0, 0, 0, 8, 8, 8])
    assert batch.sample.tolist() == images.tolist() * 3
    assert batch.denoising_step.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert torch.equal(stored.values, rolled.scores.values[:, images])
    whole = RolloutBatch.cat(rolled.transitions)
    for i, (sample, step) in enumerate(zip(batch.sample, batch.denoising_step, strict=True)):
        (place,) = ((whole.sample == sample) & (whole.denoising_step == step)).nonzero()[:, 0]
        for name in ("latents", "velocity", "noise", "sigma", "prompt_indices"):
            assert torch.equal(getattr(batch, name)[i], getattr(whole, name)[place])
        assert batch.step.std[i] == whole.step.std[place]


def test_the_best_over_all_rollouts_are_replayed() -> None:
    epochs = Epochs(recipe_of("op_grpo", window=4, replayed=0.25))
    for _ in range(4):
        epochs.remember(epochs.sample())
    state = epochs.state
    assert [rollout.epoch for rollout in state.buffer.rollouts] == [3, 2, 1]
    chosen = best_of(state, [1])
    assert sum(map(len, chosen)) == 2
    of_dark = [(r.values[0, place].item(), i, place) for i, r in enumerate(state.buffer.rollouts) for place in (2, 3)]
    expected = sorted((i, place) for _, i, place in sorted(of_dark)[-2:])
    assert [(i, place) for i, places in enumerate(chosen) for place in places.tolist()] == expected
    assert all(not len(places) for places in best_of(state, []))


def test_a_prompt_that_does_not_come_again_has_nothing_to_replay() -> None:
    recipe = recipe_of("op_grpo", window=2, replayed=0.25)
    recipe = replace(
        recipe, prompts=replace(recipe.prompts, per_epoch=1), run=replace(recipe.run, epochs=12),
    )  # fmt: skip
    backbone = ToyBackbone()
    with pool(recipe, backbone) as rewards:
        logs = train(backbone, recipe, rewards, MemoryRecorder(), Accelerator(cpu=True))
    drawn = [epoch_prompts(2, 1, recipe.run.seed, epoch) for epoch in range(12)]
    expected = [2 if epoch and drawn[epoch] == drawn[epoch - 1] else 0 for epoch in range(12)]
    assert [log.earlier_images for log in logs] == expected
    assert {0, 2} == set(expected)


@pytest.mark.parametrize("subsample", [1.0, 0.5])
def test_each_update_has_an_equal_share_of_each_rollout(subsample: float) -> None:
    recipe = recipe_of("rpg", window=3)
    recipe = replace(recipe, update=replace(recipe.update, minibatches=4, inner_epochs=2, subsample=subsample))
    epochs = Epochs(recipe)
    for _ in range(3):
        rolled = epochs.sample()
        trained = training_set(epochs.state, rolled, rolled.transitions)
        if epochs.state.epoch < 2:
            epochs.remember(rolled)
    batch = RolloutBatch.cat(trained.transitions)
    found = list(trained.minibatches(epochs.state))
    assert len(found) == 8
    count = round(16 * subsample)
    assert recipe.transitions_per_update == 3 * count
    for minibatch in found:
        assert torch.bincount(batch.sample[minibatch.index] // 16).tolist() == [count] * 3
    for one_pass in (found[:4], found[4:]):
        index = torch.cat([minibatch.index for minibatch in one_pass])
        assert len(index.unique()) == len(index) == 3 * 4 * count
    assert not torch.equal(found[0].index, found[4].index)


@pytest.mark.parametrize("subsample", [1.0, 0.5])
def test_the_weights_of_an_update_make_a_mean_over_all_images(subsample: float) -> None:
    """In expectation over the choice of fresh images, where some are left out."""
    recipe = recipe_of("op_grpo", window=2, replayed=0.25)
    recipe = replace(recipe, update=replace(recipe.update, subsample=subsample))
    epochs = Epochs(recipe)
    epochs.remember(epochs.sample())
    rolled = epochs.sample()
    trained = training_set(epochs.state, rolled, rolled.transitions)
    batch, replayed = RolloutBatch.cat(trained.transitions), trained.replayed
    assert replayed is not None
    numbers = torch.randn(16 + 4 + 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    means = []
    for epoch in range(1 if subsample == 1 else 600):
        epochs.state.epoch = epoch
        (minibatch,) = trained.minibatches(epochs.state)
        assert minibatch.weights is not None
        sample = batch.sample[minibatch.index]
        means.append((minibatch.weights.double()[sample] * numbers[sample]).mean().item())
    want = torch.cat([numbers[:16], replayed.weights[:4] * numbers[16:20]]).mean().item()
    found = torch.tensor(means, dtype=torch.float64)
    error = 1e-6 if subsample == 1 else 4 * float(found.std()) / len(found) ** 0.5
    assert float(found.mean()) == pytest.approx(want, abs=error)
    if subsample == 1:
        assert (minibatch.weights[:16] == 1).all()


def test_groups_with_a_reward_that_failed_are_neither_kept_nor_joined() -> None:
    fails: set[str] = set()

    def reward(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        bad = torch.tensor([prompt in fails for prompt in prompts])
        return torch.where(bad, torch.nan, towards(images, prompts, metadata))

    recipe = recipe_of("op_grpo", window=3, replayed=0.25)
    recipe = replace(recipe, scoring=replace(recipe.scoring, on_failure="drop_group"))
    epochs = Epochs(recipe, reward=reward)
    fails.add("dark")
    epochs.remember(epochs.sample())
    (stored,) = epochs.state.buffer.rollouts
    assert stored.transitions[0].prompt_indices.unique().tolist() == [0]
    fails.clear()
    epochs.remember(epochs.sample())
    fails.add("light")
    rolled = epochs.sample()
    trained = training_set(epochs.state, rolled, rolled.transitions)
    assert trained.replayed is not None
    assert trained.replayed.images == 2
    assert RolloutBatch.cat(trained.transitions[4:]).prompt_indices.unique().tolist() == [1]


def test_what_estimators_expect_of_a_prompt_is_learned_from_fresh_images() -> None:
    """A winner would raise the baseline of its prompt."""
    recipe = replace(recipe_of("op_grpo", window=2), advantages=advantages_config("running"))
    epochs = Epochs(recipe)
    first = epochs.sample()
    epochs.remember(first)
    epochs.state.baselines = first.advantages.baselines
    rolled = epochs.sample()
    training_set(epochs.state, rolled, rolled.transitions)
    rewards = rolled.rewards.view(2, 8).mean(1)
    momentum = recipe.advantages.momentum  # type: ignore[attr-defined]
    want = {p: momentum * first.advantages.baselines[p] + (1 - momentum) * rewards[p].item() for p in (0, 1)}
    assert rolled.advantages.baselines == pytest.approx(want)


@pytest.mark.parametrize("name", ["rpg", "op_grpo"])
def test_rollouts_that_are_not_finite_are_not_kept(name: str) -> None:
    epochs = Epochs(recipe_of(name, window=3))
    epochs.remember(epochs.sample())
    before = epochs.state.buffer
    rolled = epochs.sample()
    for batch in rolled.transitions:
        batch.noise[:, 0, 0] = torch.inf
    epochs.remember(rolled)
    assert epochs.state.buffer is before
    assert "is not kept for later updates" in epochs.recorder.messages[0]


def test_rules_that_measure_the_fresh_rollout_alone_are_refused() -> None:
    recipe = recipe_of("rpg")
    with pytest.raises(UserError, match=r"update.stop to none, or objective.window to 1"):
        replace(recipe, update=replace(recipe.update, stop="espo"))
    replace(recipe_of("rpg", window=1), update=replace(recipe.update, stop="espo"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rpg", {"window": 9}, r"window must lie in \[1, 8\] rollouts; got 9"),
        ("op_grpo", {"window": 0}, r"window must lie in \[1, 8\] rollouts; got 0"),
        ("op_grpo", {"window": 2.0}, "window must be a whole number of rollouts; got 2.0"),
        ("op_grpo", {"keep": 0.0}, r"keep must lie in \(0, 1\]; got 0.0"),
        ("op_grpo", {"replayed": 1.5}, r"replayed must lie in \(0, 1\]; got 1.5"),
        ("op_grpo", {"cap": 0.0}, "cap must be positive"),
    ],
)
def test_options_that_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        objective_config(name, **options)


def test_the_steps_that_are_kept_have_to_divide_into_the_minibatches() -> None:
    recipe = recipe_of("op_grpo", keep=0.75)
    with pytest.raises(UserError, match=r"3 trained steps \(objective.keep of sampler.sde_steps\) = 12 transitions"):
        replace(recipe, update=replace(recipe.update, minibatches=8))
