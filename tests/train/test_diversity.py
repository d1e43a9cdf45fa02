"""Diversity of an evaluation against distances written out."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastguard.train.diversity import diversity, reduced
from fastguard.train.monitor import EvaluationLog


def test_it_is_the_mean_root_mean_square_difference_within_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 5, 7), generator=generator, dtype=torch.uint8)
    expected = []
    for prompt in (images[:3], images[3:]):
        pixels = prompt.double() / 255
        pairs = [(pixels[a] - pixels[b]).square().mean().sqrt().item() for a, b in ((0, 1), (0, 2), (1, 2))]
        expected.append(sum(pairs) / 3)
    assert diversity(reduced(images), 3) == pytest.approx(sum(expected) / 2, rel=1e-6)  # float32 pixels


def test_black_and_white_are_1_apart_and_equal_images_0() -> None:
    black, white = torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    assert diversity(reduced(torch.cat([black, white])), 2) == 1.0
    assert diversity(reduced(torch.cat([white, white])), 2) == 0.0
    assert diversity(reduced(white), 1) is None  # no pair


def test_large_images_are_averaged_down() -> None:
    """A checkerboard of single pixels is grey at half the size: its noise is no diversity."""
    board = (torch.arange(128)[:, None] + torch.arange(128)).remainder(2).mul(255).to(torch.uint8)
    boards = torch.stack([board, 255 - board])[:, None]
    assert reduced(boards).shape == (2, 64 * 64)
    assert diversity(reduced(boards), 2) == 0.0


def test_logs_of_earlier_versions_load() -> None:
    old = json.loads('{"epoch": 1, "proxy": 1.0, "gold": 2.0, "rewards": {}, "gold_change_in_errors": 0.0}')
    assert EvaluationLog(**old).diversity is None
    assert math.isfinite(EvaluationLog(**old).gold)
