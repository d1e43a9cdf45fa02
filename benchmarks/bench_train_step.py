"""Rollout and update of the real 11.9-billion-parameter Flux with random weights: seconds, peak memory, utilisation.

    python benchmarks/bench_train_step.py [--cases 'lora-*' ...] [--save] [--resume]    on a GPU of 80 GB or more
    python benchmarks/bench_train_step.py --plan [--save]                    the planner's predictions; needs no GPU
    python benchmarks/bench_train_step.py --dry-run                          every step with a tiny model on the CPU

A case is `lora` (rank 64, AdamW) or `full` (8-bit AdamW), at 512^2 or 1024^2, with fused or `unfused` blocks, at one
level of model.recompute, as far as it could fit, `compiled` (diffusers' compile_repeated_blocks) or not; no KL, no EMA.
Each runs in a process of its own, held to 80 GB (1e9 bytes; the planner's unit) on larger cards too: one that runs out
of memory is recorded as such. Nothing is downloaded: weights and prompt embeddings are random, made on the device; all
else is the trainer's own code (`rollout`, `update_weights`), with the VAE in memory. The allocator is given expandable
segments, so that what fits is not decided by how the memory lies.

The learning rate is 0, so that every repetition is a first update, whose ratios should be 1: how far they are from it
is recorded. The clip range is wide, so that a ratio that is not 1 clips nothing: matmuls on gradients of zeros are
faster than those on real ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import program
import results
import textbook
import torch
from bench_kernels import both
from timing import call_times, graph_times, rotations
from torch.nn.attention import SDPBackend
from tqdm import tqdm
from train_step_cases import CASES, MEMORY_GB, Case, chosen_cases
from train_step_model import build, kept_bytes, sample, update
from train_step_plan import PEAK_TFLOPS, concluded, describe, plan_table, planned, planning_pool

SECTION, PLAN_SECTION = "train_step", "plan_train_step"
MATMUL = 8192
REPEATS, ENOUGH_S = range(3, 11), 8.0
"""repetitions: at least 3, at most 10, none begun after so many seconds"""
CASE_LIMIT_S = 420


# --- measuring ------------------------------------------------------------------------------------------------------


class Peak:
    """Largest numbers of bytes that PyTorch's allocator has handed out and held since this was made; None on a CPU."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> dict[str, int | None]:
        if not self._cuda:
            return {"peak_bytes": None, "reserved_bytes": None}
        return {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}


