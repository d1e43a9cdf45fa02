"""The words and tables of a comparison, derived from its numbers."""

# ruff: noqa: RUF001 (minus and plus-minus signs are meant)
from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from fastguard.compare.results import Compared, Results, Row, limit
from fastguard.recipe import as_dict, differences
from fastguard.report.equal_proxy import Spread
from fastguard.report.page import Table

DIGITS = {"proxy": 2, "gold": 2, "diversity": 3, "epochs": 1}
"""Digits behind the point, of each quantity."""
NAMES = {"proxy": "proxy", "gold": "gold score", "diversity": "diversity", "epochs": "epochs"}
FIRST_UPDATE = (
    "The first update after a rollout is identical for all objectives of one denoising step. No weight has moved, "
    "every ratio is 1, and the gradient with respect to the log-ratio is minus the advantage. What remains is a factor "
    "for each denoising step: objective.reweight, and RatioNorm's standard deviation."
)
SAME_INSIDE = (
    "Log-ratios are means over the D elements of a latent, so ratios stay close to 1: 1 ± 1e-5 for Flux at 512 x 512, "
    "with D = 65,536. Smooth functions of such a ratio have one and the same gradient inside the clip range. What "
    "differs between objectives is where and how the gradient ends."
)
EQUAL_PROXY = (
    "At an equal number of updates the policy that moved less tends to look better by the gold score, whatever its "
    "objective. So the fair comparison is at equal proxy: for each seed, the highest proxy that all its runs reached "
    "in their evaluations, with the other numbers interpolated linearly between the evaluations where a run first "
    "reaches it. A run whose proxy never rose above its start has no such place, and is left out there."
)
EVALUATIONS = (
    "Evaluations draw the same prompts from the same noise each time. The proxy is the reward that is trained on. The "
    "gold score is never trained on. Diversity is the root-mean-square difference between two images of a prompt, in "
    "the unit of white minus black."
)


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def title(results: Results) -> str:
    return f"{count(len(results.arms), 'arm')} of {results.title}"


def lead(results: Results) -> str:
    recipe, names = results.arms[0].recipe, [arm.name for arm in results.arms]
    return (
        f"{', '.join(names)}: {count(len(results.seeds), 'seed')} each, {count(recipe.run.epochs, 'epoch')} of "
        f"{recipe.images_per_epoch} images, from the same weights and, seed by seed, from the same noise in the first "
        f"rollout. Differences are to {names[0]}. Every sentence below that states a result was generated from these "
        "runs."
    )


def notice(results: Results) -> str:
    """The highlighted line on top, or nothing."""
    planned, notes = len(results.arms) * len(results.seeds), []
    if len(results.runs) + len(results.failures) < planned:
        notes.append(f"Partial report: {len(results.runs)} of {planned} runs are finished. The same command resumes.")
    notes += [f"{arm}, seed {seed}, did not finish: {said}" for (arm, seed), said in results.failures.items()]
    return " ".join(notes)


def short(results: Results) -> list[str]:
    """The main findings, a point each."""
    points = [FIRST_UPDATE, SAME_INSIDE + _measured_ratio(results)]
    if not results.levels:
        return [*points, "There is no equal proxy yet: it needs a seed whose runs are all finished, and that rose."]
    for metric in ("gold", "diversity"):
        points.append(_verdict(results, metric))
    return points


def _measured_ratio(results: Results) -> str:
    """Of denoising steps; the ratios of final latents are to other policies, and of another size."""
    steps = {arm.name for arm in results.arms if arm.recipe.objective.process == "reverse"}
    widths = [ratio.std for run in results.runs if run.arm in steps for log in run.epochs for ratio in log.per_step]
    finite = [width for width in widths if math.isfinite(width)]
    if not finite:
        return ""
    return f" In these runs the standard deviation of the ratio of a denoising step was at most {max(finite):.1e}."


