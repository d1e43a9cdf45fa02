"""Flux.1, and any pipeline of its kind: what is known of it without its weights. `spec` has the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from fastguard.backbones.pipeline import JOINT_ATTENTION, PipelineFamily

if TYPE_CHECKING:
    from fastguard.backbones.flux.spec import FluxSpec

_DISTILLED = "Flux.1 takes its guidance as an input, and has no second branch"


class Flux(PipelineFamily):
    """A FluxPipeline in diffusers' layout: CLIP and T5, the transformer, the VAE."""

    pipeline = "FluxPipeline"
    transformer = "FluxTransformer2DModel"
    download = "tens of GB; Flux.1-dev after its licence is accepted on its page and `hf auth login`"
    unread: ClassVar[Mapping[str, str]] = {
        "model.negative_prompt": _DISTILLED,
        "model.guidance_gradient": _DISTILLED,
    }
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
