"""The demo's figures and page."""

# ruff: noqa: RUF001 (minus and multiplication signs are meant)
from __future__ import annotations

from pathlib import Path

from fastguard.demo import text
from fastguard.demo.analysis import common_proxy, crossing, paired_runs, proxies
from fastguard.demo.config import GUARDED, PLAIN, TITLES
from fastguard.demo.experiment import DemoRun, Results
from fastguard.report.page import Picture, Section, Table, write_page
from fastguard.report.palette import BLUE, GREY, VERMILLION
from fastguard.report.plots import Line, plot_lines
from fastguard.utils.grids import save_grid

COLORS = {PLAIN: VERMILLION, GUARDED: BLUE}
AXES = {
    "proxy": "proxy reward (logits)",
    "accuracy": "gold accuracy",
    "frechet": "Fréchet distance to real images",
    "diversity": "pixel distance within a class",
}


PICTURE_KINDS = ("training", "gold", "ratio", "clip", "samples")
"""How the names of its pictures begin."""


def write_demo_page(results: Results, out: Path, partial: bool) -> Path:
    """Write PNGs and `report.html` to `out` (which exists); works with any number of finished runs, also none."""
    runs = results.runs
    sections = [
        Section("In short", points=text.short_text(results), table=text.summary_table(results)),
        Section("The ratio: a left shift and its repair", text.ratio_text(runs), pictures=_ratio(runs, out)),
        Section("What is clipped", text.clip_text(results), pictures=_clipping(runs, out)),
        Section("Proxy and gold during training", text.training_text(results), pictures=_training(results, out)),
        Section("Gold at equal proxy", text.equal_proxy_text(results), pictures=_gold_against_proxy(results, out)),
        Section("Samples", [SAMPLES], pictures=_samples(results, out)),
        Section("What this does not show", text.limits_text(results)),
        Section("Settings", table=_settings(results)),
    ]
    notice = text.notice(results, partial)
    return write_page(out / "report.html", text.TITLE, text.lead(results), sections, notice)


SAMPLES = (
    "Every grid starts from the same noise and asks for the same digits, so tiles can be compared one by one. "
    "Trained policies are shown for one seed, at the iteration nearest to equal proxy (once both objectives have "
    "finished it) and at the end (a run stops once its proxy passes the target, so these may be the same)."
)


def _lines(runs: list[DemoRun], x: str, y: str) -> list[Line]:
    """One line per run: metric y over iterations, or against metric x."""
    lines = []
    for run in runs:
        metrics = [evaluation.metrics for evaluation in run.evaluations]
        xs = [float(i) for i in range(len(metrics))] if x == "iteration" else [getattr(m, x) for m in metrics]
        ys = [getattr(m, y) for m in metrics]
        lines.append(Line(TITLES[run.objective], COLORS[run.objective], xs, ys))
    return lines


def _training(results: Results, out: Path) -> list[Picture]:
    if not results.runs:
        return []
    pictures = []
    for metric, label in AXES.items():
        path = plot_lines(
            out / f"training_{metric}.png",
            _lines(results.runs, "iteration", metric),
            "iterations (8 updates each)" if _updates(results) == 8 else "iterations",
            label,
            integer_x=True,
            yscale="log" if metric == "frechet" else "linear",
        )
        alt = f"{label} over iterations, one line per seed and objective"
        pictures.append(Picture(path, f"{label[0].upper()}{label[1:]}, one line per seed", alt))
    return pictures


def _gold_against_proxy(results: Results, out: Path) -> list[Picture]:
    if not results.runs:
        return []
    level = common_proxy([run for pair in paired_runs(results.runs) for run in pair])
    pictures = []
    for metric in ("frechet", "diversity", "accuracy"):
        path = plot_lines(
            out / f"gold_{metric}.png",
            _lines(results.runs, "proxy", metric),
            AXES["proxy"],
            AXES[metric],
            yscale="log" if metric == "frechet" else "linear",
            marker_x=None if level is None else (level, "equal proxy"),
        )
        name = f"{AXES[metric][0].upper()}{AXES[metric][1:]}"
        alt = f"{AXES[metric]} against proxy reward, one line per seed and objective"
        pictures.append(Picture(path, f"{name} against proxy", alt))
    return pictures


def _ratio(runs: list[DemoRun], out: Path) -> list[Picture]:
    if not runs:
        return []
    pictures = []
    for field, label, title in (
        ("ratio_bias", "mean of ratio − 1", "Mean of ratio − 1 (0 is unbiased; symmetric log axis)"),
        ("ratio_std", "standard deviation of the ratio", "Standard deviation of the ratio (log axis)"),
    ):
        lines = []
        for run in runs:
            values = list(getattr(run.probe, field))
            steps = [float(i + 1) for i in range(len(values))]
            lines.append(Line(TITLES[run.objective], COLORS[run.objective], steps, values))
        path = plot_lines(
            out / f"{field}.png",
            lines,
            "denoising step (1 starts from noise)",
            label,
            integer_x=True,
            yscale="symlog" if field == "ratio_bias" else "log",
            linthresh=1e-4,
        )
        pictures.append(Picture(path, title, f"{label} per denoising step, one line per seed and objective"))
    return pictures


