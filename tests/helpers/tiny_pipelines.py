"""Complete pipelines of a few thousand random weights: everything but their size is real.

Weights are drawn from torch's global generator.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastguard.backbones import family_of


def make_tiny_pipeline(kind: str, folder: Path, seed: int = 0) -> Path:
    """The tiny pipeline of a family in a folder, as a run makes it."""
    from fastguard.backbones.pipeline.tiny import make_tiny  # not before the interpreter is chosen

    family: Any = family_of(kind)
    return make_tiny(family.spec, folder, seed)


def make_tiny_flux(folder: Path, seed: int = 0) -> Path:
    return make_tiny_pipeline("flux", folder, seed)


def make_tiny_wan() -> Any:
    """Wan, for video."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    from fastguard.backbones.pipeline.tiny import t5_tokenizer

    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(vocab_size=258, d_model=32, d_ff=64, d_kv=16, num_layers=1, num_heads=2)),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=16,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=16,
            out_channels=16,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
        ),
    )
