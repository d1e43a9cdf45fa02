"""What is said on stdout and stderr: failing output ends nothing, and no text of others acts on the terminal."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast
from unicodedata import category

from tqdm import tqdm

_ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of what acts on a terminal, reorders text, ends a line, or is half of a character."""


def printable(text: str) -> str:
    """The text with characters that act on a terminal escaped as in Python (`\\x1b`); newlines and tabs stay."""
    return "".join(
        c.encode("unicode_escape").decode() if category(c) in _ACTING and c not in "\n\t" else c for c in text
    )


def say(message: str, file: TextIO | None = None) -> None:
    """A line on `file` (stderr), `printable` and at once, that does not tear a progress bar.

    May be called by a signal's handler. A closed terminal or a full log is no error.
    """
    # ValueError: a closed file. RuntimeError: a signal's message, while the signal interrupted another one.
    with suppress(OSError, ValueError, RuntimeError):
        stream = file or sys.stderr
        if stream is not None:  # closed before Python began; tqdm would take stdout instead
            tqdm.write(printable(message), file=stream)
            stream.flush()


def a_few(names: Sequence[str], most: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class Unfailing:
    """A text stream whose writes do not fail: what cannot be written is lost, and the next write is tried again."""

    def __init__(self, stream: TextIO, lost: OSError | None = None) -> None:
        self._stream = stream
        self.lost = lost
        """why something could not be written; a reader that went away (`| head`) does not count"""

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, operation: Callable[..., Any], *args: Any) -> bool:
        try:
            operation(*args)
        except OSError as error:
            if error.errno != errno.EPIPE:
                self.lost = error
            return False
        except ValueError:
            self.lost = _closed()
            return False
        return True

    def finish(self) -> None:
        """Write what is buffered, or drop it: the interpreter would try again at its exit, and fail."""
        if not self._try(self._stream.flush):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unfailing_output() -> Iterator[Unfailing]:
    """Inside, sys.stdout (which is yielded) and sys.stderr are `Unfailing`; closed ones lead nowhere, for good."""
    _occupy_closed()
    there = [None if getattr(stream, "closed", stream is None) else stream for stream in (sys.stdout, sys.stderr)]
    lost = [_closed() if stream is None else None for stream in there]
    held = [stream or open(os.devnull, "w") for stream in there]  # noqa: SIM115
    errors = [getattr(stream, "errors", None) for stream in held]
    for stream in held:
        _on_unknown_characters(stream, "backslashreplace")
    ours = [Unfailing(stream, why) for stream, why in zip(held, lost, strict=True)]
    sys.stdout, sys.stderr = cast(list[TextIO], ours)
    try:
        yield ours[0]
    finally:
        for stream in ours:
            stream.finish()
        sys.stdout, sys.stderr = held
        for stream, before in zip(held, errors, strict=True):
            _on_unknown_characters(stream, before)


def _closed() -> OSError:
    return OSError(errno.EBADF, "it is closed")


def _on_unknown_characters(stream: TextIO, errors: str | None) -> None:
    """What a stream does with what its encoding does not know (half characters of a path, say)."""
    # It flushes first, which a full disk, or who closed or detached the stream, may not allow.
    with suppress(OSError, ValueError):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _occupy_closed() -> None:
    """Point closed ones of the descriptors 0 to 2 nowhere: else the next file that is opened gets the number, and what
    a C library says would be written into a checkpoint."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