def seconds(run: Callable[[], Any], cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def repeated(run: Callable[[], Any], cuda: bool) -> dict[str, float]:
    """Percentiles of a warm call."""
    times: list[float] = []
    while len(times) < REPEATS.start or (len(times) < REPEATS.stop - 1 and sum(times) < ENOUGH_S):
        times.append(seconds(run, cuda))
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20_s": deciles[1], "p50_s": deciles[4], "p80_s": deciles[7], "repetitions": len(times)}


def measure_loss(shape: tuple[int, ...], dtype: torch.dtype, cuda: bool) -> dict[str, Any]:
    """`guard_loss`, forward and backward, of one micro-batch alone: as a CUDA graph past L2, and called from Python."""
    device = "cuda" if cuda else "cpu"
    tensor_bytes = math.prod(shape) * dtype.itemsize
    count = rotations(3 * tensor_bytes, cuda)
    sets = [textbook.make_inputs(shape, dtype, device, seed=seed) for seed in range(count)]
    runs = [both(textbook.fused_guard_loss, inputs) for inputs in sets]
    return {"shape": shape, "graph": graph_times(runs, cuda), "called_from_python": call_times(runs[0], cuda)}


def measure_matmul(dtype: torch.dtype, cuda: bool) -> float:
    """TFLOP/s of a large square matmul of random numbers: what this card gives at best, in the same run."""
    n = MATMUL if cuda else 128
    a, b = (torch.randn(n, n, dtype=dtype, device="cuda" if cuda else "cpu") for _ in range(2))
    return 2 * n**3 / call_times(lambda: a @ b, cuda)["p50_us"] / 1e6


def attention_kernel(dtype: torch.dtype, cuda: bool) -> str:
    """What PyTorch takes for attention of Flux's heads when gradients are asked for."""
    query = torch.empty(1, 24, 4608, 128, dtype=dtype, device="cuda" if cuda else "cpu", requires_grad=True)
    return SDPBackend(torch._fused_sdp_choice(query, query, query)).name


def measure_training(case: Case, dry: bool, row: dict[str, Any]) -> None:
    """Fill the row; `row["phase"]` says what was going on, should it end early.

    Times of a rollout do not depend on what waits on the device, its peak does: that is taken once the optimizer's
    state is there.
    """
    cuda = not dry
    row["phase"] = "build"
    state = build(case, dry)
    recipe, backbone = state.recipe, state.backbone
    row["phase"] = "baselines"  # while there is room for them
    row["loss"] = measure_loss((recipe.micro_batch, *backbone.latent_shape), backbone.dtype, cuda)
    row["matmul_tflop_per_s"] = measure_matmul(backbone.dtype, cuda)
    if cuda:
        torch.cuda.empty_cache()
    row["attention"] = attention_kernel(backbone.dtype, cuda)
    row["parameters"] = sum(p.numel() for p in state.policy.parameters())
    row["trained_parameters"] = sum(p.numel() for p in state.parameters.values())
    backbone.load_prompts([0])
    row["phase"] = "rollout"
    transitions = sample(state)
    assert all(bool(torch.isfinite(part.velocity).all()) for part in transitions), "a velocity is not finite"
    row["rollout"] = {}
    if case.times_rollout:
        row["rollout"] = repeated(lambda: sample(state), cuda)
        row["rollout"]["s_per_image"] = row["rollout"]["p50_s"] / recipe.images_per_epoch
        batches = recipe.images_per_epoch // recipe.sampler.batch_size
        row["rollout"]["s_per_step"] = row["rollout"]["p50_s"] / batches / recipe.sampler.num_steps
    row["phase"] = "update"
    row["kept_bytes"] = kept_bytes(state, transitions) if cuda else None
    first, found = Peak(cuda), {}
    first_s = seconds(lambda: found.update(update(state, transitions)), cuda)  # makes the optimizer's state; compiles
    first_peak = first.read()
    steady = Peak(cuda)
    row["update"] = {**found, **repeated(lambda: update(state, transitions), cuda)}
    row["update"] |= {"first_s": first_s, "first_peak_bytes": first_peak["peak_bytes"]}
    row["update"]["s_per_transition"] = row["update"]["p50_s"] / recipe.transitions_per_update
    # What decides whether it fits is the larger of the two.
    row["update"] |= {name: n if n is None else max(n, first_peak[name] or 0) for name, n in steady.read().items()}
    row["phase"] = "rollout beside the optimizer's state"
    sampling = Peak(cuda)
    sample(state)
    row["rollout"] |= sampling.read()


def measure(case: Case, dry: bool) -> dict[str, Any]:
    """Everything about a case, in this process; a case that does not fit has an `error`, and what came before it."""
    row: dict[str, Any] = {**case.settings(dry), "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")}
    if not dry:
        total = torch.cuda.get_device_properties(0).total_memory
        row["cap_bytes"] = min(int(MEMORY_GB * 1e9), total)
        torch.cuda.set_per_process_memory_fraction(row["cap_bytes"] / total)
    try:
        measure_training(case, dry, row)
        del row["phase"]
    except torch.OutOfMemoryError as error:
        row |= {"error": "out of memory", "message": f"in {row['phase']}: {str(error).splitlines()[0]}"}
    return row


