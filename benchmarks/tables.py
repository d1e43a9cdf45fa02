"""The results as Markdown tables and pictures: pivots of the rows, with only what was measured, losing cases included.

    python benchmarks/tables.py                                print the tables
    python benchmarks/tables.py --into PAGE [--plots FOLDER]   write them between the page's markers, and the pictures

Devices are never mixed: each has its own tables, from the last measurement of each case.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import rows

from fastguard.config import UpdateConfig

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
KEYS = ["device", "suite", "case", "contender", "phase"]
ABOUT = ["driver", "threads", "torch", "triton", "commit", "dirty", "date"]
FORMATS = {
    "times": "{}", "times_base": "{:.2f}x", "of_copy": "{:.0%} of copy", "bandwidth": "{:,.0f} GB/s",
    "peak_new_mib": "{:,.1f} MiB new", "error": "{:.1e}", "largest": "of {:.1e}", "moved_mb": "{:.1f} MB",
    "least_mb": "of {:.1f} MB", "of_least": "{:.3f}", "per_step": "{:.3f} s a step",
    "p50_per_transition": "{:.3f} s a transition", "images_per_s": "{:.3f} images/s", "peak_gib": "{:.1f} GiB",
    "planned_gib": "planned {:.1f} GiB", "kept_mib": "{:,.1f} MiB kept", "kept_b": "{:.0f} B kept",
    "mfu": "MFU {:.1%}", "of_update": "{:.3%} of the update", "executed_per_needed": "{:.2f} FLOPs for each needed",
    "passed tests": "{:.0f} passed", "note": "{}",
}  # fmt: skip
"""of what is shown in a cell, in this order"""
MEASURED = [
    "p20", "p50", "p80", "of_copy", "bandwidth", "peak_new", "kept", "error", "largest", "moved", "least", "per_step",
    "per_image", "p50_per_transition", "peak", "needed", "of_update", "executed_per_needed", "passed tests", "failed",
    "skipped", "out of memory", "worst_log_ratio_of_clip_range",
]  # fmt: skip
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}
"""dense bf16 of the SXM cards, from the data sheets"""
BASES = {"loss": "fused", "host": "fused", "blocks": "fused pointwise"}
"""whom the others are compared with; in an experiment, the first choice is the product's"""
MARGIN = 0.02
"""A choice is better if it is faster by more than this, and by more than the spread (p20 to p80) of both."""
COLOURS = {"naive": "#8c8c8c", "eager": "#8c8c8c", "compiled": "#d08a2e", "fused": "#1f6f8b", "fused none": "#7db3c4"}
Frame = Any  # pandas has no annotations that mypy could read here


def load(folder: Path = rows.RESULTS) -> Frame:
    """A line for each device, case, contender and phase, a column for each metric, and what follows from them."""
    found = pd.DataFrame(rows.newest(rows.load(folder)), columns=[*KEYS, "metric", "value", "note", *ABOUT])
    order = pd.MultiIndex.from_frame(found[KEYS].drop_duplicates())
    wide = found.pivot_table(index=KEYS, columns="metric", values="value").reindex(index=order, columns=MEASURED)
    wide = wide.join(found.groupby(KEYS)[["note", *ABOUT]].first()).reset_index()
    tuned = wide[wide.suite == "tuning"].groupby("case").contender.first()
    bases = wide[wide.contender == wide.suite.map(BASES).astype(object).fillna(wide.case.map(tuned).astype(object))]
    same = ["device", "suite", "case", "phase"]
    wide = wide.merge(bases[[*same, "p20", "p50"]], how="left", suffixes=("", "_base"), on=same)
    wide["times_base"] = wide.p50 / wide.p50_base
    trained = wide.suite == "train_step"
    wide["times"] = [f"{line.p50:,.1f} us ({line.p20:,.1f} to {line.p80:,.1f})" for line in wide.itertuples()]
    wide["times"] = wide.times.where(wide.p50.notna() & ~trained)
    plan = wide[wide.suite == "plan"].sort_values("date").drop_duplicates(["case", "phase"], keep="last")
    phases = wide.phase.replace("rollout beside the optimizer", "rollout")
    asked = pd.MultiIndex.from_arrays(
        [wide.case.str.removesuffix("-compiled"), phases]
    )  # the planner knows no compiler
    for name, column in (("planned", "peak"), ("tflop", "needed")):
        wide[name] = pd.Series(plan.set_index(["case", "phase"])[column].reindex(asked).to_numpy()).where(trained)
    wide["planner_error"] = wide.planned / wide.peak - 1
    seconds = wide.p50_per_transition.fillna(wide.per_step)
    wide["images_per_s"] = 1 / wide.per_image
    wide["mfu"] = wide.tflop / seconds / wide.device.map(PEAK_TFLOPS).astype(float)
    for unit, size in {"mb": 1e6, "mib": 2**20, "gib": 2**30}.items():
        for name in ("peak_new", "moved", "least", "peak", "planned"):
            wide[f"{name}_{unit}"] = wide[name] / size
    wide["kept_mib"], wide["kept_b"] = wide.kept.where(wide.kept >= 2**20) / 2**20, wide.kept.where(wide.kept < 2**20)
    wide["of_least"] = wide.moved / wide.least
    return wide


