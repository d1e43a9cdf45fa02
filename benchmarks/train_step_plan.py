"""What the memory planner says of a training step's case, and what follows from a measurement beside it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from typing import Any

import program
from train_step_cases import CLIP_RANGE, MEMORY_GB, Case

from fastguard.config import UpdateConfig
from fastguard.memory import executed_flops, kept_activations, rollout_flops, update_flops
from fastguard.memory.phases import GIB, limit_bytes, planned_phases

PLANNER_GOAL = 0.05
PEAK_TFLOPS = {"NVIDIA H100 80GB HBM3": 989.0, "NVIDIA H200": 989.0}
"""dense bf16 of the SXM cards, from the data sheets"""


def planned(case: Case, dry: bool) -> dict[str, Any]:
    """The planner's prediction for a case: bytes, FLOPs, and whether it fits."""
    recipe = case.recipe(dry)
    phases = {phase.name: phase for phase in planned_phases(recipe, case.recompute)}
    peaks = {name: phases[name].peak for name in ("rollout", "update")}
    parts = ("weights", "gradients", "optimizer", "activations", "trajectories")
    return {
        **case.settings(dry),
        "peak_bytes": peaks,
        "update_bytes": {part: getattr(phases["update"], part) for part in parts},
        "fits": max(peaks.values()) <= limit_bytes(recipe),
        "kept_bytes": kept_activations(recipe).total,
        "needed_tflop_per_transition": update_flops(recipe) / recipe.micro_batch / 1e12,
        "needed_tflop_per_rollout_step": rollout_flops(recipe) / 1e12,
        "executed_per_needed_flop": executed_flops(recipe) / update_flops(recipe),
        "peak_goal_gib": case.peak_goal_gib,
        "mfu_goal": case.mfu_goal,
    }


