"""Files read and written so that an error names the file, and says what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

_CAUSES = {
    errno.ENOSPC: ("the disk is full", "Make room"),
    errno.EDQUOT: ("the disk quota is used up", "Make room"),
    errno.EFBIG: ("the file is larger than files may be here", "Raise the limit (ulimit -f)"),
    errno.EIO: ("the disk reports an error", "Look at the disk, or choose another"),
    errno.ELOOP: ("a symbolic link, which is not followed here", "Remove it"),
}
"""What happened, and what to do about it."""


def read_text(path: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises ValueError that names the line of other bytes."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{content[error.start]:02x}: {error.reason}"
        raise ValueError(f"{path}, line {line}: not UTF-8 ({byte}); save the file as UTF-8") from None


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
    """Inside, an OSError (or safetensors' own word for one) becomes an OSError that names the file or folder `path`.

    Args:
        consequence: what was not written, for readers who may fear for more.
        then: what to do after the cause is mended.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, text = _number(error), getattr(error, "strerror", None) or str(error)
        cause, remedy = _CAUSES.get(number, (text, "Mend that"))
        where = getattr(error, "filename", None) or path
        message = f"{where}: {cause}{consequence}. {remedy}, and {then}"
        raise (OSError(number, message) if number else OSError(message)) from error


def _number(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else 0
