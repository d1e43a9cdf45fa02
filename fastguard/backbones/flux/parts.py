"""What the folder of a Flux pipeline must hold."""

from __future__ import annotations

from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from fastguard.backbones.folder import PipelineParts
from fastguard.backbones.sizes import MOST_CHANNELS, MOST_LAYERS, MOST_LEVELS

_TEXT = {"vocab_size": 2**24}
_LARGEST: dict[str, dict[str, int]] = {
    "transformer": {
        "num_layers": MOST_LAYERS,
        "num_single_layers": MOST_LAYERS,
        **dict.fromkeys(
            (
                "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
                "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope",
            ),
            MOST_CHANNELS,
        ),
    },
    "vae": {
        "layers_per_block": MOST_LEVELS,
        **dict.fromkeys(
            ("in_channels", "out_channels", "latent_channels", "norm_num_groups", "block_out_channels", "sample_size"),
            MOST_CHANNELS,
        ),
    },
    "text_encoder": {
        **_TEXT,
        "num_hidden_layers": MOST_LAYERS,
        **dict.fromkeys(
            (
                "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "projection_dim",
            ),
            MOST_CHANNELS,
        ),
    },
    "text_encoder_2": {
        **_TEXT,
        "num_layers": MOST_LAYERS,
        **dict.fromkeys(("d_model", "d_ff", "d_kv", "num_heads", "relative_attention_num_buckets"), MOST_CHANNELS),
    },
    "scheduler": {"num_train_timesteps": 1_000_000},
}  # fmt: skip
PARTS = PipelineParts(
    modules={
        "transformer": (FluxTransformer2DModel, "diffusion_pytorch_model"),
        "vae": (AutoencoderKL, "diffusion_pytorch_model"),
        "text_encoder": (CLIPTextModel, "model"),
        "text_encoder_2": (T5EncoderModel, "model"),
    },
    tokenizers={"tokenizer": (CLIPTokenizer, "text_encoder"), "tokenizer_2": (T5Tokenizer, "text_encoder_2")},
    largest=_LARGEST,
)