@contextmanager
def planning_pool(dry: bool) -> Iterator[Executor]:
    """Processes on half of the cores: fake tensors compute nothing that would let go of Python's lock.

    What is not planned when the block ends will not be.
    """
    if dry:  # a thread is sooner done than a process has started
        pool: Executor = ThreadPoolExecutor(1)
    else:
        workers = max(2, (os.cpu_count() or 1) // 2)
        pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in active_children():
            process.terminate()


def _begin_worker() -> None:
    """In a process of the pool: end with the program, and let Ctrl-C end the program alone."""
    program.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def concluded(case: Case, row: dict[str, Any], plan: dict[str, Any], peak_tflops: float | None) -> dict[str, Any]:
    """The row with what follows from it: utilisation, the share of the loss, the planner's error, the goals."""
    row = {**row, "planned": {key: plan[key] for key in ("peak_bytes", "kept_bytes", "fits")}}
    if "error" not in row:
        sampling = row["rollout"]
        if case.times_rollout:
            sampling["tflop_per_s"] = plan["needed_tflop_per_rollout_step"] / sampling["s_per_step"]
            sampling["mfu"] = None if peak_tflops is None else sampling["tflop_per_s"] / peak_tflops
        done = row["update"]
        rate = plan["needed_tflop_per_transition"] / done["s_per_transition"]
        done["tflop_per_s"], done["mfu"] = rate, None if peak_tflops is None else rate / peak_tflops
        done["of_matmul"] = rate / row["matmul_tflop_per_s"]
        passes = row["transitions_per_update"] / row["micro_batch"]
        row["loss"]["share"] = passes * row["loss"]["graph"]["p50_us"] / 1e6 / done["p50_s"]
        row["loss"]["share_called_from_python"] = (
            passes * row["loss"]["called_from_python"]["p50_us"] / 1e6 / done["p50_s"]
        )
        if done["peak_bytes"] is not None:
            row["planner_error"] = {
                phase: plan["peak_bytes"][phase] / row[phase]["peak_bytes"] - 1 for phase in ("rollout", "update")
            }
    row["goals"] = list(goals(case, row))
    return row


def goals(case: Case, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """(what, measured, reached) of each number to reach; reached is None where it was not measured."""
    failed = row.get("error")

    def goal(what: str, measured: str | None, reached: bool) -> dict[str, Any]:
        if failed:
            return {"what": what, "measured": failed, "reached": False if failed == "out of memory" else None}
        return {"what": what, "measured": measured, "reached": reached if measured else None}

    if case.peak_goal_gib is not None:
        peaks = [] if failed else [row[phase]["peak_bytes"] for phase in ("rollout", "update")]
        top = max((n / GIB for n in peaks if n is not None), default=None)
        text = None if top is None else f"{top:.1f} GiB"
        yield goal(f"peak <= {case.peak_goal_gib:g} GiB", text, top is not None and top <= case.peak_goal_gib)
    if case.mfu_goal is not None:
        mfu = None if failed else row["update"]["mfu"]
        text = None if mfu is None else f"{mfu:.1%}"
        yield goal(f"MFU >= {case.mfu_goal:.0%}", text, mfu is not None and mfu >= case.mfu_goal)
    if not (failed or case.compile):  # the planner knows nothing of what a compiler keeps, and parity was not promised
        worst = row["update"]["worst_log_ratio"]
        limit = UpdateConfig.parity * CLIP_RANGE[case.size]
        yield goal(f"first log-ratio <= {limit:.0e}", f"{worst:.1e}", worst <= limit)
        errors = row.get("planner_error", {})
        text = ", ".join(f"{name} {error:+.1%}" for name, error in errors.items()) or None
        within = all(abs(error) <= PLANNER_GOAL for error in errors.values())
        yield goal(f"planner within {PLANNER_GOAL:.0%}", text, within)


def gib(n_bytes: int | None) -> str:
    return "-" if n_bytes is None else f"{n_bytes / GIB:.1f}"


def plan_table(rows: dict[str, dict[str, Any]]) -> str:
    """The predictions as text."""
    width = max(24, *(len(name) + 1 for name in rows))
    lines = [
        f"{'predicted, GiB':{width}}{'micro-batch':>12}{'weights':>9}{'gradients':>11}{'optimizer':>11}"
        f"{'activations':>13}{'rollout':>9}{'update':>8}  {f'in {MEMORY_GB:g} GB':10}{'TFLOP':>7}{'executed':>10}  goal"
    ]
    for name, row in rows.items():
        parts, peaks = row["update_bytes"], row["peak_bytes"]
        goal = ""
        if row["peak_goal_gib"] is not None:
            kept = max(peaks.values()) / GIB <= row["peak_goal_gib"]
            goal = f"peak <= {row['peak_goal_gib']:g} GiB: predicted to be {'reached' if kept else 'missed'}"
        if row["mfu_goal"] is not None:
            limit = row["needed_tflop_per_transition"] / row["mfu_goal"] / PEAK_TFLOPS["NVIDIA H200"]
            goal = f"MFU >= {row['mfu_goal']:.0%}: needs <= {limit:.3f} s a transition (H100 SXM, H200)"
        lines.append(
            f"{name:{width}}{row['micro_batch']:>12}{gib(parts['weights']):>9}{gib(parts['gradients']):>11}"
            f"{gib(parts['optimizer']):>11}{gib(parts['activations']):>13}{gib(peaks['rollout']):>9}"
            f"{gib(peaks['update']):>8}  {'fits' if row['fits'] else 'too large':10}"
            f"{row['needed_tflop_per_transition']:>7.3g}{row['executed_per_needed_flop']:>10.2f}  {goal}".rstrip()
        )
    legend = "parts: of the update's peak; TFLOP: needed by the update of one transition; executed: as a multiple of it"
    return "\n".join([*lines, legend])


def describe(name: str, row: dict[str, Any]) -> str:
    """A measured case as text."""
    lines = [f"\n{name}, micro-batch {row['micro_batch']}"]
    if "rollout" in row:
        done = row["rollout"]
        timed = f"{done['s_per_step']:8.3f} s a step" if "s_per_step" in done else f"{'-':>8} s a step"
        mfu = f"   MFU {done['mfu']:.1%}" if done.get("mfu") is not None else ""
        lines.append(
            f"  rollout  {timed}        peak {gib(done.get('peak_bytes')):>6} GiB"
            f"   planned {gib(row['planned']['peak_bytes']['rollout'])}{mfu}"
        )
    if "update" in row and "error" not in row:
        done, loss = row["update"], row["loss"]
        mfu = "no peak known for this device" if done["mfu"] is None else f"{done['mfu']:.1%}"
        lines += [
            f"  update   {done['s_per_transition']:8.3f} s a transition  peak {gib(done['peak_bytes']):>6} GiB"
            f"   planned {gib(row['planned']['peak_bytes']['update'])}"
            f"   (update of {row['transitions_per_update']}: p20 {done['p20_s']:.3f}, p50 {done['p50_s']:.3f}, "
            f"p80 {done['p80_s']:.3f} s; the first {done['first_s']:.1f} s)",
            f"  MFU {mfu}; {done['tflop_per_s']:.4g} TFLOP/s, {done['of_matmul']:.0%} of a plain matmul's "
            f"{row['matmul_tflop_per_s']:.4g}",
            f"  loss {loss['share']:.3%} of the update ({loss['share_called_from_python']:.3%} called from Python)"
            f"; kept for backward {gib(row['kept_bytes'])} GiB; first log-ratio {done['worst_log_ratio']:.1e}",
        ]
    if "error" in row:
        planner = "fits" if row["planned"]["fits"] else "does not fit"
        lines.append(f"  {row['error']}: {row['message']} (planner: {planner} in {MEMORY_GB:g} GB)")
    words = {True: "reached", False: "MISSED", None: "not measured"}
    for goal in row["goals"]:
        lines.append(f"  goal {': '.join(filter(None, (goal['what'], goal['measured'], words[goal['reached']])))}")
    return "\n".join(lines)
