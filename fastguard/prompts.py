"""Prompts from a file, encoded once by CLIP and T5 and kept on disk.

Axes: P prompt, T text token, C channel.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastguard.errors import UserError
from fastguard.utils.files import fitting, parse_json, read_bytes, read_text, writing
from fastguard.utils.finite import is_finite, require_finite
from fastguard.utils.quiet import quiet_bars
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

    def __post_init__(self) -> None:
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            lone = error.object[error.start]
            raise UserError(f"the prompt {self.text!r} holds {lone!r}, half of a character; remove it") from None


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Tells lists of prompts apart, by texts and metadata."""
    content = json.dumps([[prompt.text, prompt.metadata] for prompt in prompts], default=str)
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
    """Prompts whose embeddings lie on disk, one file per distinct text; read as needed."""

    prompts: Sequence[Prompt]
    files: Sequence[Path]
    """(P,): where the embeddings of each prompt are"""

    def load(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Embeddings (P, T, C) of T5 and (P, C) of CLIP, in the encoders' dtype on the host.

        Raises DamagedError, naming the file, for what was damaged since it was encoded or found whole.
        """
        found = [_load(self.files[index]) for index in indices]
        return torch.stack([one["embeds"] for one in found]), torch.stack([one["pooled"] for one in found])


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


def encode_prompts(
    prompts: Sequence[Prompt], path: str, max_tokens: int, cache: Path | None, dtype: torch.dtype, device: torch.device
) -> EncodedPrompts:
    """Encode what the cache does not hold yet, and free the encoders again.

    Args:
        path: the pipeline whose text encoders are used; they are loaded only if something is missing.
        max_tokens: T5 tokens per prompt.
        cache: as in `cache_folder`; files are keyed by the encoders, their dtype, `max_tokens` and the text.

    Raises UserError for encoders with weights, and prompts with embeddings, that are not finite; those are not cached.
    """
    folder = cache_folder(cache) / "prompts" / _encoder_key(path, max_tokens, dtype)
    files = [folder / f"{hashlib.sha256(p.text.encode()).hexdigest()[:32]}.safetensors" for p in prompts]
    texts = {file: p.text for file, p in zip(files, prompts, strict=True)}
    with writing(folder, then=ANOTHER_CACHE):
        folder.mkdir(parents=True, exist_ok=True)
        clear_scratch(folder)
    unusable = _unusable(list(texts))
    if unusable:
        with fitting(f"model.path = {path!r}: what encodes the prompts"):
            _encode([(file, texts[file]) for file in unusable], path, max_tokens, dtype, device)
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


@torch.no_grad()
def _encode(
    missing: Sequence[tuple[Path, str]], path: str, max_tokens: int, dtype: torch.dtype, device: torch.device
) -> None:
    from diffusers import FluxPipeline  # seconds of import, which a warm cache spares

    quiet_bars()
    pipe: Any = FluxPipeline.from_pretrained(path, transformer=None, vae=None, dtype=dtype, use_safetensors=True)
    pipe.to(device)
    require_finite(pipe.text_encoder, "text_encoder", path)
    require_finite(pipe.text_encoder_2, "text_encoder_2", path)
    starts = tqdm(range(0, len(missing), ENCODE_BATCH), desc="encoding prompts", unit="batch", disable=None)
    if starts.disable:  # stderr is a file or a pipe
        say(f"encoding prompts: {len(missing)}")
    for start in starts:
        part = missing[start : start + ENCODE_BATCH]
        embeds, pooled, _ = pipe.encode_prompt([text for _, text in part], max_sequence_length=max_tokens)
        for i, (file, text) in enumerate(part):
            for name, encoding in (("text_encoder_2", embeds[i]), ("text_encoder", pooled[i])):
                if not is_finite(encoding):
                    remedy = "take another encoder" if dtype == torch.float32 else 'set model.dtype = "float32"'
                    raise UserError(
                        f"{name} makes NaN or infinity of the prompt {text[:60]!r} in {dtype}, though its weights are "
                        f"finite: {remedy}"
                    )
            with writing(file, then=ANOTHER_CACHE):
                save_sealed({"embeds": embeds[i].cpu().contiguous(), "pooled": pooled[i].cpu().contiguous()}, file)
    del pipe
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def pipeline_folder(path: str) -> Path:
    """The local folder of a pipeline: the path itself, or the hub's snapshot (downloaded if it is not there)."""
    if Path(path).is_dir():
        return Path(path)
    from diffusers import DiffusionPipeline
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError

    quiet_bars()
    missed = f": it was not downloaded to {HF_HUB_CACHE}"
    try:
        with writing(Path(path), missed, "start again, or set HF_HOME to another folder"):
            return Path(DiffusionPipeline.download(path, use_safetensors=True))
    except HFValidationError as error:
        raise UserError(f"model.path = {path!r} is no folder here, and no name on the hub: {error}") from error


def _encoder_key(path: str, max_tokens: int, dtype: torch.dtype) -> str:
    """What the embeddings depend on: the encoders' settings and vocabularies, and the identity of their weights."""
    digest = hashlib.sha256(f"{max_tokens} {dtype}".encode())
    folder = pipeline_folder(path)
    for name in ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"):
        for file in sorted((folder / name).glob("*")):
            digest.update(f"{name}/{file.name}".encode())
            if file.suffix in (".json", ".txt", ".model"):
                digest.update(read_bytes(file))
            else:  # gigabytes of weights: their size and time of change stand for them
                stat = file.stat()
                digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
