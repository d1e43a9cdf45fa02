"""Bias and tanh-GELU: kernels against the float64 reference and its gradient by autograd, far tails included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastguard.ops import gelu as formulas

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the activations, the bias, the prefix, and the gradient.
DTYPES = [(BF16,) * 4, (FP16,) * 4, (FP32,) * 4, (BF16, FP32, FP32, BF16), (FP32, BF16, BF16, FP32)]
DTYPES += [(BF16, BF16, BF16, FP32)]
# One element, odd sizes, a tile (16 tokens x 256 channels) and its neighbours, several programs of 32 tokens, Flux.
SHAPES = [(1, 1, 1), (2, 3, 7), (1, 15, 255), (1, 16, 256), (2, 17, 257), (2, 33, 100), (1, 70, 9), (1, 2, 12288)]


def make_case(
    shape: tuple[int, int, int],
    prefix: int | None = None,
    dtypes: tuple[torch.dtype, ...] = (FP32,) * 4,
    device: str = "cpu",
    with_bias: bool = True,
) -> dict[str, Tensor | None]:
    """x, bias, prefix and a random gradient; x reaches both tails."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad = 2 * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    bias = torch.randn(shape[2], generator=generator).to(dtypes[1]).to(device) if with_bias else None
    joined = None if prefix is None else torch.randn(*shape[:2], prefix, generator=generator).to(dtypes[2]).to(device)
    return {"x": x.to(dtypes[0]).to(device), "bias": bias, "prefix": joined, "grad": grad.to(dtypes[3]).to(device)}


def run_kernels(case: dict[str, Tensor | None]) -> dict[str, Tensor]:
    from fastguard.kernels import gelu

    x, bias = case["x"], case["bias"]
    out = gelu.bias_gelu_fwd(x, bias, case["prefix"])
    grads = [case["grad"].clone(memory_format=torch.contiguous_format) for _ in range(2)]
    nothing = gelu.bias_gelu_bwd_(grads[0], x, bias, False)
    again = gelu.bias_gelu_bwd_(grads[1], x, bias, True)
    assert nothing.shape == (0,)
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(again, out[..., out.shape[-1] - x.shape[-1] :])
    return {"out": out, "grad_x": grads[0]}


def run_formula(case: dict[str, Tensor | None], double: bool) -> dict[str, Tensor]:
    """The reference and its gradient by autograd, in float64 or in the dtypes of the case."""
    inputs = {
        key: value if value is None else value.detach().cpu().double() if double else value.detach()
        for key, value in case.items()
    }
    x, prefix = inputs["x"].requires_grad_(), inputs["prefix"]
    out = formulas.bias_gelu(x, inputs["bias"])
    (grad_x,) = torch.autograd.grad(out, x, inputs["grad"].to(out.dtype))
    out = out.detach().to(x.dtype)
    return {"out": out if prefix is None else torch.cat([prefix.to(x.dtype), out], dim=-1), "grad_x": grad_x}


def assert_matches_reference(case: dict[str, Tensor | None]) -> None:
    got, truth, eager = run_kernels(case), run_formula(case, True), run_formula(case, False)
    for key, dtype in (("out", case["x"].dtype), ("grad_x", case["grad"].dtype)):
        want = truth[key]
        assert got[key].shape == want.shape
        assert got[key].dtype == dtype, key
        assert got[key].is_contiguous()
        error = (got[key].cpu().double() - want).abs().max()
        eager_error = (eager[key].cpu().double() - want).abs().max()
        # Two units in the last place of the largest value: one for the interpreter, which truncates where a GPU
        # rounds, one for float32 arithmetic before it.
        unit = torch.finfo(dtype).eps * want.abs().max()
        assert error <= 2 * eager_error + 2 * unit, (key, float(error), float(eager_error), float(unit))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("prefix", [None, 1, 255, 256, 300])
