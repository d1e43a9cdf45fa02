"""How much the images of one prompt differ: a number for any model, from pixels alone.

Axes: P prompt, N image of a prompt, F value of a reduced image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

SIDE = 64
"""Pixels: larger images are averaged down to this, so that sharpness and noise do not count as diversity."""


def reduced(images: Tensor) -> Tensor:
    """uint8 images (B, C, H, W) as float32 values (B, F) in [0, 1], averaged down to at most 64 x 64 pixels."""
    height, width = images.shape[-2:]
    return adaptive_avg_pool2d(images.float(), (min(height, SIDE), min(width, SIDE))).flatten(1) / 255


def diversity(values: Tensor, images_per_prompt: int) -> float | None:
    """Mean over the prompts of the mean root-mean-square difference between two images of a prompt, in [0, 1].

    Args:
        values: (P * N, F), from `reduced`; the images of a prompt stand together.
        images_per_prompt: N. None is returned for 1, which has no pairs.
    """
    if images_per_prompt < 2:
        return None
    prompts = values.double().unflatten(0, (-1, images_per_prompt))
    distances = torch.stack([torch.pdist(images).mean() for images in prompts])
    return (distances.mean() / values.shape[1] ** 0.5).item()
