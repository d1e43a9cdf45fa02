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
from fastguard.loss import GuardLoss, guard_loss, matching_loss
from fastguard.loss.checks import Reweight
from fastguard.loss.objectives import Given, MatchingObjective, Noised, Objective, Shifted
from fastguard.ops.transition import total_variation
from fastguard.train.advantages import advantages_of, size_of_each
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

    An objective of whole trajectories gets all steps of an image in one update, one of groups all images of a draw.
    Each rollout batch is shuffled and shared out on its own, seeded by its place in the whole rollout: an update sees
    the same transitions on 1, 2 or 8 processes.
    """
    recipe = state.recipe
    images, steps, scope = recipe.sampler.batch_size, recipe.trained_steps, recipe.objective.scope
    batches = recipe.images_per_process // images
    first = state.accelerator.process_index * batches
    rollouts = len(advantages) // recipe.images_per_process
    words = [[recipe.run.seed, state.epoch, first + i, age] for age in range(rollouts) for i in range(batches)]
    generators = [np.random.default_rng(np.random.SeedSequence(w)) for w in words]
    # A word of its own for what all batches share.
    common = np.random.default_rng(np.random.SeedSequence([recipe.run.seed, state.epoch, 0, 0, 2]))
    for number in range(recipe.update.inner_epochs):
        shares, weights = [], torch.zeros(len(advantages), device="cpu")
        first_step = number * steps if recipe.objective.process == "forward" else 0
        order_of_steps = common.permutation(steps)
        for i, generator in enumerate(generators):
            chosen = np.arange(images)
            if recipe.update.subsample < 1:
                sizes = size_of_each(advantages[i * images :][:images]).numpy()
                chosen, factors = choose(sizes, recipe.trained_images, generator)
                weights[i * images + chosen] = torch.from_numpy(factors).float()
            # A rollout batch lies step by step. What is shuffled are rows of transitions that stay together.
            rows = chosen[:, None] + images * (first_step + np.arange(steps))
            if scope == "group":  # an image of a group may be in any batch
                rows = rows.T[order_of_steps]
            else:
                rows = rows if scope == "trajectory" else rows.T.reshape(-1, 1)
                rows = rows[generator.permutation(len(rows))]
            order = torch.from_numpy(rows + i * images * recipe.stored_steps)
            shares.append(order.tensor_split(recipe.update.minibatches))
        for parts in zip(*shares, strict=True):
            index = torch.cat([part.flatten() for part in parts])
            yield Minibatch(index, weights if recipe.update.subsample < 1 else None)


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
    given: in the place of the objective: it around another policy, or the derivatives of one of whole trajectories or
    groups. Without these each step is taken as the policy gradient has it, which is a trajectory objective's gradient
    as long as no ratio has moved.
    """
    if objective.scope != "transition" and given is None:
        still = torch.zeros_like(advantages)
        given = Given(
            by_log_ratio=-advantages, by_drift=still, clipped=still.bool(), log_ratio=objective.log_ratio,
            bandwidth=objective.bandwidth, moves_drift=False,
        )  # fmt: skip
    velocity = predict_velocity(policy, batch.latents, batch.sigma, batch.prompt_indices)
    kl_weight = objective.kl_weight if weights is None or not objective.kl_weight else objective.kl_weight * weights
    if objective.process == "forward":
        return matching_loss(
            velocity, batch.velocity, batch.noise, advantages, batch.sigma, objective=given or objective,
            sample_weight=weights, ref_velocity=batch.ref_velocity, kl_weight=kl_weight,
        )  # fmt: skip
    return guard_loss(
        velocity,
        batch.velocity,
        batch.noise,
        advantages,
        batch.step.to(velocity.device),
        objective=given or objective,
        reweight=step_factor(batch, objective),
        sample_weight=weights,
        ref_velocity=batch.ref_velocity,
        kl_weight=kl_weight,
        kl_type=objective.kl_type,
    )


def step_factor(batch: RolloutBatch, objective: ObjectiveConfig) -> Reweight | Tensor:
    """The factor on the policy loss: a name that the loss knows, or a number of each transition, (N,)."""
    if objective.reweight == "tempflow" or objective.reweight == "noise_level":
        assert batch.step_weight is not None  # `sample_epoch` found it from the schedule
        return batch.step_weight
    return objective.reweight


