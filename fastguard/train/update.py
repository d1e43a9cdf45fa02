"""Optimizer updates: minibatches, the loss of one, and what happens if it is not finite.

Axes: N transition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fastguard.config import ObjectiveConfig
from fastguard.errors import NotFiniteError, UserError
from fastguard.loss import GuardLoss, guard_loss
from fastguard.loss.objectives import Given, Objective, Shifted
from fastguard.ops.transition import total_variation
from fastguard.train.metrics import Update
from fastguard.train.recorder import Recorder
from fastguard.train.rollout import Policy, RolloutBatch, predict_velocity
from fastguard.train.state import TrainState
from fastguard.train.subsample import choose
from fastguard.utils.finite import not_finite
from fastguard.utils.sharding import full_tensor, local_shard
from fastguard.utils.terminal import a_few


@dataclass(frozen=True)
class Minibatch:
    """What one update trains on."""

    index: Tensor
    """(N,) int64, on the host: transitions of this process's rollout"""
    weights: Tensor | None = None
    """of each image, on the host, where a pass trains on some alone (`update.subsample`) or on earlier ones too"""
    offsets: Tensor | None = None
    """(images, steps) on the device: log-ratio of the policy at the start of the updates to the one that drew a step"""


def minibatches(state: TrainState, advantages: Tensor) -> Iterator[Minibatch]:
    """Every transition that a pass trains on, once per pass; for the advantages of several rollouts, of all of them.

    An objective of whole trajectories gets all steps of an image in one update. Each rollout batch is shuffled and
    shared out on its own, seeded by its place in the whole rollout: an update sees the same transitions on 1, 2 or 8
    processes.
    """
    recipe = state.recipe
    images, steps = recipe.sampler.batch_size, recipe.sampler.sde_steps
    batches = recipe.images_per_process // images
    first = state.accelerator.process_index * batches
    rollouts = len(advantages) // recipe.images_per_process
    words = [[recipe.run.seed, state.epoch, first + i, age] for age in range(rollouts) for i in range(batches)]
    generators = [np.random.default_rng(np.random.SeedSequence(w)) for w in words]
    for _ in range(recipe.update.inner_epochs):
        shares, weights = [], torch.zeros(len(advantages), device="cpu")
        for i, generator in enumerate(generators):
            chosen = np.arange(images)
            if recipe.update.subsample < 1:
                chosen, factors = choose(advantages[i * images :][:images].numpy(), recipe.trained_images, generator)
                weights[i * images + chosen] = torch.from_numpy(factors).float()
            # A rollout batch lies step by step. What is shuffled are rows of transitions that stay together.
            rows = chosen[:, None] + images * np.arange(recipe.trained_steps)
            rows = rows if recipe.objective.scope == "trajectory" else rows.T.reshape(-1, 1)
            order = torch.from_numpy(rows[generator.permutation(len(rows))] + i * images * steps)
            shares.append(order.tensor_split(recipe.update.minibatches))
        for parts in zip(*shares, strict=True):
            yield Minibatch(torch.cat(parts).flatten(), weights if recipe.update.subsample < 1 else None)


def policy_loss(
    policy: Policy,
    batch: RolloutBatch,
    advantages: Tensor,
    objective: ObjectiveConfig,
    given: Objective | None = None,
    weights: Tensor | None = None,
) -> GuardLoss:
    """`guard_loss` of a minibatch, with the velocity from the rollout's own step function.

    weights: (N,) of the transitions, for their policy loss and their KL.
    given: in the place of the objective: it around another policy, or the derivatives of one of whole trajectories.
    Without these each step is taken as the policy gradient has it, which is the objective's gradient as long as no
    ratio has moved.
    """
    if objective.scope == "trajectory" and given is None:
        still = torch.zeros_like(advantages)
        given = Given(
            by_log_ratio=-advantages, by_drift=still, clipped=still.bool(), log_ratio=objective.log_ratio,
            moves_drift=False,
        )  # fmt: skip
    velocity = predict_velocity(policy, batch.latents, batch.sigma, batch.prompt_indices)
    return guard_loss(
        velocity,
        batch.velocity,
        batch.noise,
        advantages,
        batch.step.to(velocity.device),
        objective=given or objective,
        reweight=objective.reweight,
        sample_weight=weights,
        ref_velocity=batch.ref_velocity,
        kl_weight=objective.kl_weight if weights is None or not objective.kl_weight else objective.kl_weight * weights,
        kl_type=objective.kl_type,
    )


