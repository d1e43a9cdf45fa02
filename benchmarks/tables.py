"""The results as Markdown: what was measured beside what was to be reached, losing cases included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import tune
from bench_kernels import CONTENDERS, KERNELS
from train_step_cases import MEMORY_GB

from fastguard.config import Recompute

Rows = dict[str, dict[str, Any]]
NAMES = {"textbook": "textbook, eager", "compiled": "textbook, torch.compile", "fused": "fastguard"}


def markdown(heading: list[str], rows: Iterable[list[str]]) -> str:
    """A table; messages of errors are put on one line."""
    plain = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (heading, *rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (plain[0], ["---"] * len(heading), *plain[1:]))


def distinct(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def stack(rows: Rows) -> str:
    """Versions, day and commit of some rows, which may come from several runs."""
    envs = [row["environment"] for row in rows.values()]
    versions = distinct(f"driver {env['driver']}, torch {env['torch']}, triton {env['triton']}" for env in envs)
    return f"{versions}, {when(envs)}"


def when(envs: Iterable[dict[str, Any]]) -> str:
    """Days and commits of some runs, and whether code was changed since the commit."""
    envs = list(envs)
    commits = distinct(f"{env['commit']}{' with changes' if env['dirty'] else ''}" for env in envs)
    return f"{distinct(env['time'][:10] for env in envs)}, commit {commits}"


def gib(n_bytes: float | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / 2**30:.1f}"


def us(times: dict[str, float] | str) -> str:
    """The median with its spread, or why there is none."""
    if isinstance(times, str):
        return times
    return f"{times['p50_us']:,.1f} ({times['p20_us']:,.1f} to {times['p80_us']:,.1f})"


def median(times: dict[str, float] | str) -> str:
    return times if isinstance(times, str) else f"{times['p50_us']:,.1f}"


def failed(row: dict[str, Any], columns: int) -> list[str]:
    return [f"{row['error']}: {row['message']}", *[""] * (columns - 1)]


# --- the loss -------------------------------------------------------------------------------------------------------


def loss_table(device: str, section: dict[str, Any]) -> str:
    """Times, ratios and memory of the loss on one device, as bench_transition.py measures them."""
    env = section["environment"]
    rows = []
    for shape, forms in section["forward_backward"].items():
        cells = [f"{forms[name]['p50_ms']:.2f} ms" for name in NAMES]
        faster = f"{forms['textbook']['times_fused']:.1f}, {forms['compiled']['times_fused']:.1f}"
        kept = f"{forms['textbook']['bytes_kept_for_backward']:,} B to {forms['fused']['bytes_kept_for_backward']:,} B"
        rows.append([shape, *cells, faster, kept])
    errors = section["log_ratio_error"]
    heading = ["latents", *NAMES.values(), "times faster", "kept for backward"]
    return (
        f"**{device}**, {env['threads']} threads, torch {env['torch']}, {section['dtype'].removeprefix('torch.')}, "
        f"forward + backward, {when([env])}:\n\n{markdown(heading, rows)}\n\n"
        "Error of the log-ratio against float64 at D = 65,536 and a velocity change of 1e-3, in float32: fastguard "
        f"{errors['fused']:.1e}, textbook {errors['textbook']:.1e}, for log-ratios up to "
        f"{errors['size of the log-ratio']:.1e}."
    )


def kernel_tables(device: str, rows: Rows) -> str:
    """Kernels of one GPU; then the whole loss and the whole step beside textbook code."""
    shares, losses, others = [], [], []
    for label, row in rows.items():
        if "error" in row:
            shares.append([label, *failed(row, 4)])
            continue
        cells = [f"{us(row[name])}, {row[name]['of_copy']:.0%}" for name in KERNELS]
        shares.append([label, f"{row['copy']['gb_per_s']:,.0f}", *cells])
        both = [row[f"{name} loss"]["both"] for name in NAMES]
        faster = [
            "-" if isinstance(times, str) or isinstance(both[2], str) else f"{times['p50_us'] / both[2]['p50_us']:.1f}"
            for times in both[:2]
        ]
        losses.append([label, *map(us, both), ", ".join(faster)])
        python = [row[f"{name} loss"]["both_from_python"] for name in NAMES]
        steps = [row[f"{name} step"]["graph"] for name in NAMES]
        others.append([label, *map(median, (*python, *steps))])
    return "\n\n".join(
        [
            f"**Kernels of loss and step, {device}**, {stack(rows)}; bf16, CUDA graphs, inputs rotated past L2; "
            "microseconds (p20 to p80) and share of the copy bandwidth:",
            markdown(["latents", "copy, GB/s", *KERNELS], shares),
            f"**The whole loss, forward + backward, {device}**, in the same run, microseconds (p20 to p80):",
            markdown(["latents", *NAMES.values(), "times faster"], losses),
            f"**Called from Python, and the step of the rollout, {device}**, in the same run, microseconds. Left the "
            "loss, forward + backward, launches by the host included; right the step in CUDA graphs:",
            markdown(["latents", *(f"{what}: {name}" for what in ("loss", "step") for name in NAMES.values())], others),
        ]
    )


def memory_sentence(rows: Rows) -> str:
    """New bytes at the peak of forward + backward, of the largest shape that all contenders ran."""
    ran = {label: row for label, row in rows.items() if "error" not in row}
    for label, row in reversed(ran.items()):
        peaks = {name: row[f"{name} loss"]["peak_new_bytes"] for name in CONTENDERS}
        if not any(isinstance(peak, str) for peak in peaks.values()):
            words = ", ".join(f"{NAMES[name]} {peaks[name] / 2**20:,.0f} MiB" for name in NAMES)
            return f"New memory at the peak of forward + backward, {label}: {words}."
    return ""


# --- the blocks of Flux ---------------------------------------------------------------------------------------------


def flux_kernels_table(device: str, rows: Rows) -> str:
    """Flux kernels of one GPU."""
    lines = []
    for name, row in rows.items():
        if "error" in row:
            lines.append([name, *failed(row, 3)])
        else:
            eager = us(row["eager"]) if "eager" in row else ""
            lines.append([name, us(row), f"{row['of_copy']:.0%} of {row['copy']['gb_per_s']:,.0f} GB/s", eager])
    return "\n\n".join(
        [
            f"**Flux kernels, {device}**, {stack(rows)}; 4,608 tokens, bf16, CUDA graphs, inputs rotated past L2:",
            markdown(["kernel", "us (p20 to p80)", "of copy", "diffusers' eager, us"], lines),
        ]
    )


def flux_blocks_table(device: str, rows: Rows) -> str:
    """Both kinds of block in each form."""
    lines = []
    for kind, forms in rows.items():
        if "error" in forms:
            lines.append([kind, *failed(forms, 5)])
            continue
        for name, form in forms.items():
            if not (isinstance(form, dict) and "inference" in form):
                continue  # what its run shared
            cells = [
                cell
                for phase in ("inference", "training")
                for cell in (f"{form[phase]['p50_us'] / 1e3:.2f}", f"{form[f'{phase}_times_eager']:.2f}")
            ]
            kept = f"{form['kept_bytes'] / 2**20:.0f}" if "kept_bytes" in form else ""
            lines.append([f"{kind}, {name}", *cells, kept])
    heading = ["block", "inference, ms", "times eager", "training, ms", "times eager", "kept, MiB"]
    return f"**Flux blocks, {device}**, {stack(rows)}; 4,608 tokens, bf16, LoRA:\n\n{markdown(heading, lines)}"


def flux_bytes_table(run: dict[str, Any]) -> str:
    """Bytes that each Flux kernel moves."""
    env = run["environment"]
    rows = [
        [name, f"{row['moved'] / 1e6:.1f} MB", f"{row['least'] / 1e6:.1f} MB", f"{row['moved'] / row['least']:.3f}"]
        for name, row in run["kernels"].items()
    ]
    return (
        "Bytes that each Flux kernel moves, counted from its launches at 4,608 tokens of 3,072 channels in bfloat16, "
        "beside the least that any method could (`python benchmarks/bench_flux_block.py --bytes`, "
        f"{when([env])}):\n\n{markdown(['kernel', 'moved', 'least', 'ratio'], rows)}"
    )


# --- the training step ----------------------------------------------------------------------------------------------


def case_label(row: dict[str, Any]) -> str:
    blocks = "fused" if row["fuse"] else "unfused"
    compiled = ", compiled" if row.get("compile") else ""
    return (
        f"{row['train']}, {row['size']}^2, {blocks}{compiled}, recompute {row['recompute']}, "
        f"micro-batch {row['micro_batch']}"
    )


def case_order(row: dict[str, Any]) -> tuple[Any, ...]:
    """LoRA first, smaller images first; plain blocks, fused ones from level to level, then compiled ones."""
    levels = get_args(Recompute)
    return row["train"] != "lora", row["size"], row["compile"], row["fuse"], levels.index(row["recompute"])


def train_step_table(device: str, cases: Rows) -> str:
    """The training step of the whole model on one GPU, beside what was planned and what was to be reached."""
    words = {True: "reached", False: "**missed**", None: "not measured"}
    rows = []
    for row in cases.values():
        planned = {phase: gib(n) for phase, n in row["planned"]["peak_bytes"].items()}
        said = [
            f"{goal['what']}: {', '.join(filter(None, (goal['measured'], words[goal['reached']])))}"
            for goal in row["goals"]
        ]
        if "error" in row:
            fits = "fits" if row["planned"]["fits"] else "does not fit"
            cells = ["", f"{row['error']} (planner: {planned['update']}, {fits})", "", "", ""]
        else:
            rollout, update = row["rollout"], row["update"]
            low, high = (update[f"{p}_s"] / row["transitions_per_update"] for p in ("p20", "p80"))
            timed = f"{rollout['s_per_step']:.3f}, " if "s_per_step" in rollout else ""
            mfu = ["-" if value is None else f"{value:.1%}" for value in (rollout.get("mfu"), update["mfu"])]
            cells = [
                f"{timed}{gib(rollout['peak_bytes'])} ({planned['rollout']})",
                f"{update['s_per_transition']:.3f} ({low:.3f} to {high:.3f}), "
                f"{gib(update['peak_bytes'])} ({planned['update']})",
                f"{gib(row['kept_bytes'])} ({gib(row['planned']['kept_bytes'])})",
                ", ".join(mfu),
                f"{row['loss']['share']:.3%}",
            ]
        rows.append([case_label(row), *cells, "; ".join(said)])
    heading = ["case", "rollout: s a step, peak", "update: s a transition (p20 to p80), peak", "kept for backward",
               "MFU: rollout, update", "loss, of the update", "goals"]  # fmt: skip
    return (
        f"**{device}**, one training step of Flux (11.9 billion random weights), {stack(cases)}, held to "
        f"{distinct(row['memory_gb'] for row in cases.values())} GB; memory in GiB, in parentheses the planner's, "
        "which knows no compiler:\n\n"
        f"{markdown(heading, rows)}"
    )


def planned_table(plans: Rows) -> str:
    """What the planner says of the same cases; it needs no GPU."""
    rows = []
    eager = (row for row in plans.values() if not row["compile"])  # the planner knows no compiler
    for row in sorted(eager, key=case_order):
        peaks, goal = row["peak_bytes"], row["peak_goal_gib"]
        said = "" if goal is None else f"<= {goal:g} GiB"
        fits = "fits" if row["fits"] else "too large"
        flops = f"{row['executed_per_needed_flop']:.2f}"
        rows.append([case_label(row), gib(peaks["rollout"]), gib(peaks["update"]), fits, flops, said])
    heading = [
        "case",
        "peak of the rollout",
        "peak of the update",
        f"in {MEMORY_GB:g} GB ({gib(MEMORY_GB * 1e9)} GiB)",
        "FLOPs executed for each needed",
        "goal",
    ]
    return (
        "Predicted, not measured: what the memory planner says of those cases, in GiB (`python "
        f"benchmarks/bench_train_step.py --plan`, {when(row['environment'] for row in plans.values())}):\n\n"
        f"{markdown(heading, rows)}"
    )  # fmt: skip


def share_sentence(device: str, cases: Rows) -> str:
    """How much of an update the fused loss is."""
    shares = {case_label(row): row["loss"]["share"] for row in cases.values() if "error" not in row}
    if not shares:
        return ""
    least, most = min(shares, key=lambda case: shares[case]), max(shares, key=lambda case: shares[case])
    return (
        f"On {device} the fused loss, forward and backward, is {shares[least]:.3%} ({least}) to {shares[most]:.3%} "
        f"({most}) of an update of the whole of Flux."
    )


# --- launch tables --------------------------------------------------------------------------------------------------


def tuning_table(experiment: str, devices: dict[str, Rows]) -> str:
    """Every case of an experiment, choices across: median, and its ratio to the product's choice; the best in bold."""
    choices = list(tune.EXPERIMENTS[experiment].choices)
    parts = []
    for device, rows in devices.items():
        mine = {name.partition(": ")[2]: row for name, row in rows.items() if name.partition(": ")[0] == experiment}
        if not mine:
            continue
        lines = []
        for case, row in mine.items():
            if "error" in row:
                lines.append([case, *failed(row, len(choices))])
                continue
            if choices[0] not in row:  # of a time when the product did otherwise
                continue
            ours = row[choices[0]]["p50_us"]
            cells = []
            for choice in choices:
                times = row.get(choice, "-")
                cell = times if isinstance(times, str) else f"{times['p50_us']:,.1f} ({times['p50_us'] / ours:.2f})"
                if not isinstance(times, str) and "from_python" in times:
                    cell += f"; {times['from_python']['p50_us']:,.1f}"
                cells.append(f"**{cell}**" if choice == row["best"] else cell)
            lines.append([case, *cells])
        python = "; called from Python" if tune.EXPERIMENTS[experiment].from_python else ""
        parts.append(
            f"{device}, {stack(mine)}; microseconds (of the first column's){python}:\n\n"
            f"{markdown(['case', *choices], lines)}"
        )
    return "\n\n".join(parts) or "Not yet measured."
