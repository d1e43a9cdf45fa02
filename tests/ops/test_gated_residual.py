"""The gated residual: kernels against the float64 reference and its gradients by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastguard.ops import gated_residual as formulas

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the stream, the branch, and the gate.
DTYPES = [(BF16, BF16, BF16), (FP16, FP16, FP16), (FP32, FP32, FP32), (BF16, BF16, FP32), (FP32, BF16, FP16)]
# One element, odd sizes, a tile (16 tokens x 256 channels) and its neighbours, several programs of 32 tokens, Flux.
SHAPES = [
    (1, 1, 1),
    (2, 3, 7),
    (1, 15, 255),
    (1, 16, 256),
    (2, 17, 257),
    (1, 32, 8),
    (2, 33, 100),
    (1, 70, 9),
    (1, 2, 3072),
]


def make_case(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, ...] = (FP32,) * 3, device: str = "cpu") -> Any:
    """x, y, gate and a random gradient of the result; the gate is a chunk of the rows of a modulation."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, y, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    gate = torch.randn(shape[0], 6 * shape[2], generator=generator).to(dtypes[2]).to(device).chunk(6, dim=1)[2]
    stream, branch = (tensor.to(dtype).to(device) for tensor, dtype in zip((x, y), dtypes, strict=False))
    return {"x": stream, "y": branch, "gate": gate, "grad": grad.to(dtypes[0]).to(device)}


def run_kernels(case: dict[str, Tensor]) -> dict[str, Tensor]:
    from fastguard.kernels import gated_residual

    out = gated_residual.gated_residual_fwd(case["x"], case["y"], case["gate"])
    grad_y, grad_gate = gated_residual.gated_residual_bwd(case["grad"], case["y"], case["gate"])
    return {"out": out, "grad_y": grad_y, "grad_gate": grad_gate}


def run_formula(case: dict[str, Tensor], double: bool) -> dict[str, Tensor]:
    """The reference and its gradients by autograd, in float64 or in the dtypes of the case."""
    inputs = {key: value.detach().cpu().double() if double else value.detach() for key, value in case.items()}
    y, gate = inputs["y"].requires_grad_(), inputs["gate"].requires_grad_()
    out = formulas.gated_residual(inputs["x"], y, gate)
    grad_y, grad_gate = torch.autograd.grad(out, (y, gate), inputs["grad"].to(out.dtype))
    return {"out": out.detach().to(inputs["x"].dtype), "grad_y": grad_y, "grad_gate": grad_gate}


def assert_matches_reference(case: dict[str, Tensor]) -> None:
    got, truth, eager = run_kernels(case), run_formula(case, True), run_formula(case, False)
    for key, want in truth.items():
        assert got[key].shape == want.shape
        assert got[key].dtype == (FP32 if key == "grad_gate" else case["x"].dtype), key
        assert got[key].is_contiguous()
        error = (got[key].cpu().double() - want).abs().max()
        eager_error = (eager[key].cpu().double() - want).abs().max()
        # Two units in the last place of the largest value: one for the interpreter, which truncates where a GPU
        # rounds, one for float32 arithmetic before it.
        unit = torch.finfo(got[key].dtype).eps * want.abs().max()
        assert error <= 2 * eager_error + 2 * unit, (key, float(error), float(eager_error), float(unit))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case(shape, device=kernel_device))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 40, 320), (2, 20, 333)], ids=str)
def test_every_dtype(dtypes, shape, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case(shape, dtypes, kernel_device))


def test_without_a_gradient_of_the_gate(kernel_device, poisoned) -> None:
    from fastguard.kernels.gated_residual import gated_residual_bwd

    case = make_case((2, 37, 300), (BF16, BF16, BF16), kernel_device)
    grad_y, grad_gate = gated_residual_bwd(case["grad"], None, case["gate"])
    assert torch.equal(grad_y, run_kernels(case)["grad_y"])
    assert grad_gate.shape == (0,)
    assert grad_gate.dtype == FP32


