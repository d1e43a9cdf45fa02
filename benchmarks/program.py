"""What the programs of this folder have in common: their options, how they end, and that nothing outlives them."""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import results
import torch

from fastguard.cli import terminations_as_interrupts

PR_SET_PDEATHSIG = 1  # linux/prctl.h
GRACE_S = 10.0
"""in which a process may end by itself"""


# --- options --------------------------------------------------------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With a module's docstring for --help."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_arguments(parser: argparse.ArgumentParser, always_saves: bool = False) -> None:
    """What every benchmark on a GPU takes."""
    if not always_saves:
        parser.add_argument("--save", action="store_true", help="add the numbers to the result files")
    add_out(parser)
    parser.add_argument("--resume", action="store_true", help="keep what the last run of this commit and GPU measured")
    parser.add_argument("--minutes", type=_minutes, default=math.inf, help="end after about so many minutes")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, nothing saved")


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the result files")


def _minutes(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}, expected more than 0")
    return value


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, needs_gpu: bool = True) -> None:
    """Refuse what makes no sense, before anything is measured: nothing of a dry run is a number, the rest needs a GPU,
    and numbers must have a place to go to."""
    if args.dry_run and args.save:
        parser.error("--dry-run saves nothing: toy sizes are no numbers")
    if needs_gpu and not (args.dry_run or torch.cuda.is_available()):
        parser.error("needs a CUDA device, and torch sees none; --dry-run walks the path on the CPU")
    if args.dry_run:
        print("a dry run: toy sizes on the CPU, no number below means anything", flush=True)
        return
    try:
        results.commit()
        if args.save:
            args.out.mkdir(parents=True, exist_ok=True)
        results.load(args.out)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}; expected a folder to write to")
    except ValueError as error:
        parser.error(str(error))
    if args.save and not os.access(args.out, os.W_OK):
        parser.error(f"--out {args.out} cannot be written to")


def chosen(names: Iterable[str], patterns: Sequence[str], option: str) -> list[str]:
    """The names that match a pattern. Raises ValueError for a pattern that matches none."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"{option} {pattern!r} matches none of {', '.join(map(repr, names))}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


# --- processes ------------------------------------------------------------------------------------------------------


def run(main: Callable[[], str | None]) -> None:
    """Run a program to its exit status: None is success. SIGTERM and SIGHUP stop it as Ctrl-C does, tidily."""
    try:
        with terminations_as_interrupts():
            sys.exit(main())
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name} was stopped; --resume goes on with what it has saved", file=sys.stderr)
        sys.exit(130)


def interpret_kernels() -> None:
    """Run Triton kernels on a CPU. That has to be known before triton is imported: the program starts anew."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})


def end_with_parent() -> None:
    """Called in a process that another one has started: it is killed when that one ends, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that outlives neither the block nor this process, even if this one is killed.

    It has a session of its own, so that Ctrl-C reaches it, and what it has started, by way of this process alone.
    """
    with subprocess.Popen(command, text=True, start_new_session=True, preexec_fn=end_with_parent, **options) as process:
        try:
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[str]) -> None:
    """End a `child` and all that runs in its session."""
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
