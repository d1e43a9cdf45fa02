"""README tables and plots from the result files: python benchmarks/plot.py

Rewrites the part of README.md between the `results` markers and the pictures in benchmarks/results/plots/. Devices are
never mixed: each has its own table, from its newest file. What was not measured says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import results

README = results.ROOT / "README.md"
PLOTS = results.RESULTS / "plots"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
COLOURS = {"textbook": "#8c8c8c", "compiled": "#d08a2e", "fused": "#1f6f8b"}
NAMES = {"textbook": "textbook, eager", "compiled": "textbook, torch.compile", "fused": "fastguard"}


def newest(files: list[dict[str, Any]], section: str) -> dict[str, dict[str, Any]]:
    """The newest run of a section for each device."""
    runs = [run for file in files for run in file.get(section, [])]
    runs.sort(key=lambda run: str(run["environment"]["time"]))
    return {run["environment"]["device"]: run for run in runs}


def loss_table(device: str, section: dict[str, Any]) -> str:
    """Times, ratios and memory of the loss on one device."""
    env = section["environment"]
    lines = [
        f"**{device}**, {env['threads']} threads, torch {env['torch']}, {section['dtype'].removeprefix('torch.')}, "
        f"forward + backward, {env['time'][:10]}, commit {env['commit']}:",
        "",
        "| latents | textbook, eager | textbook, `torch.compile` | fastguard | times faster | kept for backward |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape, rows in section["forward_backward"].items():
        cells = [f"{rows[name]['p50_ms']:.2f} ms" for name in ("textbook", "compiled", "fused")]
        faster = f"{rows['textbook']['times_fused']:.1f}, {rows['compiled']['times_fused']:.1f}"
        kept = f"{rows['textbook']['bytes_kept_for_backward']:,} B to {rows['fused']['bytes_kept_for_backward']:,} B"
        lines.append(f"| {shape} | {' | '.join(cells)} | {faster} | {kept} |")
    errors = section["log_ratio_error"]
    lines += [
        "",
        f"Error of the log-ratio against float64 at D = 65,536 and a velocity change of 1e-3, in float32: fastguard "
        f"{errors['fused']:.1e}, textbook {errors['textbook']:.1e}, for log-ratios up to "
        f"{errors['size of the log-ratio']:.1e}.",
    ]
    return "\n".join(lines)


def kernel_table(device: str, section: dict[str, Any]) -> str:
    """Kernels and losses of one GPU."""
    env = section["environment"]
    lines = [
        f"**{device}**, driver {env['driver']}, torch {env['torch']}, triton {env['triton']}, {env['time'][:10]}, "
        f"commit {env['commit']}; CUDA graphs, inputs rotated past L2:",
        "",
        "| latents | copy | loss forward | loss backward | sde_step | fwd + bwd: textbook, compiled, fastguard |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, rows in section["shapes"].items():
        cells = [f"{rows['copy']['gb_per_s']:,.0f} GB/s"]
        for kernel in ("loss forward", "loss backward", "sde_step"):
            cells.append(f"{rows[kernel]['p50_us']:.1f} us, {100 * rows[kernel]['of_copy']:.0f}% of copy")
        times = []
        for name in ("textbook", "compiled", "fused"):
            row = rows[f"{name} forward + backward"]
            times.append(row if isinstance(row, str) else f"{row['p50_us']:.1f} us")
        lines.append(f"| {label} | {' | '.join(cells)} | {', '.join(times)} |")
    return "\n".join(lines)


def loss_plot(device: str, section: dict[str, Any], path: Path) -> None:
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
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=8, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    files = results.load()
    losses, kernels = newest(files, "loss"), newest(files, "kernels")
    parts = []
    for device, section in losses.items():
        path = PLOTS / f"loss_{results.slug(device)}.png"
        loss_plot(device, section, path)
        parts.append(f"{loss_table(device, section)}\n\n![times of the loss]({path.relative_to(results.ROOT)})")
    parts += [kernel_table(device, section) for device, section in kernels.items()]
    if not kernels:
        parts.append("**H100 / H200**: not yet measured. `python benchmarks/gpu_suite.py` does it in one command.")
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + after)
    print(f"wrote {len(parts)} parts to {README.name}" + "".join(f"\n  {path}" for path in sorted(PLOTS.glob("*.png"))))


if __name__ == "__main__":
    main()
