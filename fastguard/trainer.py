"""The training loop: rollout, rewards, advantages, minibatches of (loss, backward, step), log.

Axes: N transition, B image, S token, C channel, T trained denoising step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastguard.advantages import Advantages, group_advantages
from fastguard.config import ObjectiveConfig, TrainConfig
from fastguard.loss import GuardLoss, guard_loss
from fastguard.sampler import Policy, Transitions, predict_velocity, rollout, sample_seeds

Decode = Callable[[Tensor], Tensor]
"""latents (B, S, C) -> images, in whatever form the reward takes"""
Reward = Callable[[Tensor, Tensor], Tensor]
"""(images, prompt_indices (B,) int64) -> scores (B,), larger is better"""


@dataclass(frozen=True)
class IterationLog:
    """What one iteration reports; plain numbers, for JSON."""

    iteration: int
    """0 is the first rollout"""
    reward_mean: float
    """mean reward of the rollout, which precedes the iteration's updates"""
    zero_spread_groups: int
    """groups whose rewards were all equal"""
    grad_norm: float
    """mean gradient norm over the updates, before it is scaled down"""
    clip_fraction_positive: float
    """share of transitions with a positive advantage that were clipped, over all updates"""
    clip_fraction_negative: float
    """the same for negative advantages"""
    ratio_bias: tuple[float, ...]
    """(T,): mean of ratio - 1 per denoising step, last epoch"""
    ratio_std: tuple[float, ...]
    """(T,): standard deviation of the ratio per denoising step, last epoch"""


@dataclass(frozen=True)
class Update:
    """What one optimizer update leaves for the log; tensors stay on the device."""

    advantages: Tensor
    denoising_step: Tensor
    log_ratio: Tensor
    clipped: Tensor
    grad_norm: Tensor


OnIteration = Callable[[IterationLog, nn.Module], bool]
"""called after each iteration with its log and the policy; True stops the training"""


def train(
    policy: nn.Module,
    decode: Decode,
    reward: Reward,
    latent_shape: tuple[int, ...],
    config: TrainConfig,
    on_iteration: OnIteration = lambda log, policy: False,
    accelerator: Accelerator | None = None,
) -> list[IterationLog]:
    """Train `policy` in place (its signature: `sampler.Policy`) to raise `reward`; one log per iteration.

    Raises ValueError for rewards that are not finite or have the wrong shape, and FloatingPointError, before
    the weights change, for a loss or gradient that is not finite.
    """
    accelerator = accelerator or Accelerator()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    policy, optimizer = accelerator.prepare(policy, optimizer)
    logs: list[IterationLog] = []
    for iteration in range(config.iterations):
        prompt_indices, seeds = images_to_sample(config, iteration, accelerator)
        rolled = rollout(policy, prompt_indices, seeds, latent_shape, config.sampler)
        rewards = reward(decode(rolled.latents), prompt_indices)
        advantages = global_advantages(rewards, prompt_indices, config, accelerator)
        transitions = Transitions.cat(rolled.transitions)
        updates = []
        for index in minibatches(len(transitions), iteration, config, accelerator):
            batch = transitions[index]
            batch_advantages = advantages.values[batch.sample]
            result = policy_loss(policy, batch, batch_advantages, config.objective)
            accelerator.backward(result.loss)
            grad_norm = accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
            if not torch.isfinite(result.loss + grad_norm):
                raise blame(policy, batch, batch_advantages, config.objective)
            optimizer.step()
            optimizer.zero_grad()
            updates.append(Update(batch_advantages, batch.denoising_step, result.log_ratio, result.clipped, grad_norm))
        logs.append(summarize(iteration, rewards, advantages, updates, config))
        if on_iteration(logs[-1], accelerator.unwrap_model(policy)):
            break
    return logs


