"""Files read and written so that an error names the file, and says what to do."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fastguard.errors import FileError, UserError

_CAUSES = {
    errno.ENOSPC: ("the disk is full", "Make room"),
    errno.EDQUOT: ("the disk quota is used up", "Make room"),
    errno.EFBIG: ("the file is larger than files may be here", "Raise the limit (ulimit -f)"),
    errno.EIO: ("the disk reports an error", "Look at the disk, or choose another"),
    errno.ELOOP: ("a symbolic link, which is not followed here", "Remove it"),
}
"""What happened, and what to do about it."""
_NO_MEMORY = re.compile("out of memory|can't allocate memory|Cannot allocate memory")
"""How CUDA, torch's allocator of host memory, and safetensors say it."""
MOST_LEVELS = 64
"""Lists and objects inside each other, in JSON."""


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises as `read_bytes`, and UserError for other bytes."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x}: {error.reason}"
        raise UserError(f"{path}, line {line}: not UTF-8 ({byte}); save the file as UTF-8") from None


def read_bytes(path: Path) -> bytes:
    """A whole file. Raises FileError for one that cannot be read, UserError for one that does not fit into memory."""
    try:
        with fitting(path):
            return path.read_bytes()
    except OSError as error:
        raise FileError(error.errno, f"{path}: {error.strerror}") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text that everything else can take, and write again.

    Raises ValueError for what is not JSON, is nested deeper than `MOST_LEVELS`, or holds half a character.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels") from None
    _check_json(value, MOST_LEVELS)
    return value


def _check_json(value: Any, levels: int) -> None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"it holds {value[error.start]!r}, half of a character") from None
    elif isinstance(value, (list, dict)):
        if levels == 0:
            raise ValueError(f"it is nested deeper than {MOST_LEVELS} levels")
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_json(part, levels - 1)


@contextmanager
def fitting(what: Path | str, remedy: str = "free some, or take a smaller one") -> Iterator[None]:
    """Inside, running out of the memory of the host or a GPU becomes a UserError that names `what` is read."""
    try:
        yield
    except Exception as error:
        if (cause := out_of_memory(error)) is None:
            raise
        raise UserError(f"{what} does not fit into memory ({cause}): {remedy}") from error


def out_of_memory(error: BaseException | None) -> str | None:
    """What was said about it, if there was not enough memory; loaders raise errors of their own on top of that."""
    while error is not None:
        text = " ".join(str(error).split())
        number = _number(error) if isinstance(error, (OSError, SafetensorError)) else 0
        if isinstance(error, MemoryError) or number == errno.ENOMEM or _NO_MEMORY.search(text):
            return text[:200] or "out of memory"
        error = error.__cause__ or error.__context__
    return None


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all; what a link at `path` or beside it leads to is left alone."""
    aside = path.with_name(f"{path.name}.part")
    aside.unlink(missing_ok=True)  # of a killed run
    try:
        with aside.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, consequence: str = "", then: str = "start again") -> Iterator[None]:
    """Inside, an OSError (or safetensors' own word for one) becomes a FileError that names the file or folder `path`.

    Args:
        consequence: what was not written, for readers who may fear for more.
        then: what to do after the cause is mended.
    """
    try:
        yield
    except FileError:
        raise
    except (OSError, SafetensorError) as error:
        number, text = _number(error), getattr(error, "strerror", None) or " ".join(str(error).split())
        cause, remedy = _CAUSES.get(number, (text, "Mend that"))
        # Of a rename, the second name: the first is of a temporary file.
        where = getattr(error, "filename2", None) or getattr(error, "filename", None) or path
        message = f"{where}: {cause}{consequence}. {remedy}, and {then}"
        raise (FileError(number, message) if number else FileError(message)) from error


def _number(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0
