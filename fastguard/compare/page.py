"""The page of a comparison, its pictures, and results.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import get_args

from fastguard.compare import text
from fastguard.compare.results import FinishedRun, Results
from fastguard.report.page import Picture, Section, write_page
from fastguard.report.palette import BLUE, CURVES
from fastguard.report.plots import Line, Style, plot_intervals, plot_lines
from fastguard.utils.files import write_text

STYLES: tuple[Style, ...] = get_args(Style)
EPOCHS = "epochs done"
LABELS = {"proxy": "proxy", "gold": "gold score", "diversity": "diversity"}


def write_comparison(results: Results, out: Path) -> Path:
    """Write `out`/report.html, its pictures and results.json; works with any number of finished runs."""
    write_text(out / "results.json", json.dumps(results.as_json(), indent=1))
    sections = [
        Section("In short", points=text.short(results)),
        Section(
            "At equal proxy", [text.EQUAL_PROXY], table=text.equal_table(results), pictures=_intervals(results, out)
        ),
        Section("Gold and diversity against proxy", pictures=_against_proxy(results, out)),
        Section("At the end", [text.EVALUATIONS], table=text.final_table(results)),
        Section("Over the epochs", pictures=_over_epochs(results, out)),
        Section("What is clipped, time and memory", table=text.cost_table(results), pictures=_clipped(results, out)),
        Section("The arms", table=text.arms_table(results)),
        Section("What this does not show", text.limits_text(results)),
    ]
    if not results.runs:
        sections = sections[-2:]
    return write_page(out / "report.html", text.title(results), text.lead(results), sections, text.notice(results))


def _mean(runs: list[FinishedRun], metric: str) -> list[float]:
    """A metric at each evaluation, mean over runs; as long as the shortest run."""
    return [fmean(values) for values in zip(*(run.values(metric) for run in runs), strict=False)]


def _lines(results: Results, x: str | None, y: str) -> list[Line]:
    """A curve for each arm: metric y over the epochs, or against metric x."""
    lines = []
    for i, arm in enumerate(results.arms):
        runs = [run for run in results.of(arm.name) if run.evaluations]
        if not runs:
            continue
        ys = _mean(runs, y)
        xs = runs[0].at[: len(ys)] if x is None else _mean(runs, x)
        if any(math.isfinite(value) for value in ys):
            lines.append(_line(i, arm.name, xs, ys))
    return lines


def _line(i: int, name: str, xs: list[float], ys: list[float]) -> Line:
    return Line(name, CURVES[i % len(CURVES)], xs, ys, STYLES[i // len(CURVES) % len(STYLES)])


def _over_epochs(results: Results, out: Path) -> list[Picture]:
    pictures = []
    for metric, label in LABELS.items():
        if lines := _lines(results, None, metric):
            path = plot_lines(out / f"epochs_{metric}.png", lines, EPOCHS, label, integer_x=True)
            pictures.append(Picture(path, f"{label.capitalize()}, mean over seeds", f"{label} over epochs, by arm"))
    return pictures


def _against_proxy(results: Results, out: Path) -> list[Picture]:
    level = fmean(results.levels.values()) if results.levels else None
    pictures = []
    for metric in ("gold", "diversity"):
        if lines := _lines(results, "proxy", metric):
            label = LABELS[metric]
            marker = None if level is None else (level, "equal proxy")
            path = plot_lines(out / f"proxy_{metric}.png", lines, "proxy", label, marker_x=marker)
            name = f"{label.capitalize()} against proxy, means over seeds"
            pictures.append(Picture(path, name, f"{label} against proxy, by arm"))
    return pictures


def _intervals(results: Results, out: Path) -> list[Picture]:
    first, pictures = results.arms[0].name, []
    for metric in ("gold", "diversity"):
        found = {row.arm: row.equal[metric].difference for row in results.rows if metric in row.equal}
        shown = {arm: difference for arm, difference in found.items() if difference is not None}
        if shown:
            label = f"{LABELS[metric]} at equal proxy, minus that of {first}"
            means, halves = [d.mean for d in shown.values()], [d.half_width for d in shown.values()]
            path = plot_intervals(out / f"equal_{metric}.png", list(shown), means, halves, label, BLUE)
            name = f"{LABELS[metric].capitalize()} at equal proxy: difference to {first}, 95% intervals"
            pictures.append(Picture(path, name, f"{label}, a point and an interval for each arm"))
    return pictures


def _clipped(results: Results, out: Path) -> list[Picture]:
    pictures = []
    for sign in ("positive", "negative"):
        lines = []
        for i, arm in enumerate(results.arms):
            runs = results.of(arm.name)
            logs = zip(*(run.epochs for run in runs), strict=False)
            ys = [100 * fmean(getattr(log, f"clip_fraction_{sign}") for log in each) for each in logs]
            if ys:
                lines.append(_line(i, arm.name, [float(epoch + 1) for epoch in range(len(ys))], ys))
        if lines:
            path = plot_lines(
                out / f"clipped_{sign}.png", lines, "epoch", "clipped (%)", integer_x=True, ylim=(-1, None)
            )
            name = f"Clipped transitions with a {sign} advantage"
            pictures.append(Picture(path, name, f"{name} in percent over the epochs, by arm"))
    return pictures
