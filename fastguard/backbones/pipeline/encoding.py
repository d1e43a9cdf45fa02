"""Prompts encoded by the text encoders of a pipeline.

Axes: P prompt, T text token, C channel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard.backbones.folder import pipeline_folder
from fastguard.backbones.pipeline.spec import EncodeSettings, PipelineSpec, TextPart
from fastguard.backbones.quantize import quantize_linears, require_library
from fastguard.config import Encoders
from fastguard.errors import UserError
from fastguard.prompts import Encode, EncodedPrompts, Prompt, encode_once
from fastguard.utils.files import fitting, read_bytes
from fastguard.utils.finite import is_finite, require_finite
from fastguard.utils.quiet import quiet_bars


def encode_prompts(
    spec: PipelineSpec,
    prompts: Sequence[Prompt],
    path: str,
    max_tokens: int,
    cache: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    encoders: Encoders = "device",
    size: tuple[int, int] = (0, 0),
) -> EncodedPrompts:
    """The embeddings of each prompt, by the names of the spec's text parts; encodes what is not cached.

    The parts are loaded one after the other, and only if something is missing.

    Args:
        path: the pipeline whose text encoders are used.
        max_tokens: as prompts.max_tokens.
        cache: as in `prompts.cache_folder`; files are keyed by the text, and by all that `_encoder_key` names.
        encoders: as prompts.encoders.
        size: (height, width) of images in pixels, for prompts that have one.

    Raises UserError for encoders with weights, and prompts with embeddings, that are not finite, which are not cached;
    and where "int8" has no torchao.
    """
    where = torch.device("cpu") if encoders == "cpu" else device
    asked = EncodeSettings(max_tokens, where, dtype, *size)
    load_encoders = [partial(_load, spec, part, path, asked, encoders) for part in spec.text_parts]
    remedy = "free some, or change prompts.encoders, which says where they are encoded"
    with fitting(f"model.path = {path!r}: what encodes the prompts", remedy):
        key = _encoder_key(spec, path, max_tokens, dtype, encoders)
        return encode_once(prompts, key, cache, load_encoders, partial(spec.identity, asked))


def _load(spec: PipelineSpec, part: TextPart, path: str, asked: EncodeSettings, encoders: Encoders) -> Encode:
    """Load the encoders of a part on the device, in a pipeline that has nothing else but the tokenizers."""
    if encoders == "int8":
        # Where torchao is missing, not only after every prompt went through the first part.
        require_library("int8", 'prompts.encoders = "int8"', '"device" or "cpu"')
    quiet_bars()
    absent = dict.fromkeys(set(spec.parts.modules) - set(part.encoders))
    pipe: Any = spec.encoding_pipeline(path, **absent, dtype=asked.dtype, use_safetensors=True)
    for name in part.encoders:
        encoder = getattr(pipe, name)
        if encoders == "int8" and part.quantizable:
            quantize_linears(encoder, asked.device, "int8")
        else:
            encoder.to(asked.device)
        require_finite(encoder, name, path)
    return partial(_encode, part, pipe, asked)


def _encode(part: TextPart, pipe: Any, asked: EncodeSettings, prompts: Sequence[Prompt]) -> Iterator[dict[str, Tensor]]:
    """What the pipeline makes of the prompts with these encoders, one by one."""
    with torch.no_grad():
        embeddings = part.encode(pipe, prompts, asked)
    for i, prompt in enumerate(prompts):
        one = {name: values[i] for name, values in embeddings.items()}
        if not all(is_finite(values) for values in one.values()):
            remedy = "take another encoder" if asked.dtype == torch.float32 else 'set model.dtype = "float32"'
            raise UserError(
                f"{' or '.join(part.encoders)} makes NaN or infinity of the prompt {prompt.text[:60]!r} in "
                f"{asked.dtype}, though its weights are finite: {remedy}"
            )
        yield one


def _encoder_key(spec: PipelineSpec, path: str, max_tokens: int, dtype: torch.dtype, encoders: Encoders) -> str:
    """What the embeddings depend on: where and how they are computed, the encoders' settings and vocabularies, and the
    identity of their weights."""
    digest = hashlib.sha256(f"{max_tokens} {dtype} {encoders}".encode())  # a host rounds otherwise than a GPU
    folder = pipeline_folder(path)
    of_encoders = [name for part in spec.text_parts for name in part.encoders]
    for name in (*spec.parts.tokenizers, *of_encoders):
        for file in sorted((folder / name).glob("*")):
            digest.update(f"{name}/{file.name}".encode())
            if file.suffix in (".json", ".txt", ".model"):
                digest.update(read_bytes(file))
            else:  # gigabytes of weights: their size and time of change stand for them
                stat = file.stat()
                digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]
