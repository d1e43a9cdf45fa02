"""Prompts encoded by the CLIP and T5 of a Flux pipeline.

Axes: T text token, C channel.
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
from fastguard.errors import UserError
from fastguard.prompts import Encode, EncodedPrompts, Prompt, encode_once
from fastguard.utils.files import fitting, read_bytes
from fastguard.utils.finite import is_finite, require_finite
from fastguard.utils.quiet import quiet_bars


def encode_prompts(
    prompts: Sequence[Prompt], path: str, max_tokens: int, cache: Path | None, dtype: torch.dtype, device: torch.device
) -> EncodedPrompts:
    """The embeddings of T5, "embeds" (T, C), and of CLIP, "pooled" (C,), of each prompt; encodes what is not cached.

    Args:
        path: the pipeline whose text encoders are used; they are loaded only if something is missing.
        max_tokens: T5 tokens per prompt.
        cache: as in `prompts.cache_folder`; files are keyed by the encoders, their dtype, `max_tokens` and the text.

    Raises UserError for encoders with weights, and prompts with embeddings, that are not finite; those are not cached.
    """
    load_encoders = partial(_load_encoders, path, max_tokens, dtype, device)
    with fitting(f"model.path = {path!r}: what encodes the prompts"):
        return encode_once(prompts, _encoder_key(path, max_tokens, dtype), cache, load_encoders)


def _load_encoders(path: str, max_tokens: int, dtype: torch.dtype, device: torch.device) -> Encode:
    from diffusers import FluxPipeline  # its own imports take seconds, which a warm cache spares

    quiet_bars()
    pipe: Any = FluxPipeline.from_pretrained(path, transformer=None, vae=None, dtype=dtype, use_safetensors=True)
    pipe.to(device)
    require_finite(pipe.text_encoder, "text_encoder", path)
    require_finite(pipe.text_encoder_2, "text_encoder_2", path)

    def encode(texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        with torch.no_grad():
            embeds, pooled, _ = pipe.encode_prompt(list(texts), max_sequence_length=max_tokens)
        for i, text in enumerate(texts):
            for name, encoding in (("text_encoder_2", embeds[i]), ("text_encoder", pooled[i])):
                if not is_finite(encoding):
                    remedy = "take another encoder" if dtype == torch.float32 else 'set model.dtype = "float32"'
                    raise UserError(
                        f"{name} makes NaN or infinity of the prompt {text[:60]!r} in {dtype}, though its weights are "
                        f"finite: {remedy}"
                    )
            yield {"embeds": embeds[i], "pooled": pooled[i]}

    return encode


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
