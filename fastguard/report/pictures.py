"""The plots and image grids of a run's page."""

# ruff: noqa: RUF001 (minus, multiplication and plus-minus signs are meant)
from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from fastguard.report.data import TrainingRun
from fastguard.report.page import Picture, Section, Table
from fastguard.report.palette import BLUE, CURVES, EARLY_TO_LATE, GREEN, VERMILLION
from fastguard.report.plots import Line, plot_lines
from fastguard.report.words import as_number, finite_values, phase_names
from fastguard.train.metrics import EpochLog, RewardLog

EPOCH = "epoch (0 is the first rollout)"
MOST_GRIDS = 6
"""Grids of training images on the page; they are spread over the run."""
GRID_WIDTH = 1000
"""Pixels; wider grids are scaled down, as pages of a hundred megabytes open slowly."""


def _curve(
    path: Path, title: str, ylabel: str, lines: list[Line], xlabel: str = EPOCH, **options: Any
) -> list[Picture]:
    """A plot, unless none of its values is finite. Lines without any are left out."""
    lines = [line for line in lines if finite_values(line.y)]
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
    values = [y for line in lines for y in finite_values(line.y)]
    return "log" if values and min(values) > 0 else "linear"


def _from_zero(lines: Sequence[Line]) -> tuple[float, float]:
    return 0.0, 1.08 * max((y for line in lines for y in finite_values(line.y)), default=1.0) or 1.0


def reward_pictures(run: TrainingRun, out: Path) -> list[Picture]:
    names = [reward.label for reward in run.recipe.rewards]
    line = _over_epochs(run, "mean", BLUE, lambda log: log.reward_mean, band=[log.reward_std for log in run.epochs])
    title = names[0] if len(names) == 1 and run.recipe.rewards[0].weight == 1 else "Weighted sum of the rewards"
    pictures = _curve(out / "reward.png", title, "reward", [line])
    if len(names) == 1:
        return pictures
    for i, name in enumerate(names):
        logs = [log.rewards.get(name, RewardLog(math.nan, math.nan)) for log in run.epochs]
        xs = [float(log.epoch) for log in run.epochs]
        line = Line("mean", BLUE, xs, [log.mean for log in logs], band=[log.std for log in logs])
        pictures += _curve(out / f"reward_{i}.png", name, "score", [line])
    return pictures