@dataclass(frozen=True)
class Goal:
    """A number to reach: every line of `query` that has this column must be on the right side of the limit."""

    what: str
    limit: float
    query: str
    column: str
    show: str = "{:.0%}"
    at_most: bool = False
    lines: int = 1
    """that must be there for a verdict"""


KERNELS = "suite == 'blocks' and contender == 'kernel' and {} case.str.contains('_bwd')"
STEPS = "suite == 'train_step' and not case.str.contains('compiled')"
LARGE = "suite == 'loss' and contender == 'kernel' and case in ['8x16777216 bf16', '8x67108864 bf16']"
LOSS = "suite == 'loss' and case == '8x4096x64 bf16' and phase == 'both' and contender == "
BLOCK = "suite == 'blocks' and phase == 'training' and contender == "
SANITIZER = "phase == 'compute-sanitizer' and skipped != 1"
CASE = "suite == 'train_step' and case == "
NF4 = f"{CASE}'lora-512-nf4-x3-block'"
CLIPPED = "worst_log_ratio_of_clip_range"
GOALS = (
    Goal("kernels' tests on the GPU: red parts", 0, "phase == 'pytest'", "red", "{:.0f}", True, 3),
    Goal("compute-sanitizer: tools that found something", 0, SANITIZER, "red", "{:.0f}", True),
    Goal("loss, Flux 1024^2, batch 8, bf16: faster than naive", 30, f"{LOSS}'naive'", "times_base", "{:.1f}x"),
    Goal("the same: faster than torch.compile of it", 3, f"{LOSS}'compiled'", "times_base", "{:.1f}x"),
    Goal("loss and step, 256 MB and more: of the copy bandwidth", 0.85, LARGE, "of_copy"),
    Goal("each block kernel forward: of the copy bandwidth", 0.8, KERNELS.format("not"), "of_copy"),
    Goal("each block kernel backward: of the copy bandwidth", 0.7, KERNELS.format(""), "of_copy"),
    Goal("a fused block, forward + backward: faster than eager", 1.25, f"{BLOCK}'eager'", "times_base", "{:.2f}x"),
    Goal("the same: against torch.compile", 1.0, f"{BLOCK}'compiled'", "times_base", "{:.2f}x"),
    Goal("update at 1024^2, LoRA, no recomputation: MFU", 0.45, f"{CASE}'lora-1024-none' and phase == 'update'", "mfu"),
    Goal("the same, two images at a time: MFU", 0.45, f"{CASE}'lora-1024-x2-none' and phase == 'update'", "mfu"),
    Goal("planner against the measured peaks: error", 0.05, STEPS, "planner_error", "{:.1%}", True),
    Goal("all parameters trained in 80 GB", 80e9 / 2**30, f"{CASE}'full-512-block'", "peak_gib", "{:.1f} GiB", True),
    Goal("LoRA, 512^2, nf4, recompute block: peak", 12, NF4, "peak_gib", "{:.1f} GiB", True),
    Goal("LoRA, 512^2, recompute block: peak", 30, f"{CASE}'lora-512-block'", "peak_gib", "{:.1f} GiB", True),
    Goal("LoRA, 1024^2, recompute block: peak", 30, f"{CASE}'lora-1024-block'", "peak_gib", "{:.1f} GiB", True),
    Goal("all weights, 512^2, recompute block: peak", 78, f"{CASE}'full-512-block'", "peak_gib", "{:.1f} GiB", True),
    Goal("first log-ratio after a rollout, of the clip range", UpdateConfig.parity, STEPS, CLIPPED, "{:.2%}", True),
)  # fmt: skip


def verdict(goal: Goal, found: Frame) -> str | None:
    """What was found on one device; None if it was not measured."""
    part = found.query(goal.query)
    part = part.assign(red=part.failed.fillna(0))
    if goal.column == "peak_gib" and part["out of memory"].any():
        return "out of memory: **missed**"
    values = part.set_index("case")[goal.column].dropna().abs()
    if len(values) < goal.lines and not values.gt(0).any():
        return None
    reach = values <= goal.limit if goal.at_most else values >= goal.limit
    worst = (values.idxmax if goal.at_most else values.idxmin)() if len(values) else ""
    which = f" ({worst}; {reach.sum()} of {len(values)} reach it)" if len(values) > 1 else ""
    extreme = values.max() if goal.at_most else values.min()
    return f"{goal.show.format(extreme)}{which}: {'reached' if reach.all() else '**missed**'}"


