"""Flux.1, and any pipeline of its kind: what is known of it without its weights, and where the rest is.

The files beside this one import diffusers and transformers, which takes seconds: methods import them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastguard.backbones.base import Backbone, Family, Skeleton, TextEncoder
from fastguard.config import Encoders, LoraConfig, ModelConfig, Recipe, Recompute
from fastguard.prompts import EncodedPrompts, Prompt, cache_folder
from fastguard.utils.findings import Finding

TINY = "tiny"
"""model.path of the random pipeline that is made on first use."""


class Flux(Family):
    """A FluxPipeline in diffusers' layout: CLIP and T5, the transformer, the VAE."""

    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    """Attention and feed-forward layers of the double blocks, attention of the single blocks (179 M at rank 64)."""

    def prepare(self, recipe: Recipe) -> Recipe:
        """Makes the tiny random pipeline if it is asked for."""
        if recipe.model.path != TINY:
            return recipe
        from fastguard.backbones.flux.tiny import make_tiny_flux

        folder = make_tiny_flux(cache_folder(recipe.prompts.cache) / "tiny_flux")
        return replace(recipe, model=replace(recipe.model, path=str(folder)))

    def encode(self, recipe: Recipe, prompts: Sequence[Prompt], device: torch.device) -> EncodedPrompts:
        from fastguard.backbones.flux.encoding import encode_prompts
        from fastguard.backbones.flux.parts import PARTS
        from fastguard.backbones.folder import check_pipeline, pipeline_folder

        model, config, dtype = recipe.model, recipe.prompts, getattr(torch, recipe.model.dtype)
        check_pipeline(pipeline_folder(model.path), PARTS)
        return encode_prompts(
            prompts, model.path, config.max_tokens, config.cache, dtype, device, encoders=config.encoders
        )

    def load(
        self, recipe: Recipe, encoded: Any, num_trained_prompts: int, device: torch.device, recompute: Recompute
    ) -> Backbone:
        from fastguard.backbones.flux.backbone import FluxBackbone

        return FluxBackbone.load(recipe, encoded, num_trained_prompts, device, recompute)

    def describe(self, model: ModelConfig) -> str:
        return f"{model.path} ({model.train})"

    def how_to_load(self, model: ModelConfig, folder: Path) -> str:
        if model.train == "lora":
            return f'pipe.load_lora_weights("{folder}")'
        return f'FluxTransformer2DModel.from_pretrained("{folder}")'

    def examine(self, recipe: Recipe) -> Iterator[Finding]:
        from fastguard.backbones.flux.parts import PARTS
        from fastguard.backbones.folder import examine_pipeline

        if recipe.model.path == TINY:
            yield Finding("ok", "the tiny random pipeline is made on first use")
        else:
            download = "tens of GB; Flux.1-dev after its licence is accepted on its page and `hf auth login`"
            yield from examine_pipeline(recipe.model.path, PARTS, download)

    def check_attention(self, model: ModelConfig) -> None:
        if model.attention != "native":
            from fastguard.backbones.flux.backbone import set_attention
            from fastguard.backbones.flux.skeleton import meta_transformer, pipeline_configs

            set_attention(meta_transformer(pipeline_configs(TINY), torch.float32), model.attention)

    def runs_on_cpu(self, model: ModelConfig) -> bool:
        return model.path == TINY

    def skeleton(self, model: ModelConfig, lora: LoraConfig, recompute: Recompute) -> Skeleton:
        from fastguard.backbones.flux.skeleton import flux_skeleton

        return flux_skeleton(model, lora, recompute)

    def text_encoders(self, model: ModelConfig, max_tokens: int, encoders: Encoders) -> Sequence[TextEncoder]:
        from fastguard.backbones.flux.skeleton import flux_text_encoders

        return flux_text_encoders(model, max_tokens, encoders)
