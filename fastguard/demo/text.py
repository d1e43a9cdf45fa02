"""The demo report's words, derived from the numbers of its own runs: nothing here knows how they will turn out."""

# ruff: noqa: RUF001 (minus and multiplication signs are meant)
from __future__ import annotations

import math

import numpy as np

from fastguard.demo.analysis import Comparison, common_proxy, compare, paired_runs
from fastguard.demo.config import GUARDED, PLAIN, TITLES
from fastguard.demo.experiment import DemoRun, Results
from fastguard.report.equal_proxy import Spread
from fastguard.report.page import Table

METRICS = {
    "accuracy": "Gold accuracy",
    "frechet": "Fréchet distance",
    "diversity": "Diversity within a class",
}


TITLE = "Flow-GRPO and GRPO-Guard on handwritten digits"


def lead(results: Results) -> str:
    """What was done, in one paragraph."""
    return (
        "A tiny Flux transformer, pretrained on scikit-learn's digits at 64×64 pixels, is trained further by "
        "reinforcement learning against a proxy reward that can be fooled: once with Flow-GRPO, once with "
        f"GRPO-Guard, {_runs(results)}, from the same weights. Judges that the training never sees tell "
        "how much of the gain is real. Every sentence below that states a result was generated from these runs."
    )


def _runs(results: Results) -> str:
    """How many runs the numbers come from."""
    seeds = results.config.seeds
    if len(results.runs) < 2 * seeds:
        return f"{len(results.runs)} of {2 * seeds} runs finished"
    return f"{_count(seeds, 'seed')} each"


def notice(results: Results, partial: bool) -> str:
    """The highlighted line on top, or nothing."""
    notes = []
    if partial:
        expected = 2 * results.config.seeds
        notes.append(f"Partial report: interrupted when {len(results.runs)} of {expected} runs were finished.")
    if results.config.smoke:
        notes.append("Smoke setting (--quick): every stage ran, but the numbers mean nothing.")
    return " ".join(notes)


def short_text(results: Results) -> list[str]:
    """The main findings, one line each; the sections below explain them."""
    runs, pairs = results.runs, paired_runs(results.runs)
    points = []
    flow, guard = probe_statistics(runs, PLAIN), probe_statistics(runs, GUARDED)
    if flow is not None and guard is not None:
        shift = "Flow-GRPO's ratio shifts left" if _is_shifted(flow, guard) else "No clear left shift of the ratio"
        points.append(
            f"{shift}: the mean of ratio − 1 at the last trained step is {_small(flow[0][-1])} with Flow-GRPO and "
            f"{_small(guard[0][-1])} with GRPO-Guard."
        )
    clipped = [(TITLES[name], clip_shares(runs, name)) for name in TITLES]
    shares = [f"{share[0]:.1%} and {share[1]:.1%} with {name}" for name, share in clipped if share is not None]
    if shares:
        points.append(f"Clipped among positive and among negative advantages: {'; '.join(shares)}.")
    level = common_proxy([run for pair in pairs for run in pair])
    if level is not None:
        iterations, frechet = compare(pairs, "iterations", level), compare(pairs, "frechet", level)
        points.append(
            f"Proxy reward {level:.1f} takes {iterations.plain.mean:.1f} iterations with Flow-GRPO and "
            f"{iterations.guarded.mean:.1f} with GRPO-Guard."
        )
        points.append(
            f"Fréchet distance there: {frechet.plain.mean:.1f} with Flow-GRPO and {frechet.guarded.mean:.1f} "
            f"with GRPO-Guard ({results.before.metrics.frechet:.1f} before training); "
            f"{_verdict(frechet.difference, '', 1)}."
        )
        diversity = compare(pairs, "diversity", level)
        points.append(
            f"Diversity within a class there: {diversity.plain.mean:.2f} and {diversity.guarded.mean:.2f} "
            f"({results.before.metrics.diversity:.2f} before); {_verdict(diversity.difference, '', 2)}. Of three gold "
            f"metrics at {_count(len(pairs), 'seed')}, one may differ by chance."
        )
    return points or ["No run was finished."]


