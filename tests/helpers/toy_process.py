"""Toy runs as processes, forked from one that has imported everything: each takes a fraction of a second."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from helpers.deadline import deadline

_FORKS = multiprocessing.get_context("forkserver")


class ToyProcess:
    """A running `toy_run.py` with these arguments, in its environment or this one; what it says goes to a file."""

    def __init__(self, *arguments: object, environment: Mapping[str, str] = os.environ) -> None:
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115  for as long as the process lives
        args = (self._log.name, [str(a) for a in arguments], dict(environment))
        self._process = _FORKS.Process(target=_run, args=args, daemon=True)
        _FORKS.set_forkserver_preload(["helpers.toy_run"])
        self._process.start()

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> int:
        """Its exit code, negative for a signal that ended it."""
        with deadline(self._process):
            self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def said(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")


def _run(log: str, arguments: list[str], environment: dict[str, str]) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["toy_run.py", *arguments]
    from helpers import toy_run

    toy_run.run_and_exit()
