"""The numbers to reach on a GPU, each beside what the result files say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import results
import validate

Rows = dict[str, dict[str, Any]]
Found = tuple[str, bool] | None
"""what was measured, in words, and whether it is enough; None: it was not measured"""
NOT_MEASURED = "not yet measured"


@dataclass(frozen=True)
class Goal:
    """A number to reach, of one section of the results."""

    what: str
    goal: str
    section: str
    judge: Callable[[Rows], Found]


def _ran(rows: Rows, name: str) -> dict[str, Any] | None:
    row = rows.get(name)
    return None if row is None or "error" in row else row


def _tests(rows: Rows) -> Found:
    parts = [rows[name] for name in validate.TESTS if name in rows]
    failed = [row for row in parts if "error" in row]
    if not failed and len(parts) < len(validate.TESTS):
        return None
    counts = {word: sum(row.get("counted", {}).get(word, 0) for row in parts) for word in ("passed", "failed")}
    words = [f"{count} {word}" for word, count in counts.items() if count]
    words += [row["error"] for row in failed if not row.get("counted", {}).get("failed")]
    return ", ".join(words), not failed


def _sanitizer(rows: Rows) -> Found:
    tools = {name: row for name, row in rows.items() if name in validate.TOOLS and "skipped" not in row}
    if not tools:
        return None
    words = ", ".join(f"{name}: {row.get('error', 'clean')}" for name, row in tools.items())
    return words, not any("error" in row for row in tools.values())


def _faster(than: str, goal: float) -> Callable[[Rows], Found]:
    def judge(rows: Rows) -> Found:
        row = _ran(rows, "Flux 1024^2, batch 8")
        if row is None:
            return None
        ours, theirs = row["fused loss"]["both"], row[f"{than} loss"]["both"]
        if isinstance(ours, str) or isinstance(theirs, str):
            return None
        times = theirs["p50_us"] / ours["p50_us"]
        return f"{times:.1f}x ({ours['p50_us']:.1f} us against {theirs['p50_us']:.1f} us)", times >= goal

    return judge


def _large_latents(rows: Rows) -> Found:
    shares = [
        (row[kernel]["of_copy"], f"{kernel}, {label}")
        for label in ("256 MB a tensor", "1 GB a tensor")
        if (row := _ran(rows, label))
        for kernel in ("loss forward", "loss backward", "sde_step")
    ]
    return _least(shares, 0.85)


def _least(shares: list[tuple[float, str]], goal: float) -> Found:
    """The smallest share decides; how many others miss as well."""
    if not shares:
        return None
    least, name = min(shares)
    enough = sum(share >= goal for share, _ in shares)
    return f"{least:.0%} at least ({name}); {enough} of {len(shares)} reach it", least >= goal


def _flux_kernels(backward: bool, goal: float) -> Callable[[Rows], Found]:
    def judge(rows: Rows) -> Found:
        names = [name for name in rows if ("backward" in name or "gradient" in name) == backward]
        return _least([(row["of_copy"], name) for name in names if (row := _ran(rows, name))], goal)

    return judge


def _block(than: str, goal: float) -> Callable[[Rows], Found]:
    def judge(rows: Rows) -> Found:
        times = {
            kind: row[than]["training"]["p50_us"] / row["fused pointwise"]["training"]["p50_us"]
            for kind in ("double", "single")
            if (row := _ran(rows, kind))
        }
        words = ", ".join(f"{kind} {value:.2f}x" for kind, value in times.items())
        return (words, min(times.values()) >= goal) if times else None

    return judge


def _case(name: str, what: str) -> Callable[[Rows], Found]:
    """A goal that the training step's case has judged itself."""

    def judge(rows: Rows) -> Found:
        for goal in rows.get(name, {}).get("goals", ()):
            if goal["what"].startswith(what) and goal["reached"] is not None:
                return goal["measured"], goal["reached"]
        return None

    return judge


def _planner(rows: Rows) -> Found:
    errors = [
        (abs(error), f"{error:+.1%} ({name}, {phase})")
        for name, row in rows.items()
        if not row.get("compile")
        for phase, error in row.get("planner_error", {}).items()
    ]
    if not errors:
        return None
    worst, words = max(errors)
    return f"{words} at worst, of {len(errors)} peaks", worst <= 0.05


