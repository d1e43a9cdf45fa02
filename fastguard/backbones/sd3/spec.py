"""The classes of Stable Diffusion 3 and 3.5, and how their pipeline uses them.

Axes: B image, P prompt, T text token, C channel, H and W of a latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5Tokenizer,
)

from fastguard.backbones.folder import PipelineParts
from fastguard.backbones.pipeline.hub import CLIP_L, T5_XXL, VAE_16
from fastguard.backbones.pipeline.spec import (
    Configs,
    EncoderCall,
    EncodeSettings,
    Grid,
    PipelineSpec,
    Text,
    TextPart,
    decode_scaled,
    encode_by_t5,
    texts,
)
from fastguard.backbones.pipeline.tiny import TEXT_DIM, clip_tokenizer, t5_tokenizer, tiny_clip, tiny_t5, tiny_vae
from fastguard.backbones.schedule import own_steps
from fastguard.backbones.sizes import CLIP_SIZES, MOST_CHANNELS, MOST_LAYERS, T5_SIZES, VAE_SIZES
from fastguard.config import ModelConfig
from fastguard.errors import UserError
from fastguard.prompts import Prompt

PARTS = PipelineParts(
    modules={
        "transformer": (SD3Transformer2DModel, "diffusion_pytorch_model"),
        "vae": (AutoencoderKL, "diffusion_pytorch_model"),
        "text_encoder": (CLIPTextModelWithProjection, "model"),
        "text_encoder_2": (CLIPTextModelWithProjection, "model"),
        "text_encoder_3": (T5EncoderModel, "model"),
    },
    tokenizers={
        "tokenizer": (CLIPTokenizer, "text_encoder"),
        "tokenizer_2": (CLIPTokenizer, "text_encoder_2"),
        "tokenizer_3": (T5Tokenizer, "text_encoder_3"),
    },
    largest={
        "transformer": {
            "num_layers": MOST_LAYERS,
            **dict.fromkeys(
                (
                    "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
                    "joint_attention_dim", "pooled_projection_dim", "caption_projection_dim", "pos_embed_max_size",
                    "sample_size",
                ),
                MOST_CHANNELS,
            ),
        },
        "vae": VAE_SIZES,
        "text_encoder": CLIP_SIZES,
        "text_encoder_2": CLIP_SIZES,
        "text_encoder_3": T5_SIZES,
    },
)  # fmt: skip
CLIP_TOKENS = 77
MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}
LARGE = {
    **MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
OTHERS: Configs = {
    "vae": {**VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "text_encoder": {**CLIP_L, "projection_dim": 768},
    "text_encoder_2": {
        **CLIP_L,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
    "text_encoder_3": T5_XXL,
}


def _clips(pipe: Any, prompts: Sequence[Prompt], asked: EncodeSettings) -> dict[str, Tensor]:
    embeds, pooled = zip(
        *(pipe._get_clip_prompt_embeds(texts(prompts), device=asked.device, clip_model_index=i) for i in (0, 1)),
        strict=True,
    )
    return {"clip": torch.cat(embeds, dim=-1), "pooled": torch.cat(pooled, dim=-1)}


def _t5(pipe: Any, prompts: Sequence[Prompt], asked: EncodeSettings) -> dict[str, Tensor]:
    return {"t5": encode_by_t5(pipe, prompts, asked)}


class SD3Spec(PipelineSpec):
    """StableDiffusion3Pipeline."""

    pipeline = StableDiffusion3Pipeline
    parts = PARTS
    one_gradient_layout = True
    blocks: ClassVar[Mapping[str, str]] = {"joint": "transformer_blocks"}
    known: ClassVar[Mapping[str, Configs]] = {
        "stabilityai/stable-diffusion-3.5-medium": {**OTHERS, "transformer": MEDIUM},
        "stabilityai/stable-diffusion-3.5-large": {**OTHERS, "transformer": LARGE},
    }
    text_parts = (
        TextPart(("text_encoder", "text_encoder_2"), _clips, quantizable=False),  # 1.6 GB in bfloat16
        TextPart(("text_encoder_3",), _t5),
    )

    def grid(self, configs: Configs, model: ModelConfig) -> Grid:
        grid, most = super().grid(configs, model), configs["transformer"]["pos_embed_max_size"]
        if max(grid.rows, grid.columns) > most:
            side = most * model.height // grid.rows
            raise UserError(
                f"model.height and model.width must be at most {side} pixels: the model has no positions beyond"
            )
        return grid

    def latent_shape(self, configs: Configs, grid: Grid) -> tuple[int, ...]:
        """(C, H, W): the transformer makes the patches itself."""
        transformer = configs["transformer"]
        patch = transformer["patch_size"]
        return transformer["in_channels"], grid.rows * patch, grid.columns * patch

    def text_shapes(self, configs: Configs, grid: Grid, max_tokens: int) -> Mapping[str, tuple[int, ...]]:
        transformer = configs["transformer"]
        return {
            "embeds": (CLIP_TOKENS + max_tokens, transformer["joint_attention_dim"]),
            "pooled": (transformer["pooled_projection_dim"],),
        }

    def text(self, encoded: Text) -> Text:
        """CLIP's tokens, filled up to T5's channels, come before T5's (arXiv 2403.03206, figure 2)."""
        clip, t5 = encoded["clip"], encoded["t5"]
        filled = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"embeds": torch.cat([filled, t5], dim=1), "pooled": encoded["pooled"]}

    def encoder_calls(self, configs: Configs, max_tokens: int) -> Mapping[str, EncoderCall]:
        def clip(module: Any, ids: Tensor) -> Any:
            out = module(ids, output_hidden_states=True)
            return out.text_embeds, out.hidden_states[-2]

        return {
            "text_encoder": EncoderCall(CLIP_TOKENS, clip),
            "text_encoder_2": EncoderCall(CLIP_TOKENS, clip),
            "text_encoder_3": EncoderCall(max_tokens, lambda t5, ids: t5(ids)[0]),
        }

    def velocity(
        self, transformer: Any, latents: Tensor, sigma: Tensor, text: Text, guidance: float, positions: Tensor | None
    ) -> Tensor:
        return transformer(
            hidden_states=latents,
            encoder_hidden_states=text["embeds"],
            pooled_projections=text["pooled"],
            timestep=sigma * 1000,
            return_dict=False,
        )[0]

    def guided(self, configs: Configs, model: ModelConfig) -> bool:
        return model.guidance > 1

    def sigmas(self, scheduler: Any, grid: Grid, num_steps: int) -> tuple[float, ...]:
        """The pipeline leaves them to the scheduler, which shifts twice; see `schedule.sd3_sigmas`."""
        return own_steps(scheduler, num_steps, self.mu(scheduler, grid, num_steps))

    def decode(self, vae: Any, latents: Tensor, grid: Grid) -> Tensor:
        return decode_scaled(vae, latents)

    def tiny(self) -> Any:
        def clip() -> CLIPTextModelWithProjection:
            return CLIPTextModelWithProjection(tiny_clip(TEXT_DIM // 4, projection_dim=TEXT_DIM // 2))

        return StableDiffusion3Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=clip(),
            tokenizer=clip_tokenizer(),
            text_encoder_2=clip(),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=tiny_t5(),
            tokenizer_3=t5_tokenizer(),
            vae=tiny_vae(1.5305, 0.0609),
            transformer=SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=TEXT_DIM,
                caption_projection_dim=32,
                pooled_projection_dim=TEXT_DIM,
                pos_embed_max_size=32,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
            ),
        )
