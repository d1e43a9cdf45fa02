"""The training loop on a small policy: it learns, it is exact on-policy, and it stops at what is not finite."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.objective_formulas import FORMULAS
from helpers.toys import (
    RECIPE,
    MemoryRecorder,
    ToyBackbone,
    ToyPolicy,
    brightness,
    cpu,
    pool,
    run,
    state_of,
    towards,
    with_,
)
from torch import Tensor, nn

from fastguard.advantages import ESTIMATORS
from fastguard.config import (
    MonitorConfig,
    ObjectiveConfig,
    Recipe,
    RewardConfig,
    advantages_config,
    objective_config,
)
from fastguard.demo.backbone import DigitBackbone
from fastguard.demo.model import DigitPolicy
from fastguard.loss.objectives import OBJECTIVES
from fastguard.ops import transition as naive
from fastguard.rewards import RewardError, RewardPool
from fastguard.train import trainer
from fastguard.train.collect import images_to_sample
from fastguard.train.ema import Shadow
from fastguard.train.metrics import Update, clip_fractions, clip_range_for, ratio_log
from fastguard.train.minibatches import minibatches
from fastguard.train.monitor import Monitor
from fastguard.train.optim import AdamW
from fastguard.train.policy_loss import joint_derivatives, policy_loss
from fastguard.train.rollout import RolloutBatch, predict_velocity, rollout, training_schedule
from fastguard.train.trainer import train
from fastguard.train.update import has_moved_too_far
from fastguard.utils.sealed import DamagedError


def transitions_of(backbone: Any, recipe: Recipe) -> list[RolloutBatch]:
    prompts, seeds = images_to_sample(state_of(backbone, recipe))
    schedule = training_schedule(recipe.sampler, backbone.sigmas, 0, 0)
    return list(rollout(backbone.policy, prompts, seeds, backbone.latent_shape, schedule).transitions)


# At the scale of the toy's few elements; none depends on the step's size.
TRAINED: dict[str, dict[str, Any]] = {
    "grpo_guard": {"clip_range": 1e-2, "reweight": "inverse_dt"}, "flow_grpo": {"clip_range": 5e-2},
    "flow_dppo": {"kl_threshold": 1e-2}, "dppo": {"threshold": 0.3}, "copg": {"clip_range": 5e-2},
    "hinge": {"margin": 5e-2}, "ppo_rpe": {"threshold": 2.5e-2}, "fr_ppo": {"tau": 0.1}, "surrogate": {},
    "power_mean": {}, "cispo": {"clip_range": 5e-2}, "sapo": {}, "spo": {"epsilon": 5e-2}, "dro": {"beta": 20.0},
    "tic_grpo": {"clip_range": 5e-2}, "gmpo": {"clip_range": 5e-2}, "diffusion_nft": {"adv_clip": 1.0},
    "awm": {"clip_range": 0.2}, "dgpo": {"beta": 1.0}, "dpo": {"beta": 10.0, "pairs": "all"},
    "rpg": {}, "op_grpo": {"clip_range": 5e-2, "keep": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_raises_the_reward(name: str) -> None:
    own = {"reweight": "none"} if OBJECTIVES[name].process == "reverse" else {}
    objective: ObjectiveConfig = objective_config(name, **{**own, **TRAINED[name]})
    logs, backbone, _ = run(replace(RECIPE, objective=objective))
    assert len(logs) == RECIPE.run.epochs
    assert logs[-1].reward_mean > logs[0].reward_mean + 0.3
    assert backbone.policy.image[0].mean() > 0.2
    assert backbone.policy.image[1].mean() < -0.2


@pytest.mark.parametrize("name", ["tic_grpo", "gmpo"])
def test_a_trajectory_objective_has_the_gradient_of_one_graph(name: str) -> None:
    """Over all steps of the images of an update, in micro-batches that cut through them, after the weights moved."""
    objective = objective_config(name, clip_range=2e-2, reweight="none", log_ratio="normalized")
    recipe = replace(with_(sampler={"group_size": 4, "batch_size": 8}, update={"micro_batch": 5}), objective=objective)
    backbone = ToyBackbone()
    state, transitions = state_of(backbone, recipe), [RolloutBatch.cat(transitions_of(backbone, recipe))]
    index = next(minibatches(state, torch.zeros(8))).index
    whole = RolloutBatch.select(transitions, index)
    assert [len(whole.denoising_step[whole.sample == image].unique()) for image in whole.sample.unique()] == [4, 4]
    with torch.no_grad():
        backbone.policy.image += 0.3 * torch.randn(
            backbone.policy.image.shape, generator=torch.Generator().manual_seed(1)
        )
    advantages = torch.linspace(-1, 2, 8)

    order = torch.argsort(whole.sample * 10 + whole.denoising_step)
    batch = RolloutBatch.select(transitions, index[order])
    order = torch.argsort(batch.sample * 10 + batch.denoising_step)
    velocity = predict_velocity(backbone.policy, batch.latents, batch.sigma, batch.prompt_indices)
    cross, drift = naive.moments(velocity, batch.velocity, batch.noise, batch.step)
    ratio = (batch.step.std * cross)[order].view(2, 4)
    of_image = advantages[batch.sample[order].view(2, 4)[:, 0]]
    loss = FORMULAS[name](ratio, drift[order].view(2, 4), of_image, 16, clip_range=2e-2).mean()
    (want,) = torch.autograd.grad(loss, backbone.policy.image)

    parts = index.split(recipe.micro_batch)
    known = joint_derivatives(state, transitions, parts, advantages, moved=True)
    for part, given in zip(parts, known, strict=True):
        batch = RolloutBatch.select(transitions, part)
        result = policy_loss(backbone.policy, batch, advantages[batch.sample], objective, given)
        (result.loss * (len(part) / len(index))).backward()
    torch.testing.assert_close(backbone.policy.image.grad, want, rtol=1e-5, atol=1e-7)


def test_the_first_update_of_trajectories_needs_no_first_pass() -> None:
    """No weight has moved, so all ratios are 1."""
    recipe = replace(with_(run={"epochs": 1}), objective=objective_config("tic_grpo", clip_range=5e-2))
    calls = []

    class Counted(ToyPolicy):
        def forward(self, *args: Tensor) -> Tensor:
            calls.append(torch.is_grad_enabled())
            return super().forward(*args)

    logs, _, _ = run(recipe, ToyBackbone(Counted()))
    updates = len(logs[0].updates)
    assert updates == 8
    rollout_and_check = recipe.sampler.num_steps + 1
    assert calls.count(True) == updates + 1  # and the check before the first update
    assert calls.count(False) == rollout_and_check - 1 + updates - 1


def test_updates_end_where_the_policy_has_moved_too_far() -> None:
    """By ESPO's rule; the first update of a rollout is by its own policy, so two are made at least."""
    counts = {}
    for stop_at in (1e-6, 0.02, 1.9):
        logs, _, _ = run(with_(run={"epochs": 2}, update={"stop": "espo", "stop_at": stop_at}))
        counts[stop_at] = [len(log.updates) for log in logs]
        assert [log.scalars()["update/count"] for log in logs] == counts[stop_at]
    assert counts[1e-6] == [2, 2]
    assert counts[1.9] == [8, 8]
    assert all(2 < count < 8 for count in counts[0.02])