def check_parity(transitions: Sequence[RolloutBatch], state: TrainState) -> None:
    """Score rollout steps again in training mode, once before a process's first update.

    Nothing has changed since the rollout, so that every ratio should be 1, unless it is one to another policy. Raises
    UserError on all processes if one is further away than `update.parity` times the objective's limit, or not finite.
    """
    recipe, accelerator = state.recipe, state.accelerator
    if state.checked or recipe.update.parity == 0 or recipe.objective.anchor != "rollout":
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


def joint_derivatives(
    state: TrainState, transitions: Sequence[RolloutBatch], parts: Sequence[Tensor], advantages: Tensor, moved: bool
) -> list[Given]:
    """Derivatives of an objective whose loss joins the transitions of an image, or of a group; one entry per part.

    The gradient is `sum of c_i d l_i`, and c_i depends on the other transitions through their log-ratios alone. So a
    pass without gradients finds the log-ratios, and the gradient then needs the memory of one transition. It is exact.
    As long as the policy is the one that it is compared with, all log-ratios are 0, and this pass is left out.

    Args:
        parts: the micro-batches of an update.
        moved: whether weights have changed since the rollout.
    """
    recipe, accelerator, objective = state.recipe, state.accelerator, state.recipe.objective
    of_groups = objective.scope == "group"
    columns: list[tuple[Tensor, ...]] = []
    for part in parts:
        batch = RolloutBatch.select(transitions, part).to(accelerator.device)
        log_ratio = drift = torch.zeros_like(batch.sigma)
        if moved or objective.anchor != "rollout":
            with torch.no_grad():
                result = policy_loss(state.policy, batch, torch.zeros_like(batch.sigma), objective)
            log_ratio, drift = result.log_ratio, result.drift
        unit = torch.stack([batch.prompt_indices if of_groups else batch.sample, batch.denoising_step], 1)
        a = advantages_of(batch, advantages)
        columns.append((log_ratio, drift, a, batch.sigma, unit))
    log_ratio, drift, a, sigma, unit = (torch.cat(column) for column in zip(*columns, strict=True))
    own = slice(0, len(log_ratio))
    if of_groups:  # images of a group may be on other processes
        own = slice(accelerator.process_index * len(log_ratio), (accelerator.process_index + 1) * len(log_ratio))
        log_ratio, drift, a, sigma, unit = (accelerator.gather(x) for x in (log_ratio, drift, a, sigma, unit))
    order = torch.argsort(unit[:, 0] * recipe.trained_steps + unit[:, 1], stable=True)
    width = recipe.sampler.group_size if of_groups else recipe.trained_steps
    log_ratio, drift, a, sigma = (x[order].view(-1, width) for x in (log_ratio, drift, a, sigma))
    n_elements = math.prod(state.backbone.latent_shape)
    if of_groups:
        assert isinstance(objective, MatchingObjective)
        terms = objective.terms(log_ratio, drift, a, n_elements=n_elements, noised=Noised(sigma))
    else:
        terms = objective.terms(log_ratio, drift, a[:, 0], n_elements=n_elements)
    # A loss of n images or groups is the mean over n; that of a minibatch divides by its transitions.
    found = (width * terms.by_log_ratio, width * terms.by_drift, terms.clipped)
    back = torch.argsort(order)
    sizes = [len(part) for part in parts]
    pieces = zip(*(x.flatten()[back][own].split(sizes) for x in found), strict=True)
    return [
        Given(by_log_ratio=by_log_ratio, by_drift=by_drift, clipped=clipped, log_ratio=objective.log_ratio,
              bandwidth=objective.bandwidth, moves_drift=objective.moves_drift)
        for by_log_ratio, by_drift, clipped in pieces
    ]  # fmt: skip


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
    known: Sequence[Objective | None] = [None] * len(parts)
    if recipe.objective.scope != "transition":
        known = joint_derivatives(state, transitions, parts, advantages, moved)
    for part, given in zip(parts, known, strict=True):
        batch = RolloutBatch.select(transitions, part).to(device)
        batch_advantages.append(advantages_of(batch, advantages))
        # DDP sums gradients over the processes once per update; FSDP2 each time, which keeps them sharded.
        with accelerator.no_sync(policy) if part is not parts[-1] and not accelerator.is_fsdp2 else nullcontext():
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
        weight = advantages_of(one, advantages)
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
