"""Flux.1's classes, and how its pipeline uses them.

Axes: B image, P prompt, S image token, T text token, C channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

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
    guidance_input,
    texts,
)
from fastguard.backbones.pipeline.tiny import TEXT_DIM, clip_tokenizer, t5_tokenizer, tiny_clip, tiny_t5, tiny_vae
from fastguard.backbones.sizes import CLIP_SIZES, MOST_CHANNELS, MOST_LAYERS, T5_SIZES, VAE_SIZES
from fastguard.prompts import Prompt

PARTS = PipelineParts(
    modules={
        "transformer": (FluxTransformer2DModel, "diffusion_pytorch_model"),
        "vae": (AutoencoderKL, "diffusion_pytorch_model"),
        "text_encoder": (CLIPTextModel, "model"),
        "text_encoder_2": (T5EncoderModel, "model"),
    },
    tokenizers={"tokenizer": (CLIPTokenizer, "text_encoder"), "tokenizer_2": (T5Tokenizer, "text_encoder_2")},
    largest={
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
        "vae": VAE_SIZES,
        "text_encoder": CLIP_SIZES,
        "text_encoder_2": T5_SIZES,
    },
)  # fmt: skip
TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
VAE = {**VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159}
DEV: Configs = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL}


def _clip(pipe: Any, prompts: Sequence[Prompt], asked: EncodeSettings) -> dict[str, Tensor]:
    return {"pooled": pipe._get_clip_prompt_embeds(texts(prompts), device=asked.device)}


def _t5(pipe: Any, prompts: Sequence[Prompt], asked: EncodeSettings) -> dict[str, Tensor]:
    return {"embeds": encode_by_t5(pipe, prompts, asked)}


class FluxSpec(PipelineSpec):
    """FluxPipeline."""

    pipeline: ClassVar[Any] = FluxPipeline
    parts = PARTS
    blocks: ClassVar[Mapping[str, str]] = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
    known: ClassVar[Mapping[str, Configs]] = {
        "black-forest-labs/FLUX.1-dev": DEV,
        "black-forest-labs/FLUX.1-schnell": {**DEV, "transformer": {**TRANSFORMER, "guidance_embeds": False}},
    }
    text_parts: ClassVar[tuple[TextPart, ...]] = (
        TextPart(("text_encoder",), _clip, quantizable=False),  # 0.2 GB in bfloat16
        TextPart(("text_encoder_2",), _t5),
    )

    def text_shapes(self, configs: Configs, grid: Grid, max_tokens: int) -> Mapping[str, tuple[int, ...]]:
        transformer = configs["transformer"]
        return {
            "embeds": (max_tokens, transformer["joint_attention_dim"]),
            "pooled": (transformer["pooled_projection_dim"],),
        }

    def encoder_calls(self, configs: Configs, max_tokens: int) -> Mapping[str, EncoderCall]:
        return {
            "text_encoder": EncoderCall(
                configs["text_encoder"]["max_position_embeddings"],
                lambda clip, ids: clip(ids, output_hidden_states=False).pooler_output,
            ),
            "text_encoder_2": EncoderCall(max_tokens, lambda t5, ids: t5(ids, output_hidden_states=False)[0]),
        }

    def reads_guidance(self, configs: Configs) -> bool:
        return bool(configs["transformer"].get("guidance_embeds"))

    def positions(self, grid: Grid) -> Tensor:
        rows_and_columns = torch.arange(grid.rows, device="cpu"), torch.arange(grid.columns, device="cpu")
        y, x = torch.meshgrid(*rows_and_columns, indexing="ij")
        return torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float()

    def velocity(
        self, transformer: Any, latents: Tensor, sigma: Tensor, text: Text, guidance: float, positions: Tensor
    ) -> Tensor:
        embeds, device = text["embeds"], latents.device
        return transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds,
            pooled_projections=text["pooled"],
            timestep=sigma,
            guidance=guidance_input(transformer, guidance, latents),
            img_ids=positions.to(device, latents.dtype),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=latents.dtype),
            return_dict=False,
        )[0]

    def decode(self, vae: Any, latents: Tensor, grid: Grid) -> Tensor:
        z = FluxPipeline._unpack_latents(latents, grid.height, grid.width, self.vae_factor(vae.config))
        return decode_scaled(vae, z)

    def tiny(self) -> Any:
        return self.pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            text_encoder=CLIPTextModel(tiny_clip(TEXT_DIM)),
            tokenizer=clip_tokenizer(),
            text_encoder_2=tiny_t5(),
            tokenizer_2=t5_tokenizer(),
            vae=tiny_vae(0.3611, 0.1159),
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT_DIM,
                pooled_projection_dim=TEXT_DIM,
                guidance_embeds=True,
                axes_dims_rope=(4, 6, 6),
            ),
        )
