"""Cases measured in a process of their own each: a fault on the GPU ends that process, and no other case.

The program that measures starts itself with `--child`. The child reads the name of its case from stdin, and prints each
finding as a line of JSON as soon as it has it, so that what came before a fault is kept.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import rows
import torch
from rows import Measured

LIMIT_S = 420
"""in which a case has to be done"""
CHILD = "--child"
DONE = "done"
"""a child's last answer"""
TOLD_LINES = 40
"""of a child's last words, that are shown"""


class Processes:
    """Measures each case in a process of its own. The next one imports everything while one measures."""

    def __init__(self, program: str, args: Namespace, environ: Mapping[str, str]) -> None:
        """environ: all environment variables of the children."""
        self._command = [sys.executable, program, CHILD, *(["--toy"] if args.toy else [])]
        self._args, self._environ = args, environ
        self._waiting: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return rows.start(self._command, env=self._environ, stdin=pipe, stdout=pipe, stderr=pipe)

    def measure(self, name: str) -> Measured:
        """What the child found; if it broke or was not done in time, that comes last, as `failed`."""
        process = self._waiting or self._start()
        self._waiting = self._start()  # it ends with this one
        limit_s = min(LIMIT_S, max(1.0, self._args.end - time.monotonic()))
        problem = None
        try:
            printed, errors = process.communicate(f"{name}\n", timeout=limit_s)
            if process.returncode:
                problem = f"exit status {process.returncode}: {reason(errors)}"
        except subprocess.TimeoutExpired:
            rows.stop(process)
            printed, errors = process.communicate()
            problem = f"not done after {limit_s:.0f} s"
        finally:
            rows.stop(process)
        found = list(_findings(printed))
        if found[-1:] == [DONE]:
            found.pop()
        elif problem is None:
            problem = f"it ended before it was done: {reason(errors)}"
        yield from found
        if problem:
            print(*errors.strip().splitlines()[-TOLD_LINES:], sep="\n", file=sys.stderr, flush=True)
            yield "", "", {rows.FAILED: problem}


def _findings(printed: str) -> Iterator[Any]:
    for line in printed.splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return  # cut off, as the process ended


def reason(errors: str) -> str:
    """The line with which a process that broke says why; a CUDA error has advice after it."""
    lines = errors.strip().splitlines() or ["it said nothing"]
    return ([line for line in lines if re.match(r"[\w.]+(Error|Exception): ", line)] or lines)[-1]


def serve(measure: Callable[[str, bool], Measured]) -> None:
    """The child: measure the case that it is told of, at toy sizes or not, and print what is found.

    A case that does not fit ends with `out of memory`, and with the last phase that did.
    """
    name = sys.stdin.readline().strip()
    if not name:  # there is nobody to say so any more
        return
    answers, phase = os.fdopen(os.dup(1), "w"), "nothing"
    os.dup2(2, 1)  # libraries print, too

    def answer(found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    try:
        for found in measure(name, "--toy" in sys.argv):
            answer(found)
            phase = found[1]
    except torch.OutOfMemoryError as error:
        answer(["", "", {rows.OUT_OF_MEMORY: f"after {phase}: {str(error).splitlines()[0]}"}])
    answer(DONE)
