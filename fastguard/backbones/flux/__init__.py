"""Flux.1, and any pipeline of its kind: what is known of it without its weights. `spec` has the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastguard.backbones.pipeline import GUIDANCE_IS_AN_INPUT, JOINT_ATTENTION, PipelineFamily

if TYPE_CHECKING:
    from fastguard.backbones.flux.spec import FluxSpec


class Flux(PipelineFamily):
    """A FluxPipeline in diffusers' layout: CLIP and T5, the transformer, the VAE."""

    pipeline = "FluxPipeline"
    transformer = "FluxTransformer2DModel"
    download = "tens of GB; Flux.1-dev after its licence is accepted on its page and `hf auth login`"
    unread = GUIDANCE_IS_AN_INPUT
    lora_targets = (
        *JOINT_ATTENTION,
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    """Attention and feed-forward layers of the double blocks, attention of the single blocks (179 M at rank 64)."""

    @property
    def spec(self) -> FluxSpec:
        from fastguard.backbones.flux.spec import FluxSpec

        return FluxSpec(self)