def _verdict(results: Results, metric: str) -> str:
    """Which arms differ from the first at equal proxy, by their intervals."""
    compared = {row.arm: row.equal[metric].difference for row in results.rows if metric in row.equal}
    found = {arm: difference for arm, difference in compared.items() if difference is not None}
    first, name = results.arms[0].name, NAMES[metric]
    if not found:
        return f"{name.capitalize()} at equal proxy: there is nothing to compare with {first}."
    if all(math.isnan(difference.half_width) for difference in found.values()):
        return f"{name.capitalize()} at equal proxy: a single seed says nothing about reliability."
    sides = {
        "higher": [arm for arm, difference in found.items() if difference.excludes_zero and difference.mean > 0],
        "lower": [arm for arm, difference in found.items() if difference.excludes_zero and difference.mean < 0],
    }
    parts = [f"{side} for {', '.join(arms)}" for side, arms in sides.items() if arms]
    told = " and ".join(parts) + ", by 95% intervals that exclude 0" if parts else "no reliable difference for any arm"
    chance = f" One in twenty intervals excludes 0 by chance; these are {len(found)}." if len(found) > 1 else ""
    return f"{name.capitalize()} at equal proxy, against {first}: {told}.{chance}"


def final_table(results: Results) -> Table:
    """Where the runs ended."""
    metrics = ("proxy", "gold", "diversity")
    header = ["arm", "seeds", *(f"{NAMES[m]}{part}" for m in metrics for part in ("", ", difference"))]
    rows = [[row.arm, str(row.seeds), *_cells(row.final, metrics)] for row in results.rows]
    last = sorted({run.evaluations[-1].epoch for run in results.runs if run.evaluations})
    after = " or ".join(map(str, last))
    return Table(header, rows, f"After {after} epochs, the last evaluation. {_how(results)}")


def equal_table(results: Results) -> Table | None:
    """The arms at equal proxy; None if there is no such proxy."""
    if not results.levels:
        return None
    metrics = ("epochs", "gold", "diversity")
    header = ["arm", "seeds", *(f"{NAMES[m]}{part}" for m in metrics for part in ("", ", difference"))]
    rows = []
    for row in results.rows:
        seeds = sum(results.reached(run) for run in results.of(row.arm))
        rows.append([row.arm, str(seeds), *_cells(row.equal, metrics)])
    values = [f"{level:.2f}" for level in results.levels.values()]
    note = f"Equal proxy by seed: {', '.join(values)}; set by {', '.join(results.slowest)}, whose runs rose least. "
    return Table(header, rows, note + _how(results))


def _how(results: Results) -> str:
    text = f"Means over seeds; difference = arm − {results.arms[0].name}, paired by seed"
    return text + (", ± half the 95% t-interval." if len(results.seeds) > 1 else "; a single seed has no interval.")


def _cells(found: Mapping[str, Compared], metrics: tuple[str, ...]) -> list[str]:
    cells = []
    for metric in metrics:
        compared = found.get(metric)
        cells.append("–" if compared is None else f"{compared.mean.mean:.{DIGITS[metric]}f}")
        difference = None if compared is None else compared.difference
        cells.append("–" if difference is None else interval(difference, DIGITS[metric]))
    return cells


def interval(difference: Spread, digits: int) -> str:
    """`+0.12 ± 0.34`; without the half width for a single seed."""
    value = f"{difference.mean:+.{digits}f}".replace("-", "−")
    return value if math.isnan(difference.half_width) else f"{value} ± {difference.half_width:.{digits}f}"


