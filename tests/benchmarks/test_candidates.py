"""Kernels that might replace one of the product's give its numbers. Their machine code: test_h100_code.py."""

from __future__ import annotations

import candidates
import pytest
import torch
from torch import Tensor

from fastguard.kernels import transition
from fastguard.kernels.common import LAUNCH

# One program; several; more partial sums than a tile of the epilogue, and more samples.
SHAPES = [(1, 5), (3, 9000), (21, 40), (1, 300_000)]
OPTIONS = {**candidates.OPTIONS, "clip_low": 1e-3, "clip_high": 1e-3, "kl_threshold": 1e-4}


def arguments(shape: tuple[int, int], dtype: torch.dtype, device: str, reference: bool) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(sum(shape))
    old, delta, noise, ref = (torch.randn(shape, generator=generator) for _ in range(4))
    latents = [(old + 0.05 * delta).to(dtype), old.to(dtype), noise.to(dtype), ref.to(dtype) if reference else None]
    one = torch.ones(shape[0])
    per_sample = [torch.linspace(-1, 2, shape[0]), -0.1 * one, 0.3 * one, one]
    return [None if t is None else t.to(device) for t in (*latents, *per_sample)]


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("objective", [0, 2])
@pytest.mark.parametrize("reference", [False, True], ids=["", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_launch_gives_the_bits_of_two(
    shape, reference, objective, reduction, kernel_device, poisoned, monkeypatch
) -> None:
    monkeypatch.setattr(transition, "EPILOGUE_WARPS", LAUNCH.num_warps)
    args = arguments(shape, torch.float32, kernel_device, reference)
    chosen = {**OPTIONS, "objective": objective, "kl_weight": 0.1 * reference, "reduction": reduction}
    want = candidates.two_launches(*args, **chosen)
    ticket = torch.zeros((), dtype=torch.int32, device=kernel_device)
    for taken in (None, ticket, ticket):  # made by the launcher; given; and given once more, as the launch left it
        for got, expected in zip(candidates.guard_forward_one_launch(*args, taken, **chosen), want, strict=True):
            assert torch.equal(got, expected)
    assert ticket.item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 65_536), (8, 262_144), (32, 262_144)], ids=str)
def test_one_launch_repeats_under_load(shape, dtype, monkeypatch) -> None:
    """10,000 launches, each with its last program somewhere else: a sum read too early would show."""
    # The epilogue adds in an order that follows from its warps, which are those of the sums in a single launch.
    monkeypatch.setattr(transition, "EPILOGUE_WARPS", LAUNCH.num_warps)
    args = arguments(shape, dtype, "cuda", False)
    want = candidates.two_launches(*args, **OPTIONS)
    ticket = torch.zeros((), dtype=torch.int32, device="cuda")
    differ = torch.zeros((), dtype=torch.bool, device="cuda")
    other, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    for i in range(10_000):
        if i % 2:
            with torch.cuda.stream(other):
                busy @ busy
        for got, expected in zip(candidates.guard_forward_one_launch(*args, ticket, **OPTIONS), want, strict=True):
            differ |= (got != expected).any()
    assert not differ.item()
    assert ticket.item() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_early_epilogue_gives_the_same_bits(shape) -> None:
    """1,000 launches behind each other. The interpreter knows no dependent launches."""
    args = arguments(shape, torch.bfloat16, "cuda", False)
    want = candidates.two_launches(*args, **OPTIONS)
    with candidates.early_epilogue():
        for _ in range(1000):
            for got, expected in zip(candidates.two_launches(*args, **OPTIONS), want, strict=True):
                assert torch.equal(got, expected)
    assert transition._guard_epilogue_kernel is candidates._guard_epilogue_kernel
