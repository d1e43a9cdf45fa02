"""A hang fails its test instead of the whole session."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

DEADLINE_S = 300


@contextmanager
def deadline(what: object = "this test") -> Iterator[None]:
    """Inside, `what` has five minutes; a failure says it."""

    def fail(*_: Any) -> None:
        pytest.fail(f"no end after {DEADLINE_S} s: {what!r}")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(DEADLINE_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