def _clipping(runs: list[DemoRun], out: Path) -> list[Picture]:
    pictures = []
    highest = max(
        (100 * max(log.clip_fraction_positive, log.clip_fraction_negative) for run in runs for log in run.logs),
        default=0.0,
    )
    longest = max((len(run.logs) for run in runs), default=1)
    for name in TITLES:
        lines = []
        for run in (run for run in runs if run.objective == name):
            xs = [float(log.epoch + 1) for log in run.logs]
            positive = [100 * log.clip_fraction_positive for log in run.logs]
            negative = [100 * log.clip_fraction_negative for log in run.logs]
            lines.append(Line("positive advantages", COLORS[name], xs, positive))
            lines.append(Line("negative advantages", GREY, xs, negative, style="dashed"))
        if lines:
            path = plot_lines(
                out / f"clip_{name}.png",
                lines,
                "iteration",
                "clipped transitions (%)",
                integer_x=True,
                ylim=(-0.02 * highest - 0.1, 1.08 * highest + 0.1),
                xlim=(0.5, longest + 0.5),
            )
            alt = f"share of clipped transitions of {TITLES[name]} by sign of the advantage"
            pictures.append(Picture(path, TITLES[name], alt))
    return pictures


def _samples(results: Results, out: Path) -> list[Picture]:
    before = results.before
    pictures = [
        Picture(save_grid(out / "samples_real.png", results.reference.tiles), "Real images", "real digits"),
        Picture(
            save_grid(out / "samples_before.png", before.tiles),
            f"Pretrained: proxy {before.metrics.proxy:.1f}",
            "generated digits before training",
        ),
    ]
    pairs = paired_runs(results.runs)
    level = common_proxy([run for pair in pairs for run in pair])
    chosen = pairs[0] if pairs else tuple(results.runs[:1])

    def show(run: DemoRun, index: int, key: str, when: str) -> None:
        path = save_grid(out / f"samples_{key}_{run.objective}.png", run.evaluations[index].tiles)
        title = f"{TITLES[run.objective]} {when}: iteration {index}, proxy {proxies(run)[index]:.1f}"
        pictures.append(Picture(path, title, f"generated digits, {title}"))

    last = {run.objective: len(run.evaluations) - 1 for run in chosen}
    equal = {run.objective: round(crossing(run, level)) for run in chosen} if level is not None else {}
    for run in chosen:
        if run.objective in equal:
            where = "at equal proxy and at the end" if equal == last else "at equal proxy"
            show(run, equal[run.objective], "equal_proxy", where)
    if equal != last:
        for run in chosen:
            show(run, last[run.objective], "after", "at the end")
    return pictures


def _updates(results: Results) -> int:
    update = results.config.train.update
    return update.inner_epochs * update.minibatches


def _settings(results: Results) -> Table:
    config, train, reference = results.config, results.config.train, results.reference
    sampler, update = train.sampler, train.update
    seconds = ", ".join(f"{stage} {value:.0f} s" for stage, value in results.seconds.items())
    rows = [
        ["Policy", "FluxTransformer2DModel, 1 double and 2 single blocks, width 64; 16 tokens × 256 channels"],
        ["Pretraining", f"rectified flow, {config.pretrain.steps:,} steps, batch {config.pretrain.batch_size}"],
        ["Rollout", f"{train.prompts.per_epoch} prompts × {sampler.group_size} images, {sampler.num_steps} steps, "
                    f"shift {sampler.shift}, noise level {sampler.noise_level:g}, first {sampler.sde_steps} trained"],
        ["Updates", f"{update.inner_epochs} passes × {update.minibatches} minibatches per rollout, AdamW "
                    f"{update.learning_rate:g}, gradient norm {update.max_grad_norm:g}"],
        ["Stop", f"proxy {config.target_proxy:g} or {train.run.epochs} iterations"],
        ["Proxy", f"perceptron trained on {config.classifiers.proxy_images_per_class} images per class; recognizes "
                  f"{reference.proxy_accuracy:.1%} of real images"],
        ["Gold", f"convolutional network trained on 797 other images; recognizes {reference.gold_accuracy:.1%} of "
                 "real images that it has not seen"],
        ["Time", seconds],
    ]  # fmt: skip
    return Table(["Setting", "Value"], rows, prose=True)
