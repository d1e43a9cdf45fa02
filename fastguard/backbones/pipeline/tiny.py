"""Complete pipelines of a few hundred thousand random weights, for tests and first steps on a CPU.

Everything is real but its size: text encoders and their tokenizers, the VAE, the scheduler, the transformer. A pipeline
is saved in diffusers' layout and loaded by the code that loads the large ones.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTokenizer, Qwen2Tokenizer, T5Config, T5EncoderModel, T5Tokenizer

from fastguard.errors import UserError
from fastguard.prompts import ANOTHER_CACHE
from fastguard.utils.files import writing
from fastguard.utils.sealed import clear_scratch, is_sealed_folder, scratch, seal_folder
from fastguard.utils.terminal import a_few, say

if TYPE_CHECKING:  # its families import this module
    from fastguard.backbones.pipeline.spec import PipelineSpec

TEXT_DIM = 32
"""Channels of the tiny text encoders."""


def make_tiny(spec: PipelineSpec, folder: Path, seed: int = 0) -> Path:
    """Write the pipeline to `folder`, all or nothing; one that is there and whole stays. Returns the folder.

    An empty, unfinished or damaged one is replaced. Raises UserError for a folder that holds something else.
    """
    with writing(folder, then=ANOTHER_CACHE):
        folder.parent.mkdir(parents=True, exist_ok=True)
        clear_scratch(folder.parent)
        if is_sealed_folder(folder):
            return folder
        replaced = any(folder.glob("*"))
        with scratch(folder.parent) as aside:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                spec.tiny().save_pretrained(aside / "new")
            seal_folder(aside / "new")
            _require_ours(folder, os.listdir(aside / "new"))
            if replaced:
                say(f"{folder} is damaged, or of an earlier version, and is made anew")
            _put(aside / "new", folder, aside / "old")
    return folder


def _require_ours(folder: Path, names: Sequence[str]) -> None:
    """What is replaced is deleted, and must not be somebody's work."""
    others = sorted({path.name for path in folder.glob("*")}.difference(names))
    if others:
        raise UserError(
            f"{folder} is the place of the tiny pipeline, but holds {a_few(others)}: move that away, or choose another "
            "prompts.cache"
        )


def _put(new: Path, folder: Path, old: Path) -> None:
    """Rename a folder to one that may be there already; another process may do the same meanwhile."""
    while not is_sealed_folder(folder):
        try:
            os.rename(new, folder)  # replaces an empty one
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            with suppress(FileNotFoundError):  # the other process has just moved it away
                os.rename(folder, old)


def tiny_vae(scaling_factor: float, shift_factor: float) -> Any:
    """The AutoencoderKL of a pipeline of 16 channels, with 4 and one level less."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_clip(width: int, **settings: Any) -> CLIPTextConfig:
    """Of a CLIP that reads `clip_tokenizer`."""
    return CLIPTextConfig(
        vocab_size=258,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=256,
        eos_token_id=257,
        **settings,
    )


def tiny_t5() -> T5EncoderModel:
    """A T5 that reads `t5_tokenizer`."""
    return T5EncoderModel(
        T5Config(vocab_size=258, d_model=TEXT_DIM, d_ff=2 * TEXT_DIM, d_kv=16, num_layers=2, num_heads=2)
    )


def bytes_vocabulary() -> list[str]:
    """One token per byte, in the byte-level alphabet's fixed order."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def clip_tokenizer() -> CLIPTokenizer:
    vocabulary = {token: i for i, token in enumerate(bytes_vocabulary())}
    vocabulary |= {"<|startoftext|>": 256, "<|endoftext|>": 257}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)]
    pieces += [(chr(i), -3.0) for i in range(33, 127)] + [("▁", -2.0)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer of bytes, with the chat template of Qwen 3."""
    vocabulary = {token: i for i, token in enumerate([*bytes_vocabulary(), "<|endoftext|>"])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        extra_special_tokens=["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
        ),
    )
