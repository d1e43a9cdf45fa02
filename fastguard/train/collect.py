"""One epoch's images: sampled, decoded and scored, with their advantages.

Axes: B image, C channel, R reward, T trained denoising step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastguard.advantages import NegativeRewardError
from fastguard.rewards import RewardError, RewardPool, Scores
from fastguard.rewards.collect import collect_scores
from fastguard.train.advantages import (
    Advantages,
    advantages_without_failures,
    combine_rewards,
    over_all_steps,
    scores_by_step,
    standardize_each,
)
from fastguard.train.forward import draw_times, noised
from fastguard.train.metrics import Clock
from fastguard.train.recorder import Recorder
from fastguard.train.rollout import (
    RolloutBatch,
    Schedule,
    epoch_prompts,
    epoch_schedule,
    predict_velocity,
    rollout,
    sample_seeds,
)
from fastguard.train.state import TrainState
from fastguard.train.step_weights import step_weights
from fastguard.utils.processes import on_all
from fastguard.utils.sealed import DamagedError


@dataclass(frozen=True)
class SampledEpoch:
    """A rollout with its rewards, of this process unless said otherwise."""

    transitions: tuple[RolloutBatch, ...]
    """one entry per rollout batch: its transitions, step by step"""
    advantages: Advantages
    """values (B,), or (B, denoising steps) by an estimator with `per_step`, on the host"""
    scores: Scores
    """of all processes: values (R, B), those of the final images"""
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
    schedule = epoch_schedule(recipe, backbone.sigmas, state.epoch)
    forward = recipe.objective.process == "forward"
    weights = None if forward else step_weights(recipe.objective.reweight, schedule)
    per_step = recipe.advantages.per_step
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
                rolled = rollout(
                    state.policy, on_device, drawn, backbone.latent_shape, schedule, backbone.dtype, per_step
                )
                if forward:
                    batch = noised_batch(state, rolled.latents, prompt_indices[part], seeds[part, 1:])
                else:
                    batch = RolloutBatch.cat(rolled.transitions)
                batch = replace(batch, sample=batch.sample + first)
                if weights is not None:
                    batch = replace(batch, step_weight=weights.to(device)[batch.denoising_step])
                transitions.append(batch if recipe.sampler.store == "device" else batch.to("cpu"))
            for latents in rolled.one_step or (rolled.latents,):
                with clock.phase("decode"):
                    images = backbone.decode(latents)
                rewards.submit(images, prompt_indices[part])
            first_images = images if first_images is None else first_images
    with clock.phase("rewards"):
        scores = collect_scores(rewards, state.accelerator)
    assert first_images is not None
    return score_epoch(state, schedule, tuple(transitions), scores, prompt_indices, first_images)


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
    if recipe.objective.scope == "group":  # whose images are compared: with the same noise
        first = sample_seeds(recipe.run.seed, state.epoch, prompt_indices, 0 * members, recipe.draws_of_noise)
        seeds[:, 1:] = first[:, 1:]
    return prompt_indices, seeds


def noised_batch(state: TrainState, final: Tensor, prompt_indices: Tensor, seeds: Tensor) -> RolloutBatch:
    """Noised final latents (B, S, C) of a rollout batch, for all passes over it; seeds (B, draws) of their noises."""
    recipe = state.recipe
    passes, draws = recipe.update.inner_epochs, recipe.update.draws
    shift = recipe.sampler.shift_for(state.backbone.shift)
    times = draw_times(recipe.run.seed, state.epoch, prompt_indices, passes, draws, shift)
    of_draws = seeds[:, : recipe.stored_steps]
    with state.anchor_policy():
        return noised(state.policy, prompt_indices.to(final.device), final, of_draws, times, draws)


def score_epoch(
    state: TrainState,
    schedule: Schedule,
    transitions: tuple[RolloutBatch, ...],
    scores: Scores,
    prompt_indices: Tensor,
    images: Tensor,
) -> SampledEpoch:
    """Advantages with group statistics over all processes."""
    recipe, accelerator = state.recipe, state.accelerator
    device, per_step = accelerator.device, recipe.advantages.per_step

    def everyone(x: Tensor, images: int) -> Tensor:  # with the images of all processes along that axis
        return accelerator.gather(x.movedim(images, 0).contiguous().to(device)).movedim(0, images).cpu()

    values = scores.values
    if per_step:
        values = scores_by_step(values, recipe.sampler.batch_size, recipe.scored_per_image)
    values, prompts = everyone(values, 1), everyone(prompt_indices, 0)
    final = values[..., -1] if per_step else values
    whole = Scores(final, tuple(gather_object(list(scores.failures))))
    weights = [reward.weight for reward in recipe.rewards]
    compared = standardize_each(values, prompts) if recipe.scoring.normalize_each else values
    try:
        advantages = advantages_without_failures(compared, prompts, recipe.advantages, weights, state.baselines)
    except ValueError as error:  # rewards that this estimator cannot take
        raise RewardError(f"advantages: {error}{_whose(error, state)}") from error
    if not advantages.counted.any():
        failure = whole.failures[0]
        raise RewardError(
            f'every group had a reward that failed, the first: reward "{failure.label}" for prompt {failure.prompt!r}: '
            f"{failure.reason}"
        )
    first = accelerator.process_index * len(prompt_indices)
    share = slice(first, first + len(prompt_indices))
    own = replace(advantages, values=advantages.values[share], counted=advantages.counted[share])
    if per_step:
        own = replace(own, values=over_all_steps(own.values, schedule))
    dropped = len(prompts[~advantages.counted].unique())
    return SampledEpoch(transitions, own, whole, combine_rewards(final, weights), dropped, images)


def _whose(error: ValueError, state: TrainState) -> str:
    """The names behind the numbers of a refused reward."""
    if not isinstance(error, NegativeRewardError):
        return ""
    label, prompt = state.recipe.rewards[error.function].label, state.backbone.prompts[error.prompt].text
    return f' (reward function {error.function} is "{label}", prompt {error.prompt} is {prompt[:60]!r})'


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