def check_parity(transitions: Sequence[RolloutBatch], state: TrainState) -> None:
    """Score rollout steps again in training mode, once before a process's first update.

    Nothing has changed since the rollout, so that every ratio should be 1. Raises UserError on all processes if one
    is further away than `update.parity` times the objective's limit, or not finite.
    """
    recipe, accelerator = state.recipe, state.accelerator
    if state.checked or recipe.update.parity == 0:
        return
    first = next(minibatches(state, torch.zeros(recipe.images_per_process, device="cpu"))).index
    batch = RolloutBatch.select(transitions, first[: recipe.micro_batch]).to(accelerator.device)
    ones = torch.ones(len(batch), dtype=torch.float32, device=accelerator.device)
    objective = recipe.objective
    result = policy_loss(state.policy, batch, ones, objective)
    n_elements = batch.latents[0].numel()
    moved = objective.moved(result.log_ratio.detach(), result.drift.detach(), n_elements=n_elements)
    worst = accelerator.gather(moved.max()[None]).max().item()
    if not math.isfinite(worst):
        raise UserError(f"parity preflight: a rollout step scored again is {worst}: {_why_not_finite(state)}")
    if not worst <= recipe.update.parity * objective.limit:
        limit = f"{objective.limit:g}, a usual clip range"
        if objective.limit_name is not None:
            limit = f"objective.{objective.limit_name} = {objective.limit:g}"
        raise UserError(
            f"parity preflight: a rollout step scored again in training mode is off by {worst:.2e}, more than "
            f"update.parity = {recipe.update.parity:g} of {limit}, "
            "before any weight has changed. Look at: "
            f"batch shape (sampler.batch_size = {recipe.sampler.batch_size}, transitions per pass "
            f"{recipe.micro_batch}: make them equal), model.dtype = {recipe.model.dtype}, "
            f"model.attention = {recipe.model.attention} (is it deterministic?), dropout or other layers that act "
            "differently in training. update.parity = 0 skips this check"
        )
    state.checked = True


def _why_not_finite(state: TrainState) -> str:
    """Weights that are not finite on any process, in words; or where else to look."""
    if names := sorted(set(gather_object(not_finite(state.policy)))):
        return f"weights of the policy hold NaN or infinity ({a_few(names)}): start from other weights"
    model = state.recipe.model
    return (
        f"the policy's weights are finite, so that a value overflows on the way: look at model.dtype = {model.dtype}, "
        f"model.attention = {model.attention} and model.fuse = {model.fuse}. update.parity = 0 skips this check"
    )


