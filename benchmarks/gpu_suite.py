"""Everything that needs a GPU, in one command: tests, sanitizer, kernels, launch tables, Flux blocks, training steps.

    python benchmarks/gpu_suite.py [--stages NAME ...] [--minutes N] [--resume] [--out DIR]

Each stage is a program of its own in this folder, which saves what it has measured as it goes, in
benchmarks/results/<gpu>/<date>_<commit>.json. Nothing is timed while a test is red. With --minutes it ends after about
that time, and what takes minutes is broken off; with --resume it goes on where it stopped, for the same commit and
device. Last come the numbers to reach beside those measured; `python benchmarks/plot.py` then puts everything into
README.md and docs/hopper.md. Needs the `bench` and `lowbit` extras, and 80 GB for the training steps. `--dry-run` walks
the whole path on a CPU at toy sizes and saves nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import goals
import results

STAGES: dict[str, list[str]] = {
    "tests": ["validate.py", "--only", "tests"],
    "sanitizer": ["validate.py", "--only", "sanitizer"],
    "kernels": ["bench_kernels.py"],
    "flux": ["bench_flux_block.py"],
    "train_step": ["bench_train_step.py"],
    "tuning": ["tune.py"],
}
"""in the order of what is missed most, should time run out"""


def run_stage(name: str, args: argparse.Namespace, minutes: float) -> bool:
    """In a process that finds the GPU empty; whether it went through."""
    script, *options = STAGES[name]
    if args.dry_run:
        options += ["--dry-run"]
    else:
        options += ["--save", "--out", str(args.out.resolve()), "--minutes", f"{minutes:.2f}"]
        options += ["--resume"] if args.resume else []
    print(f"\n== {name}: python benchmarks/{' '.join([script, *options])}", flush=True)
    command = [sys.executable, str(Path(__file__).with_name(script)), *options]
    environ = {**os.environ, **({"TRITON_INTERPRET": "1"} if args.dry_run else {})}
    return subprocess.run(command, cwd=results.ROOT, env=environ, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="only these")
    results.add_arguments(parser)
    args = parser.parse_args()
    results.check_arguments(parser, args)
    end = time.monotonic() + 60 * args.minutes
    unfinished = []
    for name in STAGES:
        if name not in args.stages:
            continue
        left = (end - time.monotonic()) / 60
        if left <= 0 or not run_stage(name, args, left):
            unfinished.append(name)
            if name == "tests":
                sys.exit("gpu_suite: the tests failed or were not finished; nothing is timed")
    if not args.dry_run:
        print(f"\n{goals.table(goals.measured(results.load(args.out)))}")
    if unfinished:
        sys.exit(f"gpu_suite: not finished: {', '.join(unfinished)}")


if __name__ == "__main__":
    main()
