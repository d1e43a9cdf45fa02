"""The demo's digit model as a model family; `demo.backbone` is what it loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import torch

from fastguard.backbones import Backbone, Family
from fastguard.config import ModelConfig, Recipe, Recompute
from fastguard.errors import UserError
from fastguard.extras import MissingExtraError, need
from fastguard.prompts import Prompt
from fastguard.utils.findings import Finding

_DRAWS = 'model.kind = "digits" draws the ten digits'
_NO_ENCODER = 'model.kind = "digits" has no text encoder'


class Digits(Family):
    """A tiny Flux transformer that draws the ten digits, pretrained on first use."""

    unread: ClassVar[Mapping[str, str]] = {
        **{
            f"model.{f.name}": 'model.kind = "digits" has its own size, weights, dtype and recompute'
            for f in fields(ModelConfig)
            if f.name not in ("kind", "fuse")
        },
        "lora": 'model.kind = "digits" trains every weight',
        "prompts.file": _DRAWS,
        "prompts.max_tokens": _NO_ENCODER,
        "prompts.encoders": _NO_ENCODER,
        "prompts.cache": _NO_ENCODER,
        "sampler.decode_tiled": 'model.kind = "digits" has no VAE',
        "monitor.file": _DRAWS,
    }
    footprint = "a few MB"

    def read_prompts(self, file: Path) -> list[Prompt]:
        """The ten digits."""
        return [Prompt(str(digit), {"digit": digit}) for digit in range(10)]

    def prompt(self, text: str) -> Prompt:
        raise UserError(f"{_DRAWS}: leave out --prompt")

    def load(
        self, recipe: Recipe, encoded: Any, num_trained_prompts: int, device: torch.device, recompute: Recompute
    ) -> Backbone:
        from fastguard.demo.backbone import DigitBackbone

        return DigitBackbone.load(device, recipe.model.fuse)

    def describe(self, model: ModelConfig) -> str:
        return "the demo's digit model"

    def examine(self, recipe: Recipe) -> Iterator[Finding]:
        text = "the digit model is made on first use"
        try:
            need("demo")
            yield Finding("ok", text)
        except MissingExtraError as error:
            yield Finding("FAIL", f"{text}; {error}")

    def image_shape(self, model: ModelConfig) -> tuple[int, int, int]:
        from fastguard.demo.data import IMAGE_SIZE

        return 1, IMAGE_SIZE, IMAGE_SIZE
