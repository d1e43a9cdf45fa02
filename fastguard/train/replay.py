"""What the updates of an epoch train on: the fresh rollout, and earlier ones by the objective's `reuse`.

Axes: B image of this process's fresh rollout, R reward function, M best image of a stored rollout, E replayed image,
T denoising step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from fastguard.train.advantages import advantages_without_failures, combine_rewards, standardize_each
from fastguard.train.buffer import Buffer, StoredRollout, as_tensors, collected, renumbered, stored
from fastguard.train.collect import SampledEpoch
from fastguard.train.minibatches import Minibatch, minibatches
from fastguard.train.policy_loss import policy_loss
from fastguard.train.recorder import Recorder
from fastguard.train.rollout import RolloutBatch, epoch_prompts
from fastguard.train.state import TrainState
from fastguard.utils.finite import names_not_finite
from fastguard.utils.processes import on_all
from fastguard.utils.sealed import DamagedError


@dataclass(frozen=True)
class TrainingSet:
    """What an epoch's updates train on, of this process."""

    transitions: tuple[RolloutBatch, ...]
    """the fresh rollout batches, then the earlier ones; their images are numbered one after the other"""
    advantages: Tensor
    """of each of these images, on the host"""
    dropped: Tensor
    """bool, on the host, of fresh images and of those of whole rollouts: not trained on, since a reward failed"""
    replayed: Replayed | None = None
    """of the best images of earlier rollouts, where there are some"""

    def minibatches(self, state: TrainState) -> Iterator[Minibatch]:
        """Every transition once per pass; each update takes an equal share of every rollout."""
        if self.replayed is None:
            found = minibatches(state, self.advantages)
        else:
            fresh = minibatches(state, self.advantages[: state.recipe.images_per_process])
            found = self.replayed.shared_out(state, fresh)
        for minibatch in found:
            yield minibatch.without(self.dropped, len(self.advantages)) if self.dropped.any() else minibatch

    def earlier_images(self, state: TrainState) -> int:
        """Images of earlier rollouts, over all processes."""
        if self.replayed is not None:
            return self.replayed.images
        return (len(self.advantages) - state.recipe.images_per_process) * state.accelerator.num_processes


def training_set(state: TrainState, rolled: SampledEpoch, transitions: tuple[RolloutBatch, ...]) -> TrainingSet:
    """The fresh transitions with what the buffer adds to them, before any weight changes. Collective.

    Raises DamagedError if an encoded prompt was damaged since the start.
    """
    fresh = TrainingSet(transitions, rolled.advantages.values, ~rolled.advantages.counted)
    if not len(state.buffer):
        return fresh
    if state.recipe.objective.reuse == "rollouts":
        return with_rollouts(state, fresh)
    return with_best(state, fresh, rolled.scores.values)


def remember(
    state: TrainState, rolled: SampledEpoch, transitions: tuple[RolloutBatch, ...], recorder: Recorder
) -> Buffer:
    """The buffer after this epoch's rollout, whose number is `state.epoch`. Collective.

    Transitions that are not finite are left out: no checkpoint that holds them could be read.
    """
    objective = state.recipe.objective
    if objective.rollouts == 1:
        return state.buffer
    newest: StoredRollout | None
    if objective.reuse == "best":
        newest = best_images(state, transitions, rolled.scores.values)
    else:
        bad = names_not_finite(pair for batch in transitions for pair in as_tensors(batch).items())
        finite = not any(gather_object(bad))
        own = rolled.advantages
        newest = StoredRollout(state.epoch, transitions, own.values, ~own.counted) if finite else None
    if newest is None:
        why = "no image of it is finite and scored" if objective.reuse == "best" else "it holds NaN or infinity"
        recorder.skipped(state.epoch, f"the rollout is not kept for later updates: {why}")
        return state.buffer
    return Buffer((newest, *state.buffer.rollouts)[: objective.rollouts - 1])


def load_prompts(state: TrainState, batches: Sequence[RolloutBatch]) -> None:
    """Bring the prompts of all these transitions to the device."""
    prompts = torch.cat([batch.prompt_indices.cpu() for batch in batches]).unique().tolist()
    on_all(state.accelerator, DamagedError, lambda: state.backbone.load_prompts(prompts))


# --- whole rollouts ---------------------------------------------------------------------------------------------------


def with_rollouts(state: TrainState, fresh: TrainingSet) -> TrainingSet:
    """All earlier rollouts, each with its own advantages and its own policy's velocities."""
    recipe = state.recipe
    images, batches = recipe.sampler.batch_size, [*fresh.transitions]
    for rollout in state.buffer.rollouts:
        batches += [
            renumbered(batch, images, (len(batches) + i) * images) for i, batch in enumerate(rollout.transitions)
        ]
    load_prompts(state, batches)
    advantages = torch.cat([fresh.advantages, *(rollout.values for rollout in state.buffer.rollouts)])
    dropped = [fresh.dropped, *(r.dropped for r in state.buffer.rollouts if r.dropped is not None)]
    return TrainingSet(tuple(batches), advantages, torch.cat(dropped))