def images_to_sample(config: TrainConfig, iteration: int, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """This process's share of the rollout: prompt indices (B,) on the device and seeds (B, draws) on the host."""
    total = config.num_prompts * config.group_size
    if total % accelerator.num_processes:
        raise ValueError(
            f"num_prompts * group_size = {total} images do not divide among {accelerator.num_processes} processes"
        )
    share = total // accelerator.num_processes
    flat = torch.arange(share) + accelerator.process_index * share
    prompt_indices, members = flat // config.group_size, flat % config.group_size
    seeds = sample_seeds(config.seed, iteration, prompt_indices, members, config.sampler.num_steps)
    return prompt_indices.to(accelerator.device), seeds


def global_advantages(
    rewards: Tensor, prompt_indices: Tensor, config: TrainConfig, accelerator: Accelerator
) -> Advantages:
    """Advantages of this process's images, with group statistics over all processes."""
    if rewards.shape != prompt_indices.shape:
        raise ValueError(
            f"the reward function must return one score per image, {tuple(prompt_indices.shape)}, "
            f"got {tuple(rewards.shape)}"
        )
    everyone = group_advantages(
        accelerator.gather(rewards), accelerator.gather(prompt_indices), std=config.advantage_std
    )
    first = accelerator.process_index * len(rewards)
    return Advantages(everyone.values[first : first + len(rewards)], everyone.zero_spread_groups)


def minibatches(
    num_transitions: int, iteration: int, config: TrainConfig, accelerator: Accelerator
) -> Iterator[Tensor]:
    """Host indices of each update's transitions: every transition once per epoch, in a seeded order."""
    words = [config.seed, iteration, accelerator.process_index]
    rng = np.random.default_rng(np.random.SeedSequence(words))
    for _ in range(config.epochs):
        order = torch.from_numpy(rng.permutation(num_transitions))
        yield from order.tensor_split(config.minibatches)


def policy_loss(policy: Policy, batch: Transitions, advantages: Tensor, objective: ObjectiveConfig) -> GuardLoss:
    """`guard_loss` of a minibatch, with the velocity from the rollout's own step function."""
    velocity = predict_velocity(policy, batch.latents, batch.sigma, batch.prompt_indices)
    return guard_loss(
        velocity,
        batch.velocity,
        batch.noise,
        advantages,
        batch.step.to(velocity.device),
        objective=objective.name,
        clip_range=objective.clip_range,
        adv_clip=objective.adv_clip,
        reweight=objective.reweight,
    )


def blame(policy: nn.Module, batch: Transitions, advantages: Tensor, objective: ObjectiveConfig) -> FloatingPointError:
    """Find the transitions whose own loss or gradient is not finite: slow, one at a time, and only on failure."""
    guilty = []
    parameters = [p for p in policy.parameters() if p.requires_grad]
    for i in range(len(batch)):
        one = batch[torch.tensor([i])]
        loss = policy_loss(policy, one, advantages[i : i + 1], objective).loss
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if not all(torch.isfinite(x).all() for x in (loss, *gradients) if x is not None):
            guilty.append(
                f"denoising step {one.denoising_step.item()} of sample {one.sample.item()} "
                f"(prompt {one.prompt_indices.item()})"
            )
    where = "; ".join(guilty) or "no single transition of this process: only their sum overflows"
    return FloatingPointError(f"the loss or its gradient is not finite, the weights were left as they are: {where}")


def summarize(
    iteration: int, rewards: Tensor, advantages: Advantages, updates: list[Update], config: TrainConfig
) -> IterationLog:
    """Reduce an iteration's updates to plain numbers; the only host copies of a healthy iteration."""
    positive, negative = clip_fractions(updates)
    last_epoch = updates[-config.minibatches :]
    step = torch.cat([u.denoising_step for u in last_epoch]).cpu()
    # expm1 keeps the digits that exp(log_ratio) - 1 loses.
    deviation = torch.cat([u.log_ratio for u in last_epoch]).cpu().double().expm1()
    per_step = [deviation[step == i] for i in range(config.sampler.sde_steps)]
    return IterationLog(
        iteration=iteration,
        reward_mean=rewards.mean().item(),
        zero_spread_groups=int(advantages.zero_spread_groups.item()),
        grad_norm=torch.stack([u.grad_norm for u in updates]).mean().item(),
        clip_fraction_positive=positive,
        clip_fraction_negative=negative,
        ratio_bias=tuple(d.mean().item() for d in per_step),
        ratio_std=tuple(d.std(correction=0).item() for d in per_step),
    )


def clip_fractions(updates: list[Update]) -> tuple[float, float]:
    """Share of clipped transitions among those with positive and with negative advantage (0 if there are none)."""
    clipped = torch.cat([u.clipped for u in updates]).float()
    advantages = torch.cat([u.advantages for u in updates])
    shares = []
    for selected in (advantages > 0, advantages < 0):
        shares.append(((clipped * selected).sum() / selected.sum().clamp(min=1)).item())
    return shares[0], shares[1]
