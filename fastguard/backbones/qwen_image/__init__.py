"""Qwen-Image, and any pipeline of its kind: what is known of it without its weights. `spec` has the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastguard.backbones.pipeline import JOINT_ATTENTION, PipelineFamily

if TYPE_CHECKING:
    from fastguard.backbones.qwen_image.spec import QwenImageSpec


class QwenImage(PipelineFamily):
    """A QwenImagePipeline in diffusers' layout: Qwen2.5-VL, the transformer, the VAE."""

    pipeline = "QwenImagePipeline"
    transformer = "QwenImageTransformer2DModel"
    download = "about 58 GB"
    lora_targets = (
        *JOINT_ATTENTION,
        "img_mlp.net.0.proj",
        "img_mlp.net.2",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    )
    """Attention and feed-forward layers of both streams, as in Flow-GRPO (425 M at rank 64)."""

    @property
    def spec(self) -> QwenImageSpec:
        from fastguard.backbones.qwen_image.spec import QwenImageSpec

        return QwenImageSpec(self)
