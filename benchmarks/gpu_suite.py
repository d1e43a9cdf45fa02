"""Everything that needs a GPU, in one command: tests, loss, blocks, sanitizer, training steps, launch tables.

    python benchmarks/gpu_suite.py [--only NAME ...] [--minutes N] [--resume] [--dry-run]

Each stage is a program of its own in this folder, in a process that finds the GPU empty. It saves every case as soon as
that is measured, in benchmarks/results/<gpu>.jsonl. Nothing is timed while a test is red. With --minutes it stops after
about that time; with --resume it measures only what the same code, versions and kind of GPU have not measured there.
Last come the numbers to reach beside those measured. Needs the `dev` extra, and 80 GB for the training steps.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import rows
import tables

STAGES: dict[str, list[str]] = {
    "tests": ["validate.py", "--only", "*tests*"],
    "loss": ["bench_loss.py"],
    "blocks": ["bench_blocks.py"],
    "sanitizer": ["validate.py", "--only", "*check"],
    "train_step": ["bench_train_step.py"],
    "tuning": ["tune.py"],
    "bytes": ["bench_blocks.py", "--bytes"],
    "plan": ["bench_train_step.py", "--plan"],
}
"""in the order of what is missed most, should time run out"""
SHORTEST_S = 1.0
"""for which a stage is not even begun"""


def run_stage(name: str, args: argparse.Namespace) -> bool:
    """Whether it went through."""
    script, *options = STAGES[name]
    options += [f"--{flag.replace('_', '-')}" for flag in ("resume", "dry_run", "toy") if getattr(args, flag)]
    if math.isfinite(args.minutes):
        options += ["--minutes", f"{(args.end - time.monotonic()) / 60:.2f}"]
    print(f"\n== {name}: python benchmarks/{' '.join([script, *options])}", flush=True)
    command = [sys.executable, str(Path(__file__).with_name(script)), *options, "--out", str(args.out.resolve())]
    with rows.child(command, cwd=rows.ROOT) as stage:
        return stage.wait() == 0


def main() -> str | None:
    parser = rows.parser(__doc__, f"stages, of {', '.join(STAGES)}")
    args = parser.parse_args()
    if unknown := set(args.only) - {*STAGES, "*"}:
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {', '.join(STAGES)}")
    rows.check_arguments(parser, args, needs_gpu=True)
    unfinished = []
    for name in STAGES:
        if args.only != ["*"] and name not in args.only:
            continue
        if args.end - time.monotonic() < SHORTEST_S or not run_stage(name, args):
            unfinished.append(name)
            if name == "tests":
                return "gpu_suite: the tests failed or were not finished; nothing is timed"
    if not args.toy:
        print(f"\n{tables.goals_table(tables.load(args.out))}")
    return f"gpu_suite: not finished: {', '.join(unfinished)}" if unfinished else None


if __name__ == "__main__":
    rows.run(main)
