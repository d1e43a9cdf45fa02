"""README tables and plots from the result files: python benchmarks/plot.py

Rewrites the part of README.md between the `results` markers and the pictures in benchmarks/results/plots/. Devices are
never mixed: each has its own table, from its newest file. What was not measured says so; what was only predicted, too.
"""

from __future__ import annotations

from collections.abc import Iterable
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


def newest_anywhere(files: list[dict[str, Any]], section: str) -> dict[str, Any] | None:
    """The newest run of a section that does not depend on the machine."""
    runs = newest(files, section).values()
    return max(runs, key=lambda run: str(run["environment"]["time"]), default=None)


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


def newest_cases(files: list[dict[str, Any]], section: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The newest row of each case for each device, with its `environment`: cases may be measured one by one."""
    devices: dict[str, dict[str, dict[str, Any]]] = {}
    runs = [run for file in files for run in file.get(section, [])]
    for run in sorted(runs, key=lambda run: str(run["environment"]["time"])):
        env = run["environment"]
        for name, row in run["cases"].items():
            devices.setdefault(env["device"], {})[name] = {**row, "environment": env, "memory_gb": run["memory_gb"]}
    return devices


def gib(n_bytes: float | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / 2**30:.1f}"


def case_label(row: dict[str, Any]) -> str:
    blocks = "fused" if row["fuse"] else "unfused"
    return f"{row['train']}, {row['size']}^2, {blocks}, recompute {row['recompute']}, micro-batch {row['micro_batch']}"


def distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def train_step_table(device: str, cases: dict[str, dict[str, Any]]) -> str:
    """The training step of the whole model on one GPU, beside what was planned and what was to be reached."""
    envs = [row["environment"] for row in cases.values()]
    stacks = distinct(f"driver {env['driver']}, torch {env['torch']}, triton {env['triton']}" for env in envs)
    lines = [
        f"**{device}**, one training step of Flux (11.9 billion random weights), {stacks}, held to "
        f"{distinct(row['memory_gb'] for row in cases.values())} GB, "
        f"{distinct(env['time'][:10] for env in envs)}, commit {distinct(env['commit'] for env in envs)}; "
        "peaks in GiB, in parentheses the planner's:",
        "",
        "| case | rollout: s an image, peak | update: s a transition (p20 to p80), peak | MFU | loss | goals |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    words = {True: "reached", False: "**missed**", None: "not measured"}
    for row in cases.values():
        planned = {phase: gib(n) for phase, n in row["planned"]["peak_bytes"].items()}
        said = [f"{goal['what']}: {goal['measured']}, {words[goal['reached']]}" for goal in row["goals"]]
        if "error" in row:
            fits = "fits" if row["planned"]["fits"] else "does not fit"
            cells = ["", f"{row['error']} (planner: {planned['update']}, {fits})", "", ""]
        else:
            rollout, update = row["rollout"], row["update"]
            low, high = (update[f"{p}_s"] / row["transitions_per_update"] for p in ("p20", "p80"))
            cells = [
                f"{rollout['s_per_image']:.3f}, {gib(rollout['peak_bytes'])} ({planned['rollout']})",
                f"{update['s_per_transition']:.3f} ({low:.3f} to {high:.3f}), "
                f"{gib(update['peak_bytes'])} ({planned['update']})",
                "-" if update["mfu"] is None else f"{update['mfu']:.1%}",
                f"{row['loss']['share']:.3%}",
            ]
        lines.append(f"| {case_label(row)} | {' | '.join(cells)} | {'; '.join(said)} |")
    return "\n".join(lines)


def planned_table(files: list[dict[str, Any]]) -> str:
    """What the planner says of the same cases: the newest, from any machine, since it needs no GPU."""
    run = newest_anywhere(files, "plan_train_step")
    if run is None:
        return ""
    env = run["environment"]
    lines = [
        f"Predicted, not measured: what the memory planner says of those cases, in GiB (`python "
        f"benchmarks/bench_train_step.py --plan`, {env['time'][:10]}, commit {env['commit']}):",
        "",
        f"| case | peak of the rollout | peak of the update | in {run['memory_gb']:g} GB "
        f"({gib(run['memory_gb'] * 1e9)} GiB) | FLOPs executed for each needed | goal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in run["cases"].values():
        peaks, goal = row["peak_bytes"], row["peak_goal_gib"]
        said = "" if goal is None else f"<= {goal:g} GiB"
        fits = "fits" if row["fits"] else "too large"
        cells = [gib(peaks["rollout"]), gib(peaks["update"]), fits, f"{row['executed_per_needed_flop']:.2f}", said]
        lines.append(f"| {case_label(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def flux_block_table(device: str, section: dict[str, Any]) -> str:
    """Flux kernels and blocks of one GPU."""
    env = section["environment"]
    lines = [
        f"**Flux kernels and blocks, {device}**, driver {env['driver']}, torch {env['torch']}, triton {env['triton']}, "
        f"{env['time'][:10]}, commit {env['commit']}; 4,608 tokens, CUDA graphs, inputs rotated past L2; copying: "
        f"{section['kernels']['copy']['gb_per_s']:,.0f} GB/s:",
        "",
        "| kernel | us (p20 to p80) | of copy | eager, us |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in section["kernels"].items():
        if name != "copy":
            eager = f"{row['eager']['p50_us']:.1f}" if "eager" in row else ""
            spread = f"{row['p50_us']:.1f} ({row['p20_us']:.1f} to {row['p80_us']:.1f})"
            lines.append(f"| {name} | {spread} | {row['of_copy']:.0%} | {eager} |")
    lines += [
        "",
        "| block | inference, ms | times eager | training, ms | times eager | kept, MiB |",
        "| --- " * 6 + "|",
    ]
    for kind, forms in section["blocks"].items():
        for name, row in forms.items():
            kept = f"{row['kept_bytes'] / 2**20:.0f}" if "kept_bytes" in row else ""
            cells = [
                f"{row[phase]['p50_us'] / 1e3:.2f} | {row[f'{phase}_times_eager']:.2f}"
                for phase in ("inference", "training")
            ]
            lines.append(f"| {kind}, {name} | {' | '.join(cells)} | {kept} |")
    return "\n".join(lines)


def flux_bytes_table(files: list[dict[str, Any]]) -> str:
    """Bytes that each Flux kernel moves: the newest count, from any machine, since it needs no GPU."""
    run = newest_anywhere(files, "flux_bytes")
    if run is None:
        return ""
    env = run["environment"]
    lines = [
        "Bytes that each Flux kernel moves, counted from its launches at 4,608 tokens of 3,072 channels in bfloat16, "
        f"beside the least that any method could (`python benchmarks/bench_flux_block.py --bytes`, {env['time'][:10]}, "
        f"commit {env['commit']}):",
        "",
        "| kernel | moved | least | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in run["kernels"].items():
        moved, least = row["moved"], row["least"]
        lines.append(f"| {name} | {moved / 1e6:.1f} MB | {least / 1e6:.1f} MB | {moved / least:.3f} |")
    return "\n".join(lines)


def flux_parts(files: list[dict[str, Any]]) -> list[str]:
    """Times where they were measured, and the count of bytes."""
    parts = [flux_block_table(device, section) for device, section in newest(files, "flux_blocks").items()]
    if not parts:
        parts.append(
            "**Flux kernels and blocks on an H100 or H200**: not yet measured. `python benchmarks/bench_flux_block.py "
            "--save` does it on a GPU; it is part of gpu_suite.py."
        )
    return parts + [text for text in (flux_bytes_table(files),) if text]


def train_step_plot(device: str, cases: dict[str, dict[str, Any]], path: Path) -> None:
    """Peak of the update with the planner's prediction, and seconds a transition, for the cases that ran."""
    ran = {name: row for name, row in cases.items() if "error" not in row}
    figure, (memory, times) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained", sharey=True)
    places = range(len(ran))
    memory.barh(places, [row["update"]["peak_bytes"] / 2**30 for row in ran.values()], color=COLOURS["fused"])
    planned = [row["planned"]["peak_bytes"]["update"] / 2**30 for row in ran.values()]
    memory.scatter(planned, places, marker="|", s=160, color=COLOURS["compiled"], label="planned", zorder=3)
    memory.set_xlabel("peak of the update, GiB")
    memory.legend(frameon=False, fontsize=8)
    middle = [row["update"]["s_per_transition"] for row in ran.values()]
    times.barh(places, middle, color=COLOURS["fused"])
    for place, row in enumerate(ran.values()):
        mfu = row["update"]["mfu"]
        times.annotate("" if mfu is None else f"MFU {mfu:.0%}", (middle[place], place), xytext=(3, 0),
                       textcoords="offset points", va="center", fontsize=7)  # fmt: skip
    times.set_xlabel("update, seconds a transition")
    times.margins(x=0.2)
    memory.set_yticks(places, list(ran))
    memory.invert_yaxis()
    memory.set_title(f"Training step of Flux, {device}", fontsize=10, loc="left")
    for axis in (memory, times):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def train_step_parts(files: list[dict[str, Any]]) -> list[str]:
    """Measured where it was; else the planner's predictions, called by their name."""
    parts = []
    for device, cases in newest_cases(files, "train_step").items():
        parts.append(train_step_table(device, cases))
        if any("error" not in row for row in cases.values()):
            path = PLOTS / f"train_step_{results.slug(device)}.png"
            train_step_plot(device, cases, path)
            parts[-1] += f"\n\n![training step]({path.relative_to(results.ROOT)})"
    if not parts:
        parts.append(
            "**Training step of the whole of Flux**: not yet measured. `python benchmarks/bench_train_step.py --save` "
            "does it on a GPU of 80 GB; it is part of gpu_suite.py."
        )
        parts += [text for text in (planned_table(files),) if text]
    return parts


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
    parts += flux_parts(files)
    parts += train_step_parts(files)
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + after)
    print(f"wrote {len(parts)} parts to {README.name}" + "".join(f"\n  {path}" for path in sorted(PLOTS.glob("*.png"))))


if __name__ == "__main__":
    main()