# --- the best images --------------------------------------------------------------------------------------------------


def best_images(state: TrainState, transitions: Sequence[RolloutBatch], scores: Tensor) -> StoredRollout | None:
    """The best images of each prompt of this rollout, with the steps that are trained; None if there are none.

    Every process holds them all, so that any of them can train on any image, whatever prompts it samples itself.

    Args:
        scores: (R, B of all processes); NaN marks an image that a reward failed on.
    """
    recipe, accelerator = state.recipe, state.accelerator
    own, size, steps = recipe.images_per_process, recipe.sampler.batch_size, recipe.trained_steps
    rewards = combine_rewards(scores, [reward.weight for reward in recipe.rewards])
    groups = rewards.nan_to_num(nan=-torch.inf).view(-1, recipe.sampler.group_size)
    count = recipe.objective.replayed_images(recipe.sampler.group_size)
    places = groups.argsort(dim=1, descending=True, stable=True)[:, :count]
    images = (places + torch.arange(len(groups), device="cpu")[:, None] * groups.shape[1]).flatten().sort().values
    images = images[~rewards[images].isnan()]
    if not len(images):
        return None
    most = int(torch.bincount(images // own).max()) * steps
    mine = images[images // own == accelerator.process_index] % own
    first = mine // size * (size * recipe.sampler.sde_steps) + mine % size  # transition of each, in its rollout batch
    index = (first[:, None] + size * torch.arange(steps, device="cpu")).flatten()
    best = collected(transitions, index, most, own, accelerator)
    # It lies step by step, with the images of each step in order.
    tensors = [tensor.view(steps * len(images), -1) for tensor in as_tensors(best).values()]
    whole = torch.stack([tensor.isfinite().all(1).cpu() for tensor in tensors]).all(0).view(steps, -1).all(0)
    if not whole.any():
        return None
    best = best[whole.repeat(steps).nonzero()[:, 0]]
    return StoredRollout(state.epoch, (stored(best, recipe),), scores[:, images[whole]].cpu())


@dataclass(frozen=True)
class Replayed:
    """The best images of earlier rollouts that join the fresh groups of an epoch, the same on every process."""

    images: int
    """E"""
    first: int
    """place of their first transition; an idle one, which fills up an update, follows the last"""
    weights: Tensor
    """(E + 1,) float32 on the host; 0 for the idle one"""
    offsets: Tensor
    """(B + E + 1, T) on the device: log-ratio of the policy now to the policy that drew the step, 0 for fresh images"""

    def shared_out(self, state: TrainState, fresh: Iterator[Minibatch]) -> Iterator[Minibatch]:
        """The fresh minibatches, with a share of the replayed transitions each, dealt out to the processes.

        An update sees the same transitions on any number of processes. Each process gets as many of them, if need be
        with an idle one, and the weights make the loss a mean over all real ones.
        """
        recipe, accelerator = state.recipe, state.accelerator
        processes, count = accelerator.num_processes, recipe.update.minibatches
        generator = np.random.default_rng(np.random.SeedSequence([recipe.run.seed, state.epoch, 0, 0, 1]))
        idle = self.images * recipe.trained_steps
        for _ in range(recipe.update.inner_epochs):
            order = torch.from_numpy(generator.permutation(idle))
            for share in order.tensor_split(count):
                minibatch = next(fresh)
                own = share[accelerator.process_index :: processes]
                padding = torch.full((-(-len(share) // processes) - len(own),), idle, device="cpu")
                index = torch.cat([minibatch.index, self.first + own, self.first + padding])
                # Where a pass takes some of the fresh images alone, they stand for all of them.
                of_fresh = recipe.sampler.batch_size / recipe.trained_images
                weights = (
                    torch.ones(recipe.images_per_process, device="cpu")
                    if minibatch.weights is None
                    else minibatch.weights
                )
                real = of_fresh * len(minibatch.index) * processes + len(share)
                scale = len(index) * processes / real
                yield Minibatch(index, scale * torch.cat([of_fresh * weights, self.weights]), self.offsets)


def with_best(state: TrainState, fresh: TrainingSet, scores: Tensor) -> TrainingSet:
    """The best earlier images of the fresh prompts, as further members of their groups.

    Each reward counts once, in the statistics of the fresh group. What an estimator expects of a prompt stays what the
    fresh images alone have taught it.

    Args:
        scores: (R, B of all processes) of the fresh images; NaN marks an image that a reward failed on.
    """
    recipe, own = state.recipe, state.recipe.images_per_process
    drawn = epoch_prompts(state.backbone.num_trained_prompts, recipe.prompts.per_epoch, recipe.run.seed, state.epoch)
    prompts = torch.tensor(drawn, device="cpu").repeat_interleave(recipe.sampler.group_size)
    failed = prompts[scores.isnan().any(0)].tolist()
    parts, values, groups, images = [], [scores], [prompts], 0
    for rollout, chosen in zip(
        state.buffer.rollouts, best_of(state, [prompt for prompt in drawn if prompt not in failed]), strict=True
    ):
        if len(chosen):
            batch, kept = rollout.transitions[0], rollout.values.shape[1]
            index = torch.arange(recipe.trained_steps, device="cpu")[:, None] * kept + chosen
            parts.append(renumbered(batch[index.flatten()], len(chosen), own + images))
            values.append(rollout.values[:, chosen])
            groups.append(parts[-1].prompt_indices[: len(chosen)].cpu())
            images += len(chosen)
    if not parts:
        return fresh
    advantages = advantages_of(state, torch.cat(values, 1), torch.cat(groups))
    idle = renumbered(parts[0][torch.zeros(1, dtype=torch.int64, device="cpu")], 1, own + images)
    load_prompts(state, (*fresh.transitions, *parts))
    # Each part lies step by step; of each image, by trained step:
    sizes = [len(part) for part in parts]
    found = by_image(log_ratios(state, parts).split(sizes), recipe.trained_steps)
    steps = by_image([part.denoising_step for part in parts], recipe.trained_steps).to(found.device)
    offsets = torch.zeros(own + images + 1, recipe.sampler.num_steps, device=found.device)
    offsets[own : own + images].scatter_(1, steps, found)
    weights = torch.cat([recipe.objective.trajectory_weights(found).cpu(), torch.zeros(1, device="cpu")])
    replayed = Replayed(images, sum(map(len, fresh.transitions)), weights, offsets)
    start = state.accelerator.process_index * own
    everyone = (advantages[start : start + own], advantages[len(prompts) :], torch.zeros(1, device="cpu"))
    return TrainingSet((*fresh.transitions, *parts, idle), torch.cat(everyone), fresh.dropped, replayed)


def by_image(parts: Sequence[Tensor], steps: int) -> Tensor:
    """Numbers of the images of some parts, which lie step by step: (images, steps)."""
    return torch.cat([part.view(steps, -1).T for part in parts])


def best_of(state: TrainState, prompts: Sequence[int]) -> list[Tensor]:
    """Which images of each stored rollout are the best of these prompts over all of them, as 1-d int64 on the host."""
    recipe, rollouts = state.recipe, state.buffer.rollouts
    count = recipe.objective.replayed_images(recipe.sampler.group_size)
    sizes = [rollout.values.shape[1] for rollout in rollouts]
    rewards = torch.cat([combine_rewards(r.values, [reward.weight for reward in recipe.rewards]) for r in rollouts])
    # A stored batch lies step by step, so its first transitions are one of each image.
    owners = torch.cat([r.transitions[0].prompt_indices[:n].cpu() for r, n in zip(rollouts, sizes, strict=True)])
    chosen = torch.zeros(len(rewards), dtype=torch.bool, device="cpu")
    for prompt in prompts:
        places = (owners == prompt).nonzero()[:, 0]
        chosen[places[rewards[places].argsort(descending=True, stable=True)[:count]]] = True
    return [part.nonzero()[:, 0] for part in chosen.split(sizes)]


def advantages_of(state: TrainState, scores: Tensor, prompt_indices: Tensor) -> Tensor:
    """Advantages of images of all processes, fresh and earlier ones of a prompt as one group: (R, B) -> (B,)."""
    recipe = state.recipe
    compared = standardize_each(scores, prompt_indices) if recipe.scoring.normalize_each else scores
    weights = [reward.weight for reward in recipe.rewards]
    return advantages_without_failures(compared, prompt_indices, recipe.advantages, weights, state.baselines).values


@torch.no_grad()
def log_ratios(state: TrainState, parts: Sequence[RolloutBatch]) -> Tensor:
    """Log-ratio of the policy now to the one that drew each transition, in order, on the device. Collective.

    Each process scores an equal share of them.
    """
    accelerator = state.accelerator
    total = sum(map(len, parts))
    count = -(-total // accelerator.num_processes)
    own = torch.arange(count, device="cpu") + accelerator.process_index * count
    found = []
    for index in own.clamp(max=total - 1).split(state.recipe.micro_batch):
        batch = RolloutBatch.select(parts, index).to(accelerator.device)
        result = policy_loss(state.policy, batch, torch.zeros_like(batch.sigma), state.recipe.objective)
        found.append(result.log_ratio)
    everyone: Tensor = accelerator.gather(torch.cat(found))
    return everyone[:total]
