"""The tests of the kernels on a GPU, and every operator under compute-sanitizer; what came of it goes into the results.

    python benchmarks/validate.py [--only 'tests of *' memcheck ...]

The tests are `pytest -m gpu` in three parts, each in several processes if pytest-xdist is installed: most of their time
is compiling kernels. A part stops after 20 minutes or when --minutes runs out, and --resume restarts it from its
beginning. compute-sanitizer runs every operator once, at sizes that are no multiples of anything, under memcheck
(accesses past the end, with every tensor in an allocation of its own), racecheck (shared memory) and synccheck
(barriers); it is skipped, and says so, where it is not installed. What a kernel leaves unwritten shows in the tests,
whose outputs are filled with NaN beforehand.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial

import rows
from rows import Measured, Numbers

TOOLS = ("memcheck", "racecheck", "synccheck")
OPERATORS = ["benchmarks/operator_calls.py"]
TESTS = {
    "tests of operators": ["tests/ops"],
    "tests of blocks": ["tests/blocks"],
    "all other tests": ["tests", "--ignore=tests/ops", "--ignore=tests/blocks"],
}
TOY_TESTS = ["tests/test_step.py", "-m", "not slow"]
LIMIT_S = 1200
# Processes that test on one GPU. The tests with the largest tensors share one of them (xdist_group).
WORKERS = 8


def run_tests(part: str, args: argparse.Namespace) -> Measured:
    """One part of the tests that run on a GPU."""
    selected = TOY_TESTS if args.toy else ["-m", "gpu", *TESTS[part]]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]
    if importlib.util.find_spec("xdist") and not args.toy:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadgroup"]
    few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}  # of each process
    yield "kernel", "pytest", outcome(command, few, args.end)


def run_sanitizer(tool: str, args: argparse.Namespace) -> Measured:
    """Every operator under one of compute-sanitizer's tools."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if args.toy or sanitizer is None:
        why = "a toy run" if args.toy else "compute-sanitizer is not installed"
        yield "kernel", "compute-sanitizer", {rows.SKIPPED: why}
        return
    watch = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    if tool == "memcheck":
        watch += ["--report-api-errors", "no"]  # libraries ask for functions that need not be there
    # Tensors cut from the allocator's large blocks would hide an access past their ends.
    environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    yield "kernel", "compute-sanitizer", outcome([*watch, sys.executable, *OPERATORS], environ, args.end)


def outcome(command: Sequence[str], environ: dict[str, str], end: float) -> Numbers:
    """Run it, show what it prints, and tell what it counted. `failed` unless all went well."""
    limit_s = min(LIMIT_S, max(1.0, end - time.monotonic()))
    lines: list[str] = []
    with rows.child(
        command, cwd=rows.ROOT, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        timer = threading.Timer(limit_s, rows.stop, [process])
        start = time.monotonic()
        timer.start()
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                lines.append(line)
            status = process.wait()
            late = time.monotonic() - start >= limit_s
        finally:
            timer.cancel()
    counted = re.findall(r"(\d+) (passed|failed|skipped|error)", "".join(lines))
    numbers: dict[str, float | str] = {f"{word} tests": int(number) for number, word in counted}
    if late:
        return {**numbers, rows.FAILED: f"not done after {limit_s:.0f} s"}
    if status or not numbers.get("passed tests"):
        reports = [line.strip("= \n") for line in lines if line.startswith("=========")]
        return {**numbers, rows.FAILED: f"exit status {status}. {'; '.join(reports[:10])}".rstrip(". ")}
    return numbers


def suite(args: argparse.Namespace) -> tuple[str, rows.Cases]:
    tests: rows.Cases = {part: partial(run_tests, part, args) for part in [*TESTS][: 1 if args.toy else None]}
    return "validation", {**tests, **{tool: partial(run_sanitizer, tool, args) for tool in TOOLS}}


if __name__ == "__main__":
    rows.main(__doc__, suite)
