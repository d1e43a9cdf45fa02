"""The training loop: rollout, rewards, advantages, minibatches of (loss, backward, step), log, save."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator

from fastguard.backbones import Backbone
from fastguard.config import Recipe
from fastguard.errors import NotFiniteError
from fastguard.rewards import RewardError, RewardPool
from fastguard.train.collect import SampledEpoch, add_reference, sample_epoch
from fastguard.train.metrics import (
    Clock,
    EpochLog,
    RewardLog,
    Update,
    UpdateLog,
    clip_range_for,
    gather_updates,
    ratio_log,
)
from fastguard.train.monitor import Monitor
from fastguard.train.recorder import Recorder
from fastguard.train.replay import TrainingSet, remember, training_set
from fastguard.train.rollout import epoch_schedule
from fastguard.train.state import TrainState, build_state, for_processes
from fastguard.train.update import check_parity, has_moved_too_far, update_weights
from fastguard.utils.sealed import DamagedError


def train(
    backbone: Backbone,
    recipe: Recipe,
    rewards: RewardPool,
    recorder: Recorder,
    accelerator: Accelerator | None = None,
    monitor: Monitor | None = None,
) -> list[EpochLog]:
    """Train the backbone's policy in place to raise the rewards; returns the logs of the epochs done here.

    Raises UserError before anything is sampled if the images do not divide over the processes or rollout steps
    score differently in training. Raises after saving: RewardError if a reward fails and the recipe says to stop, and
    DamagedError if an encoded prompt was damaged since the start. Raises NotFiniteError, and saves nothing, after
    `update.max_bad_updates` updates in a row that were not finite, or one that left weights, average or optimizer state
    that are not.
    """
    accelerator = accelerator or Accelerator()
    recipe = for_processes(recipe, accelerator.num_processes)
    state = build_state(backbone, recipe, accelerator, monitor)
    recorder.restore(state)
    try:
        return train_epochs(state, rewards, recorder)
    except NotFiniteError as error:
        raise NotFiniteError(f"{error}. {recorder.way_back()}") from None


def train_epochs(state: TrainState, rewards: RewardPool, recorder: Recorder) -> list[EpochLog]:
    """Epochs until the recipe's last one or a wish to stop, saved as the recipe says and at the end."""
    logs: list[EpochLog] = []
    try:
        stop = evaluate(state, recorder)
        while state.epoch < state.recipe.run.epochs and not stop:
            log = run_epoch(state, rewards, recorder)
            if log is None:  # asked to stop before any weight changed: this epoch begins again after a resume
                break
            logs.append(log)
            stop = recorder.stop_requested() or evaluate(state, recorder)
            if state.epoch % state.recipe.run.save_every == 0:
                recorder.save(state)
    except (RewardError, DamagedError):
        recorder.save(state)
        raise
    recorder.save(state)
    return logs


def run_epoch(state: TrainState, rewards: RewardPool, recorder: Recorder) -> EpochLog | None:
    """One epoch: rollout, rewards, advantages, updates, log. None if asked to stop before the first update."""
    clock = Clock(state.accelerator.device)
    rolled = sample_epoch(state, rewards, recorder, clock)
    if rolled is None:
        return None
    for failure in rolled.scores.failures:
        recorder.skipped(state.epoch, f'reward "{failure.label}" for prompt {failure.prompt!r}: {failure.reason}')
    with clock.phase("reference"):
        transitions = add_reference(rolled.transitions, state)
    check_parity(transitions, state)
    updates: list[Update] = []
    with clock.phase("update"):
        trained = training_set(state, rolled, transitions)
        for minibatch in trained.minibatches(state):
            moved = not all(update.skipped for update in updates)
            updates.append(update_weights(state, trained.transitions, minibatch, trained.advantages, recorder, moved))
            if has_moved_too_far(updates[-1], state):
                break
        state.require_finite()  # one reading an epoch of what each update reads, before it is evaluated or rolled out
    state.buffer = remember(state, rolled, transitions, recorder)
    state.end_epoch()
    state.baselines = rolled.advantages.baselines
    log = summarize(state, rolled, trained, updates, clock)
    recorder.end_epoch(log, rolled.images, state)
    return log


def summarize(
    state: TrainState, rolled: SampledEpoch, trained: TrainingSet, updates: Sequence[Update], clock: Clock
) -> EpochLog:
    """Reduce an epoch to plain numbers, over all processes; the only host copies of a healthy epoch."""
    recipe, accelerator = state.recipe, state.accelerator
    everyone = gather_updates(updates, accelerator)
    last_pass = everyone[-recipe.update.minibatches :]
    window = epoch_schedule(recipe, state.backbone.sigmas, state.epoch - 1).window
    steps = window[: recipe.trained_steps] if recipe.objective.process == "reverse" else range(recipe.update.draws)
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
        steps=tuple(steps),
        per_step=tuple(ratio_log(last_pass, step) for step in steps),
        clip_fraction_positive=overall.clip_fraction_positive,
        clip_fraction_negative=overall.clip_fraction_negative,
        clip_range_for_30_percent=clip_range_for(0.3, everyone),
        clip_range_for_10_percent=clip_range_for(0.1, everyone),
        seconds=dict(clock.seconds),
        images_per_s=recipe.images_per_epoch / sum(clock.seconds.values()),
        peak_memory_gib=peak,
        earlier_images=trained.earlier_images(state),
    )


def evaluate(state: TrainState, recorder: Recorder) -> bool:
    """Ask the monitor, where there is one and it is due; saves a new best. True stops the run."""
    if state.monitor is None or state.epoch % state.recipe.monitor.every or state.monitor.has_seen(state.epoch):
        return False
    with state.average.in_place() if state.average is not None else nullcontext():
        verdict = state.monitor.evaluate(state.policy, state.backbone, state.accelerator, state.epoch)
    recorder.evaluated(verdict)
    if verdict.is_best:
        recorder.save(state)
    return verdict.stop
