"""The page of a training run, from the files that it leaves in its folder; works for unfinished runs as well.

"epoch" counts rollouts from 0, as in metrics.jsonl and the names of images: rollout 12, and the evaluation at 12, are
of the policy after 12 epochs of training.
"""

# ruff: noqa: RUF001 (minus, multiplication and plus-minus signs are meant)
from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

from PIL import Image

from fastguard.config import Recipe
from fastguard.metrics import EpochLog, RatioLog, RewardLog, UpdateLog
from fastguard.monitor import EvaluationLog
from fastguard.recipe import parse_recipe, totals
from fastguard.report import PALETTE, Line, Picture, Section, Table, plot_lines, write_page
from fastguard.run import checkpoint_of, read_rows

BLUE, RED, GREEN = PALETTE[:3]
GREY = "#999999"
EPOCH = "epoch (0 is the first rollout)"
MOST_GRIDS = 6
"""Grids of training images on the page; they are spread over the run."""
GRID_WIDTH = 1000
"""Pixels; wider grids are scaled down, as pages of a hundred megabytes open slowly."""
RECENT = 5
"""Epochs, the last ones, that the clip advice is computed from."""
IMPORTANT = (
    "run.dir", "run.seed", "run.epochs", "model.path", "model.train", "model.dtype", "model.height", "model.width",
    "lora.rank", "sampler.num_steps", "sampler.noise_level", "sampler.sde_steps", "sampler.window",
    "sampler.group_size", "objective.name", "objective.clip_range", "objective.kl_weight", "prompts.file",
    "update.learning_rate", "update.inner_epochs", "update.minibatches",
)  # fmt: skip
"""Settings that the page shows even if they are the defaults."""


@dataclass(frozen=True)
class TrainingRun:
    """What the folder of a run holds."""

    path: Path
    recipe: Recipe
    epochs: list[EpochLog]
    evaluations: list[EvaluationLog]
    skipped: list[str]
    """messages of skipped updates"""
    unread: int
    """rows that do not hold what this version writes"""

    @property
    def done(self) -> int:
        """Epochs done."""
        return self.epochs[-1].epoch + 1 if self.epochs else 0

    @property
    def best(self) -> EvaluationLog | None:
        """The evaluation with the highest gold score."""
        return max((e for e in self.evaluations if math.isfinite(e.gold)), key=lambda e: e.gold, default=None)


def write_run_report(run: Path) -> Path:
    """Write `run`/report.html, and its pictures to `run`/report/. Returns the page's path.

    Raises ValueError if `run` is not the folder of a run.
    """
    found = read_run(run)
    out = run / "report"
    out.mkdir(exist_ok=True)
    sections = [
        Section("In short", points=summary(found)),
        Section("Reward", _reward_text(found), pictures=_reward(found, out)),
        _gold(found, out),
        Section("The ratio, and what is clipped", _ratio_text(found), clip_advice(found), pictures=_ratio(found, out)),
        Section("Optimization", pictures=_optimization(found, out)),
        Section("Time and memory", _time_text(found), pictures=_time(found, out)),
        Section("Images of training", pictures=_training_grids(found, out)),
        Section("Images of evaluations", pictures=_evaluation_grids(found, out)),
        Section("Updates that were skipped", points=found.skipped[-10:]),
        Section("Settings", table=_settings(found.recipe)),
    ]
    told = [s for s in sections if s.paragraphs or s.points or s.table or s.pictures]
    model = found.recipe.model
    what = "the demo's digit model" if model.kind == "digits" else f"{model.path} ({model.train})"
    rewards = ", ".join(reward.label for reward in found.recipe.rewards)
    lead = f"{found.recipe.objective.name} on {what}, rewarded by {rewards}: {found.done} of {_planned(found)} done."
    return write_page(run / "report.html", f"Run {run.resolve().name}", lead, told, _notice(found))


