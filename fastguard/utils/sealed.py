"""Files that can be made again: sealed with a digest of folder, name and content, written aside, and renamed.

They outlive the runs that made them. What a disk has changed since then is noticed, and made anew. What a killed
process left unfinished is removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from fastguard.errors import UserError

_UNSEALED = "0" * 64
"""Stands for the digest while it is computed, and so covers every byte but its own."""
_SEAL = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_FOLDERS_SEAL = "sha256"
"""The file that holds the digest of a sealed folder."""
_SCRATCH = ".part-"


class DamagedError(UserError):
    """A file that is not as it was sealed; the message names it."""


def save_sealed(tensors: dict[str, Tensor], path: Path) -> None:
    """Write host tensors to a safetensors file, at once or not at all. Its header has a SHA-256 of its folder's
    name, its own, and all its bytes."""
    content = save(tensors, {"sha256": _UNSEALED})
    digest = hashlib.sha256(_named(path) + content).hexdigest()
    with scratch(path.parent) as folder:
        (folder / path.name).write_bytes(content.replace(_UNSEALED.encode(), digest.encode(), 1))
        os.replace(folder / path.name, path)


def load_sealed(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by `save_sealed`, on the host. The file is read once: what is compared is what is returned.

    Raises DamagedError if any bit differs from what was written, if that was another file, or if there is no seal.
    """
    content = path.read_bytes()
    seal = _SEAL.search(content)
    if seal is None or _digest_of(path, content, seal) != seal[1].decode():
        raise DamagedError(f"{path} is damaged")
    return load(content)


def is_whole(path: Path) -> bool:
    """Whether `load_sealed` gives the file's tensors."""
    try:
        load_sealed(path)
    except (OSError, MemoryError, DamagedError):
        return False
    return True


def _named(path: Path) -> bytes:
    """Goes before the content: a file in another's place is whole, but not what its name and folder say."""
    return f"{path.parent.name}/{path.name}\n".encode()


def _digest_of(path: Path, content: bytes, seal: re.Match[bytes]) -> str:
    digest = hashlib.sha256(_named(path) + content[: seal.start(1)] + _UNSEALED.encode())
    digest.update(memoryview(content)[seal.end(1) :])
    return digest.hexdigest()


def seal_folder(folder: Path) -> None:
    """Write a digest of all files, and of their names, into the folder."""
    (folder / _FOLDERS_SEAL).write_text(_digest_of_folder(folder), encoding="ascii")


def is_sealed_folder(folder: Path) -> bool:
    """Whether the folder holds the files that it was sealed with, to the bit, and no other."""
    try:
        return (folder / _FOLDERS_SEAL).read_bytes() == _digest_of_folder(folder).encode()
    except (OSError, MemoryError):
        return False


def _digest_of_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file != folder / _FOLDERS_SEAL:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder)}\n{len(content)}\n".encode() + content)
    return digest.hexdigest()


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, locked for this process; what it then still holds goes with it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=folder))
        with suppress(FileNotFoundError):  # another process cleared it before it was locked
            lock = os.open(path, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: nobody clears there either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                break
            os.close(lock)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def clear_scratch(folder: Path) -> None:
    """Remove temporary folders that killed processes left in `folder`: those that no living one has locked."""
    for left in folder.glob(f"{_SCRATCH}*"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY)  # opening a fifo would wait for a writer
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)