def summary_table(results: Results) -> Table:
    """Judges before training, at equal proxy for both objectives, and on real images."""
    before, real, pairs = results.before.metrics, results.reference, paired_runs(results.runs)
    level = common_proxy([run for pair in pairs for run in pair])
    rows = [["Proxy reward (logits)", f"{before.proxy:.2f}", "", "", "", ""]]
    if level is not None:
        rows[0][2:5] = [f"{level:.2f}", f"{level:.2f}", "equal by choice"]
        c = compare(pairs, "iterations", level)
        rows.append(["Iterations to get there", "0", *_cells(c, 1), ""])
    real_values = {
        "accuracy": f"{real.gold_accuracy:.3f}",
        "frechet": f"{real.frechet:.1f}",
        "diversity": f"{real.diversity:.2f}",
    }
    for metric, digits in (("accuracy", 3), ("frechet", 1), ("diversity", 2)):
        start = f"{getattr(before, metric):.{digits}f}"
        middle = ["", "", ""] if level is None else _cells(compare(pairs, metric, level), digits)
        rows.append([METRICS[metric], start, *middle, real_values[metric]])
    header = ["At equal proxy reward", "Pretrained", "Flow-GRPO", "GRPO-Guard", "Difference", "Real images"]
    note = ""
    if level is None:
        header, rows = ["", "Pretrained", "Real images"], [[row[0], row[1], row[-1]] for row in rows]
    else:
        note = f"Means over {_count(len(pairs), 'seed')}; difference = GRPO-Guard − Flow-GRPO, paired by seed"
        note += ", ± half the 95% t-interval. " if len(pairs) > 1 else ". "
    note += (
        f"Fréchet distances of {results.config.eval_samples} samples to 1,000 real images (for real images: half "
        "against half); they depend on the number of samples and compare only within this table."
    )
    return Table(header, rows, note)


def ratio_text(runs: list[DemoRun]) -> list[str]:
    """The importance ratio per denoising step, from the probe."""
    flow, guard = (probe_statistics(runs, name) for name in (PLAIN, GUARDED))
    paragraphs = [
        "The ratio between the new and the rollout policy decides what is clipped, so its distribution should be "
        "centred on 1 and alike at every denoising step. Measured here in a separate probe where nothing else "
        "interferes: one rollout with uniform steps, then its updates without clipping, statistics over the last "
        "epoch. Plotted is ratio − 1, because the deviations are far smaller than 1."
    ]
    if flow is None or guard is None:
        return [*paragraphs, "The comparison needs a finished run of each objective."]
    (flow_bias, flow_std), (guard_bias, guard_std) = flow, guard
    worst_guard = float(np.abs(guard_bias).max())
    shifted = _is_shifted(flow, guard)
    paragraphs.append(
        ("The left shift is there, and RatioNorm removes it: " if shifted else "No clear left shift in this run: ")
        + f"at the last trained step Flow-GRPO's mean ratio − 1 is {_small(flow_bias[-1])}, "
        f"{abs(flow_bias[-1]) / flow_std[-1]:.1f} times the ratio's standard deviation; "
        f"GRPO-Guard's stays within ±{_small(worst_guard)} at every step "
        f"(at most {float(np.abs(guard_bias / guard_std).max()):.2f} times its standard deviation)."
    )
    flow_growth, guard_growth = flow_std.max() / flow_std.min(), guard_std.max() / guard_std.min()
    paragraphs.append(
        f"Between the quietest and the widest step the standard deviation differs {flow_growth:.0f}-fold for "
        f"Flow-GRPO and {guard_growth:.1f}-fold for GRPO-Guard"
        + (": one clip range fits Flow-GRPO's steps badly." if flow_growth > 2 * guard_growth else ".")
    )
    return paragraphs


