"""The training loop: rollout, rewards, advantages, minibatches of (loss, backward, step), log, save.

Axes: N transition, B image, S token, C channel, R reward, T trained denoising step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from fastguard.advantages import Advantages, advantages_without_failures, combine_rewards
from fastguard.backbones import Backbone
from fastguard.config import ObjectiveConfig, Recipe
from fastguard.loss import GuardLoss, guard_loss
from fastguard.metrics import Clock, EpochLog, RewardLog, Update, UpdateLog, clip_range_for, gather_updates, ratio_log
from fastguard.monitor import Monitor, Verdict
from fastguard.optim import Optimizer, build_optimizer
from fastguard.rewards import RewardError, RewardPool, Scores, collect_scores
from fastguard.sampler import (
    Policy,
    Transitions,
    epoch_prompts,
    predict_velocity,
    rollout,
    sample_seeds,
    training_schedule,
)
from fastguard.weights import Shadow, local, trained_parameters, whole


class Run(Protocol):
    """Where a run leaves its traces; every method is called by all processes."""

    def restore(self, state: TrainState) -> None:
        """Continue from a checkpoint, if there is one to continue from."""
        ...

    def stop_requested(self) -> bool:
        """Whether to save and end at the next safe point; the same answer on every process."""
        ...

    def skipped(self, epoch: int, message: str) -> None:
        """Write down an update that was skipped and the transitions to blame, or a group and the reward that failed."""
        ...

    def end_epoch(self, log: EpochLog, images: Tensor, state: TrainState) -> None:
        """Record an epoch (images: uint8 (B, C, H, W), this process's first rollout batch)."""
        ...

    def evaluated(self, verdict: Verdict) -> None:
        """Record an evaluation of the monitor."""
        ...

    def save(self, state: TrainState) -> None:
        """Write a checkpoint, unless this state has one."""
        ...


@dataclass
class TrainState:
    """Everything that changes while a run goes on, and so everything that a checkpoint holds."""

    accelerator: Accelerator
    recipe: Recipe
    backbone: Backbone
    policy: nn.Module
    """the backbone's policy as accelerate wrapped it"""
    parameters: dict[str, nn.Parameter]
    """what is trained, by name"""
    optimizer: Optimizer
    average: Shadow | None
    """averaged weights (EMA)"""
    before: Callable[[], AbstractContextManager[None]] | None
    """context in which the policy is the model before training; None where no KL is asked for"""
    monitor: Monitor | None
    epoch: int = 0
    """epochs done"""
    updates: int = 0
    """optimizer updates done, without skipped ones"""
    bad_in_a_row: int = 0
    """updates skipped since the last good one"""
    checked: bool = False
    """whether this process has passed the parity preflight"""


def build_state(backbone: Backbone, recipe: Recipe, accelerator: Accelerator, monitor: Monitor | None) -> TrainState:
    """Wrap the policy for its processes and build what trains it."""
    update = recipe.update
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Gradients are summed in float32 whatever the weights' dtype; the optimizer comes after the sharding.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        idle = torch.optim.SGD([p for p in backbone.policy.parameters() if p.requires_grad], lr=0.0)
        policy, _ = accelerator.prepare(backbone.policy, idle)
    else:
        policy = accelerator.prepare(backbone.policy)
    parameters = trained_parameters(policy)
    before = None
    if recipe.objective.kl_weight > 0:
        before = backbone.adapters_off if backbone.has_adapters else Shadow(policy, update.copies).in_place
    average = Shadow(policy, update.copies, torch.float32) if update.ema_decay > 0 else None
    optimizer = build_optimizer(list(parameters.values()), update)
    return TrainState(accelerator, recipe, backbone, policy, parameters, optimizer, average, before, monitor)


def train(
    backbone: Backbone,
    recipe: Recipe,
    rewards: RewardPool,
    run: Run,
    accelerator: Accelerator | None = None,
    monitor: Monitor | None = None,
) -> list[EpochLog]:
    """Train the backbone's policy in place to raise the rewards; returns the logs of the epochs done here.

    Raises ValueError before anything is sampled if the images do not divide over the processes or rollout steps
    score differently in training; RewardError, after saving, if a reward fails and the recipe says to stop; and
    FloatingPointError after `update.max_bad_updates` updates in a row that were not finite.
    """
    accelerator = accelerator or Accelerator()
    recipe = for_processes(recipe, accelerator.num_processes)
    state = build_state(backbone, recipe, accelerator, monitor)
    run.restore(state)
    logs: list[EpochLog] = []
    try:
        stop = evaluate(state, run)
        while state.epoch < recipe.run.epochs and not stop:
            log = run_epoch(state, rewards, run)
            if log is None:  # asked to stop before any weight changed: this epoch begins again after a resume
                break
            logs.append(log)
            stop = run.stop_requested() or evaluate(state, run)
            if state.epoch % recipe.run.save_every == 0:
                run.save(state)
    except RewardError:
        run.save(state)
        raise
    run.save(state)
    return logs


def run_epoch(state: TrainState, rewards: RewardPool, run: Run) -> EpochLog | None:
    """One epoch: rollout, rewards, advantages, updates, log. None if asked to stop before the first update."""
    clock = Clock(state.accelerator.device)
    rolled = sample_epoch(state, rewards, run, clock)
    if rolled is None:
        return None
    for failure in rolled.scores.failures:
        run.skipped(state.epoch, f'reward "{failure.label}" for prompt {failure.prompt!r}: {failure.reason}')
    with clock.phase("reference"):
        transitions = add_reference(rolled.transitions, state)
    check_parity(transitions, state)
    updates = []
    with clock.phase("update"):
        for index in minibatches(state):
            updates.append(update_weights(state, transitions, index, rolled.advantages.values, run))
    state.epoch += 1
    log = summarize(state, rolled, updates, clock)
    run.end_epoch(log, rolled.images, state)
    return log


def for_processes(recipe: Recipe, processes: int) -> Recipe:
    """The recipe for as many processes as were launched. Raises ValueError, with what would work, if it cannot be."""
    try:
        return replace(recipe, hardware=replace(recipe.hardware, processes=processes))
    except ValueError as error:
        planned = recipe.hardware.processes
        raise ValueError(f"launched on {processes} processes (hardware.processes = {planned}): {error}") from None


@dataclass(frozen=True)
class SampledEpoch:
    """A rollout with its rewards, of this process unless said otherwise."""

    transitions: tuple[Transitions, ...]
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


def sample_epoch(state: TrainState, rewards: RewardPool, run: Run, clock: Clock) -> SampledEpoch | None:
    """Sample, decode and score one epoch's images; None if the run was asked to stop meanwhile.

    Rewards are computed in the pool's threads while the next batch is sampled.
    """
    recipe, backbone, device = state.recipe, state.backbone, state.accelerator.device
    schedule = training_schedule(recipe.sampler, backbone.shift, recipe.run.seed, state.epoch)
    prompt_indices, seeds = images_to_sample(state)
    backbone.hold(prompt_indices.tolist())
    transitions: list[Transitions] = []
    first_images = None
    for first in range(0, len(prompt_indices), recipe.sampler.batch_size):
        if run.stop_requested():
            return None
        part = slice(first, first + recipe.sampler.batch_size)
        with clock.phase("rollout"):
            on_device = prompt_indices[part].to(device)
            rolled = rollout(state.policy, on_device, seeds[part], backbone.latent_shape, schedule, backbone.dtype)
            batch = Transitions.cat(rolled.transitions)
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
    """This process's share of the rollout: prompt indices (B,) and seeds (B, draws), on the host."""
    recipe, accelerator = state.recipe, state.accelerator
    chosen = torch.tensor(
        epoch_prompts(state.backbone.num_trained_prompts, recipe.prompts.per_epoch, recipe.run.seed, state.epoch)
    )
    share = recipe.images_per_process
    flat = torch.arange(share) + accelerator.process_index * share
    prompt_indices, members = chosen[flat // recipe.sampler.group_size], flat % recipe.sampler.group_size
    seeds = sample_seeds(recipe.run.seed, state.epoch, prompt_indices, members, recipe.sampler.num_steps)
    return prompt_indices, seeds


def score_epoch(
    state: TrainState, transitions: tuple[Transitions, ...], scores: Scores, prompt_indices: Tensor, images: Tensor
) -> SampledEpoch:
    """Advantages with group statistics over all processes."""
    recipe, accelerator = state.recipe, state.accelerator
    device = accelerator.device

    def everyone(x: Tensor) -> Tensor:  # (..., B) -> (..., B of all processes)
        return accelerator.gather(x.movedim(-1, 0).contiguous().to(device)).movedim(0, -1).cpu()

    values, prompts = everyone(scores.values), everyone(prompt_indices)
    whole = Scores(values, tuple(gather_object(list(scores.failures))))
    weights = [reward.weight for reward in recipe.rewards]
    total = combine_rewards(values, weights, prompts)
    compared = (
        combine_rewards(values, weights, prompts, normalize_each=True) if recipe.scoring.normalize_each else total
    )
    advantages, counted = advantages_without_failures(compared, prompts, recipe.scoring.std)
    if not counted.any():
        raise RewardError(f"every group had a reward that failed, the first: {whole.failures[0]}")
    first = accelerator.process_index * len(prompt_indices)
    own = Advantages(advantages.values[first : first + len(prompt_indices)], advantages.zero_spread_groups)
    dropped = len(prompts[~counted].unique())
    return SampledEpoch(transitions, own, whole, total, dropped, images)


@torch.no_grad()
def add_reference(transitions: tuple[Transitions, ...], state: TrainState) -> tuple[Transitions, ...]:
    """Add the velocities of the model before training, if the objective asks for a KL.

    They do not depend on the policy, so that one pass per rollout serves all of its updates.
    """
    if state.before is None:
        return transitions
    size, device = state.recipe.sampler.batch_size, state.accelerator.device
    with state.before():
        scored = []
        for part in transitions:
            velocities = []
            for index in torch.arange(len(part)).split(size):
                batch = part[index].to(device)
                velocity = predict_velocity(state.policy, batch.latents, batch.sigma, batch.prompt_indices)
                velocities.append(velocity.to(part.latents.device))
            scored.append(replace(part, ref_velocity=torch.cat(velocities)))
    return tuple(scored)


def minibatches(state: TrainState) -> Iterator[Tensor]:
    """Host indices, into this process's transitions, of each update: every transition once per pass.

    Each rollout batch is shuffled and shared out on its own, seeded by its place in the whole rollout: an update sees
    the same transitions on 1, 2 or 8 processes.
    """
    recipe = state.recipe
    size = recipe.sampler.batch_size * recipe.sampler.sde_steps
    batches = recipe.images_per_process // recipe.sampler.batch_size
    first = state.accelerator.process_index * batches
    words = [[recipe.run.seed, state.epoch, first + i] for i in range(batches)]
    generators = [np.random.default_rng(np.random.SeedSequence(w)) for w in words]
    for _ in range(recipe.update.inner_epochs):
        orders = [torch.from_numpy(g.permutation(size)) + i * size for i, g in enumerate(generators)]
        shares = [order.tensor_split(recipe.update.minibatches) for order in orders]
        for parts in zip(*shares, strict=True):
            yield torch.cat(parts)


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
        kl_threshold=objective.kl_threshold,
        ref_velocity=batch.ref_velocity,
        kl_weight=objective.kl_weight,
        kl_type=objective.kl_type,
    )


def check_parity(transitions: Sequence[Transitions], state: TrainState) -> None:
    """Score rollout steps again in training mode, once before a process's first update.

    Nothing has changed since the rollout, so that every ratio should be 1. Raises ValueError on all processes if one
    is further away than `update.parity` times the clip range.
    """
    recipe, accelerator = state.recipe, state.accelerator
    if state.checked or recipe.update.parity == 0:
        return
    first = next(minibatches(state))
    batch = Transitions.select(transitions, first[: recipe.micro_batch]).to(accelerator.device)
    ones = torch.ones(len(batch), device=accelerator.device)
    result = policy_loss(state.policy, batch, ones, recipe.objective)
    if recipe.objective.name == "flow_dppo":
        name, limit, moved = "objective.kl_threshold", recipe.objective.kl_threshold, result.drift.detach() / 2
    else:
        name, limit, moved = "objective.clip_range", recipe.objective.clip_range, result.log_ratio.detach().abs()
    worst = accelerator.gather(moved.max()[None]).max().item()
    if not worst <= recipe.update.parity * limit:
        raise ValueError(
            f"parity preflight: a rollout step scored again in training mode is off by {worst:.2e}, more than "
            f"update.parity = {recipe.update.parity:g} of {name} = {limit:g}, before any weight has changed. Look at: "
            f"batch shape (sampler.batch_size = {recipe.sampler.batch_size}, transitions per pass "
            f"{recipe.micro_batch}: make them equal), model.dtype = {recipe.model.dtype}, "
            f"model.attention = {recipe.model.attention} (is it deterministic?), dropout or other layers that act "
            "differently in training. update.parity = 0 skips this check"
        )
    state.checked = True


def update_weights(
    state: TrainState, transitions: Sequence[Transitions], index: Tensor, advantages: Tensor, run: Run
) -> Update:
    """One optimizer update, in micro-batches; skipped on all processes if its loss or gradient is not finite.

    Raises FloatingPointError once `update.max_bad_updates` were skipped in a row.
    """
    recipe, accelerator, policy = state.recipe, state.accelerator, state.policy
    config, device = recipe.update, accelerator.device
    results, batches, batch_advantages, losses = [], [], [], []
    parts = index.split(recipe.micro_batch)
    for part in parts:
        batch = Transitions.select(transitions, part).to(device)
        batch_advantages.append(advantages[batch.sample.cpu()].to(device))
        # DDP sums gradients over the processes once per update; FSDP2 each time, which keeps them sharded.
        with accelerator.no_sync(policy) if part is not parts[-1] and not accelerator.is_fsdp2 else nullcontext():
            result = policy_loss(policy, batch, batch_advantages[-1], recipe.objective)
            loss = result.loss * (len(part) / len(index))
            accelerator.backward(loss)
        losses.append(loss.detach())
        batches.append(batch.denoising_step)
        results.append(result._replace(loss=result.loss.detach()))
    grad_norm = whole(accelerator.clip_grad_norm_(list(state.parameters.values()), config.max_grad_norm))
    finite = accelerator.gather(torch.isfinite(torch.stack(losses).sum() + grad_norm)[None]).all().item()
    update = Update(
        advantages=torch.cat(batch_advantages),
        denoising_step=torch.cat(batches),
        log_ratio=torch.cat([r.log_ratio for r in results]),
        clipped=torch.cat([r.clipped for r in results]),
        kl=None if results[0].kl is None else torch.cat([r.kl for r in results if r.kl is not None]),
        grad_norm=grad_norm,
        skipped=not finite,
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
    state.bad_in_a_row += 1
    message = blame(state, transitions, suspects(parts, losses, accelerator), advantages)
    run.skipped(state.epoch, message)
    if state.bad_in_a_row >= config.max_bad_updates:
        raise FloatingPointError(f"{state.bad_in_a_row} updates in a row (update.max_bad_updates): {message}")
    return update


def suspects(parts: Sequence[Tensor], losses: Sequence[Tensor], accelerator: Accelerator) -> Tensor:
    """Indices of the micro-batches whose loss was not finite on any process, or of all if only a gradient was.

    The same micro-batches on every process, as sharded weights need the same passes on all of them.
    """
    bad = accelerator.gather(~torch.isfinite(torch.stack(list(losses)))[None]).any(0).tolist()
    return torch.cat([part for part, guilty in zip(parts, bad, strict=True) if guilty or not any(bad)])


def blame(state: TrainState, transitions: Sequence[Transitions], index: Tensor, advantages: Tensor) -> str:
    """Find the transitions whose own loss or gradient is not finite: slow, one at a time, and only on failure."""
    accelerator, objective = state.accelerator, state.recipe.objective
    guilty = []
    for i in index.tolist():
        one = Transitions.select(transitions, torch.tensor([i])).to(accelerator.device)
        weight = advantages[one.sample.cpu()].to(accelerator.device)
        with nullcontext() if accelerator.is_fsdp2 else accelerator.no_sync(state.policy):
            loss = policy_loss(state.policy, one, weight, objective).loss
            loss.backward()
        gradients = [p.grad for p in state.parameters.values() if p.grad is not None]
        if not all(torch.isfinite(local(x)).all() for x in (loss, *gradients)):
            prompt = state.backbone.prompts[int(one.prompt_indices.item())].text
            guilty.append(
                f"denoising step {one.denoising_step.item()} of sample {one.sample.item()} on process "
                f"{accelerator.process_index} (prompt {one.prompt_indices.item()}: {prompt[:60]!r})"
            )
        state.optimizer.zero_grad()
    everyone = gather_object(guilty)
    where = "; ".join(everyone) or "no single transition, only their sum overflows"
    return f"epoch {state.epoch}: the loss or its gradient is not finite, the weights were left as they are: {where}"


def summarize(state: TrainState, rolled: SampledEpoch, updates: Sequence[Update], clock: Clock) -> EpochLog:
    """Reduce an epoch to plain numbers, over all processes; the only host copies of a healthy epoch."""
    recipe, accelerator = state.recipe, state.accelerator
    everyone = gather_updates(updates, accelerator)
    last_pass = everyone[-recipe.update.minibatches :]
    schedule = training_schedule(recipe.sampler, state.backbone.shift, recipe.run.seed, state.epoch - 1)
    overall = ratio_log(everyone)
    counted = rolled.rewards[~torch.isnan(rolled.rewards)]
    groups = recipe.prompts.per_epoch - rolled.dropped_groups
    peak = None
    if accelerator.device.type == "cuda":
        own = torch.tensor([torch.cuda.max_memory_allocated()], device=accelerator.device)
        peak = accelerator.gather(own).max().item() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return EpochLog(
        epoch=state.epoch - 1,
        reward_mean=counted.mean().item(),
        reward_std=counted.std(correction=0).item(),
        rewards={
            config.label: RewardLog(row.nanmean().item(), row[~torch.isnan(row)].std(correction=0).item())
            for config, row in zip(recipe.rewards, rolled.scores.values, strict=True)
        },
        zero_spread_share=rolled.advantages.zero_spread_groups.item() / groups,
        dropped_groups=rolled.dropped_groups,
        updates=tuple(UpdateLog(ratio_log([u]), u.grad_norm.item(), u.skipped) for u in everyone),
        steps=tuple(schedule.window),
        per_step=tuple(ratio_log(last_pass, step) for step in schedule.window),
        clip_fraction_positive=overall.clip_fraction_positive,
        clip_fraction_negative=overall.clip_fraction_negative,
        clip_range_for_30_percent=clip_range_for(0.3, everyone),
        clip_range_for_10_percent=clip_range_for(0.1, everyone),
        seconds=dict(clock.seconds),
        images_per_s=recipe.images_per_epoch / sum(clock.seconds.values()),
        peak_memory_gib=peak,
    )


def evaluate(state: TrainState, run: Run) -> bool:
    """Ask the monitor, where there is one and it is due; saves a new best. True stops the run."""
    if state.monitor is None or state.epoch % state.recipe.monitor.every or state.monitor.has_seen(state.epoch):
        return False
    with state.average.in_place() if state.average is not None else nullcontext():
        verdict = state.monitor.evaluate(state.policy, state.backbone, state.accelerator, state.epoch)
    run.evaluated(verdict)
    if verdict.is_best:
        run.save(state)
    return verdict.stop
