"""One epoch's images: sampled, decoded and scored, with their advantages.

Axes: B image, C channel, R reward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastguard.rewards import RewardError, RewardPool, Scores
from fastguard.rewards.collect import collect_scores
from fastguard.train.advantages import Advantages, advantages_without_failures, combine_rewards, standardize_each
from fastguard.train.forward import draw_times, noised
from fastguard.train.metrics import Clock
from fastguard.train.recorder import Recorder
from fastguard.train.rollout import (
    RolloutBatch,
    epoch_prompts,
    epoch_schedule,
    predict_velocity,
    rollout,
    sample_seeds,
)
from fastguard.train.state import TrainState
from fastguard.utils.processes import on_all
from fastguard.utils.sealed import DamagedError


@dataclass(frozen=True)
class SampledEpoch:
    """A rollout with its rewards, of this process unless said otherwise."""

    transitions: tuple[RolloutBatch, ...]
    """one entry per rollout batch: its transitions, step by step"""
    advantages: Advantages
    """values (B,) on the host"""
    scores: Scores
    """of all processes: values (R, B)"""
    rewards: Tensor
    """(B,) weighted sum, of all processes"""
    dropped_groups: int
    """of all processes"""
    images: Tensor
    """uint8 (B, C, H, W): the first rollout batch"""


def sample_epoch(state: TrainState, rewards: RewardPool, recorder: Recorder, clock: Clock) -> SampledEpoch | None:
    """Sample, decode and score one epoch's images; None if the run was asked to stop meanwhile.

    Rewards are computed in the pool's threads while the next batch is sampled.
    """
    recipe, backbone, device = state.recipe, state.backbone, state.accelerator.device
    schedule = epoch_schedule(recipe, backbone.shift, state.epoch)
    prompt_indices, seeds = images_to_sample(state)
    on_all(state.accelerator, DamagedError, lambda: backbone.load_prompts(prompt_indices.tolist()))
    transitions: list[RolloutBatch] = []
    first_images = None
    with state.sampling_policy():
        for first in range(0, len(prompt_indices), recipe.sampler.batch_size):
            if recorder.stop_requested():
                return None
            part = slice(first, first + recipe.sampler.batch_size)
            with clock.phase("rollout"):
                on_device, drawn = prompt_indices[part].to(device), seeds[part, : len(schedule) + 1]
                rolled = rollout(state.policy, on_device, drawn, backbone.latent_shape, schedule, backbone.dtype)
                if recipe.objective.process == "forward":
                    batch = noised_batch(state, rolled.latents, prompt_indices[part], seeds[part, 1:])
                else:
                    batch = RolloutBatch.cat(rolled.transitions)
                batch = replace(batch, sample=batch.sample + first)
                transitions.append(batch if recipe.sampler.store == "device" else batch.to("cpu"))
            with clock.phase("decode"):
                images = backbone.decode(rolled.latents)
            rewards.submit(images, prompt_indices[part])
            first_images = images if first_images is None else first_images
    with clock.phase("rewards"):
        scores = collect_scores(rewards, state.accelerator)
    assert first_images is not None
    return score_epoch(state, tuple(transitions), scores, prompt_indices, first_images)


def images_to_sample(state: TrainState) -> tuple[Tensor, Tensor]:
    """This process's share of the rollout: prompt indices (B,) and seeds (B, 1 + draws), on the host."""
    recipe, accelerator = state.recipe, state.accelerator
    chosen = torch.tensor(
        epoch_prompts(state.backbone.num_trained_prompts, recipe.prompts.per_epoch, recipe.run.seed, state.epoch),
        device="cpu",
    )
    share = recipe.images_per_process
    flat = torch.arange(share, device="cpu") + accelerator.process_index * share
    prompt_indices, members = chosen[flat // recipe.sampler.group_size], flat % recipe.sampler.group_size
    seeds = sample_seeds(recipe.run.seed, state.epoch, prompt_indices, members, recipe.draws_of_noise)
    return prompt_indices, seeds


def noised_batch(state: TrainState, final: Tensor, prompt_indices: Tensor, seeds: Tensor) -> RolloutBatch:
    """Noised final latents (B, S, C) of a rollout batch, for all passes over it; seeds (B, draws) of their noises."""
    recipe = state.recipe
    passes, draws = recipe.update.inner_epochs, recipe.update.draws
    shift = recipe.sampler.shift_for(state.backbone.shift)
    times = draw_times(recipe.run.seed, state.epoch, prompt_indices, passes, draws, shift)
    with state.anchor_policy():
        return noised(state.policy, prompt_indices.to(final.device), final, seeds[:, : passes * draws], times, draws)


def score_epoch(
    state: TrainState, transitions: tuple[RolloutBatch, ...], scores: Scores, prompt_indices: Tensor, images: Tensor
) -> SampledEpoch:
    """Advantages with group statistics over all processes."""
    recipe, accelerator = state.recipe, state.accelerator
    device = accelerator.device

    def everyone(x: Tensor) -> Tensor:  # (..., B) -> (..., B of all processes)
        return accelerator.gather(x.movedim(-1, 0).contiguous().to(device)).movedim(0, -1).cpu()

    values, prompts = everyone(scores.values), everyone(prompt_indices)
    whole = Scores(values, tuple(gather_object(list(scores.failures))))
    weights = [reward.weight for reward in recipe.rewards]
    compared = standardize_each(values, prompts) if recipe.scoring.normalize_each else values
    try:
        advantages, counted = advantages_without_failures(
            compared, prompts, recipe.advantages, weights, state.baselines
        )
    except ValueError as error:  # rewards that this estimator cannot take
        raise RewardError(f"advantages: {error}") from error
    if not counted.any():
        failure = whole.failures[0]
        raise RewardError(
            f'every group had a reward that failed, the first: reward "{failure.label}" for prompt {failure.prompt!r}: '
            f"{failure.reason}"
        )
    first = accelerator.process_index * len(prompt_indices)
    own = replace(advantages, values=advantages.values[first : first + len(prompt_indices)])
    dropped = len(prompts[~counted].unique())
    return SampledEpoch(transitions, own, whole, combine_rewards(values, weights), dropped, images)


@torch.no_grad()
def add_reference(transitions: tuple[RolloutBatch, ...], state: TrainState) -> tuple[RolloutBatch, ...]:
    """Add the velocities of the model before training, if the objective asks for a KL.

    They do not depend on the policy, so that one pass per rollout serves all of its updates.
    """
    if state.recipe.objective.kl_weight == 0:
        return transitions
    if state.recipe.objective.anchor == "reference":
        return tuple(replace(part, ref_velocity=part.velocity) for part in transitions)
    assert state.reference_policy is not None
    size, device = state.recipe.sampler.batch_size, state.accelerator.device
    with state.reference_policy():
        scored = []
        for part in transitions:
            velocities = []
            for index in torch.arange(len(part), device="cpu").split(size):
                batch = part[index].to(device)
                velocity = predict_velocity(state.policy, batch.latents, batch.sigma, batch.prompt_indices)
                velocities.append(velocity.to(part.latents.device))
            scored.append(replace(part, ref_velocity=torch.cat(velocities)))
    return tuple(scored)