class Trajectories:
    """Derivatives of an objective of whole trajectories, of the images of one update.

    The gradient is `sum over t of c_t d l_t`, and c_t depends on the other steps through their log-ratios alone. So a
    pass without gradients finds the log-ratios, and the gradient then needs the memory of one step, not of all. It is
    exact. As long as no weight has moved since the rollout, all log-ratios are 0, and the first pass is left out.
    """

    def __init__(
        self,
        state: TrainState,
        transitions: Sequence[RolloutBatch],
        parts: Sequence[Tensor],
        advantages: Tensor,
        moved: bool,
    ) -> None:
        """moved: whether weights have changed since the rollout. The rest as in `update_weights`."""
        objective, device = state.recipe.objective, state.accelerator.device
        shape = (state.recipe.images_per_process, state.recipe.sampler.num_steps)
        log_ratio, drift = (torch.zeros(shape, device=device) for _ in range(2))
        trained = torch.zeros(shape, dtype=torch.bool, device=device)
        for part in parts:
            batch = RolloutBatch.select(transitions, part)
            place = batch.sample.to(device), batch.denoising_step.to(device)
            trained[place] = True
            if moved:
                batch = batch.to(device)
                with torch.no_grad():
                    result = policy_loss(state.policy, batch, torch.zeros_like(batch.sigma), objective)
                log_ratio[place], drift[place] = result.log_ratio, result.drift
        chosen = trained.any(1)
        log_ratio, drift = (numbers[trained].view(int(chosen.sum()), -1) for numbers in (log_ratio, drift))
        n_elements = math.prod(state.backbone.latent_shape)
        terms = objective.terms(log_ratio, drift, advantages.to(device)[chosen], n_elements=n_elements)
        # A loss of n images is the mean over n; the loss of a minibatch divides by n T transitions.
        n_steps = log_ratio.shape[1]
        found = {"by_log_ratio": n_steps * terms.by_log_ratio, "by_drift": n_steps * terms.by_drift}
        self._terms = {}
        for name, numbers in {**found, "clipped": terms.clipped}.items():
            self._terms[name] = numbers.new_zeros(shape)
            self._terms[name][trained] = numbers.flatten()
        self._objective = objective

    def derivatives(self, batch: RolloutBatch) -> Given:
        """Those of some transitions."""
        terms = {name: numbers[batch.sample, batch.denoising_step] for name, numbers in self._terms.items()}
        return Given(**terms, log_ratio=self._objective.log_ratio, moves_drift=self._objective.moves_drift)


def update_weights(
    state: TrainState,
    transitions: Sequence[RolloutBatch],
    minibatch: Minibatch,
    advantages: Tensor,
    recorder: Recorder,
    moved: bool,
) -> Update:
    """One optimizer update, in micro-batches; skipped on all processes if its loss or gradient is not finite.

    moved: whether the weights have changed since the rollout.

    Raises FloatingPointError once `update.max_bad_updates` were skipped in a row, or if it was the weights.
    """
    recipe, accelerator, policy = state.recipe, state.accelerator, state.policy
    config, device = recipe.update, accelerator.device
    results, batches, batch_advantages, losses = [], [], [], []
    index, image_weights = minibatch.index, minibatch.weights
    parts = index.split(recipe.micro_batch)
    trajectories = None
    if recipe.objective.scope == "trajectory":
        trajectories = Trajectories(state, transitions, parts, advantages, moved)
    for part in parts:
        batch = RolloutBatch.select(transitions, part).to(device)
        batch_advantages.append(advantages[batch.sample.cpu()].to(device))
        # DDP sums gradients over the processes once per update; FSDP2 each time, which keeps them sharded.
        with accelerator.no_sync(policy) if part is not parts[-1] and not accelerator.is_fsdp2 else nullcontext():
            given: Objective | None = None if trajectories is None else trajectories.derivatives(batch)
            offset = 0 if minibatch.offsets is None else minibatch.offsets[batch.sample, batch.denoising_step]
            if isinstance(offset, Tensor):
                given = Shifted(recipe.objective, offset)
            weights = None if image_weights is None else image_weights[batch.sample.cpu()].to(device)
            result = policy_loss(policy, batch, batch_advantages[-1], recipe.objective, given, weights)
            loss = result.loss * (len(part) / len(index))
            accelerator.backward(loss)
        losses.append(loss.detach())
        batches.append(batch.denoising_step)
        results.append(result._replace(loss=result.loss.detach(), log_ratio=result.log_ratio - offset))
    grad_norm = full_tensor(accelerator.clip_grad_norm_(list(state.parameters.values()), config.max_grad_norm))
    finite = accelerator.gather(torch.isfinite(torch.stack(losses).sum() + grad_norm)[None]).all().item()
    update = Update(
        advantages=torch.cat(batch_advantages),
        denoising_step=torch.cat(batches),
        log_ratio=torch.cat([r.log_ratio for r in results]),
        clipped=torch.cat([r.clipped for r in results]),
        kl=None if results[0].kl is None else torch.cat([r.kl for r in results if r.kl is not None]),
        grad_norm=grad_norm,
        skipped=not finite,
        drift=None if config.stop == "none" else torch.cat([r.drift for r in results]),
    )
    if finite:
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.updates += 1
        state.bad_in_a_row = 0
        if state.average is not None and state.updates % config.ema_every == 0:
            state.average.move_towards(config.ema_decay)
        return update
    state.optimizer.zero_grad()
    state.require_finite()  # else the transitions would be blamed for what an earlier update has done
    state.bad_in_a_row += 1
    message = blame(state, transitions, suspects(parts, losses, accelerator), advantages)
    recorder.skipped(state.epoch, message)
    if state.bad_in_a_row >= config.max_bad_updates:
        raise NotFiniteError(f"{state.bad_in_a_row} updates in a row (update.max_bad_updates): {message}")
    return update


