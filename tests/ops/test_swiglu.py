"""The gate of SwiGLU: kernels against the float64 reference and its gradient by autograd, far tails included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastguard.ops import swiglu as formulas

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the activations, the prefix, and the gradient.
DTYPES = [(BF16,) * 3, (FP16,) * 3, (FP32,) * 3, (BF16, FP32, BF16), (FP32, BF16, BF16), (BF16, BF16, FP32)]
# One element, odd sizes, a tile (16 tokens x 256 channels) and its neighbours, several programs of 32 tokens, FLUX.2.
SHAPES = [(1, 1, 1), (2, 3, 7), (1, 15, 255), (1, 16, 256), (2, 17, 257), (2, 33, 100), (1, 70, 9), (1, 2, 18432)]


def make_case(
    shape: tuple[int, int, int],
    prefix: int | None = None,
    dtypes: tuple[torch.dtype, ...] = (FP32,) * 3,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """x of twice the channels, prefix and a random gradient; x reaches both tails."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, grad = 3 * torch.randn(*shape[:2], 2 * shape[2], generator=generator), torch.randn(shape, generator=generator)
    joined = None if prefix is None else torch.randn(*shape[:2], prefix, generator=generator).to(dtypes[1]).to(device)
    return {"x": x.to(dtypes[0]).to(device), "prefix": joined, "grad": grad.to(dtypes[2]).to(device)}


def run_kernels(case: dict[str, Tensor | None]) -> dict[str, Tensor]:
    from fastguard.kernels.swiglu import swiglu_bwd_, swiglu_fwd

    x, grad = case["x"], case["grad"]
    out = swiglu_fwd(x, case["prefix"])
    grads = [grad.clone(memory_format=torch.contiguous_format) for _ in range(2)]
    grad_x, again = swiglu_bwd_(grads[0], x, False), swiglu_bwd_(grads[1], x, True)
    assert torch.equal(grads[0], grad)
    assert torch.equal(grad_x.nan_to_num(), again.nan_to_num())
    if grad.dtype == x.dtype:
        activation = out[..., out.shape[-1] - grad.shape[-1] :]
        assert torch.equal(grads[1].nan_to_num(), activation.nan_to_num())
    return {"out": out, "grad_x": grad_x}


def run_formula(case: dict[str, Tensor | None], double: bool) -> dict[str, Tensor]:
    """The reference and its gradient by autograd, in float64 or in the dtypes of the case."""
    inputs = {
        key: value if value is None else value.detach().cpu().double() if double else value.detach()
        for key, value in case.items()
    }
    x, prefix = inputs["x"].requires_grad_(), inputs["prefix"]
    out = formulas.swiglu(x)
    (grad_x,) = torch.autograd.grad(out, x, inputs["grad"].to(out.dtype))
    out = out.detach()
    return {"out": out if prefix is None else torch.cat([prefix.to(x.dtype), out], dim=-1), "grad_x": grad_x}


def assert_matches_reference(case: dict[str, Tensor | None]) -> None:
    got, truth, eager = run_kernels(case), run_formula(case, True), run_formula(case, False)
    dtype = case["x"].dtype
    for key, want in truth.items():
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
@pytest.mark.parametrize("prefix", [None, 1, 256, 300])
def test_every_shape(shape, prefix, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case(shape, prefix, device=kernel_device))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("prefix", [None, 40])
def test_every_dtype(dtypes, prefix, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case((2, 19, 333), prefix, dtypes, kernel_device))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_limits(dtype, kernel_device) -> None:
    """Far from zero SiLU is 0 or the identity, and its slope 0 or 1, exactly, up to the largest value of the dtype."""
    from fastguard.kernels.swiglu import swiglu_bwd_

    large = torch.tensor([200.0, 1e4, 65504.0, torch.finfo(dtype).max], dtype=dtype, device=kernel_device)
    for sign, slope in ((1, 1.0), (-1, 0.0)):
        a = (sign * large).view(1, 1, 4)
        grad = torch.full_like(a, 0.25)
        grad_x = swiglu_bwd_(grad, torch.cat([a, torch.ones_like(a)], dim=-1), True)
        assert torch.equal(grad, slope * a)
        assert torch.equal(grad_x, torch.cat([torch.full_like(a, 0.25 * slope), 0.25 * slope * a], dim=-1))
    zero = torch.zeros(1, 1, 8, dtype=dtype, device=kernel_device)
    zero[..., 4:] = 3.0
    grad = torch.ones_like(zero[..., :4])
    assert torch.equal(swiglu_bwd_(grad, zero, True), zero.flip(-1) / 2)
    assert not grad.any()


