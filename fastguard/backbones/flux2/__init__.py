"""FLUX.2, dev and klein: what is known of them without their weights. `spec` has the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastguard.backbones.pipeline import GUIDANCE_IS_AN_INPUT, JOINT_ATTENTION, PipelineFamily

if TYPE_CHECKING:
    from fastguard.backbones.flux2.spec import DevSpec, KleinSpec


class _Flux2(PipelineFamily):
    """What both have: one text encoder, the transformer, the VAE."""

    transformer = "Flux2Transformer2DModel"
    lora_targets = (
        *JOINT_ATTENTION,
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "attn.to_qkv_mlp_proj",
        "attn.to_out",
    )
    """Attention and feed-forward layers of the double blocks, and both layers of the single blocks."""


class Flux2Dev(_Flux2):
    """A Flux2Pipeline in diffusers' layout: Mistral 3 as text encoder, and guidance as an input."""

    pipeline = "Flux2Pipeline"
    download = "113 GB, after its licence is accepted on its page and `hf auth login`"
    unread = GUIDANCE_IS_AN_INPUT

    @property
    def spec(self) -> DevSpec:
        from fastguard.backbones.flux2.spec import DevSpec

        return DevSpec(self)


class Flux2Klein(_Flux2):
    """A Flux2KleinPipeline in diffusers' layout: Qwen 3 as text encoder, and classifier-free guidance.

    Distilled ones, which their model_index.json calls so, have no guidance.
    """

    pipeline = "Flux2KleinPipeline"
    download = "16 GB for 4B, 35 GB for 9B after its licence is accepted on its page and `hf auth login`"

    @property
    def spec(self) -> KleinSpec:
        from fastguard.backbones.flux2.spec import KleinSpec

        return KleinSpec(self)
