"""Checkpoints: complete, atomic, checked, and free of pickles (safetensors and JSON only).

A checkpoint is a folder `epoch_000012`. It is written aside, flushed to the disk and then renamed, so that a folder of
that name is whole; its manifest (size and SHA-256 of every file) finds what the disk did to it later.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastguard.files import writing
from fastguard.weights import whole

FILE_BYTES = 4 << 30
"""Tensors are gathered and written in files of about this size, so that the host holds no more at a time."""
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that is damaged or does not fit; the message names the file."""


def checkpoint_name(epoch: int) -> str:
    """The folder of the checkpoint after so many epochs."""
    return f"epoch_{epoch:06d}"


class CheckpointFolder:
    """The checkpoints of one run; every method is collective (all processes call it), the first process writes."""

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder, self._accelerator = folder, accelerator
        if accelerator.is_main_process:
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
            shutil.rmtree(left, ignore_errors=True)

    def all(self) -> list[Path]:
        """Checkpoints, newest first, whole or not."""
        return sorted(self.folder.glob("epoch_*"), reverse=True)

    def newest_whole(self) -> Path | None:
        """The newest checkpoint without damage; damaged ones are named in a warning and passed over."""
        found: list[str | None] = [None]
        if self._accelerator.is_main_process:
            for path in self.all():
                try:
                    verify(path)
                except CheckpointError as error:
                    warnings.warn(f"{error}. Trying the one before", stacklevel=2)
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
            value = whole(tensor).cpu()
            if self._accelerator.is_main_process:  # the others' hosts need not hold it all
                weights[name] = value
        writer(export, aside / "diffusers", weights)
        writer(_seal, aside)
        if path.exists():  # the same epoch once more, after a resume from an earlier one
            writer(os.replace, path, replaced)
        writer(os.replace, aside, path)
        writer(_flush, self.folder)
        if self._accelerator.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)
        failure = broadcast([None if writer.failure is None else str(writer.failure)], self._accelerator)[0]
        if failure is not None:
            raise writer.failure or OSError(f"the first process could not save: {failure}")
        return path

    def _whole_parts(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """The whole tensors in parts of about FILE_BYTES, at least one; empty on all but the first process."""
        main = self._accelerator.is_main_process
        part: dict[str, Tensor] = {}
        size = 0
        for name, tensor in named:
            value = whole(tensor).cpu()
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
                    shutil.rmtree(target, ignore_errors=True)
                    os.replace(path, target)
        self._accelerator.wait_for_everyone()

    def prune(self, keep: int, best: Collection[str | None]) -> None:
        """Delete all but the newest `keep` and the best ones; called once a newer one is safe."""
        if self._accelerator.is_main_process:
            for path in self.all()[keep:]:
                if path.name not in best:
                    dropped = self.folder / f".drop-{path.name}"
                    os.replace(path, dropped)  # so that a half-deleted folder is never taken for a checkpoint
                    shutil.rmtree(dropped, ignore_errors=True)
        self._accelerator.wait_for_everyone()


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
    """Raise CheckpointError, naming the file, unless every file is there with the size and hash that were written."""
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}; expected auto, never, or the folder of one (epoch_...)")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"checkpoint {path} has no readable {MANIFEST}") from None
    there = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    unlisted = (there | {"trainer.json", "rng.json"}) - expected.keys()
    if unlisted:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} does not list {sorted(unlisted)}")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path} lacks {name}")
        if file.stat().st_size != size:
            raise CheckpointError(f"checkpoint {path}: {name} has {file.stat().st_size} bytes, {size} were written")
        if _sha256(file) != digest:
            raise CheckpointError(f"checkpoint {path}: {name} is corrupted (its SHA-256 differs)")


def read_state(path: Path) -> dict[str, Any]:
    """The JSON state of a checkpoint."""
    return json.loads((path / "trainer.json").read_text(encoding="utf-8"))


def read_tensors(path: Path, group: str) -> dict[str, Tensor]:
    """The tensors of one group, on the host."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob(f"{group}-*.safetensors")):
        tensors |= load_file(file)
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
    """Set this process's generators; a process that the run did not have keeps its own (rollouts need none of them)."""
    states = json.loads((path / "rng.json").read_text(encoding="utf-8"))
    if accelerator.process_index >= len(states):
        return
    state = states[accelerator.process_index]
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8, device="cpu"))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8, device="cpu"))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))  # noqa: NPY002


def broadcast(values: list[Any], accelerator: Accelerator) -> list[Any]:
    """The first process's list of JSON values, on every process."""
    if accelerator.num_processes == 1:
        return values
    torch.distributed.broadcast_object_list(values, src=0)
    return values