def goals_table(found: Frame) -> str:
    """Goals down, GPUs across; only what was measured."""
    gpus = [device for device in found.device.unique() if not device.startswith("CPU")]
    verdicts = {gpu: [verdict(goal, found[found.device == gpu]) for goal in GOALS] for gpu in gpus}
    limits = [f"{'<=' if goal.at_most else '>='} {goal.show.format(goal.limit)}" for goal in GOALS]
    table = pd.DataFrame({"figure": [goal.what for goal in GOALS], "goal": limits, **verdicts})
    return markdown(table.dropna(subset=gpus, how="all")) if gpus else ""


BOTH, LAUNCH = "forward + backward", "bf16, CUDA graphs, inputs rotated past L2"
BY_CASE, BY_PHASE, BY_CONTENDER = ["case"], ["case", "phase"], ["case", "contender"]
TABLES: tuple[tuple[str, str, str, list[str], str], ...] = (
    (f"The loss, {BOTH}, called from Python", "loss", "phase == 'both from Python'", BY_CASE, "contender"),
    ("The loss: memory, and on a GPU times, CUDA graphs, inputs rotated past L2", "loss",
     "phase in ['forward', 'both']", BY_PHASE, "contender"),
    (f"A call of the loss, {BOTH}: small samples on a CPU, and what a GPU's host has to do", "host",
     "phase in ['both from Python', 'both on the host']", BY_CASE, "contender"),
    (f"Kernels of loss and step, {LAUNCH}", "loss", "contender in ['kernel', 'copy']", BY_CASE, "phase"),
    ("The rollout's step", "loss", "phase in ['step', 'step from Python']", BY_PHASE, "contender"),
    ("Largest error of the log-ratio against float64, in float32, at a velocity change of 1e-3; the largest log-ratio",
     "loss", "phase == 'log-ratio'", BY_CASE, "contender"),
    (f"Kernels of fused blocks, 4,608 tokens, {LAUNCH}", "blocks", "phase in ['launch', 'copy']", BY_CASE, "contender"),
    ("Whole blocks at 1024^2, bf16, LoRA", "blocks", "phase in ['inference', 'training'] and case != 'attention'",
     BY_CONTENDER, "phase"),
    ("PyTorch's attention, 4,608 tokens, 24 heads of 128, bf16; the error of its gradients against float64", "blocks",
     "case == 'attention' and phase != ''", ["contender"], "phase"),
    ("Bytes that each kernel of fused blocks moves, of the least possible; 4,608 tokens, bf16", "bytes", "case != ''",
     BY_CASE, "phase"),
    ("Training step of Flux, 11.9 billion random weights, held to 80 GB; the planner knows no compiler", "train_step",
     "phase not in ['', 'build', 'matmul']", BY_CASE, "phase"),
    ("Predicted by the planner, not measured, for cards of 80 GB (74.5 GiB)", "plan",
     "phase != 'both' and not case.str.contains('compiled')", BY_CASE, "phase"),
    ("Tests and compute-sanitizer", "validation", "phase != ''", BY_CASE, "phase"),
)  # fmt: skip


def markdown(table: Frame) -> str:
    """Errors' messages are put on one line."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.fillna("").to_numpy().tolist()]
    plain = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in plain)


def cell(line: Any) -> str:
    """All that was found."""
    return ", ".join(show.format(line[name]) for name, show in FORMATS.items() if name in line and pd.notna(line[name]))


def grid(part: Frame, index: list[str], columns: str) -> str:
    """A pivot of cells, in the order in which they were measured."""
    cells = part.assign(cell=[line["cell"] if "cell" in line else cell(line) for _, line in part.iterrows()])
    table = cells.pivot_table(index=index, columns=columns, values="cell", aggfunc="first", sort=False)
    return markdown(table[list(dict.fromkeys(cells[columns]))].reset_index())


def experiments(found: Frame) -> Iterator[str]:
    """Choices across; in bold the fastest, if it beats the product's by more than noise and MARGIN; else that."""
    names = found.case.str.rsplit(": ", n=1).str
    found = found.assign(experiment=names[0], case=names[-1])
    for (name, phase), lines in found.groupby(["experiment", "phase"], sort=False):
        clear = (lines.p80 < lines.p20_base) & (lines.p50 < (1 - MARGIN) * lines.p50_base)
        eligible = lines[clear | (lines.p50 == lines.p50_base)]
        best = eligible.loc[eligible.groupby("case").p50.idxmin()].index
        cells = [f"**{cell(line)}**" if index in best else cell(line) for index, line in lines.iterrows()]
        yield f"*{name}*, {phase}:\n\n{grid(lines.assign(cell=cells), ['case'], 'contender')}"