def clip_text(results: Results) -> list[str]:
    """Who is clipped, by the sign of the advantage."""
    shares = {name: clip_shares(results.runs, name) for name in TITLES}
    sentences = []
    for name, share in shares.items():
        if share is None:
            continue
        positive, negative = share
        sentences.append(
            f"{TITLES[name]} clipped {positive:.1%} of the transitions with a positive advantage and {negative:.1%} of "
            f"those with a negative one, {_balance(positive, negative)}."
        )
    if not sentences:
        return ["No finished run."]
    config = results.config
    caveat = (
        f"Clip ranges ({config.plain.limit:g} for Flow-GRPO, {config.guarded.limit:g} for GRPO-Guard) apply to "
        "differently scaled ratios, so their values say nothing about who is held tighter: compare measured shares."
    )
    if all(share is not None for share in shares.values()):
        totals = {name: float(np.mean(share)) for name, share in shares.items() if share is not None}
        looser = min(totals, key=lambda name: totals[name])
        ratio = max(totals.values()) / max(min(totals.values()), 1e-9)
        caveat += (
            f" Averaged over both signs, {totals[PLAIN]:.1%} (Flow-GRPO) against "
            f"{totals[GUARDED]:.1%} (GRPO-Guard)"
            + (f": {TITLES[looser]} is held less tightly here." if ratio > 1.5 else ": about the same.")
        )
    return [" ".join(sentences), caveat]


def training_text(results: Results) -> list[str]:
    """Proxy against gold over the whole of each run."""
    sentences = []
    before = results.before.metrics
    for name in TITLES:
        runs = [run for run in results.runs if run.objective == name]
        if not runs:
            continue
        last = [run.evaluations[-1].metrics for run in runs]
        proxy, accuracy, frechet, diversity = (
            float(np.mean([getattr(m, field) for m in last])) for field in ("proxy", "accuracy", "frechet", "diversity")
        )
        sentences.append(
            f"{TITLES[name]} moves the proxy from {before.proxy:.1f} to {proxy:.1f} in "
            f"{np.mean([len(run.logs) for run in runs]):.1f} iterations; meanwhile gold accuracy goes from "
            f"{before.accuracy:.3f} to {accuracy:.3f}, the Fréchet distance from {before.frechet:.1f} to "
            f"{frechet:.1f} and diversity from {before.diversity:.2f} to {diversity:.2f}."
        )
    finals = [run.evaluations[-1].metrics for run in results.runs]
    worse = sum(m.proxy > before.proxy and m.frechet > 2 * before.frechet for m in finals)
    if finals:
        sentences.append(
            f"In {worse} of {len(finals)} finished runs the proxy rose while the Fréchet distance more than doubled: "
            + ("the reward is over-optimized." if worse else "no strong over-optimization.")
        )
    return [" ".join(sentences)] if sentences else ["No finished run."]


def equal_proxy_text(results: Results) -> list[str]:
    """Differences at equal proxy, reliable or not."""
    pairs = paired_runs(results.runs)
    level = common_proxy([run for pair in pairs for run in pair])
    fairness = (
        "At an equal number of updates the policy that moved less tends to look better on the gold metrics, whatever "
        "its objective. So the fair comparison is at equal proxy reward: the highest value that all paired runs "
        "reached, with the metrics interpolated between iterations."
    )
    if not pairs:
        return ["The comparison at equal proxy needs a finished run of each objective with the same seed."]
    if level is None:
        return [fairness, "Not every run raised the proxy above its start, so there is no such value here."]
    iterations = compare(pairs, "iterations", level)
    factor = iterations.plain.mean / iterations.guarded.mean
    faster, quotient = ("GRPO-Guard", factor) if factor >= 1 else ("Flow-GRPO", 1 / factor)
    speed = (
        f"At proxy {level:.2f}: {faster} gets there in {quotient:.1f} times fewer iterations at the same learning rate "
        f"({iterations.plain.mean:.1f} for Flow-GRPO, {iterations.guarded.mean:.1f} for GRPO-Guard); "
        f"{_verdict(iterations.difference, 'iterations', 1)}."
    )
    findings = [
        f"{METRICS[metric]}: {_verdict(compare(pairs, metric, level).difference, unit, digits)}."
        for metric, unit, digits in (("frechet", "", 1), ("accuracy", "", 3), ("diversity", "", 2))
    ]
    return [fairness, speed, "GRPO-Guard minus Flow-GRPO at this point: " + " ".join(findings)]


