"""Everything that needs a GPU, in one command: tests, sanitizer, kernels, Flux blocks, training steps, launch tables.

    python benchmarks/gpu_suite.py [--stages NAME ...] [--minutes N] [--resume] [--out DIR]

Each stage is a program of its own in this folder, which saves what it has measured as it goes, in
benchmarks/results/<gpu>/<date>_<commit>.json. Nothing is timed while a test is red. With --minutes it ends after about
that time, and what takes minutes is broken off; with --resume it goes on where it stopped, for the same commit and
device. Last come the numbers to reach beside those measured; `python benchmarks/plot.py` then puts everything into
README.md and docs/hopper.md. Needs the `dev` extra, and 80 GB for the training steps. `--dry-run` walks the whole path
on a CPU at toy sizes and saves nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import goals
import program
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
SHORTEST = 0.01
"""minutes for which a stage is not even begun"""


def run_stage(name: str, args: argparse.Namespace, minutes: float) -> bool:
    """In a process that finds the GPU empty; whether it went through."""
    script, *options = STAGES[name]
    options += ["--minutes", f"{minutes:.2f}"] if math.isfinite(minutes) else []
    if args.dry_run:
        options += ["--dry-run"]
    else:
        options += ["--save", "--out", str(args.out.resolve())]
        options += ["--resume"] if args.resume else []
    print(f"\n== {name}: python benchmarks/{' '.join([script, *options])}", flush=True)
    with program.child([sys.executable, str(Path(__file__).with_name(script)), *options], cwd=results.ROOT) as stage:
        return stage.wait() == 0


def main() -> str | None:
    parser = program.parser(__doc__)
    parser.add_argument("--stages", nargs="+", choices=list(STAGES), default=list(STAGES), help="only these")
    program.add_arguments(parser, always_saves=True)
    args = parser.parse_args()
    args.save = not args.dry_run
    program.check_arguments(parser, args)
    end = time.monotonic() + 60 * args.minutes
    unfinished = []
    for name in STAGES:
        if name not in args.stages:
            continue
        left = (end - time.monotonic()) / 60
        if left < SHORTEST or not run_stage(name, args, left):
            unfinished.append(name)
            if name == "tests":
                return "gpu_suite: the tests failed or were not finished; nothing is timed"
    found = {} if args.dry_run else goals.measured(results.load(args.out))
    if found:
        print(f"\n{goals.table(found)}")
    return f"gpu_suite: not finished: {', '.join(unfinished)}" if unfinished else None


if __name__ == "__main__":
    program.run(main)
