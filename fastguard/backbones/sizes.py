"""Sizes in the settings of a pipeline's parts, before a library makes modules of them: a billion layers take hours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MOST_LAYERS = 128
"""Of a kind; the largest open models have half as many, and the planner takes minutes for so many."""
MOST_CHANNELS = 65_536
"""A square layer of so many takes 8 GiB in bfloat16."""
MOST_LEVELS = 16
"""Levels of a VAE, each half as wide as the one before, layers in one of them, and axes of positions."""

_TEXT = {"vocab_size": 2**24}
VAE_SIZES = {
    "layers_per_block": MOST_LEVELS,
    **dict.fromkeys(
        ("in_channels", "out_channels", "latent_channels", "norm_num_groups", "block_out_channels", "sample_size"),
        MOST_CHANNELS,
    ),
}
"""Of an AutoencoderKL."""
CLIP_SIZES = {
    **_TEXT,
    "num_hidden_layers": MOST_LAYERS,
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "projection_dim"),
        MOST_CHANNELS,
    ),
}
T5_SIZES = {
    **_TEXT,
    "num_layers": MOST_LAYERS,
    **dict.fromkeys(("d_model", "d_ff", "d_kv", "num_heads", "relative_attention_num_buckets"), MOST_CHANNELS),
}
LANGUAGE_SIZES = {
    **_TEXT,
    "num_hidden_layers": MOST_LAYERS,
    **dict.fromkeys(
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"), MOST_CHANNELS
    ),
}
"""Of a language model such as Qwen or Mistral."""
SCHEDULER_SIZES = {"num_train_timesteps": 1_000_000}

_MAY_BE_0 = ("num_layers", "num_single_layers")
_MAY_BE_NULL = ("out_channels",)


def size_problems(largest: Mapping[str, int], file: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    """Sizes that are no whole numbers, or that nobody means: a sentence each, that names file and key.

    Args:
        largest: the largest value of each size; "text_config.hidden_size" is that of a part within the settings. A size
            that is absent has its library's default.
    """
    for key, most in largest.items():
        value = _value(settings, key)
        least = 0 if key in _MAY_BE_0 else 1
        if value is None and key in _MAY_BE_NULL:
            continue
        values = value if isinstance(value, list | tuple) else [value]
        if not 1 <= len(values) <= MOST_LEVELS or not all(type(v) is int and least <= v <= most for v in values):
            shown = text if len(text := repr(value)) <= 80 else f"{text[:80]} ..."
            yield f"{file}: {key} must be a whole number in [{least}, {most}], got {shown}: download it again"


def _value(settings: Mapping[str, Any], key: str) -> Any:
    outer, _, inner = key.partition(".")
    value = settings.get(outer, 1)
    return _value(value, inner) if inner and isinstance(value, Mapping) else value
