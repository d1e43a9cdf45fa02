"""Stable Diffusion 3 and 3.5: what is known of them without their weights. `spec` has the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from fastguard.backbones.pipeline import JOINT_ATTENTION, PipelineFamily

if TYPE_CHECKING:
    from fastguard.backbones.sd3.spec import SD3Spec


class SD3(PipelineFamily):
    """A StableDiffusion3Pipeline in diffusers' layout: two CLIPs and T5, the transformer, the VAE."""

    pipeline = "StableDiffusion3Pipeline"
    unread: ClassVar[Mapping[str, str]] = {"model.attention": "diffusers has no other attention for Stable Diffusion 3"}
    transformer = "SD3Transformer2DModel"
    download = "tens of GB, after its licence is accepted on its page and `hf auth login`"
    lora_targets = JOINT_ATTENTION
    """Joint attention, as in the public recipes (19 M at rank 32 of SD3.5-M); not the second attention of SD3.5-M."""

    @property
    def spec(self) -> SD3Spec:
        from fastguard.backbones.sd3.spec import SD3Spec

        return SD3Spec(self)