def test_the_distance_that_ends_updates_is_the_mean_change_of_the_ratio() -> None:
    """2 erf(sqrt(D drift / 8)) against the mean of |r - 1| over draws of the rollout policy, r of the whole latent."""
    state = state_of(ToyBackbone(), with_(update={"stop": "espo"}))
    drift = torch.tensor([1e-3, 0.02], dtype=torch.float64)
    draws = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm = torch.sqrt(16 * drift)  # of the whitened change of the mean, D = 16
    measured = torch.expm1(norm[:, None] * draws - norm[:, None] ** 2 / 2).abs().mean().item()
    still = torch.zeros(2)
    update = Update(still, still, still, still, None, torch.tensor(1.0), drift=drift)
    for stop_at, ends in ((1.01 * measured, False), (0.99 * measured, True)):
        state.recipe = with_(update={"stop": "espo", "stop_at": stop_at})
        assert has_moved_too_far(update, state) == ends


BOUNDS: dict[str, dict[str, Any]] = {"bnpo": {"low": -10.0, "high": 0.0}, "vgpo": {"rescale": "minmax"}}
"""Of the toy's reward, which is negative."""


@pytest.mark.parametrize("name", ESTIMATORS)
def test_training_raises_the_reward_with_each_estimator(name: str) -> None:
    logs, backbone, _ = run(replace(RECIPE, advantages=advantages_config(name, **BOUNDS.get(name, {}))))
    assert logs[-1].reward_mean > logs[0].reward_mean + 0.3
    assert backbone.policy.image[0].mean() > 0.2
    assert backbone.policy.image[1].mean() < -0.2


@pytest.mark.parametrize("name", ["tempflow", "noise_level"])
@pytest.mark.parametrize("objective", ["grpo_guard", "tic_grpo"])
def test_training_raises_the_reward_with_weights_of_the_schedule(name: str, objective: str) -> None:
    """With an objective of single steps and with one of whole trajectories."""
    logs, _, _ = run(replace(RECIPE, objective=objective_config(objective, clip_range=5e-2, reweight=name)))
    assert logs[-1].reward_mean > logs[0].reward_mean + 0.3