def stack(part: Frame) -> str:
    """Versions, days and commits of some lines, which may come from several runs."""

    def each(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(str(value) for value in values if pd.notna(value)))

    commits = each(f"{c}{' with changes' if dirty else ''}" for c, dirty in zip(part.commit, part.dirty, strict=True))
    beside = f"driver {each(part.driver)}" if part.driver.notna().any() else f"{each(part.threads)} threads"
    versions = f"torch {each(part.torch)}, triton {each(part.triton)}"
    return f"{beside}, {versions}, {each(part.date.str[:10])}, commit {commits}"


def pages(found: Frame) -> Iterator[str]:
    """Everything that was measured, device by device."""
    for device, of_device in found.groupby("device", sort=False):
        for title, suite, query, index, columns in TABLES:
            part = of_device[of_device.suite == suite].query(query)
            if len(part):
                yield f"**{title}**: {device}, {stack(part)}\n\n{grid(part, index, columns)}"
        yield from experiments(of_device[of_device.suite == "tuning"])
        failed = of_device[(of_device.phase == "") & of_device.note.notna()]
        if len(failed):
            yield f"Without a result, {device}:\n\n{markdown(failed[['suite', 'case', 'contender', 'note']])}"
    if goals := goals_table(found):
        yield f"**Numbers to reach on a GPU**\n\n{goals}"


PICTURES: tuple[tuple[str, str, str, str, list[float]], ...] = (
    ("loss", "suite == 'loss' and phase == 'both from Python'", "p50", "contender", []),
    ("loss_graphs", "suite == 'loss' and phase == 'both'", "p50", "contender", []),
    ("loss_kernels", "suite == 'loss' and contender == 'kernel'", "of_copy", "phase", [0.85]),
    ("block_kernels", "suite == 'blocks' and contender == 'kernel'", "of_copy", "contender", [0.8, 0.7]),
    ("blocks", "suite == 'blocks' and phase == 'training' and case != 'attention'", "p50", "contender", []),
    ("train_step", "suite == 'train_step' and phase == 'update'", "peak_gib", "contender", []),
)
LABELS = {"p50": "forward + backward, us", "of_copy": "share of the copy bandwidth (goal dashed)",
          "peak_gib": "peak of the update, GiB"}  # fmt: skip


def draw(found: Frame, folder: Path) -> Iterator[Path]:
    """Bars, with the p20 to p80 range of times, and the planner's peaks beside those measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for device, of_device in found.groupby("device", sort=False):
        for stem, query, column, columns, goals in PICTURES:
            part = of_device.query(query).dropna(subset=column)
            if not len(part):
                continue
            bars, low, high = (part.pivot_table(index="case", columns=columns, values=name, sort=False, dropna=False)
                               for name in (column, "p20", "p80"))  # fmt: skip
            spread = [[bars[name] - low[name], high[name] - bars[name]] for name in bars] if column == "p50" else None
            if column == "peak_gib":
                bars = bars.assign(planned=part.set_index("case").planned_gib)
            figure, axis = plt.subplots(figsize=(8, 1.4 + 0.16 * bars.size), layout="constrained")
            colours = [COLOURS.get(name) or f"C{index}" for index, name in enumerate(bars)]
            # Losses of all sizes differ a thousandfold; blocks hardly differ, and their bars begin at 0.
            log = column == "p50" and stem != "blocks"
            bars.plot.barh(ax=axis, logx=log, color=colours, xerr=spread, width=0.8)
            for goal in goals:
                axis.axvline(goal, color="#b03030", linewidth=0.9, linestyle="--")
            axis.set(title=device, xlabel=LABELS[column] + " (log)" * log, ylabel="")
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside the bars, not over them
            axis.invert_yaxis()
            path = folder / f"{stem}_{rows.slug(device)}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            yield path


def write(page: Path, found: Frame, plots: Path) -> None:
    """Put tables and pictures between the markers of a page. Raises ValueError if it has none."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no {BEGIN} with {END} after it")
    pictures = [f"![{path.stem}]({os.path.relpath(path, page.parent)})" for path in draw(found, plots)]
    page.write_text("\n\n".join([before + BEGIN, *pages(found), *pictures, END + after]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=rows.RESULTS, help="folder of the result files")
    parser.add_argument("--into", type=Path, metavar="PAGE", help=f"write between {BEGIN} and {END} of this page")
    parser.add_argument("--plots", type=Path, default=rows.ROOT / "docs" / "images", help="folder of the pictures")
    args = parser.parse_args()
    try:
        found = load(args.out)
        if args.into:
            write(args.into, found, args.plots)
        else:
            print("\n\n".join(pages(found)))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