def test_every_shape(shape, prefix, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case(shape, prefix, device=kernel_device))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("prefix", [None, 40])
def test_every_dtype(dtypes, with_bias, prefix, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case((2, 19, 333), prefix, dtypes, kernel_device, with_bias))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_limits(dtype, with_bias, kernel_device) -> None:
    """Far from zero GELU is 0 or the identity, and its slope 0 or 1, exactly, up to the largest value of the dtype."""
    from fastguard.kernels.gelu import bias_gelu_bwd_

    large = torch.tensor([20.0, 100.0, 1e4, 65504.0, torch.finfo(dtype).max], dtype=dtype, device=kernel_device)
    bias = torch.zeros(5, dtype=dtype, device=kernel_device) if with_bias else None
    for sign, slope in ((1, 1.0), (-1, 0.0)):
        x = (sign * large).view(1, 1, 5)
        grad = torch.full_like(x, 3.0)
        output = bias_gelu_bwd_(grad, x, bias, True)
        assert torch.equal(output, slope * x)
        assert torch.equal(grad, torch.full_like(x, 3 * slope))
    zero = torch.zeros(1, 1, 5, dtype=dtype, device=kernel_device)
    grad = torch.ones_like(zero)
    assert torch.equal(bias_gelu_bwd_(grad, zero, bias, True), zero)
    assert torch.equal(grad, torch.full_like(zero, 0.5))