@pytest.mark.parametrize("advantages", [{}, {"name": "vgpo", "rescale": "minmax"}])
def test_bad_transitions_are_named_with_any_advantages(advantages: dict[str, str]) -> None:
    """Alone, each with its own advantage and the weight of its step."""
    recipe = replace(SMALL, advantages=advantages_config(**advantages))
    with pytest.raises(FloatingPointError, match="denoising step 2 of sample 2 on process 0") as caught:
        run(with_(recipe, objective={"reweight": "tempflow"}), ToyBackbone(PoisonedUpdate(forward=True)))
    assert str(caught.value).count("denoising step") == 2


@pytest.mark.parametrize("name", ["gdpo", "std_scaled"])
def test_estimators_get_each_reward_with_its_weight(name: str) -> None:
    """The first reward is worth nothing, and the second, a thousandth of what is wanted, is all."""

    def opposite(images: Tensor, *rest: Any) -> Tensor:
        return -1e3 * towards(images, *rest)

    recipe = replace(
        RECIPE,
        rewards=(RewardConfig("opposite", weight=0.1), RewardConfig("towards", weight=1.0)),
        advantages=advantages_config(name),
    )
    backbone = ToyBackbone()
    functions = [(recipe.rewards[0], opposite), (recipe.rewards[1], towards)]
    with RewardPool(functions, recipe.scoring, backbone.prompts) as rewards:
        logs = train(backbone, recipe, rewards, MemoryRecorder(), cpu())
    # 0.1 * -1e3 + 1 = -99 of the sum; in units of their spread, -0.1 + 1.
    assert logs[-1].rewards["towards"].mean > logs[0].rewards["towards"].mean + 0.3
    assert logs[-1].reward_mean < logs[0].reward_mean


def test_running_baselines_are_those_of_the_epochs_before() -> None:
    recipe = with_(run={"epochs": 3})
    _, _, where = run(replace(recipe, advantages=advantages_config("running", momentum=0.5)))
    state = where.state
    assert state.baselines.keys() == {0, 1}
    assert all(math.isfinite(value) and value < 0 for value in state.baselines.values())
    _, _, where = run(recipe)
    assert where.state.baselines == {}


def test_rewards_that_an_estimator_cannot_take_save_and_stop() -> None:
    recipe, where = replace(RECIPE, advantages=advantages_config("bnpo")), MemoryRecorder()
    with (
        pool(recipe, ToyBackbone()) as rewards,
        pytest.raises(RewardError, match=r"advantages: bnpo takes rewards in \[low, high\] = \[0.0, 1.0\]"),
    ):
        train(ToyBackbone(), recipe, rewards, where, cpu())
    assert where.saved == [0]


@pytest.mark.parametrize("estimator", ["group", "vgpo"])
@pytest.mark.parametrize("kind", ["dance_sde", "cps"])
@pytest.mark.parametrize("window", ["random", "sliding"])
def test_every_sampler_and_window_learns(kind: str, window: str, estimator: str) -> None:
    sampler = {"kind": kind, "window": window, "sde_steps": 2} | ({"window_epochs": 2} if window == "sliding" else {})
    recipe = with_(sampler=sampler, objective={"clip_range": 5e-2})
    logs, _, _ = run(replace(recipe, advantages=advantages_config(estimator, **BOUNDS.get(estimator, {}))))
    assert logs[-1].reward_mean > logs[0].reward_mean + 0.1
    assert len({log.steps for log in logs}) == 3  # windows of 2 among the first 4 of 5 steps
    assert all(len(log.per_step) == 2 for log in logs)


def test_runs_repeat_bitwise_and_seeds_matter() -> None:
    def result(seed: int) -> Tensor:
        return run(with_(run={"epochs": 2, "seed": seed}))[1].policy.image.detach()

    assert torch.equal(result(0), result(0))
    assert not torch.equal(result(0), result(1))


