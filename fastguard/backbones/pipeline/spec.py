"""What a family of diffusers pipelines says of itself: its classes, and how its transformer is asked for a velocity.

Axes: B image, P prompt, S image token, T text token, C channel.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastguard.backbones.folder import PipelineParts
from fastguard.backbones.schedule import equal_steps, linear_mu
from fastguard.config import ModelConfig
from fastguard.errors import UserError
from fastguard.prompts import Prompt

if TYPE_CHECKING:
    from fastguard.backbones.pipeline import PipelineFamily

Text = Mapping[str, Tensor]
"""Embeddings by name, (P, ...) or (B, ...) each."""
Configs = Mapping[str, Mapping[str, Any]]
"""Settings of the parts of a pipeline, as in their config.json."""


def texts(prompts: Sequence[Prompt]) -> list[str]:
    return [prompt.text for prompt in prompts]


def encode_by_t5(pipe: Any, prompts: Sequence[Prompt], asked: EncodeSettings) -> Tensor:
    """T5's embeddings (P, T, C), as the pipelines of Flux.1 and Stable Diffusion 3 make them."""
    return pipe._get_t5_prompt_embeds(
        texts(prompts), max_sequence_length=asked.max_tokens, device=asked.device, dtype=asked.dtype
    )


def decode_scaled(vae: Any, z: Tensor) -> Tensor:
    """Images of an AutoencoderKL, from latents (B, C, H, W) as its transformer has them: scaled and shifted."""
    z = (z / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
    return vae.decode(z, return_dict=False)[0]


def guidance_input(transformer: Any, guidance: float, latents: Tensor) -> Tensor | None:
    """model.guidance (B,) float32, for a transformer that takes it as an input; None for any other."""
    if not transformer.config.guidance_embeds:
        return None
    return torch.full((len(latents),), guidance, dtype=torch.float32, device=latents.device)


@dataclass(frozen=True)
class Grid:
    """Size of an image in the latent space."""

    rows: int
    """of image tokens"""
    columns: int
    height: int
    """pixels"""
    width: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class EncodeSettings:
    """How prompts are encoded."""

    max_tokens: int
    """prompts.max_tokens"""
    device: torch.device
    dtype: torch.dtype
    height: int
    """pixels, of prompts' images"""
    width: int


@dataclass(frozen=True)
class TextPart:
    """Encoders of prompts that are on the device together; one part is freed before the next is loaded."""

    encoders: tuple[str, ...]
    """parts of the pipeline; all others but the tokenizers are left out"""
    encode: Callable[[Any, Sequence[Prompt], EncodeSettings], dict[str, Tensor]]
    """(pipeline, prompts, settings) -> embeddings (P, ...) by name"""
    quantizable: bool = True
    """whether they are large enough to be worth 8 bits, with prompts.encoders = "int8" """


@dataclass(frozen=True)
class EncoderCall:
    """How the planner calls a text encoder."""

    tokens: int
    """of each prompt, filled up"""
    embed: Callable[[Any, Tensor], Any]
    """(module, token ids (P, tokens) int64) -> what a run keeps"""


class PipelineSpec(ABC):
    """What is particular to a family of pipelines."""

    pipeline: ClassVar[Any]
    """diffusers' class"""
    parts: ClassVar[PipelineParts]
    """what a folder must hold; the transformer and the VAE are called `transformer` and `vae`"""
    blocks: ClassVar[Mapping[str, str]]
    """kinds of the transformer's blocks, and the attributes that hold them"""
    known: ClassVar[Mapping[str, Configs]]
    """settings of models on the hub, which the planner knows without their files"""
    text_parts: ClassVar[tuple[TextPart, ...]]
    """in the order in which they are loaded: the one with the large embeddings comes last"""
    masked: ClassVar[bool] = False
    """whether attention has to pass over tokens in the middle of a sequence, by a mask"""
    one_gradient_layout: ClassVar[bool] = False
    """whether diffusers' own blocks give attention gradients of one layout, for each of query, key and value"""

    def __init__(self, family: PipelineFamily) -> None:
        self.family = family

    # --- sizes

    def grid(self, configs: Configs, model: ModelConfig) -> Grid:
        """The image tokens: the VAE's factor, then patches of 2 x 2.

        Raises UserError if the image does not divide into them.
        """
        factor = self.vae_factor(configs["vae"]) * 2
        for name in ("height", "width"):
            if getattr(model, name) % factor:
                raise UserError(f"model.{name} must be a multiple of {factor} pixels, got {getattr(model, name)}")
        return Grid(model.height // factor, model.width // factor, model.height, model.width)

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        """Pixels of an image for each number of a latent, along a side."""
        return 2 ** (len(vae["block_out_channels"]) - 1)

    def latent_shape(self, configs: Configs, grid: Grid) -> tuple[int, ...]:
        """Of one image: tokens (S, C), for models that take them."""
        return grid.tokens, configs["transformer"]["in_channels"]

    def tokens(self, grid: Grid) -> int:
        """Tokens of one image in the transformer, beside those of the text."""
        return grid.tokens

    def width(self, transformer: Mapping[str, Any]) -> int:
        """Channels of a token in the transformer."""
        return transformer["num_attention_heads"] * transformer["attention_head_dim"]

    @abstractmethod
    def text_shapes(self, configs: Configs, grid: Grid, max_tokens: int) -> Mapping[str, tuple[int, ...]]:
        """Shapes of one prompt's embeddings, as `text` returns them."""

    # --- prompts

    def identity(self, asked: EncodeSettings, prompt: Prompt) -> str:
        """What of a prompt its embeddings depend on."""
        return prompt.text

    def encoding_pipeline(self, path: str, **options: Any) -> Any:
        """The pipeline that encodes prompts; `options` are diffusers', with None for each part that is not needed."""
        return self.pipeline.from_pretrained(path, **options)

    def text(self, encoded: Text) -> Text:
        """The embeddings as `velocity` takes them, (P, ...) each, from those of all `text_parts`."""
        return encoded

    @abstractmethod
    def encoder_calls(self, configs: Configs, max_tokens: int) -> Mapping[str, EncoderCall]:
        """How each text encoder is called."""

    # --- the policy

    def positions(self, grid: Grid) -> Any:
        """Where the image tokens are, as `velocity` takes it: their positions on the host, for example."""
        return None

    def unused(self, transformer: Any) -> Sequence[str]:
        """Names of layers on which the velocity does not depend: they get no adapters, and stay as they are.

        They would get no gradients, for which DDP waits, and no state of the optimizer.
        """
        return ()

    def remake_tables(self, transformer: Any) -> None:  # noqa: B027  most transformers have none
        """Make again, in place, what a transformer computes when it is made and keeps as plain tensors.

        They have no values if it was made on the meta device, and no file holds them.
        """

    @abstractmethod
    def velocity(
        self, transformer: Any, latents: Tensor, sigma: Tensor, text: Text, guidance: float, positions: Any
    ) -> Tensor:
        """One call of the transformer: latents (B, *latent_shape), sigma (B,) float32 -> velocity like latents.

        guidance: model.guidance, for models that take it as an input.
        """

    def reads_guidance(self, configs: Configs) -> bool:
        """Whether model.guidance changes anything: some distilled models have neither such an input nor a second
        branch."""
        return True

    def guided(self, configs: Configs, model: ModelConfig) -> bool:
        """Whether the policy is guided by a second branch, for the negative prompt (classifier-free guidance)."""
        return False

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """The guided velocity (arXiv 2207.12598, equation 6, with guidance = 1 + w)."""
        return unconditional + guidance * (conditional - unconditional)

    # --- the schedule

    def sigmas(self, scheduler: Any, grid: Grid, num_steps: int) -> tuple[float, ...]:
        """The pipeline's schedule: (num_steps + 1,) flow times from 1 to 0.

        By default the pipeline hands equally spaced times to the scheduler, shifted by the number of image tokens.
        """
        return equal_steps(scheduler, num_steps, self.mu(scheduler, grid, num_steps))

    def mu(self, scheduler: Any, grid: Grid, num_steps: int) -> float:
        """The shift's logarithm for this image, for schedulers with use_dynamic_shifting."""
        return linear_mu(scheduler.config, grid.tokens)

    def shift(self, scheduler: Any, grid: Grid, num_steps: int) -> float:
        """The factor s of `s t / (1 + (s - 1) t)` in the schedule; times of the forward process are shifted by it."""
        if not scheduler.config.use_dynamic_shifting:
            return float(scheduler.config.shift)
        return math.exp(self.mu(scheduler, grid, num_steps))

    # --- images

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor, grid: Grid) -> Tensor:
        """Latents (B, *latent_shape) -> images (B, 3, H, W) in [-1, 1]."""

    def decode_in_tiles(self, vae: Any, side: int) -> None:
        """Decode in tiles of `side` pixels that overlap by a quarter, and blend them; no larger images are decoded
        whole. The VAE's own tiles would be as large as the images that it was trained with."""
        vae.enable_tiling()
        vae.tile_sample_min_size = side
        vae.tile_latent_min_size = side // self.vae_factor(vae.config)

    def decode_last_tiles(self, vae: Any, grid: Grid) -> None:
        """For the planner: of each image, decode the last tile of each size alone, and blend nothing. The peak is the
        same, within seconds.

        At an earlier tile of the same size fewer others wait. Blending is in place, thousands of small operations.
        """
        side = vae.tile_latent_min_size
        step = int(side * (1 - vae.tile_overlap_factor))
        decode_last_only(vae, grid, self.vae_factor(vae.config), side, step, vae.config.out_channels)

    # --- the tiny pipeline

    @abstractmethod
    def tiny(self) -> Any:
        """A complete pipeline of a few hundred thousand random weights, drawn from torch's global generator."""


def decode_last_only(vae: Any, grid: Grid, factor: int, side: int, step: int, channels: int) -> None:
    """Of each image's tiles of `side` numbers of a latent, `step` apart, a VAE with a `decoder`, `blend_v` and
    `blend_h` decodes the last of each size alone, and blends nothing; in place.

    Args:
        factor: pixels for each number of a latent, along a side.
        channels: of an image.
    """
    height, width = grid.height // factor, grid.width // factor
    if height <= side and width <= side:
        return
    tiles = [
        (min(side, height - y), min(side, width - x)) for y in range(0, height, step) for x in range(0, width, step)
    ]
    last = {size: i for i, size in enumerate(tiles)}
    decoded = itertools.cycle(last[size] == i for i, size in enumerate(tiles))
    whole = vae.decoder.forward

    def decode(z: Tensor, **options: Any) -> Tensor:
        if next(decoded):
            return whole(z, **options)
        *frames, tall, wide = z.shape[2:]  # a VAE of videos has an axis of frames
        return z.new_empty(len(z), channels, *frames, tall * factor, wide * factor)

    vae.decoder.forward = decode
    vae.blend_v = vae.blend_h = lambda _, tile, __: tile
