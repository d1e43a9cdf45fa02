"""What a reward is, and one checked call of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastguard.errors import UserError
from fastguard.utils.terminal import printable

LARGEST_SCORE = torch.finfo(torch.float32).max
"""Advantages are float32, and the squares of smaller scores add up in float64 without overflow."""


class RewardError(UserError, RuntimeError):
    """A reward could not score; the message says which reward, which prompts and why."""

    exit_code = 1


def one_line(text: str, most: int = 1000) -> str:
    """What a reward, a server or a client said, in one line of at most `most` characters, those that act escaped."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= most else f"{text[: most - 3]}..."


class Reward(Protocol):
    """The protocol of `fastguard.rewards`: (B, C, H, W) uint8 images, B prompts and B dicts to B scores."""

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]], /
    ) -> Tensor | np.ndarray | Sequence[float]: ...


def call_reward(
    reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> torch.Tensor:
    """Call a reward without gradients and return its scores, (B,) float64 in host memory; `usable` says which count.

    Raises TypeError for a result that is not real numbers, ValueError for the wrong number of them.
    """
    with torch.no_grad():  # grad mode belongs to a thread: the caller's does not reach a scoring thread
        result = reward(images, prompts, metadata)
        try:
            scores = _as_float64(result)
        except Exception as error:  # torch raises TypeError, ValueError or RuntimeError, by what it meets
            raise TypeError(
                f"expected {len(images)} numbers (a tensor, an array or a list), got {type(result).__name__}: {error}"
            ) from error
    if scores.shape != (len(images),):
        raise ValueError(f"expected {len(images)} scores of shape ({len(images)},), got shape {tuple(scores.shape)}")
    return scores


def usable(scores: Tensor) -> Tensor:
    """Which scores are finite in float32, (B,) bool."""
    return scores.abs() <= LARGEST_SCORE  # False for NaN


def _as_float64(result: Any) -> Tensor:
    if any(_is_complex(part) for part in (result if isinstance(result, list | tuple) else [result])):
        raise TypeError("complex scores have no order; return their real part or their magnitude")
    if isinstance(result, Tensor):
        return result.detach().to("cpu", torch.float64, copy=True).to_dense()
    if isinstance(result, np.ndarray) and result.dtype.kind in "biuf":
        result = result.astype(np.float64)  # also longdouble, and views with negative strides, unknown to torch
    return torch.tensor(result, dtype=torch.float64, device="cpu")


def _is_complex(value: Any) -> bool:
    return value.is_complex() if isinstance(value, Tensor) else np.iscomplexobj(value)
