"""What a user can mend. The command line shows these errors in one line, and any other with its traceback."""

from __future__ import annotations

from typing import ClassVar


class UserError(ValueError):
    """A setting, a flag, a file or a machine that does not do; the message says what to change."""

    exit_code: ClassVar[int] = 2
    """of a command that ends with it"""


class FileError(OSError, UserError):
    """A file or folder that cannot be read or written. Built as an OSError: of its number, or none, and a message."""

    def __str__(self) -> str:
        return f"cannot read or write: {super().__str__()}"


class NotFiniteError(UserError, FloatingPointError):
    """Training met NaN or infinity, and no update can go on from there."""

    exit_code = 1
