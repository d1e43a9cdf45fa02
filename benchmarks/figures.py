"""The results as pictures: one device each, from its newest rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from bench_kernels import KERNELS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import NAMES, Rows

COLOURS = {"textbook": "#8c8c8c", "compiled": "#d08a2e", "fused": "#1f6f8b"}
KERNEL_COLOURS = dict(zip(KERNELS, ("#1f6f8b", "#7db3c4", "#6a8d3f"), strict=True))


def save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def loss_plot(path: Path, device: str, section: dict[str, Any]) -> None:
    """Grouped bars: forward + backward per shape, logarithmic, with the p20 to p80 range."""
    shapes = list(section["forward_backward"])
    figure, axis = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for offset, name in enumerate(NAMES):
        rows = [section["forward_backward"][shape][name] for shape in shapes]
        middle = [row["p50_ms"] for row in rows]
        spread = [
            [row["p50_ms"] - row["p20_ms"] for row in rows],
            [row["p80_ms"] - row["p50_ms"] for row in rows],
        ]
        positions = [index + 0.27 * (offset - 1) for index in range(len(shapes))]
        axis.bar(positions, middle, width=0.25, color=COLOURS[name], label=NAMES[name])
        axis.errorbar(positions, middle, yerr=spread, fmt="none", ecolor="#333333", elinewidth=0.8)
        for position, row in zip(positions, rows, strict=True):
            axis.annotate(f"{row['p50_ms']:.3g}", (position, row["p80_ms"]), xytext=(0, 3),
                          textcoords="offset points", ha="center", fontsize=7)  # fmt: skip
    axis.set_yscale("log")
    axis.set_xticks(range(len(shapes)), shapes)
    axis.set_xlabel("shape of the latents")
    axis.set_ylabel("forward + backward, ms (log)")
    axis.set_title(f"GRPO-Guard loss, {device}", fontsize=10, loc="left")
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.0))
    save(figure, path)


def kernels_plot(path: Path, device: str, rows: Rows) -> None:
    """Left: the whole loss for every shape. Right: the share of the copy bandwidth of each kernel."""
    ran = {label: row for label, row in rows.items() if "error" not in row}
    places = list(range(len(ran)))
    figure, (times, shares) = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained", sharey=True)
    for name, label in NAMES.items():
        points = [
            (row[f"{name} loss"]["both"]["p50_us"], place)
            for place, row in zip(places, ran.values(), strict=True)
            if not isinstance(row[f"{name} loss"]["both"], str)
        ]
        times.scatter(*zip(*points, strict=True), color=COLOURS[name], label=label, s=26, zorder=3)
    times.set_xscale("log")
    times.set_xlabel("loss, forward + backward, us (log)")
    times.set_yticks(places, list(ran))
    times.invert_yaxis()
    for offset, name in enumerate(KERNELS):
        values = [100 * row[name]["of_copy"] for row in ran.values()]
        heights = [place + 0.27 * (offset - 1) for place in places]
        shares.barh(heights, values, height=0.25, color=KERNEL_COLOURS[name], label=name)
    goal_line(shares, 85)
    shares.set_xlabel("of the copy bandwidth, % (goal from 256 MB on: 85)")
    for axis in (times, shares):
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(-0.02, 1.0))
    figure.suptitle(f"Loss and step, {device}, bf16", fontsize=10, x=0.01, ha="left")
    save(figure, path)


def goal_line(axis: Axes, value: float) -> None:
    axis.axvline(value, color="#b03030", linewidth=0.9, linestyle="--", zorder=4)


def flux_plot(path: Path, device: str, kernels: Rows, blocks: Rows) -> None:
    """Left: the share of the copy bandwidth of each kernel. Right: each form of a block, times eager."""
    ran = {name: row for name, row in kernels.items() if "error" not in row}
    figure, (shares, times) = plt.subplots(1, 2, figsize=(11.5, 4.8), layout="constrained", width_ratios=(1.15, 1))
    places = range(len(ran))
    backward = ["backward" in name or "gradient" in name for name in ran]
    colours = [KERNEL_COLOURS["loss backward" if back else "loss forward"] for back in backward]
    shares.barh(places, [100 * row["of_copy"] for row in ran.values()], color=colours)
    # The goal of each, on its own bar.
    goals = [70 if back else 80 for back in backward]
    shares.vlines(goals, [p - 0.4 for p in places], [p + 0.4 for p in places], color="#b03030", linewidth=1.2)
    shares.set_yticks(places, list(ran), fontsize=8)
    shares.invert_yaxis()
    shares.set_xlabel("of the copy bandwidth, % (red: the goal)")
    forms = [
        (f"{kind}, {name}", form["training_times_eager"])
        for kind, row in blocks.items()
        for name, form in row.items()
        if isinstance(form, dict) and "training_times_eager" in form
    ]
    bars = [
        COLOURS["fused" if "fused" in name else "compiled" if "compiled" in name else "textbook"] for name, _ in forms
    ]
    times.barh(range(len(forms)), [value for _, value in forms], color=bars)
    goal_line(times, 1.25)
    times.set_yticks(range(len(forms)), [name for name, _ in forms], fontsize=8)
    times.invert_yaxis()
    times.set_xlabel("forward + backward of a block, times eager (goal: 1.25)")
    figure.suptitle(f"Flux kernels and blocks, {device}, 4,608 tokens, bf16", fontsize=10, x=0.01, ha="left")
    save(figure, path)


def train_step_plot(path: Path, device: str, cases: Rows) -> None:
    """Peak of the update with the planner's prediction, and seconds a transition, for the cases that ran."""
    ran = {name: row for name, row in cases.items() if "error" not in row}
    height = 1.2 + 0.24 * len(ran)
    figure, (memory, times) = plt.subplots(1, 2, figsize=(9.5, height), layout="constrained", sharey=True)
    places = range(len(ran))
    kinds = ["compiled" if row["compile"] else "fused" if row["fuse"] else "textbook" for row in ran.values()]
    colours = [COLOURS[kind] for kind in kinds]
    memory.barh(places, [row["update"]["peak_bytes"] / 2**30 for row in ran.values()], color=colours)
    planned = [row["planned"]["peak_bytes"]["update"] / 2**30 for row in ran.values()]
    memory.scatter(planned, places, marker="|", s=110, color="#111111", label="planned", zorder=3)
    memory.set_xlabel("peak of the update, GiB")
    memory.legend(frameon=False, fontsize=8)
    middle = [row["update"]["s_per_transition"] for row in ran.values()]
    times.barh(places, middle, color=colours)
    for place, row in enumerate(ran.values()):
        mfu = row["update"]["mfu"]
        times.annotate("" if mfu is None else f"MFU {mfu:.0%}", (middle[place], place), xytext=(3, 0),
                       textcoords="offset points", va="center", fontsize=7)  # fmt: skip
    times.set_xlabel("update, seconds a transition")
    times.margins(x=0.2)
    memory.set_yticks(places, list(ran), fontsize=8)
    memory.invert_yaxis()
    memory.set_title(f"Training step of Flux, {device}", fontsize=10, loc="left")
    save(figure, path)
