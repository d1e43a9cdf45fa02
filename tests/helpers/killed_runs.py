"""Toy runs that die at chosen file operations, and are resumed: python killed_runs.py DIR EPOCHS FIRST STEP.

DIR/undisturbed is a run without a kill, DIR/operation_00001 one that was killed at its first operation, and so on by
STEP until a run is not killed. Runs are forks of this process, which has imported everything: each takes a fraction of
a second.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fastguard.train.checkpoint import checkpoints_in, verify
from helpers import toy_run


def run(folder: Path, epochs: int) -> int:
    sys.argv = ["toy_run.py", str(folder), str(epochs), "--resume", "auto"]
    return toy_run.main()


def in_child(folder: Path, epochs: int, die_at: int | None = None) -> int:
    """The exit code of a run, negative for a signal; what it says goes to DIR.log."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if die_at is not None:
            os.environ["TOY_DIE_AT"] = str(die_at)
        code = run(folder, epochs)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(out: Path, epochs: int, operation: int, step: int) -> None:
    run(out / "undisturbed", epochs)  # which also imports what is imported late; without threads that a fork would lose
    while True:
        folder = out / f"operation_{operation:05d}"
        code = in_child(folder, epochs, operation)
        if code == 0:  # it has fewer operations
            return
        assert code == -signal.SIGKILL, f"{folder}: exit code {code}"
        for path in checkpoints_in(folder / "checkpoints"):
            verify(path)
        assert in_child(folder, epochs) == 0, f"{folder}: the resume failed"
        operation += step


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
