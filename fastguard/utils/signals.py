"""Signals that ask a command to end, and processes that end with their parent."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any

ENDING = (
    signal.SIGINT,  # Ctrl-C
    signal.SIGTERM,  # kill, timeout, docker stop, preemption
    signal.SIGHUP,  # a closed terminal
    signal.SIGUSR1,  # schedulers before the end of a job's time: Slurm and SGE as they are told, ...
    signal.SIGUSR2,  # ... LSF and SGE on their own account
    signal.SIGXCPU,  # the soft limit of CPU time
)
"""SIGQUIT (Ctrl-\\) is left alone, as the way to end a process at once and look at its core."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def when_parent_ends(act: Callable[[], Any]) -> None:
    """Call `act` in a thread once the process that started this one is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        act()

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def handled_by(handler: Callable[[int, Any], Any] | signal.Handlers, signals: Sequence[int] = ENDING) -> Iterator[None]:
    """Inside, the handler gets these signals; those that the parent said to ignore (nohup, a shell's `&`) stay ignored.

    In the main thread only.
    """
    # None: a handler that Python did not install, and so cannot put back.
    own = [number for number in signals if signal.getsignal(number) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, handler) for number in own}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)