def stable_gelu(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU and its slope in float64, through the exponential: the reference's 1 + tanh cancels in the lower tail."""
    z = x.cpu().double()
    near = z.clamp(-30, 30)  # exactly 0 or 1 beyond
    root = (2 / torch.pi) ** 0.5
    s = torch.sigmoid(2 * root * (near + 0.044715 * near**3))
    return z * s, s + near * s * (1 - s) * 2 * root * (1 + 3 * 0.044715 * near**2)


def test_every_finite_bfloat16(kernel_device) -> None:
    """Every value that the storage dtype has: at most one unit in its last place (the interpreter truncates)."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    x = values[values.isfinite()].view(1, 1, -1).to(kernel_device)
    got = run_kernels({"x": x, "bias": None, "prefix": None, "grad": torch.ones_like(x)})
    for result, want in zip(got.values(), stable_gelu(x), strict=True):
        # A GPU flushes an exponential below 1.2e-38 to 0; the slope is up to 240 times that. It changes sign at -0.75,
        # where float32 leaves an error on the scale of 1.
        error = (result.cpu().double() - want).abs()
        assert (error <= 2**-7 * want.abs() + 3e-36 + 3e-7 * (want.abs() < 0.01) * (x.cpu().double() > -1)).all()


def test_the_lower_tail_has_a_small_relative_error(kernel_device) -> None:
    x = torch.linspace(-9, 0, 2000, device=kernel_device).view(1, 1, -1)
    got = run_kernels({"x": x, "bias": None, "prefix": None, "grad": torch.ones_like(x)})
    out, slope = stable_gelu(x)
    # 2 u reaches -73, where float32 holds it to 4e-6: the relative error of its exponential.
    torch.testing.assert_close(got["out"].cpu().double(), out, rtol=2e-5, atol=0)
    below = x.cpu() < -1  # the slope changes sign at -0.75
    torch.testing.assert_close(got["grad_x"].cpu().double()[below], slope[below], rtol=2e-5, atol=0)


def test_a_nan_stays_where_it_is(kernel_device) -> None:
    from fastguard.kernels import gelu

    case = make_case((1, 3, 20), 4, device=kernel_device)
    case["x"][0, 1, 5] = float("nan")
    out = gelu.bias_gelu_fwd(case["x"], case["bias"], case["prefix"])
    gelu.bias_gelu_bwd_(case["grad"], case["x"], case["bias"], False)
    assert out.isnan().nonzero().tolist() == [[0, 1, 9]]
    assert case["grad"].isnan().nonzero().tolist() == [[0, 1, 5]]


def test_strided_inputs(kernel_device, poisoned) -> None:
    """Parts of a joined sequence, every other channel, one row for all tokens: as their copies."""
    case = make_case((2, 20, 48), 16, device=kernel_device)
    joined, twice = torch.randn(2, 29, 48, device=kernel_device), torch.randn(2, 20, 96, device=kernel_device)
    changes = [
        {"x": joined[:, 9:], "prefix": joined[:, :20, 16:32]},
        {"x": torch.randn(20, 2, 48, device=kernel_device).transpose(0, 1), "bias": twice[0, 0, ::2]},
        {"x": twice[..., ::2], "prefix": torch.randn(2, 16, 20, device=kernel_device).mT},
        {"x": torch.randn(2, 1, 48, device=kernel_device).expand(2, 20, 48), "prefix": twice[..., :0]},
    ]
    for change in changes:
        strided = {**case, **change}
        assert_matches_reference(strided)
        copies = run_kernels({key: value.contiguous() for key, value in strided.items()})
        for key, value in run_kernels(strided).items():
            assert torch.equal(value, copies[key]), key


@pytest.mark.parametrize("offset", [1, 3, 8])
def test_slices_that_are_not_aligned(offset, kernel_device) -> None:
    """Rows that start at no multiple of 16 bytes, of a length that is none either: slower, and right."""
    case = make_case((2, 18, 77 + 16), 40, (BF16,) * 4, kernel_device)
    case = {key: value[..., offset : offset + (77 if value.shape[-1] > 40 else 5)] for key, value in case.items()}
    assert_matches_reference(case)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("prefix", [None, 3])
def test_empty(shape, prefix, kernel_device, poisoned) -> None:
    got = run_kernels(make_case(shape, prefix, (BF16,) * 4, kernel_device))
    assert got["out"].shape == (*shape[:2], 8 + (prefix or 0))
    assert got["grad_x"].shape == shape


def test_the_gradient_is_overwritten_in_place(kernel_device) -> None:
    from fastguard.kernels.gelu import bias_gelu_bwd_

    case = make_case((1, 5, 30), device=kernel_device)
    before, x = case["grad"].data_ptr(), case["x"].clone()
    expected = run_kernels(case)["grad_x"]
    bias_gelu_bwd_(case["grad"], case["x"], case["bias"], True)
    assert case["grad"].data_ptr() == before
    assert torch.equal(case["grad"], expected)
    assert torch.equal(case["x"], x)


def test_bitwise_repeatable_and_independent_of_the_batch(kernel_device) -> None:
    case = make_case((3, 70, 130), 20, (BF16,) * 4, kernel_device)
    whole, again = run_kernels(case), run_kernels(case)
    alone = run_kernels({key: value if key == "bias" else value[1:2] for key, value in case.items()})
    for key, value in whole.items():
        assert torch.equal(again[key], value), key
        assert torch.equal(alone[key], value[1:2]), key


@pytest.mark.parametrize("tokens", [1, 7, 16, 40, 1000])
def test_any_number_of_tokens_per_program(tokens, kernel_device, poisoned, monkeypatch) -> None:
    """Shorter than a tile, no multiple of one, and more than there are."""
    from fastguard.kernels import common

    monkeypatch.setattr(common, "TOKENS_PER_PROGRAM", (tokens, tokens))
    assert_matches_reference(make_case((2, 45, 100), 30, device=kernel_device))


@pytest.mark.xdist_group("large")
@pytest.mark.gpu
def test_more_than_2_31_elements_in_total() -> None:
    """Offsets beyond 32 bits within a sample: the last token of 2^31 + 1024 elements equals the same token alone."""
    from fastguard.kernels import gelu

    n_channels = 1024
    x = torch.zeros(1, 2**21 + 1, n_channels, dtype=BF16, device="cuda")
    x[:, -1] = torch.randn(n_channels, device="cuda")
    token, bias = x[:, -1:].clone(), torch.randn(n_channels, dtype=BF16, device="cuda")
    prefix = x[..., :16]
    want = gelu.bias_gelu_fwd(token, bias, prefix[:, -1:])
    assert torch.equal(gelu.bias_gelu_fwd(x, bias, prefix)[:, -1:], want)
    grad, grad_token = x.clone(), token.clone()
    assert torch.equal(gelu.bias_gelu_bwd_(grad, x, bias, True)[:, -1:], want[..., 16:])
    gelu.bias_gelu_bwd_(grad_token, token, bias, False)
    assert torch.equal(grad[:, -1:], grad_token)
