"""The kernels' tests on a GPU, and the same kernels under compute-sanitizer; what came of it goes into the results.

    python benchmarks/validate.py [--only tests sanitizer] [--save] [--resume]

`tests` is `pytest -m gpu` in three parts, each in several processes if pytest-xdist is installed: most of their time is
compiling kernels. A part is broken off after 20 minutes.
`sanitizer` runs every operator once, at sizes that are no multiples of anything, under memcheck (accesses past the end,
with every tensor in an allocation of its own), racecheck (shared memory) and synccheck (barriers). It is skipped, and
says so, where the tool is not installed. What a kernel leaves unwritten shows in the tests, whose outputs are filled
with NaN beforehand. `--dry-run` runs a few tests here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import program
import results

SECTION = "validation"
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZED = ["tests/test_operators.py", "-k", "plain_backend and odd and bfloat16"]
"""what compute-sanitizer watches; -m gpu comes with it"""
_LOSS = [f"tests/test_{name}.py" for name in ("transition", "loss", "step", "golden", "candidates")]
_FLUX = [f"tests/test_{name}.py" for name in ("adaln", "gated_residual", "qk_norm_rope", "gelu", "fuse_flux")]
TESTS = {
    "tests of the loss": _LOSS,
    "tests of Flux blocks": _FLUX,
    "all other tests": ["tests", *(f"--ignore={path}" for path in (*_LOSS, *_FLUX))],
}
"""what pytest is given for each part"""
LIMIT_S = 1200
# Processes that test on one GPU. The tests with the largest tensors share one of them (xdist_group).
WORKERS = 8


def pytest_command(*selected: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selected]


def run_tests(part: str, dry_run: bool, limit_s: float) -> dict[str, Any]:
    """One part of the tests that run on a GPU."""
    command = pytest_command("tests/test_step.py") if dry_run else pytest_command("-m", "gpu", *TESTS[part])
    if importlib.util.find_spec("xdist") and not dry_run:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadgroup"]
    few = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "2"}  # of each process
    return {"command": shown(command), **outcome(command, few, limit_s)}


def run_sanitizer(tool: str, dry_run: bool, limit_s: float) -> dict[str, Any]:
    """Every operator under one of compute-sanitizer's tools."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if dry_run or sanitizer is None:
        return {"skipped": "a dry run" if dry_run else "compute-sanitizer is not installed"}
    watch = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    if tool == "memcheck":
        watch += ["--report-api-errors", "no"]  # libraries ask for functions that need not be there
    command = [*watch, *pytest_command("-m", "gpu", *SANITIZED)]
    # Tensors cut from the allocator's large blocks would hide an access past their ends.
    row = outcome(command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, limit_s)
    reports = [line for line in row.pop("output").splitlines() if line.startswith("=========")]
    row |= {"command": shown(command), "reports": reports[:40]}
    return row


def outcome(command: Sequence[str], environ: dict[str, str], limit_s: float) -> dict[str, Any]:
    """Run it, show what it prints, and tell what pytest counted. An `error` unless all went well."""
    end, lines = time.monotonic() + limit_s, []
    with program.child(
        command, cwd=results.ROOT, env={**os.environ, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        timer = threading.Timer(limit_s, program.stop, [process])
        timer.start()
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                lines.append(line)
            status = process.wait()
        finally:
            timer.cancel()
    output = "".join(lines)
    if status and time.monotonic() >= end:
        return {"error": "timed out", "message": f"not done after {limit_s:.0f} s", "output": output}
    counted = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", output)}
    row: dict[str, Any] = {"counted": counted, "output": output}
    if status or not counted.get("passed"):
        row |= {"error": "failed", "message": f"exit status {status}"}
    return row


def shown(command: list[str]) -> str:
    return " ".join(["python" if part == sys.executable else os.path.basename(part) for part in command])


def main() -> str | None:
    parser = program.parser(__doc__)
    parser.add_argument(
        "--only", nargs="+", choices=["tests", "sanitizer"], default=["tests", "sanitizer"], help="not both"
    )
    program.add_arguments(parser)
    args = parser.parse_args()
    program.check_arguments(parser, args)
    run = results.Run(SECTION, args)
    tests = [*TESTS][:1] if args.dry_run else [*TESTS]
    names = [name for part in args.only for name in (tests if part == "tests" else TOOLS)]

    def row_of(name: str) -> dict[str, Any]:
        print(f"\n{name}", flush=True)
        limit_s = min(LIMIT_S, run.seconds_left)
        row = (run_tests if name in TESTS else run_sanitizer)(name, args.dry_run, limit_s)
        row.pop("output", None)
        print(f"{name}: {row.get('error') or row.get('skipped') or row['counted']}", flush=True)
        return row

    run.measure(names, row_of)
    return run.finish()


if __name__ == "__main__":
    program.run(main)
