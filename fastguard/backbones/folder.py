"""Whether the folder of a pipeline is whole: its files, and the weights that its modules expect.

diffusers and transformers decide: they load each module onto the meta device, by their own rules for names, shards and
tied weights. Only the headers of the files are asked for, which takes seconds for Flux.1-dev.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import diffusers.utils.logging
import huggingface_hub
import torch
import transformers.utils.logging
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import CLIPTokenizer

from fastguard.backbones.schedule import equal_steps, linear_mu
from fastguard.backbones.sizes import SCHEDULER_SIZES, size_problems
from fastguard.errors import UserError
from fastguard.utils.files import out_of_memory, parse_json, read_bytes, writing
from fastguard.utils.findings import Finding
from fastguard.utils.quiet import quiet_bars
from fastguard.utils.terminal import a_few

AGAIN = "download it again"
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class PipelineParts:
    """What a pipeline's folder must hold beside its `model_index.json` and its scheduler."""

    modules: Mapping[str, tuple[Any, str]]
    """parts with weights: their class, and the name of its files"""
    tokenizers: Mapping[str, tuple[Any, str]]
    """tokenizers: their class, and the encoder that embeds their tokens"""
    largest: Mapping[str, Mapping[str, int]]
    """the largest value of each size in the settings, by part; see `sizes.size_problems`"""
    chat: tuple[str, ...] = ()
    """tokenizers through whose chat template prompts go"""

    @property
    def settings(self) -> dict[str, str]:
        """Each part, and its file of settings."""
        return {
            ".": "model_index.json",
            "scheduler": "scheduler_config.json",
            **dict.fromkeys(self.modules, "config.json"),
            **dict.fromkeys(self.tokenizers, "tokenizer_config.json"),
        }


def pipeline_folder(path: str) -> Path:
    """The local folder of a pipeline: the path itself, or the hub's snapshot (downloaded if it is not there)."""
    if os.path.isdir(path):
        return Path(path)
    missed = f": it was not downloaded to {HF_HUB_CACHE}"
    quiet_bars()
    try:
        with writing(Path(path), missed, "start again, or set HF_HOME to another folder"):
            return Path(DiffusionPipeline.download(path, use_safetensors=True))
    except HFValidationError as error:
        raise UserError(f"model.path = {path!r} is no folder here, and no name on the hub: {error}") from error


def examine_pipeline(path: str, parts: PipelineParts, download: str) -> Iterator[Finding]:
    """Whether `model.path` is a whole pipeline, here or in the hub's cache; downloads nothing.

    Args:
        download: what to know before it is downloaded.
    """
    if os.path.isdir(path):
        problems = list(pipeline_problems(Path(path), parts))
        yield from (Finding("FAIL", problem) for problem in problems)
        if not problems:
            yield Finding("ok", f"{path} holds all parts of a pipeline")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        yield Finding("FAIL", f"model.path = {path!r}: there is no such folder, and it is no name on the model hub")
    else:
        yield _examine_hub(path, parts, download)


def _examine_hub(name: str, parts: PipelineParts, download: str) -> Finding:
    try:
        folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return Finding(
            "warn", f"{name} is no folder here: it is downloaded from the model hub at the start ({download})"
        )
    problems = list(pipeline_problems(folder, parts))
    if problems:
        return Finding(
            "warn", f"{name} in the hub's cache lacks parts ({problems[0]}): the rest is downloaded at the start"
        )
    return Finding("ok", f"{name} is in the hub's cache: {folder}")


def check_pipeline(folder: Path, parts: PipelineParts) -> None:
    """Raise UserError, with the first of the `pipeline_problems`, unless the folder has none."""
    problems = list(pipeline_problems(folder, parts))
    if problems:
        others = f" (and {len(problems) - 1} more, which `fastguard doctor` lists)" if len(problems) > 1 else ""
        raise UserError(f"model.path: {problems[0]}{others}")


def pipeline_problems(folder: Path, parts: PipelineParts) -> Iterator[str]:
    """What is missing, damaged or does not fit in a pipeline's folder: a sentence each, that names the file or part."""
    for part, settings in parts.settings.items():
        found = list(_unreadable(folder / part, settings))
        if not found:
            try:
                with _quiet():
                    found = list(_part_problems(folder, part, parts))
            except Exception as error:  # there is no telling what a library raises about a damaged file
                found = [_failure(folder / part, error)]
                if out_of_memory(error) is None and part in parts.modules:
                    found = list(_damaged_weights(folder / part, parts.modules[part][1])) or found
        yield from found


