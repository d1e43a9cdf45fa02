"""A model family in one file: images of 2 x 8 pixels, as light or as dark as the prompt says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastguard.backbones import Backbone, Family
from fastguard.config import ModelConfig, Recipe, Recompute
from fastguard.prompts import Prompt
from fastguard.schedule import shifted_sigmas
from fastguard.utils.findings import Finding

SHAPE = (2, 8)


class ShadePolicy(nn.Module):
    """Denoises towards an image that depends on the prompt's embedding (P, 2), one-hot: light, or dark."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        for block in self.blocks:
            nn.init.zeros_(block.weight)
        self.image = nn.Linear(2, 8, bias=False)
        self.embeds = torch.empty(0)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        image = self.image(self.embeds[prompt_indices])[:, None].expand_as(latents)
        for block in self.blocks:
            image = image + block(torch.tanh(image))
        return (0.7 * latents - image) / sigma[:, None, None]


class ShadeBackbone:
    """The protocol is `backbones.Backbone`. Latents (B, 2, 8) become 256 grey levels over [-8, 8]."""

    latent_shape = SHAPE
    dtype = torch.float32
    shift = 3.0
    has_adapters = False
    fused = None

    def __init__(self, prompts: Sequence[Prompt], embeds: Tensor, num_trained_prompts: int) -> None:
        self.policy = ShadePolicy()
        self.prompts, self.num_trained_prompts, self._embeds = prompts, num_trained_prompts, embeds

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        return shifted_sigmas(num_steps, self.shift)

    def load_prompts(self, prompt_indices: Iterable[int]) -> None:
        self.policy.embeds = self._embeds

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().mul(16).add(128).round().clamp(0, 255).to(torch.uint8)[:, None].cpu()

    def adapters_off(self) -> AbstractContextManager[None]:
        raise NotImplementedError("no adapters")

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(dict(weights), folder / "shades.safetensors")


class Shades(Family):
    unread: ClassVar[Mapping[str, str]] = {
        "lora": 'model.kind = "shades" trains every weight',
        "prompts.max_tokens": 'model.kind = "shades" reads one word',
    }
    footprint = "a few KB"

    def encode(self, recipe: Recipe, prompts: Sequence[Prompt], device: torch.device) -> Any:
        shades = [int("dark" in prompt.text) for prompt in prompts]
        return prompts, nn.functional.one_hot(torch.tensor(shades), 2).float()

    def load(
        self, recipe: Recipe, encoded: Any, num_trained_prompts: int, device: torch.device, recompute: Recompute
    ) -> Backbone:
        return ShadeBackbone(*encoded, num_trained_prompts)

    def describe(self, model: ModelConfig) -> str:
        return "two shades"

    def how_to_load(self, model: ModelConfig, folder: Path) -> str:
        return f'load_file("{folder}/shades.safetensors")'

    def examine(self, recipe: Recipe) -> Iterator[Finding]:
        yield Finding("ok", "there is nothing to look for")

    def image_shape(self, model: ModelConfig) -> tuple[int, int, int]:
        return 1, *SHAPE
