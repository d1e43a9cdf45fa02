"""The command line: `fastguard <command>`. Each command is a function; heavy imports wait until it runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from tyro.extras import SubcommandApp

app = SubcommandApp()


@app.command
def demo(
    out: Path = Path("runs/demo"), seeds: int | None = None, workers: int | None = None, quick: bool = False
) -> int:
    """Compare Flow-GRPO and GRPO-Guard on handwritten digits, and write a report.

    Pretrains a tiny Flux model (kept in $FASTGUARD_CACHE or ~/.cache/fastguard), trains it with both objectives,
    and explains what is seen. A few minutes on two CPU cores. Ctrl-C leaves a report of the finished runs.

    Args:
        out: folder for report.html, its pictures and results.json
        seeds: runs per objective (3 unless given, 1 with --quick)
        workers: processes for the training runs (2 unless given; 1 on a GPU)
        quick: a smoke run of half a minute that exercises every stage; its numbers mean nothing
    """
    if find_spec("sklearn") is None:
        print("the demo's data and metrics need scikit-learn: pip install scikit-learn", file=sys.stderr)
        return 1
    from fastguard.config import DemoConfig, quick_demo
    from fastguard.demo.run import run_demo

    config = quick_demo() if quick else DemoConfig()
    if seeds is not None:
        config = replace(config, seeds=seeds)
    return run_demo(config, out, workers=1 if quick and workers is None else workers)


@contextmanager
def _terminations_as_interrupts() -> Iterator[None]:
    """SIGTERM (kill, timeout, docker stop) and SIGHUP (a closed terminal) end a command as Ctrl-C does: tidily."""
    changed = {}
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup, for one, has its own idea
            changed[number] = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, previous in changed.items():
            signal.signal(number, previous)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the `fastguard` script; returns the exit code."""
    try:
        with _terminations_as_interrupts():
            return app.cli(prog="fastguard", description=__doc__, args=args)
    except ValueError as error:  # a setting out of range; the message names it
        print(f"fastguard: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a folder that cannot be made or written; the message names it
        print(f"fastguard: cannot read or write: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before the command could take care of it itself
        print("fastguard: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
