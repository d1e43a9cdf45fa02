"""The training loop on a small policy: it learns, it is exact on-policy, and it stops at what is not finite."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastguard.config import ObjectiveConfig, SamplerConfig, TrainConfig
from fastguard.demo.model import LATENT_SHAPE, DigitPolicy
from fastguard.sampler import Transitions, rollout, sample_seeds
from fastguard.trainer import (
    Update,
    clip_fractions,
    global_advantages,
    images_to_sample,
    minibatches,
    policy_loss,
    summarize,
    train,
)

SHAPE = (2, 8)
CONFIG = TrainConfig(
    iterations=15,
    num_prompts=2,
    group_size=16,
    minibatches=4,
    learning_rate=1e-2,
    sampler=SamplerConfig(num_steps=5, sde_steps=4),
    objective=ObjectiveConfig("grpo_guard", clip_range=1e-2),
)


class Policy(nn.Module):
    """Denoises towards one learned image per prompt, and keeps a share of the noise so that images differ."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(2, *SHAPE))

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        return (0.7 * latents - self.image[prompt_indices]) / sigma[:, None, None]


def identity(latents: Tensor) -> Tensor:
    return latents


def reward(images: Tensor, prompt_indices: Tensor) -> Tensor:
    """Prompt 0 wants 1, prompt 1 wants -1."""
    wanted = 1.0 - 2.0 * prompt_indices
    return -(images - wanted[:, None, None]).square().mean((1, 2))


def cpu() -> Accelerator:
    return Accelerator(cpu=True)


def transitions_of(policy: nn.Module, config: TrainConfig, shape: tuple[int, ...]) -> list[Transitions]:
    prompts, seeds = images_to_sample(config, 0, cpu())
    return list(rollout(policy, prompts, seeds, shape, config.sampler).transitions)


@pytest.mark.parametrize(
    "objective",
    [ObjectiveConfig("grpo_guard", clip_range=1e-2), ObjectiveConfig("flow_grpo", clip_range=5e-2, reweight="none")],
    ids=lambda o: o.name,
)
def test_training_raises_the_reward(objective: ObjectiveConfig) -> None:
    policy = Policy()
    logs = train(policy, identity, reward, SHAPE, replace(CONFIG, objective=objective), accelerator=cpu())
    assert len(logs) == CONFIG.iterations
    assert logs[-1].reward_mean > logs[0].reward_mean + 0.3
    assert policy.image[0].mean() > 0.2
    assert policy.image[1].mean() < -0.2


def test_runs_repeat_bitwise_and_seeds_matter() -> None:
    def result(seed: int) -> Tensor:
        policy = Policy()
        train(policy, identity, reward, SHAPE, replace(CONFIG, iterations=2, seed=seed), accelerator=cpu())
        return policy.image.detach()

    assert torch.equal(result(0), result(0))
    assert not torch.equal(result(0), result(1))


@pytest.mark.parametrize("name", ["grpo_guard", "flow_grpo"])
def test_on_policy_log_ratio_is_bitwise_zero(name: Any) -> None:
    """The update re-scores with the rollout's own step function; at the same batch nothing may differ."""
    policy = DigitPolicy(seed=0)
    config = replace(CONFIG, num_prompts=3, group_size=2, minibatches=1, objective=ObjectiveConfig(name))
    for batch in transitions_of(policy, config, LATENT_SHAPE):
        result = policy_loss(policy, batch, torch.ones(len(batch)), config.objective)
        assert (result.log_ratio == 0).all()
        assert (result.drift == 0).all()
    with torch.no_grad():
        policy.flux.proj_out.bias += 1e-4
    assert (policy_loss(policy, batch, torch.ones(len(batch)), config.objective).log_ratio != 0).all()


