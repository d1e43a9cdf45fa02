"""Checkpoints: complete, atomic, checked, and free of pickles (safetensors and JSON only).

A checkpoint is a folder `epoch_000012`. It is written aside, flushed to the disk and then renamed, so that a folder of
that name is whole; its manifest (size and SHA-256 of every file) finds what the disk did to it later.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastguard.config import LARGEST_INT
from fastguard.errors import FileError, UserError
from fastguard.train.monitor import EvaluationLog
from fastguard.utils.files import writing
from fastguard.utils.finite import names_not_finite
from fastguard.utils.processes import broadcast
from fastguard.utils.sharding import full_tensor
from fastguard.utils.terminal import a_few, say

FILE_BYTES = 4 << 30
"""Tensors are gathered and written in files of about this size, so that the host holds no more at a time."""
FORMAT = 1
"""What trainer.json says of the fields that this version reads."""
MANIFEST = "manifest.json"
MANIFEST_BYTES = 16 << 20
"""A manifest has about 100 bytes a file; a larger one is none."""


class CheckpointError(UserError):
    """A checkpoint that is damaged or does not fit; the message names the file."""


def checkpoint_name(epoch: int) -> str:
    """The folder of the checkpoint after so many epochs."""
    return f"epoch_{epoch:06d}"


class CheckpointFolder:
    """The checkpoints of one run; every method is collective (all processes call it), the first process writes."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self._accelerator = folder, accelerator
        if accelerator.is_main_process:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._clear()
        accelerator.wait_for_everyone()

    def _clear(self) -> None:
        """After a killed run: put back what it was about to replace, remove what it was writing or dropping."""
        for replaced in self.folder.glob(".old-*"):
            original = self.folder / replaced.name.removeprefix(".old-")
            if not original.exists():
                os.replace(replaced, original)
        for left in (*self.folder.glob(".part-*"), *self.folder.glob(".old-*"), *self.folder.glob(".drop-*")):
            _remove(left)

    def all(self) -> list[Path]:
        """Checkpoints, newest first, good or not."""
        return checkpoints_in(self.folder)

    def holds(self, path: Path) -> bool:
        """Whether a checkpoint is one of these; the folder, and each of them, may be a link to another disk."""
        return self.folder.resolve() in (path.parent.resolve(), path.resolve().parent)

    def newest_good(self) -> Path | None:
        """The newest checkpoint that `verify` passes; others are named on stderr and passed over."""
        found: list[str | None] = [None]
        if self._accelerator.is_main_process:
            for path in self.all():
                try:
                    verify(path)
                except CheckpointError as error:
                    say(f"{error}. Trying the one before")
                    continue
                found = [str(path)]
                break
        newest = broadcast(found, self._accelerator)[0]
        return None if newest is None else Path(newest)

    def save(
        self,
        epoch: int,
        state: dict[str, Any],
        tensors: dict[str, Iterable[tuple[str, Tensor]]],
        exported: Iterable[tuple[str, Tensor]],
        export: Callable[[Path, dict[str, Tensor]], None],
    ) -> Path:
        """Write `epoch_...` and return its path.

        Args:
            state: JSON values.
            tensors: group -> (name, live tensor); sharded ones are gathered one after the other.
            exported: the weights that `export(folder, whole weights)` writes as others load them.

        Raises on every process what failed on the first: OSError if the disk is full. Earlier checkpoints stay.
        """
        path = self.folder / checkpoint_name(epoch)
        aside, replaced = self.folder / f".part-{path.name}", self.folder / f".old-{path.name}"
        writer = _Writer(path, self._accelerator.is_main_process)
        writer(lambda: aside.mkdir(parents=True))
        writer(lambda: (aside / "trainer.json").write_text(json.dumps(state, indent=1), encoding="utf-8"))
        generators = gather_object([_generators()])
        writer(lambda: (aside / "rng.json").write_text(json.dumps(generators), encoding="utf-8"))
        for group, named in tensors.items():
            for count, part in enumerate(self._whole_parts(named)):
                writer(save_file, part, aside / f"{group}-{count:04d}.safetensors")
        weights = {}
        for name, tensor in exported:
            value = full_tensor(tensor).cpu()
            if self._accelerator.is_main_process:  # the others' hosts need not hold it all
                weights[name] = value
        writer(export, aside / "diffusers", weights)
        writer(_seal, aside)
        if path.exists():  # the same epoch once more, after a resume from an earlier one
            writer(os.replace, path, replaced)
        writer(os.replace, aside, path)
        writer(_flush, self.folder)
        if self._accelerator.is_main_process:
            _remove(aside)
            _remove(replaced)
        failure = broadcast([None if writer.failure is None else str(writer.failure)], self._accelerator)[0]
        if failure is not None:
            raise writer.failure or FileError(f"the first process could not save: {failure}")
        return path

    def _whole_parts(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The whole tensors in parts of about FILE_BYTES, at least one; empty on all but the first process."""
        main = self._accelerator.is_main_process
        part: dict[str, Tensor] = {}
        size = 0
        for name, tensor in named:
            value = full_tensor(tensor).cpu()
            size += value.nbytes
            if main:
                part[name] = value.contiguous()
            if size >= FILE_BYTES:
                yield part
                part, size = {}, 0
        yield part

    def set_aside_after(self, epoch: int) -> None:
        """Rename checkpoints after `epoch`, of a branch that is not gone on with: they would pass for the newest."""
        if self._accelerator.is_main_process:
            for path in self.all():
                if path.name > checkpoint_name(epoch):
                    target = self.folder / f"aside_{path.name}"
                    _remove(target)
                    os.replace(path, target)
        self._accelerator.wait_for_everyone()

    def prune(self, keep: int, best: Collection[str | None]) -> None:
        """Delete all but the newest `keep` and the best ones; called once a newer one is safe."""
        if self._accelerator.is_main_process:
            for path in self.all()[keep:]:
                if path.name not in best:
                    dropped = self.folder / f".drop-{path.name}"
                    os.replace(path, dropped)  # so that a half-deleted folder is never taken for a checkpoint
                    _remove(dropped)
        self._accelerator.wait_for_everyone()


def _remove(path: Path) -> None:
    """Remove a folder, or a file or link in its place, as far as that can be done."""
    with suppress(OSError):
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)


class _Writer:
    """Runs the first process's file operations until one fails; the others, and what follows, are passed over.

    All processes thus reach the same collectives, whatever the disk does.
    """

    def __init__(self, path: Path, active: bool) -> None:
        self._path, self._active = path, active
        self.failure: Exception | None = None

    def __call__(self, operation: Callable[..., Any], *args: Any) -> None:
        if not self._active or self.failure is not None:
            return
        try:
            with writing(
                self._path,
                ": the checkpoint was not saved, earlier ones are untouched",
                "go on with --resume auto (run.keep_last says how many are kept)",
            ):
                operation(*args)
        except Exception as error:  # whatever it is, the other processes wait in the next collective
            self.failure = error


def verify(path: Path) -> None:
    """Raise CheckpointError, naming the file, unless every listed file is there as written, and all tensors are finite.

    Files that the manifest does not list are never opened, nor are listed ones that are no plain files.
    """
    try:
        if not os.path.isdir(path):
            raise CheckpointError(
                f"there is no checkpoint {path}; expected auto, never, or the folder of one (epoch_...)"
            )
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    listed = _listed(path)
    for name, entry in listed.items():
        with _reading(path, name) as file:
            size = file.stat().st_size
            if size != entry.bytes:
                raise CheckpointError(f"checkpoint {path}: {name!r} has {size} bytes, {entry.bytes} were written")
            if _sha256(file) != entry.sha256:
                raise CheckpointError(f"checkpoint {path}: {name!r} is corrupted (its SHA-256 differs)")
            if "/" not in name and name.endswith(".safetensors"):  # now, while the system still has it in memory
                with safe_open(file, "pt") as tensors:
                    bad = names_not_finite((key, tensors.get_tensor(key)) for key in tensors.keys())  # noqa: SIM118
                if bad:
                    raise CheckpointError(f"checkpoint {path}: {name!r} holds NaN or infinity ({a_few(bad)})")


def require(path: Path) -> None:
    """`verify`, with an error that names the newest good checkpoint before this one as well."""
    try:
        verify(path)
    except CheckpointError as error:
        before = next((p for p in checkpoints_in(path.parent) if p.name < path.name and _is_good(p)), None)
        hint = "there is no good one before it" if before is None else f"the newest good one before it is {before}"
        raise CheckpointError(f"{error}; {hint}" if os.path.isdir(path) else str(error)) from None


def _is_good(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, newest first, good or not; none if it cannot be looked into."""
    if not os.path.isdir(folder):  # which is False, too, for what may not be asked
        return []
    return sorted((p for p in folder.glob("epoch_*") if re.fullmatch(r"epoch_\d{6}", p.name)), reverse=True)


@dataclass(frozen=True)
class _Entry:
    """What the manifest says of a file."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _listed(path: Path) -> dict[str, _Entry]:
    """What the manifest lists, by plain relative paths."""
    with _reading(path, MANIFEST) as file:
        if file.stat().st_size > MANIFEST_BYTES:
            raise CheckpointError(f"checkpoint {path}: {MANIFEST} has {file.stat().st_size} bytes")
        listed = _validated(dict[str, _Entry], file)
    for name in listed:
        if not name.isprintable() or any(part in ("", ".", "..") for part in name.split("/")):
            raise CheckpointError(f"checkpoint {path}: {MANIFEST} lists {name!r}, which is no file of a checkpoint")
    if missing := {"trainer.json", "rng.json"} - listed.keys():
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} does not list {sorted(missing)}")
    return listed


@contextmanager
def _reading(path: Path, name: str) -> Iterator[Path]:
    """Gives the plain file `name` of a checkpoint; inside, errors of reading it become one that names it."""
    file = path / name
    try:
        for folder in reversed(Path(name).parents[:-1]):
            if not stat.S_ISDIR((path / folder).lstat().st_mode):
                raise CheckpointError(f"checkpoint {path}: {str(folder)!r} is no plain folder")
        if not stat.S_ISREG(file.lstat().st_mode):
            raise CheckpointError(f"checkpoint {path}: {name!r} is no plain file")
        yield file
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} lacks {name!r}") from None
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"checkpoint {path}: {name!r} cannot be read: {reason}") from None


def _validated(kind: Any, file: Path) -> Any:
    """The values of a JSON file. Raises CheckpointError that names the first field that is not as expected."""
    try:
        return TypeAdapter(kind).validate_json(file.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{file} is not as it was written: {where + ': ' if where else ''}{first['msg']}"
        ) from None


_Count = Annotated[int, Field(ge=0, le=LARGEST_INT)]


@dataclass(frozen=True)
class _MonitorState:
    history: list[EvaluationLog]
    best: EvaluationLog | None
    best_scores: list[float] | None
    falling: int


@dataclass(frozen=True)
class _Format:
    format: int


@dataclass(frozen=True)
class _TrainerState:
    """What is read from trainer.json; what came later has a default."""

    epoch: _Count
    updates: _Count
    bad_in_a_row: _Count
    recipe: dict[str, Any]
    monitor: _MonitorState | None
    monitor_conditions: dict[str, Any] | None = None
    trained_prompts: str = ""
    earlier_best: list[str] = field(default_factory=list)
    baselines: dict[int, FiniteFloat] = field(default_factory=dict)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises CheckpointError, naming the file, if this version cannot read it."""
    with _reading(path, "trainer.json") as file:
        written = _validated(_Format, file).format
        if written != FORMAT:
            raise CheckpointError(
                f"{file} has format {written}, written by a later version of fastguard; this one reads {FORMAT}"
            )
        _validated(_TrainerState, file)
        return json.loads(file.read_bytes())


def read_tensors(path: Path, group: str, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of one group, on the host, or those that are wanted by their name.

    Raises CheckpointError, naming the file, if one cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for name in sorted(_listed(path)):
        if re.fullmatch(rf"{group}-\d+\.safetensors", name):
            with _reading(path, name) as file, safe_open(file, "pt") as content:
                tensors |= {key: content.get_tensor(key) for key in content.keys() if wanted(key)}  # noqa: SIM118
    return tensors


def _seal(folder: Path) -> None:
    """Write the manifest and bring everything to the disk."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    manifest = {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for entry in (*files, folder / MANIFEST, *(f for f in folder.rglob("*") if f.is_dir()), folder):
        _flush(entry)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _generators() -> dict[str, Any]:
    """The state of this process's random number generators, as JSON values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002  user code may use it
    return {
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, cached],
    }


def restore_rng(path: Path, accelerator: Accelerator) -> None:
    """Set this process's generators; a process that the run did not have keeps its own (rollouts need none of them).

    Raises CheckpointError, naming the file, if it does not hold what generators take.
    """
    with _reading(path, "rng.json") as file:
        try:
            states = json.loads(file.read_bytes())
            if accelerator.process_index < len(states):
                _set_generators(states[accelerator.process_index])
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(f"{file} is not as it was written: {error}") from None


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8, device="cpu"))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8, device="cpu"))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002
