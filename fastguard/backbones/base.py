"""What the trainer, the planner and the commands ask of a model family and of its loaded backbone.

Axes: B image, S token, C channel.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fastguard.config import Encoders, LoraConfig, ModelConfig, Recipe, Recompute
from fastguard.prompts import Prompt, read_prompts
from fastguard.utils.findings import Finding

if TYPE_CHECKING:  # imports diffusers, which takes seconds
    from fastguard.blocks import FuseReport


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1], any floating dtype, to uint8 on the host."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


class Backbone(Protocol):
    """A loaded policy with its prompts, its latent space and its file format."""

    @property
    def policy(self) -> nn.Module:
        """`policy(latents (B, *latent_shape), sigma (B,), prompt_indices (B,)) -> velocity`, of the latents' shape"""
        ...

    prompts: Sequence[Prompt]
    """prompt index i means prompts[i]"""
    num_trained_prompts: int
    """the first so many are trained on; others are for evaluations"""
    dtype: torch.dtype
    """of latents, velocities and noise"""
    has_adapters: bool
    """whether adapters are trained, rather than the weights themselves"""
    fused: FuseReport | None
    """what was fused; None if nothing was to be, or if it needs no mention"""

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Of one image, such as (S, C)."""
        ...

    @property
    def shift(self) -> float:
        """The factor s of `s t / (1 + (s - 1) t)` in the model's own schedule. With sampler.shift = "auto" the times of
        the forward process are shifted by it."""
        ...

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        """The model's own schedule, for sampler.shift = "auto": (num_steps + 1,) flow times from 1 to 0."""
        ...

    def load_prompts(self, prompt_indices: Iterable[int]) -> None:
        """Bring these prompts' embeddings to the device; the policy is asked for no other until the next call.

        Raises sealed.DamagedError if they were damaged since the start.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, *latent_shape) -> images, uint8 (B, 1 or 3, H, W) on the host."""
        ...

    def adapters_off(self) -> AbstractContextManager[None]:
        """A context in which the policy is the model before training; only asked for if `has_adapters`."""
        ...

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write trained weights (policy parameter name -> whole tensor on the host) as others load them."""
        ...


@dataclass(frozen=True)
class Skeleton:
    """A family's modules at full size on the meta device, prepared for training as a run prepares them."""

    transformer: nn.Module
    """what is trained, with its adapters"""
    decoder: nn.Module
    """what decodes latents"""
    blocks: Mapping[str, Sequence[nn.Module]]
    """the transformer's blocks, by kind; FSDP2 shards them"""
    latent_shape: tuple[int, ...]
    """of one image"""
    tokens: int
    """of one image, in the transformer"""
    width: int
    """channels of a token in the transformer"""
    branches: int
    """passes with a gradient for one image: 2 where both branches of classifier-free guidance have one"""
    text: tuple[int, int]
    """elements of an encoded prompt: of each of prompts.max_tokens tokens, and of the rest"""
    fused: FuseReport | None
    """what was fused; names are those of `transformer`'s modules"""
    assemble: Callable[[int, int, bool], Backbone]
    """(prompts.max_tokens, sampler.decode_batch, sampler.decode_tiled) -> the backbone around these modules, with one
    prompt's embeddings. Called under FakeTensorMode, once the modules' parameters have been made there."""


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder at full size on the meta device."""

    module: nn.Module
    tokens: int
    """of each prompt, filled up"""
    embed: Callable[[Tensor], Tensor]
    """token ids (B, tokens) int64 -> the part of the output that a run keeps"""


class Family(ABC):
    """A model family: what is known of it without its weights, and how its backbone is loaded.

    Commands ask it while they read a recipe: a family's own module imports its libraries inside the methods.
    """

    unread: ClassVar[Mapping[str, str]] = {}
    """`section` or `section.field` of a recipe that this family does not read -> why, as part of a sentence. A family
    that does not read prompts.file has prompts of its own, and draws no others."""
    footprint: ClassVar[str | None] = None
    """the memory, and the disk space of a checkpoint, in words, if there is too little of it to plan; None: the planner
    asks for `skeleton` and `text_encoders`"""
    lora_targets: ClassVar[tuple[str, ...]] = ()
    """layers that get an adapter with lora.targets = "auto", by the end of their names"""

    # --- a run

    def read_prompts(self, file: Path) -> list[Prompt]:
        """The prompts of a file. Raises UserError as `prompts.read_prompts`."""
        return read_prompts(file)

    def prompt(self, text: str) -> Prompt:
        """The prompt that is a text alone. Raises UserError if the family needs more."""
        return Prompt(text)

    def prepare(self, recipe: Recipe) -> Recipe:
        """The recipe with a model that is on this machine; may make one. Called by one process after the other."""
        return recipe

    def encode(self, recipe: Recipe, prompts: Sequence[Prompt], device: torch.device) -> Any:
        """Check the files of the model and encode the prompts; the result is handed to `load`.

        Called by the first process before the others, so that they find what it has cached. Raises UserError.
        """
        return prompts

    @abstractmethod
    def load(
        self, recipe: Recipe, encoded: Any, num_trained_prompts: int, device: torch.device, recompute: Recompute
    ) -> Backbone:
        """Load what is trained and what decodes; `recompute` is model.recompute, "auto" resolved. Raises UserError."""

    # --- words

    @abstractmethod
    def describe(self, model: ModelConfig) -> str:
        """The model as the report names it."""

    def how_to_load(self, model: ModelConfig, folder: Path) -> str:
        """The line of Python that loads what `Backbone.export` has written to `folder`; "" if there is none."""
        return ""

    # --- the doctor

    @abstractmethod
    def examine(self, recipe: Recipe) -> Iterator[Finding]:
        """Whether the model is there and whole. Changes and downloads nothing; what it raises is a failure."""

    def check_attention(self, model: ModelConfig) -> None:
        """Raise an exception if there is no such model.attention here."""
        return  # a family that does not read it

    def runs_on_cpu(self, model: ModelConfig) -> bool:
        """Whether a training run takes minutes, not days, without a GPU."""
        return self.footprint is not None

    def image_shape(self, model: ModelConfig) -> tuple[int, int, int]:
        """(channels, height, width) of a decoded image."""
        return 3, model.height, model.width

    # --- the planner

    def skeleton(self, model: ModelConfig, lora: LoraConfig, recompute: Recompute) -> Skeleton:
        """The modules of a run without weights; downloads nothing. Raises UserError for a model that is not known."""
        raise NotImplementedError(f"{type(self).__name__} has neither a skeleton nor a footprint")

    def text_encoders(self, model: ModelConfig, max_tokens: int, encoders: Encoders) -> Sequence[TextEncoder]:
        """The text encoders, as prompts.encoders has them; a run never has two at once. None by default."""
        return ()
