"""What a run's page says in words, from the run's own numbers."""

# ruff: noqa: RUF001 (minus, multiplication and plus-minus signs are meant)
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from statistics import fmean, median
from typing import Any

from fastguard.backbones import family_of
from fastguard.config import Recipe
from fastguard.errors import UserError
from fastguard.recipe import totals
from fastguard.report.data import TrainingRun
from fastguard.report.page import Table
from fastguard.train.metrics import EpochLog, RewardLog
from fastguard.train.run_folder import checkpoint_of

RECENT = 5
"""Epochs, the last ones, that the clip advice is computed from."""
IMPORTANT = (
    "run.dir", "run.seed", "run.epochs", "model.path", "model.train", "model.dtype", "model.height", "model.width",
    "lora.rank", "sampler.num_steps", "sampler.noise_level", "sampler.sde_steps", "sampler.window",
    "sampler.group_size", "objective.name", "objective.clip_range", "objective.kl_threshold", "objective.kl_weight",
    "prompts.file", "update.learning_rate", "update.inner_epochs", "update.minibatches",
)  # fmt: skip
"""Settings that the page shows even if they are the defaults."""


def as_number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"−{-value:.4g}" if value < 0 else f"{value:.4g}"


def _share(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:.0%}" if value == 0 or value >= 0.1 else f"{value:.1%}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def finite_values(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def planned_epochs(run: TrainingRun) -> str:
    return _count(run.recipe.run.epochs, "epoch")


def partial_notice(run: TrainingRun) -> str:
    parts = []
    if run.done == 0:
        parts.append("No epoch of this run has been finished yet.")
    elif run.done < run.recipe.run.epochs:
        parts.append(f"An unfinished run: {run.done} of {planned_epochs(run)} done.")
    if run.unread:
        parts.append(f"{_count(run.unread, 'row')} of its files could not be read, and are left out.")
    return " ".join(parts)


def summary(run: TrainingRun) -> list[str]:
    """The run in words, a point each."""
    points = [
        f"{run.done} of {planned_epochs(run)} done" + ("" if run.done < run.recipe.run.epochs else ", as planned") + "."
    ]
    if run.epochs:
        points += _reward_points(run)
    points += _gold_points(run)
    if run.epochs:
        points += _trouble_points(run)
        speed = finite_values([log.images_per_s for log in run.epochs])
        if speed:
            points.append(f"{as_number(median(speed))} images per second (median over epochs, sampling and training).")
        memory = finite_values([log.peak_memory_gib for log in run.epochs])
        points.append(
            f"Peak memory: {max(memory):.1f} GiB on the fullest GPU." if memory else "Peak memory: there was no GPU."
        )
    return [*points, _where_weights_are(run)]


def _reward_points(run: TrainingRun) -> list[str]:
    first, last = run.epochs[0], run.epochs[-1]
    names = [name for name in first.rewards if name in last.rewards]
    pairs = [("Reward", _total(first), _total(last))]
    if len(names) > 1:
        pairs += [(f"Reward {name}", first.rewards[name], last.rewards[name]) for name in names]
    if first is last:
        return [
            f"{name}: {as_number(a.mean)} ± {as_number(a.std)} in the only rollout (± over its images)."
            for name, a, _ in pairs
        ]
    return [
        f"{name}: {as_number(a.mean)} ± {as_number(a.std)} in the first rollout, "
        f"{as_number(b.mean)} ± {as_number(b.std)} in "
        f"that of epoch {last.epoch} (± over its images); {_moved(a, b)}."
        for name, a, b in pairs
    ]


def _total(log: EpochLog) -> RewardLog:
    return RewardLog(log.reward_mean, log.reward_std)


def _moved(before: RewardLog, after: RewardLog) -> str:
    change = after.mean - before.mean
    if not math.isfinite(change):
        return "the change is unknown"
    by = f", {abs(change) / before.std:.1f} of the first standard deviations" if before.std > 0 else ""
    return f"{'up' if change > 0 else 'down'} by {as_number(abs(change))}{by}" if change else "no change"


def _gold_points(run: TrainingRun) -> list[str]:
    if not run.recipe.monitor.every:
        return ["Over-optimization was not watched: monitor.every is 0, so there are no gold scores."]
    if run.best is None:
        return ["No gold score was measured yet."]
    first, last = run.evaluations[0], run.evaluations[-1]
    warned = [e for e in run.evaluations if e.warning]
    told = (
        f"The monitor warned of reward hacking {_count(len(warned), 'time')}, first at epoch {warned[0].epoch}."
        if warned
        else f"The monitor gave no warning in {_count(len(run.evaluations), 'evaluation')}."
    )
    best = run.path / "checkpoints" / f"epoch_{run.best.epoch:06d}"
    where = f"checkpoint {best}" if best.is_dir() else "its checkpoint is not there"
    return [
        f"Best gold score: {as_number(run.best.gold)} at epoch {run.best.epoch} (epoch {first.epoch}: "
        f"{as_number(first.gold)}, epoch {last.epoch}: {as_number(last.gold)}); {where}.",
        told,
    ]


def _trouble_points(run: TrainingRun) -> list[str]:
    updates = [update for log in run.epochs for update in log.updates]
    skipped = sum(update.skipped for update in updates)
    dropped = sum(log.dropped_groups for log in run.epochs)
    groups = run.recipe.prompts.per_epoch * len(run.epochs)
    flat = finite_values([log.zero_spread_share for log in run.epochs])
    points = [
        f"Skipped updates (not finite): {skipped} of {len(updates)}. Groups dropped because a reward failed: {dropped} "
        f"of {groups}."
    ]
    if flat:
        advice = (
            ": they teach nothing, so look for a reward with finer steps, or prompts that are neither too easy nor too "
            "hard"
        )
        points.append(
            f"Groups whose rewards were all equal: {_share(fmean(flat))} on average, {_share(flat[-1])} in the last "
            f"epoch{advice if fmean(flat) > 0.3 and run.recipe.advantages.within_groups else ''}."
        )
    return points


def _where_weights_are(run: TrainingRun) -> str:
    try:
        folder = checkpoint_of(run.path, "newest") / "diffusers"
    except UserError:
        return "There are no trained weights: no checkpoint was saved."
    model = run.recipe.model
    line = family_of(model.kind).how_to_load(model, folder)
    return f"Newest trained weights: {folder}" + (f"; load them with {line}." if line else ".")


def reward_text(run: TrainingRun) -> list[str]:
    if not run.epochs:
        return []
    text = (
        "Each point is the mean over the images of a rollout, before that epoch's updates; the band is ± one standard "
        "deviation over these images."
    )
    if run.recipe.scoring.normalize_each:
        text += (
            " The policy learns from rewards in units of their spread in the group (scoring.normalize_each). What is "
            "shown is the rewards as they are."
        )
    return [text]


def ratio_text(run: TrainingRun) -> list[str]:
    updates = [update for log in run.epochs for update in log.updates[:1] if not update.skipped]
    if not updates:
        return []
    per_epoch = run.recipe.update.inner_epochs * run.recipe.update.minibatches
    compared = {
        "rollout": "the one that sampled the rollout",
        "average": "an average of the policies so far, which sampled the rollout",
        "reference": "the model before training",
    }[run.recipe.objective.anchor]
    text = f"The ratio compares the policy with {compared}. Ratio − 1 is shown, which is small."
    if run.recipe.objective.anchor != "rollout":
        return [text]
    text += " "
    furthest = max(max(abs(u.ratio.bias), u.ratio.std) for u in updates)
    if furthest == 0:
        text += (
            "At the first update of an epoch no weight has changed since the rollout (it is on-policy): every ratio is "
            "exactly 1, ratio − 1 exactly 0, and nothing is clipped, as it should be."
        )
    else:
        text += (
            "At the first update of an epoch no weight has changed since the rollout (it is on-policy), so every ratio "
            f"should be exactly 1. Mean and standard deviation of ratio − 1 were up to {as_number(furthest)} there: "
            "rollout and update round differently (batch shape, dtype, attention backend)."
        )
    if per_epoch == 1:
        text += " This run has one update per epoch: it is on-policy throughout, and the clip range has no effect."
    return [text]


def clip_advice(run: TrainingRun) -> list[str]:
    """Which clip range would give 10 to 30% clipped, from the ratios of the last epochs; a point each."""
    recipe = run.recipe
    logs = run.epochs[-RECENT:]
    if not logs or recipe.update.inner_epochs * recipe.update.minibatches == 1:
        return []
    when = "in epoch {}" if len(logs) == 1 else "on average over epochs {} to {}"
    when = when.format(*dict.fromkeys((logs[0].epoch, logs[-1].epoch)))
    positive, negative = (
        fmean(finite_values([getattr(log, f"clip_fraction_{sign}") for log in logs]) or [math.nan])
        for sign in ("positive", "negative")
    )
    shares = (
        f"{_share(positive)} of the transitions with a positive advantage and {_share(negative)} of those with a "
        "negative one"
    )
    used = recipe.objective.limit
    if recipe.objective.limit_name is None:
        return []
    if recipe.objective.limit_name != "clip_range":
        limit = f"objective.{recipe.objective.limit_name} = {used:g}"
        return [f"{limit} left {shares} without a gradient, {when}."]
    points = [f"objective.clip_range = {used:g} was used. It clipped {shares}, {when}."]
    if recipe.update.stop != "none":
        return [*points, f"update.stop = {recipe.update.stop} ended updates before ratios could move further."]
    thirty, ten = (
        finite_values([getattr(log, f"clip_range_for_{share}_percent") for log in logs]) for share in (30, 10)
    )
    if not ten:
        return [
            *points,
            "No clip range would have clipped 10%: fewer transitions than that moved the way their advantage wants. "
            "More updates per rollout (update.minibatches, update.inner_epochs) or a larger update.learning_rate move "
            "them further.",
        ]
    high = median(ten)
    if thirty:
        low = median(thirty)
        points.append(
            f"As measured, {low:.2g} would have clipped 30% of all transitions and {high:.2g} 10%: a clip range "
            "between them gives 10 to 30%."
        )
    else:
        low = 0.0
        points.append(
            f"As measured, {high:.2g} would have clipped 10% of all transitions. None would have clipped 30%: fewer "
            "transitions than that moved the way their advantage wants, those of on-policy updates among them."
        )
    if low <= used <= high:
        return [*points, "The clip range that was used lies there: no change is needed."]
    problem = "less than 10%" if used > high else "more than 30%"
    between = math.sqrt(low * high) if low else high / 2
    return [
        *points,
        f"The clip range that was used clips {problem}: try {between:.2g}, and look again, since updates that are "
        "clipped otherwise move the policy otherwise.",
    ]


def time_text(run: TrainingRun) -> list[str]:
    totals_by_phase = {phase: sum(log.seconds.get(phase, 0.0) for log in run.epochs) for phase in phase_names(run)}
    whole = sum(totals_by_phase.values())
    if not whole > 0:
        return []
    ordered = sorted(totals_by_phase.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{phase} {_share(part / whole)}" for phase, part in ordered if part > 0.001 * whole)
    return [
        f"Of {whole / len(run.epochs):.3g} s per epoch on average: {shares}. Evaluations and checkpoints are not "
        "counted; rewards are computed while the next images are sampled, and only the wait for them is counted."
    ]


def phase_names(run: TrainingRun) -> list[str]:
    return list(dict.fromkeys(phase for log in run.epochs for phase in log.seconds))


def settings_table(recipe: Recipe) -> Table:
    """What follows from the recipe, then every setting that is important or not the default."""
    rows = [[name, value, ""] for name, value in totals(recipe)]
    for section in fields(recipe):
        value = getattr(recipe, section.name)
        if section.name == "rewards":
            continue
        for field in fields(value):
            name, now, default = (
                f"{section.name}.{field.name}",
                getattr(value, field.name),
                getattr(type(value)(), field.name),
            )
            if name != "monitor.gold" and (now != default or name in IMPORTANT):
                rows.append([name, _setting(now), "" if now == default else f"default: {_setting(default)}"])
    for kind, rewards in (("rewards", recipe.rewards), ("monitor.gold", recipe.monitor.gold)):
        for reward in rewards:
            options = "".join(f", {key} = {value}" for key, value in reward.options.items())
            rows.append([f"{kind}: {reward.label}", f"{reward.use}, weight {reward.weight:g}{options}", ""])
    return Table(["Setting", "Value", ""], rows, "All settings: recipe.json.", prose=True)


def _setting(value: Any) -> str:
    return ", ".join(str(v) for v in value) or "none" if isinstance(value, tuple) else str(value)