def test_every_finite_bfloat16(kernel_device) -> None:
    """Every value that the storage dtype has: at most one unit in its last place (the interpreter truncates)."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(BF16)
    a = values[values.isfinite()].view(1, 1, -1).to(kernel_device)
    got = run_kernels({"x": torch.cat([a, torch.ones_like(a)], -1), "prefix": None, "grad": torch.ones_like(a)})
    z = a.cpu().double()
    s = torch.sigmoid(z)
    slope = s + z * torch.exp(-z.abs()) * torch.sigmoid(z.abs()) ** 2
    for result, want in ((got["out"], z * s), (got["grad_x"][..., : a.shape[-1]], slope)):
        # A GPU flushes an exponential below 1.2e-38 to 0; here it is multiplied by up to 88. The slope changes sign at
        # -1.28, where float32 leaves an error on the scale of 1.
        error = (result.cpu().double() - want).abs()
        assert (error <= 2**-7 * want.abs() + 2e-36 + 3e-7 * (want.abs() < 0.01) * (z > -2)).all()


@pytest.mark.parametrize(("at", "nan_in_x"), [(5, [5, 25]), (25, [5])])
def test_a_nan_stays_where_it_is(at, nan_in_x, kernel_device) -> None:
    """In the half that is activated it reaches the gradients of both, in the other half that of the activated one."""
    case = make_case((1, 3, 20), 4, device=kernel_device)
    case["x"][0, 1, at] = float("nan")
    got = run_kernels(case)
    assert got["out"].isnan().nonzero().tolist() == [[0, 1, 9]]
    assert got["grad_x"].isnan().nonzero().tolist() == [[0, 1, channel] for channel in nan_in_x]


def test_strided_inputs(kernel_device, poisoned) -> None:
    """Parts of a joined sequence and of a joined projection, every other channel, one row for all tokens: as copies."""
    case = make_case((2, 20, 48), 16, device=kernel_device)
    joined, twice = torch.randn(2, 29, 150, device=kernel_device), torch.randn(2, 20, 192, device=kernel_device)
    changes = [
        {"x": joined[:, 9:, 54:], "prefix": joined[:, :20, 16:32]},
        {"x": torch.randn(20, 2, 96, device=kernel_device).transpose(0, 1)},
        {"x": twice[..., ::2], "prefix": torch.randn(2, 16, 20, device=kernel_device).mT},
        {"x": torch.randn(2, 1, 96, device=kernel_device).expand(2, 20, 96), "prefix": twice[..., :0]},
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
    case = make_case((2, 18, 77), 40, (BF16,) * 3, kernel_device)
    wide = torch.randn(2, 18, 170, device=kernel_device).to(BF16)
    assert_matches_reference({**case, "x": wide[..., offset : offset + 154], "prefix": wide[..., offset : offset + 5]})


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("prefix", [None, 3])
def test_empty(shape, prefix, kernel_device, poisoned) -> None:
    got = run_kernels(make_case(shape, prefix, (BF16,) * 3, kernel_device))
    assert got["out"].shape == (*shape[:2], 8 + (prefix or 0))
    assert got["grad_x"].shape == (*shape[:2], 16)


def test_bitwise_repeatable_and_independent_of_the_batch(kernel_device) -> None:
    case = make_case((3, 70, 130), 20, (BF16,) * 3, kernel_device)
    whole, again = run_kernels(case), run_kernels(case)
    alone = run_kernels({key: value[1:2] for key, value in case.items()})
    for key, value in whole.items():
        assert torch.equal(again[key], value), key
        assert torch.equal(alone[key], value[1:2]), key


@pytest.mark.parametrize("tokens", [1, 7, 16, 40, 1000])
def test_any_number_of_tokens_per_program(tokens, kernel_device, poisoned, monkeypatch) -> None:
    """Shorter than a tile, no multiple of one, and more than there are."""
    from fastguard.kernels import common

    monkeypatch.setattr(common, "TOKENS_PER_PROGRAM", (tokens, tokens))
    assert_matches_reference(make_case((2, 45, 100), 30, device=kernel_device))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("prefix", [None, 6])
def test_the_function_of_autograd(prefix, backend, kernel_device) -> None:
    """The gradients of both arguments; the caller's gradient stays as it is."""
    case = make_case((2, 5, 12), prefix, device=kernel_device)
    leaves = [case[name].requires_grad_() for name in ("x", "prefix") if case[name] is not None]
    out = formulas.SwiGLUFunction.apply(case["x"], case["prefix"], backend)
    parts = [formulas.swiglu(case["x"])] if prefix is None else [case["prefix"], formulas.swiglu(case["x"])]
    want = torch.cat(parts, dim=-1)
    torch.testing.assert_close(out, want)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
    before = upstream.clone()
    got = torch.autograd.grad(out, leaves, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(want, leaves, upstream))
    assert torch.equal(upstream, before)


@pytest.mark.xdist_group("large")
@pytest.mark.gpu
def test_more_than_2_31_elements_in_total() -> None:
    """Offsets beyond 32 bits within a sample: the last token of 2^31 + 2048 elements equals the same token alone."""
    from fastguard.kernels.swiglu import swiglu_bwd_, swiglu_fwd

    n_channels = 1024
    x = torch.zeros(1, 2**20 + 1, 2 * n_channels, dtype=BF16, device="cuda")
    x[:, -1] = torch.randn(2 * n_channels, device="cuda")
    token, prefix = x[:, -1:].clone(), x[..., :n_channels]
    want = swiglu_fwd(token, prefix[:, -1:])
    assert torch.equal(swiglu_fwd(x, prefix)[:, -1:], want)
    grad = x[..., :n_channels].contiguous()
    of_token = swiglu_bwd_(grad[:, -1:].clone(), token, False)
    assert torch.equal(swiglu_bwd_(grad, x, True)[:, -1:], of_token)
    assert torch.equal(grad[:, -1:], want[..., n_channels:])