def test_gradient_is_the_textbook_policy_gradient() -> None:
    """On-policy and unclipped: -mean(A grad log p), with log p from torch.distributions."""
    policy = Policy()
    batch = Transitions.cat(transitions_of(policy, CONFIG, SHAPE))
    advantages = torch.randn(len(batch), generator=torch.Generator().manual_seed(0))
    objective = ObjectiveConfig("flow_grpo", clip_range=0.5, reweight="none")
    (gradient,) = torch.autograd.grad(policy_loss(policy, batch, advantages, objective).loss, [policy.image])

    a, b, s = (c[:, None, None] for c in (batch.step.latents_coef, batch.step.velocity_coef, batch.step.std))
    drawn = a * batch.latents + b * batch.velocity + s * batch.noise
    mean = a * batch.latents + b * policy(batch.latents, batch.sigma, batch.prompt_indices)
    log_prob = torch.distributions.Normal(mean, s).log_prob(drawn).mean((1, 2))
    (expected,) = torch.autograd.grad(-(advantages * log_prob).mean(), [policy.image])
    # float32: log_prob rounds drawn - mean, which the inner product of the loss never forms.
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


def test_no_gradient_outlives_its_update() -> None:
    policy = Policy()
    train(policy, identity, reward, SHAPE, replace(CONFIG, iterations=1), accelerator=cpu())
    assert policy.image.grad is None


def test_callback_stops_training_and_sees_the_policy() -> None:
    policy, seen = Policy(), []

    def stop_at_second(log: Any, current: nn.Module) -> bool:
        seen.append((log.iteration, current is policy))
        return log.iteration == 1

    logs = train(policy, identity, reward, SHAPE, CONFIG, stop_at_second, cpu())
    assert seen == [(0, True), (1, True)]
    assert [log.iteration for log in logs] == [0, 1]


class InfiniteGradient(torch.autograd.Function):
    """The identity, with an infinite gradient where `bad`."""

    @staticmethod
    def forward(ctx: Any, velocity: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return velocity.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.saved_tensors[0], torch.inf, gradient), None


class PoisonedUpdate(Policy):
    """Healthy in rollouts; in updates, prompt 1 below sigma 0.5 gives NaN, or only its gradient does."""

    def __init__(self, forward: bool) -> None:
        super().__init__()
        self.in_forward = forward

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        velocity = super().forward(latents, sigma, prompt_indices)
        if not torch.is_grad_enabled():
            return velocity
        bad = ((prompt_indices == 1) & (sigma < 0.6))[:, None, None]
        if self.in_forward:
            return torch.where(bad, torch.nan, velocity)
        return InfiniteGradient.apply(velocity, bad)


@pytest.mark.parametrize("forward", [True, False], ids=["loss", "gradient only"])
def test_non_finite_updates_stop_and_name_step_and_sample(forward: bool) -> None:
    policy = PoisonedUpdate(forward)
    # Uniform flow times 1, 0.75, 0.5: only step 2 is poisoned; prompt 1 has the samples 2 and 3.
    sampler = SamplerConfig(num_steps=4, shift=1.0, sde_steps=3)
    config = replace(CONFIG, group_size=2, minibatches=1, epochs=1, sampler=sampler)
    with pytest.raises(FloatingPointError) as caught:
        train(policy, identity, reward, SHAPE, config, accelerator=cpu())
    for sample in (2, 3):
        assert f"denoising step 2 of sample {sample} (prompt 1)" in str(caught.value)
    assert str(caught.value).count("denoising step") == 2
    assert (policy.image == 0).all()


def test_bad_rewards_stop_training() -> None:
    def nan_for_image_3(images: Tensor, prompt_indices: Tensor) -> Tensor:
        return torch.where(torch.arange(len(images)) == 3, torch.nan, images.mean((1, 2)))

    with pytest.raises(ValueError, match=r"images \[3\]"):
        train(Policy(), identity, nan_for_image_3, SHAPE, CONFIG, accelerator=cpu())
    with pytest.raises(ValueError, match=r"one score per image, \(32,\), got \(32, 2\)"):
        train(Policy(), identity, lambda images, prompts: images.mean(2), SHAPE, CONFIG, accelerator=cpu())


def test_minibatches_cover_every_transition_once_per_epoch() -> None:
    def order(iteration: int, config: TrainConfig = CONFIG) -> list[Tensor]:
        return list(minibatches(128, iteration, config, cpu()))

    batches = order(0)
    assert [len(b) for b in batches] == [32] * 8
    assert torch.cat(batches[:4]).sort().values.tolist() == list(range(128))
    assert torch.cat(batches[4:]).sort().values.tolist() == list(range(128))
    assert not torch.equal(batches[0], batches[4])
    assert torch.equal(torch.cat(batches), torch.cat(order(0)))
    assert not torch.equal(torch.cat(batches), torch.cat(order(1)))
    assert not torch.equal(torch.cat(batches), torch.cat(order(0, replace(CONFIG, seed=1))))