def _failure(folder: Path, error: Exception) -> str:
    if cause := out_of_memory(error):
        return f"{folder} does not fit into memory ({cause})"
    return f"{folder} cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())}): {AGAIN}"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a pipeline. Raises UserError, naming the file, if it holds no JSON object."""
    content = read_bytes(file)
    if content.startswith(LFS_POINTER):
        raise UserError(_pointer(file))
    try:
        values = parse_json(content.decode())  # as the loaders do: other encodings, and byte order marks, stop them
    except ValueError as error:  # not JSON, or not even text
        raise UserError(f"{file} is cut short or no JSON ({error}): {AGAIN}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a JSON {type(values).__name__}, expected an object: {AGAIN}")
    return values


def _pointer(file: Path) -> str:
    return f"{file} is git-lfs's pointer to the file, not the file itself: run `git lfs pull` there, or {AGAIN}"


def _pickle(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code, and is never opened: download the weights as *.safetensors, or "
        "convert them (save_pretrained of diffusers and transformers writes safetensors)"
    )


def _unreadable(folder: Path, settings: str) -> Iterator[str]:
    """Settings that are not there, for some loaders then take defaults, and JSON files that cannot be read."""
    # Other files are the user's, or his system's. A tokenizer's loader reads many.
    files = sorted(folder.glob("[!.]*.json" if settings == "tokenizer_config.json" else "[!.]*.index.json"))
    for file in dict.fromkeys([folder / settings, *files]):
        if not file.is_file():
            yield f"there is no {file}: {AGAIN}"
            continue
        try:
            if not read_json(file) and file.name == settings:
                yield f"{file} is empty: {AGAIN}"
        except UserError as error:
            yield str(error)


def _part_problems(folder: Path, part: str, parts: PipelineParts) -> Iterator[str]:
    file = folder / part / parts.settings[part]
    odd = list(size_problems({**parts.largest, "scheduler": SCHEDULER_SIZES}.get(part, {}), file, read_json(file)))
    if odd:
        yield from odd
    elif part in parts.modules:
        yield from _module_problems(folder, part, *parts.modules[part])
    elif part in parts.tokenizers:
        yield from _tokenizer_problems(folder, part, *parts.tokenizers[part], chat=part in parts.chat)
    elif part == "scheduler":
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder=part, local_files_only=True)
        times = equal_steps(scheduler, 4, linear_mu(scheduler.config, tokens=4096))
        if not all(0 <= later < earlier <= 1 for earlier, later in pairwise(times)):
            yield f"{file} makes the schedule {times}, which must fall from 1 to 0: {AGAIN}"
    else:
        yield from _index_problems(file, parts)


def _index_problems(file: Path, parts: PipelineParts) -> Iterator[str]:
    index = read_json(file)
    for part in (*parts.modules, *parts.tokenizers, "scheduler"):
        if None in (index.get(part) or [None]):
            yield f"{file} names no class for {part}: {AGAIN}"


def _module_problems(folder: Path, part: str, kind: Any, name: str) -> Iterator[str]:
    pickles = sorted((folder / part).glob("*.bin"))
    if pickles and not _files(folder / part, name):
        yield _pickle(pickles[0])
        return
    if "quantization_config" in read_json(folder / part / "config.json"):
        return  # its weights have other names and shapes until they are on a GPU
    lacking = list(_shard_problems(folder / part, name))
    if lacking:
        yield from lacking
        return
    info: dict[str, Any]
    _, info = kind.from_pretrained(
        folder, subfolder=part, device_map="meta", dtype=_stored_dtype(folder / part, name),
        output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True, use_safetensors=True,
    )  # fmt: skip
    shapes = [f"{key} {tuple(came)} instead of {tuple(wanted)}" for key, came, wanted in info["mismatched_keys"]]
    told = _told(
        ("missing", info["missing_keys"]), ("unexpected", info["unexpected_keys"]), ("of another shape", shapes)
    )
    if told:
        yield f"the weights in {folder / part} do not fit its config.json: {told}; download both again"


def _told(*found: tuple[str, Iterable[str]]) -> str:
    """(what is wrong, keys that it is wrong with) in words; nothing where there are no keys."""
    return "; ".join(f"{len(keys)} {what} ({a_few(keys)})" for what, some in found if (keys := sorted(some)))


def _stored_dtype(folder: Path, name: str) -> torch.dtype | None:
    """Of the first weight: diffusers would read all of them to convert them to another."""
    for file in _files(folder, name):
        with safe_open(file, "pt") as content:
            dtype = next((content.get_tensor(key).dtype for key in content.keys()), None)  # noqa: SIM118  no dict
        return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else None
    return None


def _files(folder: Path, name: str) -> list[Path]:
    """The file of weights or its shards, without variants (`model.fp16.safetensors`), which are not loaded."""
    return sorted((*folder.glob(f"{name}.safetensors"), *folder.glob(f"{name}-*.safetensors")))


def weights_to_load(folder: Path, name: str) -> list[Path]:
    """The files that diffusers would load: those of the index where there is one, else the one without a number."""
    index = folder / f"{name}.safetensors.index.json"
    if index.is_file():
        return sorted({folder / file for file in read_json(index).get("weight_map", {}).values()})
    return [folder / f"{name}.safetensors"]


def _shard_problems(folder: Path, name: str) -> Iterator[str]:
    """Shards that do not hold what their index says: diffusers believes the index."""
    index = folder / f"{name}.safetensors.index.json"
    if not index.is_file():
        return
    listed: dict[str, set[str]] = {}
    for key, file in read_json(index).get("weight_map", {}).items():
        listed.setdefault(file, set()).add(key)
    if not listed:
        yield f"{index} lists no weights: {AGAIN}"
    for file, keys in sorted(listed.items()):
        if not file.endswith(".safetensors"):
            yield _pickle(folder / file)
            continue
        if not (folder / file).is_file():
            yield f"there is no {folder / file}: {AGAIN}"
            continue
        with safe_open(folder / file, "pt") as content:
            there = set(content.keys())
        told = _told(("missing", keys - there), ("unexpected", there - keys))
        if told:
            yield f"the weights in {folder / file} are not those that {index.name} lists: {told}; download both again"


def _damaged_weights(folder: Path, name: str) -> Iterator[str]:
    """Files of weights that are absent, cut short, or not there but for git-lfs's pointers."""
    files = _files(folder, name)
    if not files:
        yield f"there are no weights (*.safetensors) in {folder}: {AGAIN}"
    for file in files:
        if not file.is_file():
            yield f"{file} is no file: {AGAIN}"
            continue
        with file.open("rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                yield _pointer(file)
                continue
        try:
            with safe_open(file, "pt"):  # holds the file's length against its header
                pass
        except (OSError, SafetensorError) as error:
            yield f"{file} is cut short or damaged ({error}): {AGAIN}"


def _tokenizer_problems(folder: Path, part: str, kind: Any, encoder: str, chat: bool) -> Iterator[str]:
    """transformers makes a tokenizer without a vocabulary if it finds none, and every text becomes unknown tokens."""
    own = folder / part
    settings_file = own / "tokenizer_config.json"
    whole = kind.vocab_files_names["tokenizer_file"]
    parts = [file for file in kind.vocab_files_names.values() if file != whole]
    absent = [file for file in parts if not (own / file).is_file()]
    if absent and not (own / whole).is_file():
        yield f"there is no {own / absent[0]} (nor {whole}): {AGAIN}"
        return
    for file in parts:
        if file not in absent and (own / file).read_bytes().startswith(LFS_POINTER):
            yield _pointer(own / file)
            return
    tokenizer = kind.from_pretrained(folder, subfolder=part, local_files_only=True)
    if chat and tokenizer.chat_template is None:
        yield f"there is no {own / 'chat_template.jinja'} (nor chat_template in {settings_file}): {AGAIN}"
    # Twice each: with no merges at all, as in the tiny pipeline, CLIP knows no token that ends a word.
    letters = {tuple(tokenizer(2 * letter).input_ids) for letter in ascii_lowercase}
    if len(letters) < len(ascii_lowercase):
        yield f"the vocabulary in {own} tells only {len(letters)} of {len(ascii_lowercase)} letters apart: {AGAIN}"
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        made = {"".join(pair) for pair in model["merges"]} | added
        never = [t for t in model["vocab"] if len(t.removesuffix("</w>")) > 1 and t not in made]
        if never:
            yield f"{own} lacks merges for tokens of its vocabulary ({a_few(never)}): {AGAIN}"
    if not list(_unreadable(folder / encoder, "config.json")):
        settings = read_json(folder / encoder / "config.json")
        settings = settings.get("text_config", settings)  # of an encoder that reads images, too
        positions = settings.get("max_position_embeddings")
        # The pipeline fills up all texts to this length; other tokenizers get prompts.max_tokens.
        fixed = kind is CLIPTokenizer and positions is not None
        if fixed and not 2 < tokenizer.model_max_length <= positions:
            yield (
                f"{settings_file} says model_max_length = {tokenizer.model_max_length}, but {encoder} has "
                f"{positions} positions: {AGAIN}"
            )
        embedded = settings.get("vocab_size")
        known = max(tokenizer.get_vocab().values()) + 1
        if embedded is not None and known > embedded:
            yield f"{own} knows {known} tokens, but {encoder} embeds {embedded}: they are of different models"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' own words on what does not fit; and what an exception leaves changed is put back."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    dtype = torch.get_default_dtype()
    try:
        for library in libraries:
            library.set_verbosity(library.CRITICAL)
            library.disable_progress_bar()
        yield
    finally:
        torch.set_default_dtype(dtype)
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()


@contextmanager
def described_by(file: Path | None) -> Iterator[None]:
    """Inside, what a library raises about modules that a file or folder describes becomes a UserError that names it.

    None: a known configuration, whose errors are nobody's but ours. So is code that reads a value of a tensor that has
    none.
    """
    try:
        yield
    except (UserError, DataDependentOutputException):
        raise
    except Exception as error:  # there is no telling what a library raises about odd settings
        if file is None:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"model.path: what {file} describes cannot be planned ({reason}): {AGAIN}") from error
