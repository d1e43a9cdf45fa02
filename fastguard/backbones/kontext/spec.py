"""How FLUX.1-Kontext's pipeline uses Flux.1's classes: tokens of the image that is edited follow those of the new one.

Axes: B image, P prompt, S image token, C channel.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import FluxKontextPipeline
from PIL import Image, ImageOps
from torch import Tensor

from fastguard.backbones.flux.spec import DEV, FluxSpec
from fastguard.backbones.kontext import CONTENT, IMAGE
from fastguard.backbones.pipeline.spec import Configs, EncodeSettings, Grid, Text, TextPart
from fastguard.errors import UserError
from fastguard.prompts import Prompt
from fastguard.utils.files import read_bytes


def _images(pipe: Any, prompts: Sequence[Prompt], asked: EncodeSettings) -> dict[str, Tensor]:
    """The packed latents of the prompts' images, (P, S, C), at the size of the images that are made.

    The pipeline would bring them to one of the sizes that the model was trained with.
    """
    found = []
    for prompt in prompts:
        pixels = pipe.image_processor.preprocess(load_image(Path(prompt.metadata[IMAGE])), asked.height, asked.width)
        z = pipe._encode_vae_image(pixels.to(asked.device, asked.dtype), generator=None)
        found.append(pipe._pack_latents(z, *z.shape))
    return {"image": torch.cat(found)}


def load_image(file: Path) -> Image.Image:
    """An image in RGB, upright. Raises UserError, naming the file, if it holds none."""
    try:
        with Image.open(io.BytesIO(read_bytes(file))) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # there is no telling what Pillow raises about a damaged file
        raise UserError(f"{file} is no image that Pillow reads ({error}): change {IMAGE!r} in prompts.file") from None


class KontextSpec(FluxSpec):
    """FluxKontextPipeline."""

    pipeline = FluxKontextPipeline
    known: ClassVar[Mapping[str, Configs]] = {"black-forest-labs/FLUX.1-Kontext-dev": DEV}
    # One image at a time goes through the VAE, which takes less memory than T5 does: the planner leaves it out.
    text_parts = (TextPart(("vae",), _images, quantizable=False), *FluxSpec.text_parts)

    def identity(self, asked: EncodeSettings, prompt: Prompt) -> str:
        """The text, the file's content, and the size to which it is brought."""
        assert prompt.identity is not None
        return f"{asked.height} {asked.width} {prompt.identity[CONTENT]} {prompt.text}"

    def tokens(self, grid: Grid) -> int:
        return 2 * grid.tokens

    def text_shapes(self, configs: Configs, grid: Grid, max_tokens: int) -> Mapping[str, tuple[int, ...]]:
        image = (grid.tokens, configs["transformer"]["in_channels"])
        return {**super().text_shapes(configs, grid, max_tokens), "image": image}

    def positions(self, grid: Grid) -> Tensor:
        """The edited image's differ from the new one's in their first number, 1."""
        new = super().positions(grid)
        return torch.cat([new, new + torch.tensor([1.0, 0.0, 0.0])])

    def velocity(
        self, transformer: Any, latents: Tensor, sigma: Tensor, text: Text, guidance: float, positions: Tensor
    ) -> Tensor:
        both = torch.cat([latents, text["image"]], dim=1)
        return super().velocity(transformer, both, sigma, text, guidance, positions)[:, : latents.shape[1]]