def limits_text(results: Results) -> list[str]:
    """What the numbers above cannot carry."""
    paragraphs = [
        f"This is a toy: {_runs(results)}, ten prompts, one learning rate, one reward, 4,096 "
        "latent elements (Flux at 512×512 has 65,536, where Flow-GRPO's shift grows relative to its noise). It shows "
        "the mechanism; it does not rank the objectives on real models."
    ]
    pairs = paired_runs(results.runs)
    level = common_proxy([run for pair in pairs for run in pair])
    if level is not None:
        difference = compare(pairs, "frechet", level).difference
        if not difference.excludes_zero:
            finding = "shows no reliable difference in Fréchet distance at equal proxy"
        else:
            better = "GRPO-Guard" if difference.mean < 0 else "Flow-GRPO"
            finding = f"has the lower Fréchet distance at equal proxy for {better}, beyond the spread of its seeds"
        paragraphs.append(
            f"Less over-optimization at equal proxy is not established: this run {finding}, and one setting of a toy "
            "cannot settle it either way."
        )
    return paragraphs


def clip_shares(runs: list[DemoRun], name: str) -> tuple[float, float] | None:
    """(positive, negative) clip fraction, mean over iterations and seeds; None without a finished run."""
    logs = [log for run in runs if run.objective == name for log in run.logs]
    if not logs:
        return None
    positive = float(np.mean([log.clip_fraction_positive for log in logs]))
    return positive, float(np.mean([log.clip_fraction_negative for log in logs]))


def probe_statistics(runs: list[DemoRun], name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Ratio bias and standard deviation per step (T,), mean over seeds."""
    probes = [run.probe for run in runs if run.objective == name]
    if not probes:
        return None
    return np.mean([p.ratio_bias for p in probes], axis=0), np.mean([p.ratio_std for p in probes], axis=0)


def _is_shifted(flow: tuple[np.ndarray, np.ndarray], guard: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether Flow-GRPO's ratio lies left of 1 at the last step, far beyond anything that GRPO-Guard's does."""
    return bool(flow[0][-1] < -5 * np.abs(guard[0]).max())


def _balance(positive: float, negative: float) -> str:
    low, high = sorted((positive, negative))
    if high == 0:
        return "that is, nothing"
    if high < 2 * low:
        return "about equally often"
    quotient = f"{high / low:.0f} times less often" if low > 0 else "never"
    return f"positive ones {quotient}" if positive < negative else f"negative ones {quotient}"


def _verdict(difference: Spread, unit: str, digits: int) -> str:
    unit = f" {unit}" if unit else ""
    value = f"difference {_signed(difference.mean, digits)}{unit}"
    if math.isnan(difference.half_width):
        return f"{value} in the single seed, which says nothing about reliability"
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    interval = f"95% interval {_signed(low, digits)} to {_signed(high, digits)}"
    return f"{value}, {interval}, " + ("which excludes 0" if difference.excludes_zero else "no reliable difference")


def _cells(c: Comparison, digits: int) -> list[str]:
    half = "" if math.isnan(c.difference.half_width) else f" ± {c.difference.half_width:.{digits}f}"
    means = [f"{s.mean:.{digits}f}" for s in (c.plain, c.guarded)]
    return [*means, _signed(c.difference.mean, digits) + half]


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _small(value: float) -> str:
    """Two significant digits: -0.018, or 8.0 x 10^-6 below a thousandth."""
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:.2g}".replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    superscript = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa} × 10{superscript}".replace("-", "−")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")