def other_process(index: int, count: int, **gathers: Any) -> Any:
    return SimpleNamespace(num_processes=count, process_index=index, device=torch.device("cpu"), **gathers)


def test_processes_share_the_same_images() -> None:
    alone = images_to_sample(CONFIG, 3, other_process(0, 1))
    shares = [images_to_sample(CONFIG, 3, other_process(i, 4)) for i in range(4)]
    for whole, parts in zip(alone, zip(*shares, strict=True), strict=True):
        assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(
        alone[1], sample_seeds(0, 3, torch.arange(32) // 16, torch.arange(32) % 16, CONFIG.sampler.num_steps)
    )
    with pytest.raises(ValueError, match="32 images do not divide among 3 processes"):
        images_to_sample(CONFIG, 0, other_process(0, 3))


def test_group_statistics_span_processes() -> None:
    rewards, prompts = torch.tensor([0.0, 2.0, 4.0, 10.0]), torch.zeros(4, dtype=torch.long)

    def gather(share: Tensor) -> Tensor:
        return rewards if share.is_floating_point() else prompts

    whole = global_advantages(rewards, prompts, CONFIG, other_process(0, 1, gather=gather))
    second = global_advantages(rewards[2:], prompts[2:], CONFIG, other_process(1, 2, gather=gather))
    assert torch.equal(second.values, whole.values[2:])
    assert whole.values[0] < 0 < whole.values[3]


def update(steps: list[int], log_ratio: list[float], clipped: list[bool], advantages: list[float]) -> Update:
    return Update(
        torch.tensor(advantages), torch.tensor(steps), torch.tensor(log_ratio), torch.tensor(clipped), torch.tensor(2.0)
    )


def test_log_reduces_updates() -> None:
    config = replace(CONFIG, epochs=2, minibatches=1, sampler=SamplerConfig(num_steps=3, sde_steps=2))
    first = update([0, 0, 1, 1], [9.0] * 4, [True, True, False, False], [1.0, -1.0, 1.0, 0.0])
    last = update([0, 1, 0, 1], [1e-8, -2e-3, 3e-8, -4e-3], [False] * 4, [1.0, -1.0, -1.0, 0.0])
    rewards = torch.tensor([1.0, 2.0])
    log = summarize(5, rewards, SimpleNamespace(zero_spread_groups=torch.tensor(1)), [first, last], config)  # type: ignore[arg-type]
    assert (log.iteration, log.reward_mean, log.zero_spread_groups, log.grad_norm) == (5, 1.5, 1, 2.0)
    # Positive advantages: 1 of 3 clipped; negative: 1 of 3; the clipped flag of a zero advantage counts nowhere.
    assert (log.clip_fraction_positive, log.clip_fraction_negative) == pytest.approx((1 / 3, 1 / 3))
    # The last epoch only, and 1e-8 survives although float32 has no number between 1 and 1 + 1.2e-7.
    assert log.ratio_bias == pytest.approx((2e-8, -2.993e-3), rel=1e-3)
    assert log.ratio_std == pytest.approx((1e-8, 0.997e-3), rel=1e-3)


def test_clip_fractions_tell_the_signs_apart() -> None:
    only_negative = update([0] * 4, [0.0] * 4, [False, False, True, True], [1.0, 2.0, -1.0, -2.0])
    assert clip_fractions([only_negative]) == (0.0, 1.0)
    assert clip_fractions([update([0], [0.0], [True], [1.0])]) == (1.0, 0.0)


def test_train_leaves_the_pretrained_copy_alone() -> None:
    """Objectives must start from the same weights: training one deep copy must not touch another."""
    base = Policy()
    train(copy.deepcopy(base), identity, reward, SHAPE, replace(CONFIG, iterations=1), accelerator=cpu())
    assert (base.image == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 1}, "group_size"),
        ({"minibatches": 5}, "128 .* minibatches = 5"),
        ({"sampler": SamplerConfig(sde_steps=0)}, "sde_steps"),
    ],
)
def test_config_errors_name_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
