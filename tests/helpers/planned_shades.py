"""The family of shades.py for the planner, and a reward for its images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastguard.backbones import Backbone, Skeleton, TextEncoder
from fastguard.config import Encoders, LoraConfig, ModelConfig, Recompute
from helpers.shades import SHAPE, ShadeBackbone, Shades


class PlannedShades(Shades):
    """The same for the planner, as if it were large."""

    footprint = None

    def skeleton(self, model: ModelConfig, lora: LoraConfig, recompute: Recompute) -> Skeleton:
        with torch.device("meta"):
            backbone, decoder = ShadeBackbone([], torch.empty(0), 0), nn.Linear(3, 5)

        def assemble(max_tokens: int, decode_batch: int, decode_tiled: bool) -> Backbone:
            backbone.policy.embeds = torch.empty(1, 2)
            return backbone

        return Skeleton(
            transformer=backbone.policy,
            decoder=decoder,
            blocks={"shade": backbone.policy.blocks},
            latent_shape=SHAPE,
            tokens=SHAPE[0],
            branches=1,
            width=8,
            text=(3, 2),
            fused=None,
            assemble=assemble,
        )

    def text_encoders(self, model: ModelConfig, max_tokens: int, encoders: Encoders) -> Sequence[TextEncoder]:
        with torch.device("meta"):
            words = nn.Embedding(7, 4)
        return (TextEncoder(words, max_tokens, lambda ids: words(ids)[:, 0]),)


def towards(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """A light image wants to be 1 everywhere, a dark one -1."""
    wanted = torch.tensor([-1.0 if "dark" in prompt else 1.0 for prompt in prompts])
    return -((images[:, 0].float() - 128) / 16 - wanted[:, None, None]).square().mean((1, 2))
