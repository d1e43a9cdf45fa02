"""What the trainer asks of a model family.

Axes: B image, S token, C channel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from fastguard.prompts import Prompt


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1], any floating dtype, to uint8 on the host."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu()


class Backbone(Protocol):
    """A policy with its prompts, its latent space and its file format."""

    @property
    def policy(self) -> nn.Module:
        """`policy(latents (B, S, C), sigma (B,), prompt_indices (B,)) -> velocity (B, S, C)`; see sampler.Policy"""
        ...

    prompts: Sequence[Prompt]
    """prompt index i means prompts[i]"""
    num_trained_prompts: int
    """the first so many are trained on; others are for evaluations"""
    latent_shape: tuple[int, int]
    """(S, C) of one image"""
    dtype: torch.dtype
    """of latents, velocities and noise"""
    shift: float
    """the model's own schedule shift, for sampler.shift = "auto" """

    has_adapters: bool
    """whether adapters are trained, rather than the weights themselves"""

    def load_prompts(self, prompt_indices: Iterable[int]) -> None:
        """Bring these prompts' embeddings to the device; the policy is asked for no other until the next call.

        Raises sealed.DamagedError if they were damaged since the start.
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, S, C) -> images, uint8 (B, 1 or 3, H, W) on the host."""
        ...

    def adapters_off(self) -> AbstractContextManager[None]:
        """A context in which the policy is the model before training; only asked for if `has_adapters`."""
        ...

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write trained weights (policy parameter name -> whole tensor on the host) as others load them."""
        ...
