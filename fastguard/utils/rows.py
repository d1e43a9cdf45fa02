"""Logs of a run: JSON lines, an object each, which kills and other programs may damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastguard.config import LARGEST_INT
from fastguard.utils.files import write_text


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A line's object; None for anything else (half a line, another value, not UTF-8, nested too deeply)."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_lines(file: Path) -> list[bytes]:
    """The lines of a file, without empty ones; none if it is no file."""
    return [line for line in file.read_bytes().split(b"\n") if line.strip()] if file.is_file() else []


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; odd lines are passed over."""
    return [row for row in map(parse_row, read_lines(file)) if row is not None]


def keep_rows(file: Path, wanted: Callable[[int], bool]) -> int:
    """Drop the rows whose epoch is not wanted, and move odd ones to `<name>_odd.jsonl`; returns how many were odd.

    What is kept is kept to the byte.
    """
    lines = read_lines(file)
    kept, odd = [], []
    for line in lines:
        row = parse_row(line)
        epoch = None if row is None else row.get("epoch")
        if type(epoch) is not int or not 0 <= epoch <= LARGEST_INT:
            odd.append(line)
        elif wanted(epoch):
            kept.append(line)
    if odd:
        with odd_rows(file).open("ab") as aside:  # first, so that a kill loses none
            aside.write(b"".join(line + b"\n" for line in odd))
    if lines:
        write_text(file, "".join(f"{line.decode('utf-8')}\n" for line in kept))
    return len(odd)


def odd_rows(file: Path) -> Path:
    """Where `keep_rows` puts what it cannot read."""
    return file.with_name(f"{file.stem}_odd{file.suffix}")