@pytest.mark.parametrize("micro_batch", [8, 5])  # 32 transitions an update: 5 leaves a smaller last pass
def test_micro_batches_and_host_storage_change_nothing_but_rounding(micro_batch: int) -> None:
    whole = run(with_(run={"epochs": 1}, sampler={"store": "device"}))[1].policy.image.detach()
    recipe = with_(run={"epochs": 1}, update={"micro_batch": micro_batch}, sampler={"store": "cpu"})
    parts = run(recipe)[1].policy.image.detach()
    assert torch.allclose(whole, parts, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo_guard", "flow_grpo"])
def test_on_policy_log_ratio_is_bitwise_zero(name: Any) -> None:
    """The update re-scores with the rollout's own step function; at the same batch nothing may differ."""
    backbone = DigitBackbone(DigitPolicy(seed=0))
    recipe = with_(
        prompts={"per_epoch": 3},
        sampler={"group_size": 2, "batch_size": 6},
        update={"minibatches": 1},
    )
    recipe = replace(recipe, objective=objective_config(name, clip_range=recipe.objective.limit))
    for batch in transitions_of(backbone, recipe):
        result = policy_loss(backbone.policy, batch, torch.ones(len(batch)), recipe.objective)
        assert (result.log_ratio == 0).all()
        assert (result.drift == 0).all()
    with torch.no_grad():
        backbone.policy.flux.proj_out.bias += 1e-4
    assert (policy_loss(backbone.policy, batch, torch.ones(len(batch)), recipe.objective).log_ratio != 0).all()


def test_fused_digits_are_drawn_to_the_bit_and_trained_up_to_rounding() -> None:
    recipe = with_(prompts={"per_epoch": 3}, sampler={"group_size": 2, "batch_size": 6}, update={"minibatches": 1})
    backbones = [DigitBackbone(DigitPolicy(seed=0), fuse) for fuse in (True, False)]
    fused, plain = (RolloutBatch.cat(transitions_of(backbone, recipe)) for backbone in backbones)
    assert torch.equal(fused.latents, plain.latents)
    assert torch.equal(fused.velocity, plain.velocity)
    advantages = torch.randn(len(fused), generator=torch.Generator().manual_seed(0))
    for backbone in backbones:
        policy_loss(backbone.policy, plain, advantages, recipe.objective).loss.backward()
    ours, theirs = (dict(backbone.policy.named_parameters()) for backbone in backbones)
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert parameter.grad is not None
        assert torch.allclose(ours[name].grad, parameter.grad, rtol=0, atol=1e-5 * parameter.grad.abs().max()), name


def test_gradient_is_the_textbook_policy_gradient() -> None:
    """On-policy and unclipped: -mean(A grad log p), with log p from torch.distributions."""
    policy = ToyPolicy()
    batch = RolloutBatch.cat(transitions_of(ToyBackbone(policy), RECIPE))
    advantages = torch.randn(len(batch), generator=torch.Generator().manual_seed(0))
    objective = objective_config("flow_grpo", clip_range=0.5, reweight="none")
    (gradient,) = torch.autograd.grad(policy_loss(policy, batch, advantages, objective).loss, [policy.image])

    a, b, s = (c[:, None, None] for c in (batch.step.latents_coef, batch.step.velocity_coef, batch.step.std))
    drawn = a * batch.latents + b * batch.velocity + s * batch.noise
    mean = a * batch.latents + b * policy(batch.latents, batch.sigma, batch.prompt_indices)
    log_prob = torch.distributions.Normal(mean, s).log_prob(drawn).mean((1, 2))
    (expected,) = torch.autograd.grad(-(advantages * log_prob).mean(), [policy.image])
    # float32: log_prob rounds drawn - mean, which the inner product of the loss never forms.
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_kl_holds_the_policy_back_and_is_logged() -> None:
    free, _, _ = run(with_(run={"epochs": 8}))
    held, backbone, _ = run(with_(run={"epochs": 8}, objective={"kl_weight": 100.0}))
    assert free[0].per_step[0].kl is None
    kl = [log.per_step[0].kl for log in held]
    assert all(value is not None and value >= 0 for value in kl)
    assert kl[-1] > 0
    assert held[-1].reward_mean < free[-1].reward_mean
    assert backbone.policy.image.abs().max() < 0.3


def test_the_average_follows_the_weights() -> None:
    recipe = with_(run={"epochs": 2}, update={"ema_decay": 0.5, "ema_every": 4})
    _, backbone, where = run(recipe)
    shadow = where.state.average.tensors["image"]
    assert (shadow != 0).any()
    assert not torch.equal(shadow, backbone.policy.image)
    with where.state.average.in_place():
        assert torch.equal(backbone.policy.image, shadow)
    assert not torch.equal(backbone.policy.image, shadow)


def test_a_shadow_gives_the_weights_back_to_the_bit() -> None:
    policy = nn.Linear(5, 1, bias=False).bfloat16()
    before = policy.weight.detach().clone()
    shadow = Shadow(policy, "cpu", torch.float32)
    with torch.no_grad():
        policy.weight.add_(1.0)
    moved = policy.weight.detach().clone()
    with shadow.in_place():
        assert torch.equal(policy.weight, before)
    assert torch.equal(policy.weight, moved)
    shadow.move_towards(0.75)
    assert torch.allclose(shadow.tensors["weight"], 0.75 * before.float() + 0.25 * moved.float())


def test_no_gradient_outlives_its_update() -> None:
    assert run(with_(run={"epochs": 1}))[1].policy.image.grad is None


def test_a_run_can_stop_the_training_and_the_end_is_saved() -> None:
    logs, _, where = run(RECIPE, stop=2)
    assert [log.epoch for log in logs] == [0, 1]
    assert where.saved == [2]
    assert run(with_(run={"epochs": 5, "save_every": 2}))[2].saved == [2, 4, 5]


class InfiniteGradient(torch.autograd.Function):
    """The identity, with an infinite gradient where `bad`."""

    @staticmethod
    def forward(ctx: Any, velocity: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return velocity.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.saved_tensors[0], torch.inf, gradient), None


class PoisonedUpdate(ToyPolicy):
    """Healthy in rollouts; in updates, prompt 1 below sigma 0.6 gives NaN, or only its gradient does."""

    def __init__(self, forward: bool, heals_after: int | None = None) -> None:
        super().__init__()
        self.in_forward, self.heals_after, self.calls = forward, heals_after, 0

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        velocity = super().forward(latents, sigma, prompt_indices)
        if not torch.is_grad_enabled():
            return velocity
        self.calls += 1
        if self.heals_after is not None and self.calls > self.heals_after:
            return velocity
        bad = ((prompt_indices == 1) & (sigma < 0.6))[:, None, None]
        if self.in_forward:
            return torch.where(bad, torch.nan, velocity)
        return InfiniteGradient.apply(velocity, bad)


# Uniform flow times 1, 0.75, 0.5: only step 2 is poisoned; prompt 1 has the samples 2 and 3.
SMALL = with_(
    sampler={"num_steps": 4, "shift": 1.0, "sde_steps": 3, "group_size": 2, "batch_size": 4},
    update={"minibatches": 1, "inner_epochs": 1, "parity": 0.0, "max_bad_updates": 2},
)


@pytest.mark.parametrize("forward", [True, False], ids=["loss", "gradient only"])
def test_non_finite_updates_are_skipped_named_and_stop_the_run(forward: bool) -> None:
    backbone = ToyBackbone(PoisonedUpdate(forward))
    with pytest.raises(FloatingPointError, match="2 updates in a row") as caught:
        run(SMALL, backbone)
    for sample in (2, 3):
        assert f"denoising step 2 of sample {sample} on process 0 (prompt 1: 'dark')" in str(caught.value)
    assert str(caught.value).count("denoising step") == 2
    assert (backbone.policy.image == 0).all()
    assert backbone.policy.image.grad is None


def test_one_bad_update_is_skipped_counted_and_survived() -> None:
    # The first update's own pass, then one pass for each of its 12 transitions to find the guilty ones.
    logs, backbone, where = run(with_(SMALL, run={"epochs": 3}), ToyBackbone(PoisonedUpdate(True, heals_after=13)))
    assert [[u.skipped for u in log.updates] for log in logs] == [[True], [False], [False]]
    assert len(where.messages) == 1
    assert "denoising step 2 of sample 2" in where.messages[0]
    assert where.state.updates == 2
    assert (backbone.policy.image != 0).any()


@pytest.mark.parametrize("group", ["weights", "average", "optimizer"])
def test_what_an_update_ruins_is_named_before_transitions_are_blamed(
    group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of an epoch, where the next loss is not finite either."""
    backbone, where = ToyBackbone(), MemoryRecorder()
    step = AdamW.step

    def ruin(self: AdamW) -> None:
        step(self)
        image = backbone.policy.image
        tensor = {
            "weights": image.data,
            "average": where.state.average.tensors["image"],
            "optimizer": self.state_of(image)["exp_avg"],
        }[group]
        tensor[0, 0, 0] = torch.nan

    monkeypatch.setattr(AdamW, "step", ruin)
    recipe = with_(update={"ema_decay": 0.5, "ema_every": 100})
    with (
        pool(recipe, backbone) as rewards,
        pytest.raises(FloatingPointError, match=rf"holds NaN or infinity \({group}: image.*the way back$") as caught,
    ):
        train(backbone, recipe, rewards, where, cpu())
    assert "denoising step" not in str(caught.value)
    assert where.saved == where.messages == []


class DropoutPolicy(ToyPolicy):
    """Acts differently when a gradient is wanted, as a model with active dropout does."""

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        velocity = super().forward(latents, sigma, prompt_indices)
        return velocity * 1.1 if torch.is_grad_enabled() else velocity


def test_parity_preflight_stops_before_the_first_update() -> None:
    backbone = ToyBackbone(DropoutPolicy())
    with pytest.raises(ValueError, match=r"parity preflight.*update\.parity.*batch_size.*dtype.*attention.*dropout"):
        run(RECIPE, backbone)
    assert (backbone.policy.image == 0).all()
    run(with_(run={"epochs": 1}, update={"parity": 0.0}), backbone)  # and can be skipped
    assert (backbone.policy.image != 0).any()


class OverflowingPolicy(ToyPolicy):
    """Finite weights, and a velocity that is not."""

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        return super().forward(latents, sigma, prompt_indices) * torch.inf


def test_parity_preflight_tells_weights_that_are_not_finite_from_values_that_overflow() -> None:
    for value in (torch.nan, torch.inf):
        backbone = ToyBackbone()
        with torch.no_grad():
            backbone.policy.image[0, 0, 0] = value
        with pytest.raises(ValueError, match=r"parity preflight.*weights of the policy hold NaN or infinity \(image\)"):
            run(RECIPE, backbone)
    with pytest.raises(ValueError, match=r"parity preflight.*weights are finite.*model\.dtype = bfloat16"):
        run(RECIPE, ToyBackbone(OverflowingPolicy()))


def nan_for_the_last(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    scores = towards(images, prompts, metadata)
    scores[-1] = torch.nan
    return scores


def test_a_failing_reward_saves_and_stops_or_drops_its_group() -> None:
    backbone, where = ToyBackbone(), MemoryRecorder()
    with pool(RECIPE, backbone, nan_for_the_last) as rewards, pytest.raises(RewardError, match="towards.*dark"):
        train(backbone, RECIPE, rewards, where, cpu())
    assert where.saved == [0]
    dropping = with_(run={"epochs": 3}, scoring={"on_failure": "drop_group"})
    logs, backbone, where = run(dropping, reward=nan_for_the_last)
    assert len(where.messages) == 3
    assert "reward \"towards\" for prompt 'dark'" in where.messages[0]
    assert [log.dropped_groups for log in logs] == [1, 1, 1]
    assert (backbone.policy.image[0] != 0).any()
    assert (backbone.policy.image[1] == 0).all()  # the dark prompt's group was never trained on


def test_a_prompt_that_is_damaged_meanwhile_saves_and_stops() -> None:
    class Damaged(ToyBackbone):
        left = 2

        def load_prompts(self, prompt_indices: Iterable[int]) -> None:
            self.left -= 1
            if self.left < 0:
                raise DamagedError("the encoded prompt was damaged")

    where = MemoryRecorder()
    with pool(RECIPE, Damaged()) as rewards, pytest.raises(DamagedError, match="was damaged"):
        train(Damaged(), RECIPE, rewards, where, cpu())
    assert where.saved == [2]


def test_a_rollout_without_any_score_stops() -> None:
    def broken(*_: Any) -> Tensor:
        raise OSError("no network")

    with pytest.raises(RewardError, match="every group had a reward that failed, the first: .*no network"):
        run(with_(scoring={"on_failure": "drop_group"}), reward=broken)


@pytest.mark.parametrize("name", ["grpo_guard", "tic_grpo"])
def test_a_pass_trains_on_some_of_the_images(name: str) -> None:
    """Others in each pass, by their advantages, and as well as on all of them."""
    objective = objective_config(name, clip_range=5e-2)
    recipe = replace(with_(update={"subsample": 0.5, "minibatches": 4}), objective=objective)
    state, advantages = state_of(ToyBackbone(), recipe), torch.linspace(-1, 3, 32)
    found = list(minibatches(state, advantages))
    assert [len(minibatch.index) for minibatch in found] == [16] * 8
    images = [torch.cat([m.index for m in part]) % 32 for part in (found[:4], found[4:])]
    assert [len(each.unique()) for each in images] == [16, 16]
    assert not torch.equal(images[0].unique(), images[1].unique())
    weights = found[0].weights
    assert weights is not None
    assert torch.equal(weights.nonzero()[:, 0], images[0].unique())
    assert 0.5 < weights.mean() < 1.5  # 1 in expectation
    assert weights[31] < 1  # the largest advantage, which is chosen more often than not
    logs, _, _ = run(recipe)
    assert logs[-1].reward_mean > logs[0].reward_mean + 0.2


def test_the_kl_of_some_of_the_images_is_weighted_as_their_loss() -> None:
    backbone = ToyBackbone()
    batch = RolloutBatch.cat(transitions_of(backbone, RECIPE))[torch.arange(6)]
    batch = replace(batch, ref_velocity=batch.velocity + 0.1)
    weights, advantages = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)
    objective = replace(RECIPE.objective, kl_weight=0.3)
    whole = policy_loss(backbone.policy, batch, advantages, objective, weights=weights)
    each = []
    for i in range(6):
        one = batch[torch.tensor([i])]
        each.append(policy_loss(backbone.policy, one, advantages[i : i + 1], objective).loss)
    torch.testing.assert_close(whole.loss, (weights * torch.stack(each)).mean())
    assert whole.kl is not None
    assert whole.kl.min() > 0


def test_minibatches_cover_every_transition_once_per_pass() -> None:
    def order(epoch: int, recipe: Recipe = RECIPE) -> list[Tensor]:
        state = state_of(ToyBackbone(), recipe)
        state.epoch = epoch
        return [minibatch.index for minibatch in minibatches(state, torch.zeros(32))]

    batches = order(0)
    assert [len(b) for b in batches] == [32] * 8
    assert torch.cat(batches[:4]).sort().values.tolist() == list(range(128))
    assert torch.cat(batches[4:]).sort().values.tolist() == list(range(128))
    assert not torch.equal(batches[0], batches[4])
    assert torch.equal(torch.cat(batches), torch.cat(order(0)))
    assert not torch.equal(torch.cat(batches), torch.cat(order(1)))
    assert not torch.equal(torch.cat(batches), torch.cat(order(0, with_(run={"seed": 1}))))


def update(steps: list[int], log_ratio: list[float], clipped: list[bool], advantages: list[float]) -> Update:
    return Update(
        torch.tensor(advantages), torch.tensor(steps), torch.tensor(log_ratio), torch.tensor(clipped), None,
        torch.tensor(2.0),
    )  # fmt: skip


def test_ratios_are_reduced_by_denoising_step() -> None:
    first = update([0, 0, 1, 1], [9.0] * 4, [True, True, False, False], [1.0, -1.0, 1.0, 0.0])
    last = update([0, 1, 0, 1], [1e-8, -2e-3, 3e-8, -4e-3], [False] * 4, [1.0, -1.0, -1.0, 0.0])
    overall = ratio_log([first, last])
    # Positive advantages: 1 of 3 clipped; negative: 1 of 3; the clipped flag of a zero advantage counts nowhere.
    assert (overall.clip_fraction_positive, overall.clip_fraction_negative) == pytest.approx((1 / 3, 1 / 3))
    # 1e-8 survives although float32 has no number between 1 and 1 + 1.2e-7.
    steps = [ratio_log([last], step) for step in (0, 1)]
    assert [s.bias for s in steps] == pytest.approx([2e-8, -2.993e-3], rel=1e-3)
    assert [s.std for s in steps] == pytest.approx([1e-8, 0.997e-3], rel=1e-3)


def test_clip_advice_would_clip_the_share_it_names() -> None:
    generator = torch.Generator().manual_seed(0)
    log_ratio = 1e-3 * torch.randn(10_000, generator=generator)
    advantages = torch.randn(10_000, generator=generator)
    one = Update(advantages, torch.zeros(10_000), log_ratio, torch.zeros(10_000), None, torch.tensor(1.0))
    for share in (0.1, 0.3):
        clip = clip_range_for(share, [one])
        assert clip is not None
        ratio = log_ratio.double().exp()
        clipped = torch.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
        assert clipped.float().mean().item() == pytest.approx(share, abs=1e-3)
    still = Update(advantages, torch.zeros(10_000), 0 * log_ratio, torch.zeros(10_000), None, torch.tensor(1.0))
    assert clip_range_for(0.1, [still]) is None


def test_clip_fractions_tell_the_signs_apart() -> None:
    clipped, advantages = torch.tensor([False, False, True, True]), torch.tensor([1.0, 2.0, -1.0, -2.0])
    assert clip_fractions(clipped, advantages) == (0.0, 1.0)
    assert clip_fractions(torch.tensor([True]), torch.tensor([1.0])) == (1.0, 0.0)


# --- the monitor

WATCHED = replace(
    with_(run={"epochs": 8}),
    monitor=MonitorConfig(
        every=1, prompts=2, images_per_prompt=4, num_steps=4, gold=(RewardConfig("gold", name="gold"),)
    ),
)


def watch(gold: Any, **fields: Any) -> tuple[list[Any], MemoryRecorder]:
    recipe = replace(WATCHED, monitor=replace(WATCHED.monitor, **fields))
    backbone, where = ToyBackbone(), MemoryRecorder()
    with pool(recipe, backbone) as rewards, pool(recipe, backbone, gold=[gold]) as judges:
        logs = train(backbone, recipe, rewards, where, cpu(), Monitor(recipe, judges, 0))
    return logs, where


def test_the_monitor_keeps_the_best_and_stays_silent_while_gold_rises() -> None:
    logs, where = watch(towards)
    assert len(logs) == 8
    assert [v.log.epoch for v in where.verdicts] == list(range(9))
    assert not any(v.log.warning for v in where.verdicts)
    best = max(range(9), key=lambda i: where.verdicts[i].log.gold)
    assert where.state.monitor is not None
    assert where.state.monitor.best is not None
    assert where.state.monitor.best.epoch == best
    assert best in where.saved


def away(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    """A gold reward that falls as the proxy rises: what over-optimization looks like."""
    return -towards(images, prompts, metadata)


def test_the_monitor_warns_and_stops_if_asked() -> None:
    logs, where = watch(away)
    assert len(logs) == 8
    warnings = [v.log.warning for v in where.verdicts if v.log.warning]
    assert "the reward is being hacked: since epoch 0 the proxy rose from" in warnings[0]
    assert where.state.monitor is not None
    assert where.state.monitor.best is not None
    assert where.state.monitor.best.epoch == 0
    stopped, _ = watch(away, on_hacking="stop", patience=2)
    assert len(stopped) < 8


def test_a_gold_reward_that_fails_saves_first() -> None:
    recipe = replace(WATCHED, monitor=replace(WATCHED.monitor, every=2))
    calls = []

    def breaks_at_the_second_evaluation(*batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise OSError("no network")
        return towards(*batch)

    backbone, where = ToyBackbone(), MemoryRecorder()
    with (
        pool(recipe, backbone) as rewards,
        pool(recipe, backbone, gold=[breaks_at_the_second_evaluation]) as judges,
        pytest.raises(RewardError, match="gold.*no network"),
    ):
        train(backbone, recipe, rewards, where, cpu(), Monitor(recipe, judges, 0))
    assert where.saved == [0, 2]  # the best at the start, and the two epochs before the failure


def _adamw_counts_on_the_default_device() -> bool:
    """Asked where meta tensors are the default: it cannot read such a count."""
    weight = torch.zeros(1, device="cpu", requires_grad=True)
    weight.grad = torch.zeros_like(weight)
    try:
        torch.optim.AdamW([weight]).step()
    except RuntimeError:
        return True
    return False


def test_the_defaults_of_torch_do_not_change_a_run(other_defaults) -> None:
    """A reward's library may set them for the whole process."""
    recipe = replace(WATCHED, run=replace(WATCHED.run, epochs=2))
    recipe = with_(recipe, objective={"kl_weight": 0.01})

    def results() -> tuple[list[dict[str, float]], list[float], Tensor]:
        with pool(recipe, backbone, brightness) as rewards, pool(recipe, backbone, gold=[brightness]) as judges:
            logs = train(backbone, recipe, rewards, where, cpu(), Monitor(recipe, judges, 0))
        timed = ("seconds/", "speed/")
        scalars = [{name: v for name, v in log.scalars().items() if not name.startswith(timed)} for log in logs]
        return scalars, [verdict.log.gold for verdict in where.verdicts], backbone.policy.image.detach()

    backbone, where = ToyBackbone(), MemoryRecorder()
    expected = results()
    backbone, where = ToyBackbone(), MemoryRecorder()
    with other_defaults():
        if _adamw_counts_on_the_default_device():
            pytest.skip("AdamW of this torch (2.11 and before) counts its steps on the default device")
        came = results()
    assert came[:2] == expected[:2]
    assert torch.equal(came[2], expected[2])


def test_a_score_that_is_not_finite_is_never_the_best() -> None:
    judge = Monitor(WATCHED, None, 0)  # type: ignore[arg-type]
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    missing = torch.full((2, 8), torch.nan, dtype=torch.float64)
    assert not judge.judge(missing, 0, images).is_best
    assert judge.judge(torch.zeros(2, 8), 1, images).is_best
    assert not judge.judge(missing, 2, images).is_best
    assert judge.judge(torch.ones(2, 8), 3, images).is_best


def test_an_epochs_transitions_are_gone_before_the_next_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the largest thing that the trainer holds; twice would be too much."""
    kept: list[weakref.ref[Tensor]] = []
    real = trainer.sample_epoch

    def spy(*args: Any) -> Any:
        assert all(ref() is None for ref in kept)
        rolled = real(*args)
        kept.append(weakref.ref(rolled.transitions[0].noise))
        return rolled

    monkeypatch.setattr(trainer, "sample_epoch", spy)
    run(with_(run={"epochs": 3}))
    assert len(kept) == 3


def test_a_fall_within_the_noise_is_no_alarm() -> None:
    """The same mean fall, once equal over all images, once lost in their spread."""
    judge = Monitor(WATCHED, None, 0)  # type: ignore[arg-type]
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    proxy = torch.arange(8.0)
    spread = torch.tensor([3.0, -3.0] * 4)
    judge.judge(torch.stack([proxy, torch.zeros(8)]), 0, images)
    noisy = judge.judge(torch.stack([proxy + 1, spread - 0.1]), 1, images)
    assert -1 < noisy.log.gold_change_in_errors < 0
    clear = judge.judge(torch.stack([proxy + 1, 0.01 * spread - 0.1]), 2, images)
    assert clear.log.gold_change_in_errors < -2
    assert not clear.log.warning
    assert judge.judge(torch.stack([proxy + 1, 0.01 * spread - 0.1]), 3, images).log.warning
    assert not judge.judge(torch.stack([proxy - 1, 0.01 * spread - 0.2]), 4, images).log.warning  # proxy falls too
