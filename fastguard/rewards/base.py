"""What a reward is, and one checked call of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class RewardError(RuntimeError):
    """A reward could not score; the message says which reward, which prompts and why."""


class Reward(Protocol):
    """The protocol of `fastguard.rewards`: (B, C, H, W) uint8 images, B prompts and B dicts to B scores."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], /
    ) -> Tensor | np.ndarray | Sequence[float]: ...


def call_reward(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> torch.Tensor:
    """Call a reward without gradients and return its scores, (B,) float64 in host memory; NaN is let through.

    Raises TypeError for a result that is not numbers, ValueError for the wrong number of them.
    """
    with torch.no_grad():  # grad mode belongs to a thread: the caller's does not reach a scoring thread
        result = reward(images, prompts, metadata)
    if isinstance(result, Tensor):
        scores = result.detach().to("cpu", torch.float64)
    else:
        try:
            scores = torch.tensor(result, dtype=torch.float64, device="cpu")
        except Exception as error:  # torch raises TypeError, ValueError or RuntimeError, by what it meets
            raise TypeError(
                f"expected {len(images)} numbers (a tensor, an array or a list), got {type(result).__name__}: {error}"
            ) from error
    if scores.shape != (len(images),):
        raise ValueError(f"expected {len(images)} scores of shape ({len(images)},), got shape {tuple(scores.shape)}")
    return scores