class Child:
    """`measure` in a process of its own, which waits for its turn with everything imported."""

    def __init__(self, case: Case, dry: bool) -> None:
        self.case, self._dry = case, dry
        environ = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        if dry:
            environ["CUDA_VISIBLE_DEVICES"] = ""
            if not case.compile:  # the 8-bit optimizer would spend minutes on compiling for the CPU
                environ["TORCHDYNAMO_DISABLE"] = "1"
        self._folder = tempfile.TemporaryDirectory()
        self._to = Path(self._folder.name) / "row.json"
        self._errors = Path(self._folder.name) / "errors"
        command = [sys.executable, __file__, "--child", case.name, "--to", str(self._to)]
        command += ["--dry-run"] if dry else []
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors, text=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def measure(self, limit_s: float = CASE_LIMIT_S) -> dict[str, Any]:
        """The case's row, whatever happens to its process."""
        try:
            self._process.communicate("go\n", timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {**self.case.settings(self._dry), "error": "timed out", "message": f"not done after {limit_s:g} s"}
        if self._to.exists():
            return json.loads(self._to.read_text())
        last = "\n".join(self._errors.read_text().strip().splitlines()[-4:])
        message = f"exit status {self._process.returncode}: {last}"
        return {**self.case.settings(self._dry), "error": "failed", "message": message}


class Children:
    """The processes of some cases, in turn: the next one starts up while one measures."""

    def __init__(self, cases: Sequence[Case], dry: bool) -> None:
        self._cases, self._dry = list(cases), dry
        self._next: Child | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._next is not None:
            self._next.__exit__()

    def measure(self, case: Case, limit_s: float = CASE_LIMIT_S) -> dict[str, Any]:
        child = self._next
        if child is None or child.case is not case:
            self.__exit__()
            child = Child(case, self._dry)
        after = self._cases[self._cases.index(case) + 1 :]
        self._next = Child(after[0], self._dry) if after else None
        with child:
            return child.measure(limit_s)


# --- the program ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = program.parser(__doc__)
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", help=f"of {', '.join(CASES)}")
    parser.add_argument("--plan", action="store_true", help="print the planner's predictions and the goals, no more")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    program.add_arguments(parser)
    args = parser.parse_args()
    try:
        args.chosen = chosen_cases(args.cases, args.dry_run)
    except ValueError as error:
        parser.error(str(error))
    program.check_arguments(parser, args, needs_gpu=not args.plan)
    return args


def main() -> str | None:
    args = arguments()
    if args.child:
        program.end_with_parent()
        if not sys.stdin.readline():  # until it is this case's turn; nothing, if there is nobody to say so any more
            return None
        args.to.write_text(json.dumps(measure(CASES[args.child], args.dry_run)))
        return None
    if args.plan:
        with planning_pool(args.dry_run) as pool:
            plans = {case.name: pool.submit(planned, case, args.dry_run) for case in args.chosen}
            rows = {name: plan.result() for name, plan in tqdm(plans.items(), "planning", leave=False)}
        print(plan_table(rows), flush=True)
        if args.save:
            numbers = {"memory_gb": MEMORY_GB, "rows": rows}
            print(f"\nsaved {results.save(PLAN_SECTION, results.environment(), numbers, args.out)}")
        return None
    peak_tflops = PEAK_TFLOPS.get(results.environment()["device"])
    run = results.Run(SECTION, args, memory_gb=MEMORY_GB, peak_tflop_per_s=peak_tflops)
    cases = [CASES[name] for name in run.missing(case.name for case in args.chosen)]
    with planning_pool(args.dry_run) as pool, Children(cases, args.dry_run) as children:
        plans = {case.name: pool.submit(planned, case, args.dry_run) for case in cases}  # while the first one measures

        def row_of(name: str) -> dict[str, Any]:
            measured = children.measure(CASES[name], min(CASE_LIMIT_S, run.seconds_left))
            row = concluded(CASES[name], measured, plans[name].result(), peak_tflops)
            print(describe(name, row), flush=True)
            return row

        run.measure([case.name for case in cases], row_of)
    return run.finish()


if __name__ == "__main__":
    program.run(main)