def cost_table(results: Results) -> Table:
    """What was clipped, and what an epoch took."""
    phases = dict.fromkeys(phase for row in results.rows for phase in row.seconds)
    longest = max((sum(row.seconds.values()) for row in results.rows), default=0.0)
    shown = [phase for phase in phases if any(row.seconds.get(phase, 0.0) > 0.005 * longest for row in results.rows)]
    header = ["arm", "limit", "clipped, a > 0", "clipped, a < 0", "s per epoch", *shown, "s per run", "peak memory"]
    limits = {arm.name: limit(arm.recipe.objective) for arm in results.arms}
    rows = [
        [
            row.arm,
            limits[row.arm],
            *(f"{row.clip_fraction[sign]:.1%}" for sign in ("positive", "negative")),
            f"{sum(row.seconds.values()):.2f}",
            *(f"{row.seconds.get(phase, 0.0):.2f}" for phase in shown),
            "–" if row.wall_s is None else f"{row.wall_s:.0f}",
            peak(row),
        ]
        for row in results.rows
    ]
    on_gpu = any(log.peak_memory_gib is not None for run in results.runs for log in run.epochs)
    what = "of the GPU: its largest allocation" if on_gpu else "of the process: its resident set, libraries included"
    note = (
        "Clipped: the share of transitions that had no gradient, by the sign of their advantage a, mean over epochs "
        "and seeds. Objectives without a clip have none. Seconds per epoch are by phase; those of a run count "
        "loading, evaluations and checkpoints too, while other runs share the machine. Peak memory is that "
        f"{what}."
    )
    return Table(header, rows, note)


def peak(row: Row) -> str:
    return "–" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f} GiB"


def arms_table(results: Results) -> Table:
    """What each arm is: its objective's options, and its other differences from the first arm."""
    rows, base = [], as_dict(results.arms[0].recipe)
    for arm in results.arms:
        content = as_dict(arm.recipe)
        shown = {name: value for name, value in content["objective"].items() if value is not None}
        options = ", ".join(f"{name} = {value}" for name, value in shown.items())
        others = [d for d in differences(base, content) if not d.startswith("objective.")]
        rows.append([arm.name, options, "; ".join(others)])
    return Table(["Arm", "[objective]", f"other fields, from {results.arms[0].name}"], rows, prose=True)


def limits_text(results: Results) -> list[str]:
    """What the numbers cannot carry."""
    return [
        f"One recipe, one learning rate, {count(len(results.seeds), 'seed')}. The clip ranges were chosen, not tuned: "
        "an arm that is clipped less moves faster, so a difference between arms may be one between their settings. "
        "Another model or reward may order the arms otherwise."
    ]


def markdown(content: Mapping[str, Any]) -> str:
    """The result as a caption and a table in Markdown, from what results.json holds."""
    rows, arms, seeds = content["rows"], content["arms"], content["seeds"]
    header = ["arm", "limit", "clipped, a > 0 / a < 0", "proxy at the end", "epochs to equal proxy",
              "gold at equal proxy", "difference", "diversity at equal proxy", "difference", "s per run"]  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "| --- " * len(header) + "|"]
    for row in rows:
        clipped = " / ".join(f"{row['clip_fraction'][sign]:.1%}" for sign in ("positive", "negative"))
        cells = [f"`{row['arm']}`", arms[row["arm"]]["limit"], clipped, _number(row["final"], "proxy")]
        cells.append(_number(row["equal"], "epochs"))
        for metric in ("gold", "diversity"):
            cells += [_number(row["equal"], metric), _difference(row["equal"], metric)]
        cells.append("–" if row["wall_s"] is None else f"{row['wall_s']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    levels = ", ".join(f"{level:.2f}" for level in content["levels"].values()) or "none"
    caption = (
        f"{content['title'][0].upper()}{content['title'][1:]}, {count(len(seeds), 'seed')}, "
        f"{count(content['epochs'], 'epoch')}, on {content['device']} with torch {content['torch']}, "
        f"{content['workers']} at once. Equal proxy by seed: {levels}. Differences are to `{next(iter(arms))}`, paired "
        "by seed, ± half the 95% t-interval."
    )
    return "\n".join([*textwrap.wrap(caption, 120), "", *lines])


def _number(found: Mapping[str, Any], metric: str) -> str:
    return f"{found[metric]['mean']['mean']:.{DIGITS[metric]}f}" if metric in found else "–"


def _difference(found: Mapping[str, Any], metric: str) -> str:
    difference = found[metric]["difference"] if metric in found else None
    if difference is None:
        return "–"
    half = math.nan if difference["half_width"] is None else difference["half_width"]
    return interval(Spread(difference["mean"], half), DIGITS[metric])
