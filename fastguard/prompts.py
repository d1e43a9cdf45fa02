"""Prompts from a file, and their embeddings, which are encoded once and kept on disk.

Axis: P prompt.
"""

from __future__ import annotations

from fastguard.extras import need

need("train")

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastguard.errors import UserError
from fastguard.utils.files import parse_json, read_text, writing
from fastguard.utils.sealed import DamagedError, clear_scratch, is_whole, load_sealed, save_sealed
from fastguard.utils.terminal import a_few, say

ENCODE_BATCH = 16
ANOTHER_CACHE = "start again, or choose another prompts.cache"


@dataclass(frozen=True)
class Prompt:
    """One prompt; groups are told apart by its index in the file, never by its text."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)
    """further keys of its JSON line, handed to the rewards (the text that an OCR reward looks for, say)"""
    identity: dict[str, Any] | None = None
    """what tells it from others of the same text, as JSON values; None: its metadata"""

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            lone = error.object[error.start]
            raise UserError(f"the prompt {self.text!r} holds {lone!r}, half of a character; remove it") from None


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Tells lists of prompts apart, by texts and metadata, or by what a family has put in the place of the metadata."""
    told = [[prompt.text, prompt.metadata if prompt.identity is None else prompt.identity] for prompt in prompts]
    content = json.dumps(told, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_prompts(path: Path) -> list[Prompt]:
    """Read a text file (a prompt per line) or a .jsonl file (`{"prompt": "...", ...}` per line), without blank lines.

    Raises UserError, naming the line, for what is not JSON, has no "prompt", or if there are no prompts at all.
    """
    if not os.path.isfile(path):  # which is False for what is no path, too, as a name that is too long
        raise UserError(f"there is no prompt file {path}; set prompts.file (or monitor.file)")
    prompts = []
    lines = read_text(path).split("\n")  # splitlines() would also cut inside JSON strings
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            prompts.append(_from_json(line, f"{path}, line {number}"))
        else:
            prompts.append(Prompt(line.strip()))
    if not prompts:
        raise UserError(f"{path} holds no prompts; it needs one per line")
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        entry = parse_json(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise UserError(f'{where}: expected an object with a "prompt" string, got {line.strip()[:80]}')
    try:
        return Prompt(entry["prompt"], {key: value for key, value in entry.items() if key != "prompt"})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts whose embeddings lie on disk, one file for equal prompts; read as needed."""

    prompts: Sequence[Prompt]
    files: Sequence[Path]
    """(P,): where the embeddings of each prompt are"""

    def load(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Embeddings (P, ...) by name, in the encoders' dtype on the host.

        Raises DamagedError, naming the file, for what was damaged since it was encoded or found whole.
        """
        found = [_load(self.files[index]) for index in indices]
        return {name: torch.stack([one[name] for one in found]) for name in found[0]}


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_sealed(file)
    except (OSError, DamagedError) as error:
        raise DamagedError(
            f"the encoded prompt {file} was damaged or removed after the start ({error}): start again with --resume "
            "auto, and it is encoded anew"
        ) from None


def cache_folder(chosen: Path | None = None) -> Path:
    """The folder of everything that can be made again: as chosen, $FASTGUARD_CACHE, or ~/.cache/fastguard."""
    folder = chosen or Path(os.environ.get("FASTGUARD_CACHE", Path.home() / ".cache" / "fastguard"))
    return folder.absolute()  # a reward may change the working directory


Encode = Callable[[Sequence[Prompt]], Iterable[dict[str, Tensor]]]
"""Prompts -> the embeddings of each, by name, without a batch axis."""


def encode_once(
    prompts: Sequence[Prompt],
    key: str,
    cache: Path | None,
    load_encoders: Sequence[Callable[[], Encode]],
    identity: Callable[[Prompt], str] = lambda prompt: prompt.text,
) -> EncodedPrompts:
    """Encode what the cache does not hold yet, with one encoder after the other, and free each of them again.

    Args:
        key: tells apart all that the embeddings depend on, but for the prompt.
        cache: as in `cache_folder`.
        load_encoders: each makes a part of the embeddings, and is called only if something is missing, once the
            encoder before has been freed. What it returns gets `ENCODE_BATCH` prompts at most at once. What all but the
            last make of every missing prompt waits in host memory: the one with the large embeddings comes last.
        identity: what of a prompt the embeddings depend on.

    Raises what these raise; embeddings that come after an error are not cached.
    """
    folder = cache_folder(cache) / "prompts" / key
    files = [folder / f"{hashlib.sha256(identity(p).encode()).hexdigest()[:32]}.safetensors" for p in prompts]
    asked = dict(zip(files, prompts, strict=True))
    with writing(folder, then=ANOTHER_CACHE):
        folder.mkdir(parents=True, exist_ok=True)
        clear_scratch(folder)
    unusable = _unusable(list(asked))
    if unusable:
        _encode([(file, asked[file]) for file in unusable], load_encoders)
    return EncodedPrompts(prompts, files)


def _unusable(files: Sequence[Path]) -> list[Path]:
    """Those that are not there, or not as they were written; reading and comparing takes some seconds per 1,000 MB."""
    there = [file for file in files if file.is_file()]
    checked = tqdm(there, desc="checking cached prompts", unit="prompt", delay=2, disable=None)
    damaged = {file for file in checked if not is_whole(file)}
    if damaged:
        say(
            f"{len(damaged)} of {len(there)} cached prompts are damaged, or of an earlier version, and are encoded "
            f"anew: {a_few(sorted(map(str, damaged)), 1)}"
        )
    whole = set(there) - damaged
    return [file for file in files if file not in whole]


def _encode(missing: Sequence[tuple[Path, Prompt]], load_encoders: Sequence[Callable[[], Encode]]) -> None:
    """A file is written with the last encoder's part, and so holds all parts or is not there."""
    made: list[dict[str, Tensor]] = [{} for _ in missing]
    starts = range(0, len(missing), ENCODE_BATCH)
    with tqdm(total=len(load_encoders) * len(starts), desc="encoding prompts", unit="batch", disable=None) as bar:
        for number, load_encoder in enumerate(load_encoders, start=1):
            encode = load_encoder()
            if bar.disable and number == 1:  # stderr is a file or a pipe
                say(f"encoding prompts: {len(missing)}")
            for start in starts:
                batch = slice(start, start + ENCODE_BATCH)
                _add(made[batch], encode([prompt for _, prompt in missing[batch]]))
                if number == len(load_encoders):
                    _write(missing[batch], made[batch])
                bar.update()
            del encode
            _free_memory()


def _add(embeddings: Sequence[dict[str, Tensor]], parts: Iterable[dict[str, Tensor]]) -> None:
    """Move what an encoder made to the host, beside what the ones before it made."""
    for one, part in zip(embeddings, parts, strict=True):
        one |= {name: tensor.cpu().contiguous() for name, tensor in part.items()}


def _write(entries: Sequence[tuple[Path, Prompt]], embeddings: Sequence[dict[str, Tensor]]) -> None:
    """Write the file of each prompt, and forget its embeddings."""
    for (file, _), one in zip(entries, embeddings, strict=True):
        with writing(file, then=ANOTHER_CACHE):
            save_sealed(one, file)
        one.clear()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