def test_strided_inputs(kernel_device, poisoned) -> None:
    """Parts of a joined sequence, every other channel, one row for all tokens or samples: as their copies."""
    case = make_case((2, 20, 48), device=kernel_device)
    joined, twice = torch.randn(2, 29, 48, device=kernel_device), torch.randn(2, 20, 96, device=kernel_device)
    changes = [
        {"x": joined[:, 9:], "grad": joined[:, :20]},
        {"y": torch.randn(20, 2, 48, device=kernel_device).transpose(0, 1)},
        {"x": torch.randn(2, 48, 20, device=kernel_device).mT, "y": twice[..., ::2]},
        {"grad": torch.randn(2, 1, 48, device=kernel_device).expand(2, 20, 48)},
        {"gate": torch.randn(1, 48, device=kernel_device).expand(2, 48)},
        {"gate": torch.randn(48, 2, device=kernel_device).mT},
    ]
    for change in changes:
        strided = {**case, **change}
        assert_matches_reference(strided)
        got, copies = run_kernels(strided), run_kernels({key: value.contiguous() for key, value in strided.items()})
        assert torch.equal(got["out"], copies["out"])
        assert torch.equal(got["grad_y"], copies["grad_y"])


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_slices_that_are_not_aligned(offset, kernel_device) -> None:
    """Rows that start at no multiple of 16 bytes, of a length that is none either: slower, and right."""
    case = make_case((2, 18, 77 + 16), (BF16, BF16, BF16), kernel_device)
    assert_matches_reference({key: value[..., offset : offset + 77] for key, value in case.items()})


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
def test_empty(shape, kernel_device, poisoned) -> None:
    from fastguard.kernels.gated_residual import gated_residual_bwd

    case = make_case(shape, (BF16, BF16, BF16), kernel_device)
    got = run_kernels(case)
    assert got["out"].shape == got["grad_y"].shape == shape
    assert torch.equal(got["grad_gate"], torch.zeros(shape[0], 8, device=kernel_device))
    assert gated_residual_bwd(case["grad"], None, case["gate"])[1].shape == (0,)


def test_bitwise_repeatable_and_independent_of_the_batch(kernel_device) -> None:
    case = make_case((3, 70, 130), (BF16, BF16, BF16), kernel_device)
    whole, again = run_kernels(case), run_kernels(case)
    alone = run_kernels({key: value[1:2] for key, value in case.items()})
    for key, value in whole.items():
        assert torch.equal(again[key], value), key
        assert torch.equal(alone[key], value[1:2]), key


@pytest.mark.parametrize("tokens", [1, 7, 16, 40, 1000])
def test_any_number_of_tokens_per_program(tokens, kernel_device, poisoned, monkeypatch) -> None:
    """Shorter than a tile, no multiple of one, and more than there are: the sums change in their last places only."""
    from fastguard.kernels import common

    monkeypatch.setattr(common, "TOKENS_PER_PROGRAM", (tokens, tokens))
    assert_matches_reference(make_case((2, 45, 100), device=kernel_device))


def test_long_streams_take_more_tokens_per_program() -> None:
    from fastguard.kernels.common import tokens_per_program

    assert [tokens_per_program(n) for n in (1, 512, 1024, 2047, 2048, 4608)] == [32, 32, 32, 32, 64, 64]


@pytest.mark.xdist_group("large")
@pytest.mark.gpu
def test_more_than_2_31_elements_in_total() -> None:
    """Offsets beyond 32 bits within a sample: the last token of 2^31 + 1024 elements equals the same token alone."""
    from fastguard.kernels.gated_residual import gated_residual_bwd, gated_residual_fwd

    n_channels = 1024
    x = torch.zeros(1, 2**21 + 1, n_channels, dtype=BF16, device="cuda")
    x[:, -1] = torch.randn(n_channels, device="cuda")
    gate = torch.randn(1, n_channels, dtype=BF16, device="cuda")
    token = x[:, -1:].clone()
    assert torch.equal(gated_residual_fwd(x, x, gate)[:, -1:], gated_residual_fwd(token, token, gate))
    for got, want in zip(gated_residual_bwd(x, x, gate), gated_residual_bwd(token, token, gate), strict=True):
        assert torch.equal(got[:, -1:] if got.ndim == 3 else got, want)
