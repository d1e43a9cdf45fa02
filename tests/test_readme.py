"""The code of README.md, as it stands there, and the tests that a page of the docs names."""

from __future__ import annotations

import re
from typing import Any

import torch
from helpers import ROOT
from helpers.flux_models import make_transformer

from fastguard.rewards.remote import RemoteReward

README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def names_of_a_trainer() -> dict[str, Any]:
    """What the README takes for granted."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sigmas = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])
    weight = torch.zeros(16, requires_grad=True)
    return {
        "sigma": sigmas[1].expand(4),
        "sigma_next": sigmas[2].expand(4),
        "sigmas": sigmas,
        "device": "cpu",
        "latents": randn(4, 8, 16),
        "old_velocity": randn(4, 8, 16),
        "noise": randn(4, 8, 16),
        "seeds": torch.arange(4),
        "advantages": randn(4),
        "model": lambda latents, sigma, *_: latents * 0.1 + weight,
        "prev_sample": randn(4, 8, 16),
        "prev_sample_mean": randn(4, 8, 16).requires_grad_(),
        "old_prev_sample_mean": randn(4, 8, 16),
        "std": torch.full((4,), 0.3),
        "dt": torch.full((4,), -0.2),
        "transformer": make_transformer(),
        "weight": weight,
    }


def test_the_code_runs_in_one_session() -> None:
    names = names_of_a_trainer()
    for code in BLOCKS:
        exec(compile(code, str(README), "exec"), names)
    assert len(BLOCKS) >= 4
    assert names["weight"].grad.abs().sum() > 0
    assert names["result"].loss.requires_grad
    assert len(names["report"].fused) == 4


def test_the_tests_behind_the_promises_are_there() -> None:
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:tests/)?(\w+\.py)`", page))
    assert len(named) > 10
    there = {path.name for path in (ROOT / "tests").rglob("*.py")}
    assert named <= there, named - there


def test_the_docs_state_how_long_a_remote_call_may_take() -> None:
    longest_s = RemoteReward("http://that-machine:8000").longest_s
    assert f"({longest_s:g} s by default" in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"({longest_s:g} s unless" in (RemoteReward.__doc__ or "")