def gold_section(run: TrainingRun, out: Path) -> Section:
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
    pictures = _curve(out / "gold.png", "Gold score", "gold", [Line("gold", VERMILLION, xs, golds)], marker_x=marker)
    pictures += _curve(out / "proxy.png", "Proxy", "proxy", [Line("proxy", BLUE, xs, proxies)], marker_x=marker)
    spreads = [math.nan if e.diversity is None else e.diversity for e in evaluations]
    line = Line("diversity", GREEN, xs, spreads)
    title = "Diversity: difference between two images of a prompt"
    pictures += _curve(out / "diversity.png", title, "diversity", [line], marker_x=marker)
    if len(evaluations) > 1:
        path = [Line("evaluations, in order", GREEN, proxies, golds)]
        pictures += _curve(
            out / "gold_against_proxy.png", "Gold against proxy", "gold", path, "proxy",
            marker_x=None if best is None else (best.proxy, "best gold"),
        )  # fmt: skip
    trained = [reward.label for reward in run.recipe.rewards]
    rows = [
        [
            name,
            "trained on" if name in trained else "gold",
            *(as_number(e.rewards.get(name)) for e in _ends(evaluations)),
        ]
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


def ratio_pictures(run: TrainingRun, out: Path) -> list[Picture]:
    objective = run.recipe.objective
    clips = objective.limit_name == "clip_range"
    used = (objective.limit, f"clip range {objective.limit:g}") if clips else None
    of_steps = objective.process == "reverse"
    steps = "denoising step (0 starts from noise)" if of_steps else "draw (0 has the least noise)"
    each = "denoising step" if of_steps else "draw"
    shown = list(zip(_spread([log for log in run.epochs if log.steps], 3), EARLY_TO_LATE, strict=False))
    pictures = []
    for field, title in (("ratio_bias", "mean"), ("ratio_std", "standard deviation")):
        lines = [
            Line(f"epoch {log.epoch}", color, [float(s) for s in log.steps], list(getattr(log, field)))
            for log, color in shown
        ]
        scale = _log_if_positive(lines) if field == "ratio_std" else "linear"
        pictures += _curve(
            out / f"{field}.png", f"Ratio − 1 per {each}: {title} over the last pass of an epoch",
            f"{title} of ratio − 1", lines, steps, integer_x=True, yscale=scale,
            marker_y=used if scale == "log" else (0.0, "unbiased") if field == "ratio_bias" else None,
        )  # fmt: skip
    percent = [
        _over_epochs(run, "positive advantages", BLUE, lambda log: 100 * log.clip_fraction_positive),
        _over_epochs(run, "negative advantages", VERMILLION, lambda log: 100 * log.clip_fraction_negative),
    ]
    verb = "clipped" if clips else "masked"
    if objective.limit_name is not None:
        pictures += _curve(
            out / "clip.png", f"Transitions that were {verb}, by the sign of their advantage", f"{verb} (%)", percent,
            ylim=(-1.0, None),
        )  # fmt: skip
    if clips:
        wanted = [
            _over_epochs(run, "would clip 10%", GREEN, lambda log: log.clip_range_for_10_percent),
            _over_epochs(run, "would clip 30%", VERMILLION, lambda log: log.clip_range_for_30_percent),
        ]
        pictures += _curve(
            out / "clip_range.png", "Clip ranges, as measured", "clip range", wanted, yscale="log",
            marker_y=(objective.limit, f"used: {objective.limit:g}"),
        )  # fmt: skip
    return pictures


def optimization_pictures(run: TrainingRun, out: Path) -> list[Picture]:
    limit = run.recipe.update.max_grad_norm
    norm = _over_epochs(run, "mean over updates", BLUE, lambda log: log.grad_norm)
    near = any(limit / 20 < y for y in finite_values(norm.y))
    pictures = _curve(
        out / "grad_norm.png", "Gradient norm, before it is scaled down", "gradient norm", [norm],
        yscale=_log_if_positive([norm]), marker_y=(limit, f"scaled down above {limit:g}") if near else None,
    )  # fmt: skip
    kl = _over_epochs(run, "mean over updates", BLUE, lambda log: _mean_kl(log))
    objective = run.recipe.objective
    kind = objective.kl_type if objective.process == "reverse" else "mean squared velocity difference"
    return pictures + _curve(out / "kl.png", f"KL to the model before training ({kind})", "KL", [kl])


def _mean_kl(log: EpochLog) -> float | None:
    values = finite_values([update.ratio.kl for update in log.updates])
    return fmean(values) if values else None


def time_pictures(run: TrainingRun, out: Path) -> list[Picture]:
    longest = max((sum(log.seconds.values()) for log in run.epochs), default=0.0)
    phases = [p for p in phase_names(run) if any(log.seconds.get(p, 0.0) > 0.001 * longest for log in run.epochs)]
    xs = [float(log.epoch) for log in run.epochs]
    lines = [
        Line(phase, CURVES[i % len(CURVES)], xs, [log.seconds.get(phase, 0.0) for log in run.epochs])
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


def training_grids(run: TrainingRun, out: Path) -> list[Picture]:
    rewards = {log.epoch: log.reward_mean for log in run.epochs}
    pictures = []
    for epoch, file in _spread(_grids(run, "epoch"), MOST_GRIDS):
        reward = f", mean reward {as_number(rewards[epoch])}" if epoch in rewards else ""
        pictures += _grid(file, out, f"Rollout of epoch {epoch}{reward}")
    return pictures


def evaluation_grids(run: TrainingRun, out: Path) -> list[Picture]:
    scores = {e.epoch: f": gold {as_number(e.gold)}, proxy {as_number(e.proxy)}" for e in run.evaluations}
    grids = _grids(run, "evaluation")
    shown = {epoch for epoch, _ in _ends(grids)} | ({run.best.epoch} if run.best is not None else set())
    pictures = []
    for epoch, file in grids:
        if epoch in shown:
            best = " (the best)" if run.best is not None and epoch == run.best.epoch else ""
            pictures += _grid(file, out, f"Epoch {epoch}{scores.get(epoch, '')}{best}")
    return pictures
