"""Optimizer updates: one update in micro-batches, and what happens if its loss is not finite.

Axes: N transition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from fastguard.errors import NotFiniteError, UserError
from fastguard.loss.objectives import Objective, Shifted
from fastguard.ops.transition import total_variation
from fastguard.train.advantages import advantages_of
from fastguard.train.metrics import Update
from fastguard.train.minibatches import Minibatch, minibatches
from fastguard.train.policy_loss import joint_derivatives, policy_loss
from fastguard.train.recorder import Recorder
from fastguard.train.rollout import RolloutBatch
from fastguard.train.state import TrainState
from fastguard.utils.finite import not_finite
from fastguard.utils.sharding import full_tensor, local_shard
from fastguard.utils.terminal import a_few


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
            each = "denoising step" if objective.process == "reverse" else "draw"
            guilty.append(
                f"{each} {one.denoising_step.item()} of sample {one.sample.item()}{earlier} on process "
                f"{accelerator.process_index} (prompt {one.prompt_indices.item()}: {prompt[:60]!r})"
            )
        state.optimizer.zero_grad()
    everyone = gather_object(guilty)
    where = "; ".join(everyone) or "no single transition, only their sum overflows"
    return f"epoch {state.epoch}: the loss or its gradient is not finite, the weights were left as they are: {where}"
