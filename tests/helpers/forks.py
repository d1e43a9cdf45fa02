"""Runs as processes, forked from one that has imported everything: each starts in a fraction of a second."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from helpers.deadline import deadline

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "helpers.toy_run",
        "fastguard.cli",
        "fastguard.commands.train",
        "fastguard.backbones.pipeline.backbone",
        "fastguard.backbones.flux.spec",
    ]
)
TOY = "helpers.toy_run:run_and_exit"
FASTGUARD = "fastguard.cli:main"


class Fork:
    """A running program, with these arguments, in its environment and folder or in ours.

    A program is "module:function", a function that reads sys.argv and may return an exit code. What it says goes to a
    file.
    """

    def __init__(
        self,
        program: str,
        *arguments: object,
        environment: Mapping[str, str] = os.environ,
        folder: str | Path = ".",
    ) -> None:
        self._log = tempfile.NamedTemporaryFile()  # noqa: SIM115  for as long as the process lives
        args = (program, [str(a) for a in arguments], dict(environment), os.path.abspath(folder), self._log.name)
        self._process = _FORKS.Process(target=_run, args=args, daemon=True)
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
        with open(self._log.name, encoding="utf-8", newline="") as log:
            return log.read()


def _run(program: str, arguments: list[str], environment: dict[str, str], folder: str, log: str) -> None:
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    module, function = program.split(":")
    sys.argv = [module, *arguments]
    sys.exit(getattr(importlib.import_module(module), function)())