def read_run(path: Path) -> TrainingRun:
    """Read a run's files. Raises ValueError if it is no run, or its recipe cannot be read."""
    if not (path / "recipe.json").is_file():
        raise ValueError(
            f"{path} is not the folder of a run: expected recipe.json in it, which `fastguard train` writes; "
            "give the run.dir of a recipe"
        )
    try:
        content = json.loads((path / "recipe.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'recipe.json'} is damaged: {error}") from None
    recipe = parse_recipe(content, str(path / "recipe.json"))
    epochs, odd = _logs(path / "metrics.jsonl", _epoch_log)
    evaluations, more = _logs(path / "evaluations.jsonl", lambda row: EvaluationLog(**row))
    skipped = [str(row.get("message", row)) for row in read_rows(path / "skipped.jsonl")]
    return TrainingRun(path, recipe, epochs, evaluations, skipped, odd + more)


def _logs(file: Path, build: Callable[[dict[str, Any]], Any]) -> tuple[list[Any], int]:
    """Logs in the order of their epochs, the last written one of each; and how many rows are none."""
    found: dict[int, Any] = {}
    unread = 0
    for row in read_rows(file):
        try:
            log = build(row)
            found[log.epoch] = log
        except (TypeError, KeyError, AttributeError):  # written by another version
            unread += 1
    return [found[epoch] for epoch in sorted(found)], unread


def _epoch_log(row: dict[str, Any]) -> EpochLog:
    """The inverse of `dataclasses.asdict`."""
    nested = {
        "rewards": {name: RewardLog(**reward) for name, reward in row["rewards"].items()},
        "updates": tuple(UpdateLog(**{**update, "ratio": RatioLog(**update["ratio"])}) for update in row["updates"]),
        "steps": tuple(row["steps"]),
        "per_step": tuple(RatioLog(**ratio) for ratio in row["per_step"]),
    }
    return EpochLog(**{**row, **nested})


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"−{-value:.4g}" if value < 0 else f"{value:.4g}"


def _share(value: float) -> str:
    return "–" if not math.isfinite(value) else f"{value:.0%}" if value == 0 or value >= 0.1 else f"{value:.1%}"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _finite(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _planned(run: TrainingRun) -> str:
    return _count(run.recipe.run.epochs, "epoch")


def _notice(run: TrainingRun) -> str:
    parts = []
    if run.done == 0:
        parts.append("No epoch of this run has been finished yet.")
    elif run.done < run.recipe.run.epochs:
        parts.append(f"An unfinished run: {run.done} of {_planned(run)} done.")
    if run.unread:
        parts.append(f"{_count(run.unread, 'row')} of its files could not be read, and are left out.")
    return " ".join(parts)


def summary(run: TrainingRun) -> list[str]:
    """The run in words, a point each."""
    points = [
        f"{run.done} of {_planned(run)} done" + ("" if run.done < run.recipe.run.epochs else ", as planned") + "."
    ]
    if run.epochs:
        points += _reward_points(run)
    points += _gold_points(run)
    if run.epochs:
        points += _trouble_points(run)
        speed = _finite([log.images_per_s for log in run.epochs])
        if speed:
            points.append(f"{_number(median(speed))} images per second (median over epochs, sampling and training).")
        memory = _finite([log.peak_memory_gib for log in run.epochs])
        points.append(
            f"Peak memory: {max(memory):.1f} GiB on the fullest GPU." if memory else "Peak memory: there was no GPU."
        )
    return [*points, _where_weights_are(run)]


def _reward_points(run: TrainingRun) -> list[str]:
    first, last = run.epochs[0], run.epochs[-1]
    names = [name for name in first.rewards if name in last.rewards]
    if run.recipe.scoring.normalize_each:
        pairs = [(f"Reward {name}", first.rewards[name], last.rewards[name]) for name in names]
    else:
        pairs = [("Reward", _total(first), _total(last))]
        if len(names) > 1:
            pairs += [(f"Reward {name}", first.rewards[name], last.rewards[name]) for name in names]
    if first is last:
        return [
            f"{name}: {_number(a.mean)} ± {_number(a.std)} in the only rollout (± over its images)."
            for name, a, _ in pairs
        ]
    return [
        f"{name}: {_number(a.mean)} ± {_number(a.std)} in the first rollout, {_number(b.mean)} ± {_number(b.std)} in "
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
    return f"{'up' if change > 0 else 'down'} by {_number(abs(change))}{by}" if change else "no change"


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
        f"Best gold score: {_number(run.best.gold)} at epoch {run.best.epoch} (epoch {first.epoch}: "
        f"{_number(first.gold)}, epoch {last.epoch}: {_number(last.gold)}); {where}.",
        told,
    ]


def _trouble_points(run: TrainingRun) -> list[str]:
    updates = [update for log in run.epochs for update in log.updates]
    skipped = sum(update.skipped for update in updates)
    dropped = sum(log.dropped_groups for log in run.epochs)
    groups = run.recipe.prompts.per_epoch * len(run.epochs)
    flat = _finite([log.zero_spread_share for log in run.epochs])
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
            f"epoch{advice if fmean(flat) > 0.3 else ''}."
        )
    return points


def _where_weights_are(run: TrainingRun) -> str:
    try:
        folder = checkpoint_of(run.path, "newest") / "diffusers"
    except ValueError:
        return "There are no trained weights: no checkpoint was saved."
    if run.recipe.model.kind == "digits":
        how = ""
    elif run.recipe.model.train == "lora":
        how = f'; load them with pipe.load_lora_weights("{folder}")'
    else:
        how = f'; load them with FluxTransformer2DModel.from_pretrained("{folder}")'
    return f"Newest trained weights: {folder}{how}."


def _reward_text(run: TrainingRun) -> list[str]:
    if not run.epochs:
        return []
    text = (
        "Each point is the mean over the images of a rollout, before that epoch's updates; the band is ± one standard "
        "deviation over these images."
    )
    if run.recipe.scoring.normalize_each:
        text += (
            " With scoring.normalize_each every reward is centred within its group before the sum, so that the "
            "weighted reward is near 0 throughout: only the rewards by name can rise."
        )
    return [text]


def _ratio_text(run: TrainingRun) -> list[str]:
    updates = [update for log in run.epochs for update in log.updates[:1] if not update.skipped]
    if not updates:
        return []
    per_epoch = run.recipe.update.inner_epochs * run.recipe.update.minibatches
    text = (
        "The ratio compares the policy with the one that sampled the rollout. Its distances from 1 are of the order of "
        "the clip range, so ratio − 1 is shown. "
    )
    furthest = max(max(abs(u.ratio.bias), u.ratio.std) for u in updates)
    if furthest == 0:
        text += (
            "At the first update of an epoch no weight has changed since the rollout (it is on-policy): every ratio is "
            "exactly 1, ratio − 1 exactly 0, and nothing is clipped, as it should be."
        )
    else:
        text += (
            "At the first update of an epoch no weight has changed since the rollout (it is on-policy), so every ratio "
            f"should be exactly 1. Mean and standard deviation of ratio − 1 were up to {_number(furthest)} there: "
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
        fmean(_finite([getattr(log, f"clip_fraction_{sign}") for log in logs]) or [math.nan])
        for sign in ("positive", "negative")
    )
    shares = (
        f"{_share(positive)} of the transitions with a positive advantage and {_share(negative)} of those with a "
        "negative one"
    )
    if recipe.objective.name == "flow_dppo":
        threshold = recipe.objective.kl_threshold
        return [f"objective.kl_threshold = {threshold:g} masked {shares}, {when}. There is no clip range."]
    used = recipe.objective.clip_range
    points = [f"objective.clip_range = {used:g} was used. It clipped {shares}, {when}."]
    thirty, ten = (_finite([getattr(log, f"clip_range_for_{share}_percent") for log in logs]) for share in (30, 10))
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


def _time_text(run: TrainingRun) -> list[str]:
    totals_by_phase = {phase: sum(log.seconds.get(phase, 0.0) for log in run.epochs) for phase in _phases(run)}
    whole = sum(totals_by_phase.values())
    if not whole > 0:
        return []
    ordered = sorted(totals_by_phase.items(), key=lambda item: -item[1])
    shares = ", ".join(f"{phase} {_share(part / whole)}" for phase, part in ordered if part > 0.001 * whole)
    return [
        f"Of {whole / len(run.epochs):.3g} s per epoch on average: {shares}. Evaluations and checkpoints are not "
        "counted; rewards are computed while the next images are sampled, and only the wait for them is counted."
    ]


def _curve(
    path: Path, title: str, ylabel: str, lines: list[Line], xlabel: str = EPOCH, **options: Any
) -> list[Picture]:
    """A plot, unless none of its values is finite. Lines without any are left out."""
    lines = [line for line in lines if _finite(line.y)]
    if not lines:
        return []
    plot_lines(path, lines, xlabel, ylabel, **{"integer_x": xlabel == EPOCH, **options})
    return [Picture(path, title, f"{title}; {ylabel} over {xlabel}")]


def _over_epochs(
    run: TrainingRun, label: str, color: str, value: Callable[[EpochLog], float | None], **kind: Any
) -> Line:
    ys = [value(log) for log in run.epochs]
    xs = [float(log.epoch) for log in run.epochs]
    return Line(label, color, xs, [math.nan if y is None else y for y in ys], **kind)


def _log_if_positive(lines: Sequence[Line]) -> str:
    values = [y for line in lines for y in _finite(line.y)]
    return "log" if values and min(values) > 0 else "linear"


def _from_zero(lines: Sequence[Line]) -> tuple[float, float]:
    return 0.0, 1.08 * max((y for line in lines for y in _finite(line.y)), default=1.0) or 1.0


def _reward(run: TrainingRun, out: Path) -> list[Picture]:
    names = [reward.label for reward in run.recipe.rewards]
    pictures = []
    if not run.recipe.scoring.normalize_each:
        line = _over_epochs(run, "mean", BLUE, lambda log: log.reward_mean, band=[log.reward_std for log in run.epochs])
        title = names[0] if len(names) == 1 and run.recipe.rewards[0].weight == 1 else "Weighted sum of the rewards"
        pictures += _curve(out / "reward.png", title, "reward", [line])
    if len(names) == 1 and pictures:
        return pictures
    for i, name in enumerate(names):
        logs = [log.rewards.get(name, RewardLog(math.nan, math.nan)) for log in run.epochs]
        xs = [float(log.epoch) for log in run.epochs]
        line = Line("mean", BLUE, xs, [log.mean for log in logs], band=[log.std for log in logs])
        pictures += _curve(out / f"reward_{i}.png", name, "score", [line])
    return pictures


def _gold(run: TrainingRun, out: Path) -> Section:
    if not run.evaluations:
        return Section("Proxy and gold")
    text = (
        "Evaluations draw the same prompts from the same noise each time. The proxy is the reward that is trained on; "
        "the gold score is not trained on. A proxy that rises while gold falls is reward hacking."
    )
    evaluations, best = run.evaluations, run.best
    xs = [float(e.epoch) for e in evaluations]
    proxies, golds = [e.proxy for e in evaluations], [e.gold for e in evaluations]
    marker = (float(best.epoch), "best gold") if best is not None else None
    pictures = _curve(out / "gold.png", "Gold score", "gold", [Line("gold", RED, xs, golds)], marker_x=marker)
    pictures += _curve(out / "proxy.png", "Proxy", "proxy", [Line("proxy", BLUE, xs, proxies)], marker_x=marker)
    if len(evaluations) > 1:
        path = [Line("evaluations, in order", GREEN, proxies, golds)]
        pictures += _curve(
            out / "gold_against_proxy.png", "Gold against proxy", "gold", path, "proxy",
            marker_x=None if best is None else (best.proxy, "best gold"),
        )  # fmt: skip
    trained = [reward.label for reward in run.recipe.rewards]
    rows = [
        [name, "trained on" if name in trained else "gold", *(_number(e.rewards.get(name)) for e in _ends(evaluations))]
        for name in evaluations[-1].rewards
    ]
    table = Table(["Reward", "Role", *(f"epoch {e.epoch}" for e in _ends(evaluations))], rows, prose=True)
    warnings = [f"Epoch {e.epoch}: {e.warning}" for e in evaluations if e.warning]
    return Section("Proxy and gold", [text], warnings[-3:], table, pictures)


def _ends(items: Sequence[Any]) -> list[Any]:
    return [items[0], items[-1]] if len(items) > 1 else list(items)


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _ratio(run: TrainingRun, out: Path) -> list[Picture]:
    objective = run.recipe.objective
    clips = objective.name != "flow_dppo"
    used = (objective.clip_range, f"clip range {objective.clip_range:g}") if clips else None
    steps = "denoising step (0 starts from noise)"
    shown = list(
        zip(_spread([log for log in run.epochs if log.steps], 3), ("#9ecae1", "#4292c6", "#08306b"), strict=False)
    )
    pictures = []
    for field, title in (("ratio_bias", "mean"), ("ratio_std", "standard deviation")):
        lines = [
            Line(f"epoch {log.epoch}", color, [float(s) for s in log.steps], list(getattr(log, field)))
            for log, color in shown
        ]
        scale = _log_if_positive(lines) if field == "ratio_std" else "linear"
        pictures += _curve(
            out / f"{field}.png", f"Ratio − 1 per denoising step: {title} over the last pass of an epoch",
            f"{title} of ratio − 1", lines, steps, integer_x=True, yscale=scale,
            marker_y=used if scale == "log" else (0.0, "unbiased") if field == "ratio_bias" else None,
        )  # fmt: skip
    percent = [
        _over_epochs(run, "positive advantages", BLUE, lambda log: 100 * log.clip_fraction_positive),
        _over_epochs(run, "negative advantages", RED, lambda log: 100 * log.clip_fraction_negative),
    ]
    verb = "clipped" if clips else "masked"
    pictures += _curve(
        out / "clip.png", f"Transitions that were {verb}, by the sign of their advantage", f"{verb} (%)", percent,
        ylim=(-1.0, None),
    )  # fmt: skip
    if clips:
        wanted = [
            _over_epochs(run, "would clip 10%", GREEN, lambda log: log.clip_range_for_10_percent),
            _over_epochs(run, "would clip 30%", RED, lambda log: log.clip_range_for_30_percent),
        ]
        pictures += _curve(
            out / "clip_range.png", "Clip ranges, as measured", "clip range", wanted, yscale="log",
            marker_y=(objective.clip_range, f"used: {objective.clip_range:g}"),
        )  # fmt: skip
    return pictures


def _optimization(run: TrainingRun, out: Path) -> list[Picture]:
    limit = run.recipe.update.max_grad_norm
    norm = _over_epochs(run, "mean over updates", BLUE, lambda log: log.grad_norm)
    near = any(limit / 20 < y for y in _finite(norm.y))
    pictures = _curve(
        out / "grad_norm.png", "Gradient norm, before it is scaled down", "gradient norm", [norm],
        yscale=_log_if_positive([norm]), marker_y=(limit, f"scaled down above {limit:g}") if near else None,
    )  # fmt: skip
    kl = _over_epochs(run, "mean over updates", BLUE, lambda log: _mean_kl(log))
    return pictures + _curve(
        out / "kl.png", f"KL to the model before training ({run.recipe.objective.kl_type})", "KL", [kl]
    )


def _mean_kl(log: EpochLog) -> float | None:
    values = _finite([update.ratio.kl for update in log.updates])
    return fmean(values) if values else None


def _phases(run: TrainingRun) -> list[str]:
    return list(dict.fromkeys(phase for log in run.epochs for phase in log.seconds))


def _time(run: TrainingRun, out: Path) -> list[Picture]:
    longest = max((sum(log.seconds.values()) for log in run.epochs), default=0.0)
    phases = [p for p in _phases(run) if any(log.seconds.get(p, 0.0) > 0.001 * longest for log in run.epochs)]
    xs = [float(log.epoch) for log in run.epochs]
    lines = [
        Line(phase, PALETTE[i % len(PALETTE)], xs, [log.seconds.get(phase, 0.0) for log in run.epochs])
        for i, phase in enumerate(phases)
    ]
    pictures = _curve(out / "seconds.png", "Seconds by phase", "seconds", lines, ylim=_from_zero(lines))
    memory = _over_epochs(run, "fullest GPU", BLUE, lambda log: log.peak_memory_gib)
    return pictures + _curve(out / "memory.png", "Peak memory", "GiB", [memory], ylim=_from_zero([memory]))


def _grids(run: TrainingRun, kind: str) -> list[tuple[int, Path]]:
    """(epoch, file) of the image grids of a kind, in order."""
    files = [(re.fullmatch(rf"{kind}_(\d+)\.png", p.name), p) for p in (run.path / "images").glob(f"{kind}_*.png")]
    return sorted((int(match[1]), path) for match, path in files if match)


def _grid(file: Path, out: Path, title: str) -> list[Picture]:
    """A picture of a grid, scaled down if it is large; none if the file is damaged."""
    try:
        with Image.open(file) as image:
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError):  # a killed run leaves half a file; PIL has several words for it
        return []
    if small.width > GRID_WIDTH:
        size = (GRID_WIDTH, max(1, round(small.height * GRID_WIDTH / small.width)))
        small = small.resize(size, Image.Resampling.LANCZOS)
    small.save(out / file.name)
    return [Picture(out / file.name, title, f"grid of generated images: {title}")]


def _training_grids(run: TrainingRun, out: Path) -> list[Picture]:
    rewards = {log.epoch: log.reward_mean for log in run.epochs}
    pictures = []
    for epoch, file in _spread(_grids(run, "epoch"), MOST_GRIDS):
        known = epoch in rewards and not run.recipe.scoring.normalize_each
        reward = f", mean reward {_number(rewards[epoch])}" if known else ""
        pictures += _grid(file, out, f"Rollout of epoch {epoch}{reward}")
    return pictures


def _evaluation_grids(run: TrainingRun, out: Path) -> list[Picture]:
    scores = {e.epoch: f": gold {_number(e.gold)}, proxy {_number(e.proxy)}" for e in run.evaluations}
    grids = _grids(run, "evaluation")
    shown = {epoch for epoch, _ in _ends(grids)} | ({run.best.epoch} if run.best is not None else set())
    pictures = []
    for epoch, file in grids:
        if epoch in shown:
            best = " (the best)" if run.best is not None and epoch == run.best.epoch else ""
            pictures += _grid(file, out, f"Epoch {epoch}{scores.get(epoch, '')}{best}")
    return pictures


def _settings(recipe: Recipe) -> Table:
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