def has_moved_too_far(update: Update, state: TrainState) -> bool:
    """Whether the passes over this rollout end with this update, by `update.stop`: the same answer on all processes.

    ESPO (arXiv 2202.00079) stops where the mean of |r - 1| passes a threshold. Of Gaussian steps its expectation under
    the rollout policy is known, with the ratio r of the whole latent: 2 erf(sqrt(D drift / 8)), twice the total
    variation distance. It is averaged over the transitions of the update, as they were before its step.
    """
    if update.drift is None or update.skipped:
        return False
    n_elements = math.prod(state.backbone.latent_shape)
    moved = 2 * total_variation(update.drift.double(), n_elements)
    return state.accelerator.gather(moved).mean().item() > state.recipe.update.stop_at


def suspects(parts: Sequence[Tensor], losses: Sequence[Tensor], accelerator: Accelerator) -> Tensor:
    """Indices of the micro-batches whose loss was not finite on any process, or of all if only a gradient was.

    The same micro-batches on every process, as sharded weights need the same passes on all of them.
    """
    bad = accelerator.gather(~torch.isfinite(torch.stack(list(losses)))[None]).any(0).tolist()
    return torch.cat([part for part, guilty in zip(parts, bad, strict=True) if guilty or not any(bad)])


def blame(state: TrainState, transitions: Sequence[RolloutBatch], index: Tensor, advantages: Tensor) -> str:
    """Find the transitions whose own loss or gradient is not finite: slow, one at a time, and only on failure."""
    accelerator, objective = state.accelerator, state.recipe.objective
    guilty = []
    for i in index.tolist():
        one = RolloutBatch.select(transitions, torch.tensor([i], device="cpu")).to(accelerator.device)
        weight = advantages[one.sample.cpu()].to(accelerator.device)
        with nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(state.policy):
            loss = policy_loss(state.policy, one, weight, objective).loss
            loss.backward()
        gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
        if not all(torch.isfinite(local_shard(x)).all() for x in (loss, *gradients)):
            prompt = state.backbone.prompts[int(one.prompt_indices.item())].text
            earlier = ", of an earlier rollout," if one.sample.item() >= state.recipe.images_per_process else ""
            guilty.append(
                f"denoising step {one.denoising_step.item()} of sample {one.sample.item()}{earlier} on process "
                f"{accelerator.process_index} (prompt {one.prompt_indices.item()}: {prompt[:60]!r})"
            )
        state.optimizer.zero_grad()
    everyone = gather_object(guilty)
    where = "; ".join(everyone) or "no single transition, only their sum overflows"
    return f"epoch {state.epoch}: the loss or its gradient is not finite, the weights were left as they are: {where}"
