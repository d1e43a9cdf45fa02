"""Prompts encoded by the CLIP and T5 of a Flux pipeline.

Axes: T text token, C channel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastguard.backbones.folder import pipeline_folder
from fastguard.backbones.quantize import quantize_linears, require_library
from fastguard.config import Encoders
from fastguard.errors import UserError
from fastguard.prompts import Encode, EncodedPrompts, Prompt, encode_once
from fastguard.utils.files import fitting, read_bytes
from fastguard.utils.finite import is_finite, require_finite
from fastguard.utils.quiet import quiet_bars


def encode_prompts(
    prompts: Sequence[Prompt],
    path: str,
    max_tokens: int,
    cache: Path | None,
    dtype: torch.dtype,
    device: torch.device,
    encoders: Encoders = "device",
) -> EncodedPrompts:
    """The embeddings of T5, "embeds" (T, C), and of CLIP, "pooled" (C,), of each prompt; encodes what is not cached.

    CLIP and T5 are loaded one after the other, and only if something is missing.

    Args:
        path: the pipeline whose text encoders are used.
        max_tokens: T5 tokens per prompt.
        cache: as in `prompts.cache_folder`; files are keyed by the text, and by all that `_encoder_key` names.
        encoders: as prompts.encoders.

    Raises UserError for encoders with weights, and prompts with embeddings, that are not finite, which are not cached;
    and where "int8" has no torchao.
    """
    where = torch.device("cpu") if encoders == "cpu" else device
    load_encoders = (
        partial(_load_clip, path, dtype, where, encoders),
        partial(_load_t5, path, max_tokens, dtype, where, encoders),
    )
    remedy = "free some, or change prompts.encoders, which says where they are encoded"
    with fitting(f"model.path = {path!r}: what encodes the prompts", remedy):
        return encode_once(prompts, _encoder_key(path, max_tokens, dtype, encoders), cache, load_encoders)


def _load_clip(path: str, dtype: torch.dtype, device: torch.device, encoders: Encoders) -> Encode:
    if encoders == "int8":  # CLIP itself, 0.2 GB in bfloat16, is not worth a loss
        # Where torchao is missing, not only after every prompt went through CLIP.
        require_library("int8", 'prompts.encoders = "int8"', '"device" or "cpu"')
    pipe = _load("text_encoder", path, dtype)
    pipe.text_encoder.to(device)
    require_finite(pipe.text_encoder, "text_encoder", path)
    embed = partial(pipe._get_clip_prompt_embeds, device=device)
    return partial(_encode, embed, "pooled", "text_encoder", dtype)


def _load_t5(path: str, max_tokens: int, dtype: torch.dtype, device: torch.device, encoders: Encoders) -> Encode:
    pipe = _load("text_encoder_2", path, dtype)
    if encoders == "int8":
        quantize_linears(pipe.text_encoder_2, device, "int8")
    else:
        pipe.text_encoder_2.to(device)
    require_finite(pipe.text_encoder_2, "text_encoder_2", path)
    embed = partial(pipe._get_t5_prompt_embeds, max_sequence_length=max_tokens, device=device, dtype=dtype)
    return partial(_encode, embed, "embeds", "text_encoder_2", dtype)


def _load(encoder: str, path: str, dtype: torch.dtype) -> Any:
    """The pipeline on the host, with this text encoder alone."""
    from diffusers import FluxPipeline  # its own imports take seconds, which a warm cache spares

    quiet_bars()
    absent = dict.fromkeys({"transformer", "vae", "text_encoder", "text_encoder_2"} - {encoder})
    return FluxPipeline.from_pretrained(path, **absent, dtype=dtype, use_safetensors=True)


def _encode(
    embed: Callable[[list[str]], Tensor], name: str, encoder: str, dtype: torch.dtype, texts: Sequence[str]
) -> Iterator[dict[str, Tensor]]:
    """What `FluxPipeline.encode_prompt` makes with one of its text encoders."""
    with torch.no_grad():
        encodings = embed(list(texts))
    for text, encoding in zip(texts, encodings, strict=True):
        if not is_finite(encoding):
            remedy = "take another encoder" if dtype == torch.float32 else 'set model.dtype = "float32"'
            raise UserError(
                f"{encoder} makes NaN or infinity of the prompt {text[:60]!r} in {dtype}, though its weights are "
                f"finite: {remedy}"
            )
        yield {name: encoding}


def _encoder_key(path: str, max_tokens: int, dtype: torch.dtype, encoders: Encoders) -> str:
    """What the embeddings depend on: where and how they are computed, the encoders' settings and vocabularies, and the
    identity of their weights."""
    digest = hashlib.sha256(f"{max_tokens} {dtype} {encoders}".encode())  # a host rounds otherwise than a GPU
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