def _first_ratio(rows: Rows) -> Found:
    found = [
        goal for row in rows.values() for goal in row.get("goals", ()) if goal["what"].startswith("first log-ratio")
    ]
    judged = [goal for goal in found if goal["reached"] is not None]
    if not judged:
        return None
    worst = max(judged, key=lambda goal: float(goal["measured"]))
    return f"{worst['measured']} at most, of {len(judged)} cases", all(goal["reached"] for goal in judged)


def _all_weights(rows: Rows) -> Found:
    row = rows.get("full-512-block")
    if row is None or row.get("error") not in (None, "out of memory"):
        return None
    if "error" in row:
        return row["error"], False
    peak = max(row[phase]["peak_bytes"] for phase in ("rollout", "update"))
    return f"{row['trained_parameters'] / 1e9:.1f} billion parameters trained, peak {peak / 1e9:.1f} GB", True


GOALS = (
    Goal("kernels' tests on the GPU", "all pass", "validation", _tests),
    Goal("compute-sanitizer on every operator", "clean", "validation", _sanitizer),
    Goal("loss, Flux 1024^2, batch 8, bf16: faster than textbook", ">= 30x", "kernels", _faster("textbook", 30)),
    Goal("the same: faster than torch.compile of it", ">= 3x", "kernels", _faster("compiled", 3)),
    Goal("loss and step, 256 MB and more: of the copy bandwidth", ">= 85%", "kernels", _large_latents),
    Goal("each Flux kernel forward: of the copy bandwidth", ">= 80%", "flux_kernels", _flux_kernels(False, 0.8)),
    Goal("each Flux kernel backward: of the copy bandwidth", ">= 70%", "flux_kernels", _flux_kernels(True, 0.7)),
    Goal("a fused block, forward + backward: faster than eager", ">= 1.25x", "flux_blocks", _block("eager", 1.25)),
    Goal("the same: against torch.compile", ">= 1x", "flux_blocks", _block("compiled", 1.0)),
    Goal("update at 1024^2, LoRA, no recomputation: MFU", ">= 45%", "train_step", _case("lora-1024-none", "MFU")),
    Goal("planner against the measured peaks", "within 5%", "train_step", _planner),
    Goal("all parameters trained within 80 GB", "fits", "train_step", _all_weights),
    Goal("LoRA, 512^2, recompute block: peak", "<= 30 GiB", "train_step", _case("lora-512-block", "peak")),
    Goal("LoRA, 1024^2, recompute block: peak", "<= 30 GiB", "train_step", _case("lora-1024-block", "peak")),
    Goal("all weights, 512^2, recompute block: peak", "<= 78 GiB", "train_step", _case("full-512-block", "peak")),
    Goal("first log-ratio after a rollout, of the clip range", "<= half", "train_step", _first_ratio),
)


def measured(files: list[dict[str, Any]]) -> dict[str, list[Found]]:
    """What was found for each goal, per GPU."""
    sections = {goal.section: results.newest_rows(files, goal.section) for goal in GOALS}
    devices = dict.fromkeys(device for found in sections.values() for device in found if not device.startswith("CPU"))
    return {device: [goal.judge(sections[goal.section].get(device, {})) for goal in GOALS] for device in devices}


def lines(found: dict[str, list[Found]]) -> Iterator[list[str]]:
    """Heading and rows of a table: goals down, GPUs across."""
    yield ["figure", "goal", *(found or ["H100 or H200"])]
    for index, goal in enumerate(GOALS):
        cells = []
        for of_device in found.values() or ([None] * len(GOALS),):
            result = of_device[index]
            cells.append(NOT_MEASURED if result is None else f"{result[0]}: {'reached' if result[1] else '**missed**'}")
        yield [goal.what, goal.goal, *cells]


def table(found: dict[str, list[Found]]) -> str:
    """As Markdown."""
    heading, *rows = lines(found)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ["---"] * len(heading), *rows))
