"""LayerNorm + modulation, and the gated residual before it: kernels against the float64 reference and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastguard.ops import adaln as formulas
from fastguard.ops.gated_residual import gated_residual as gated_residual_formula

EPS = 1e-6
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the activations, the residual, and the modulation.
DTYPES = [(BF16, BF16, BF16), (FP16, FP16, FP16), (FP32, FP32, FP32), (BF16, BF16, FP32), (FP32, BF16, FP16)]
# One channel, odd sizes, a tile and its neighbours, Flux.
SHAPES = [(1, 1, 1), (2, 3, 7), (1, 5, 63), (3, 2, 64), (2, 4, 65), (2, 2, 1000), (1, 2, 3072), (1, 1, 4097)]
OUTPUTS = ("normed", "grad_x", "grad_scale", "grad_shift")
GATED_OUTPUTS = (*OUTPUTS, "summed", "grad_residual", "grad_gate")


def make_case(
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (FP32, FP32, FP32),
    device: str = "cpu",
    mean: float = 0.0,
) -> dict[str, Any]:
    """Activations, modulation, and random gradients of both outputs. Modulation rows are chunks of one tensor."""
    generator = torch.Generator().manual_seed(sum(shape))
    stream, residual_dtype, modulation_dtype = dtypes
    x, residual, grad, grad_summed = (torch.randn(shape, generator=generator) for _ in range(4))
    modulation = 0.5 * torch.randn(shape[0], 6 * shape[2], generator=generator)
    shift, scale, gate, *_ = modulation.to(modulation_dtype).to(device).chunk(6, dim=1)
    return {
        "x": (x + mean).to(stream).to(device),
        "residual": residual.to(residual_dtype).to(device),
        "grad": grad.to(stream).to(device),
        "grad_summed": grad_summed.to(stream).to(device),
        "shift": shift,
        "scale": scale,
        "gate": gate,
    }


def run_kernels(case: dict[str, Any], gated: bool = True) -> dict[str, Tensor]:
    """Forward, and backward with every gradient that there is."""
    from fastguard.kernels import adaln

    before = (case["residual"], case["gate"]) if gated else (None, None)
    normed, summed, mean, rstd = adaln.adaln_fwd(case["x"], *before, case["scale"], case["shift"], EPS)
    stored = summed if gated else case["x"]
    after = (case["grad_summed"], *before) if gated else (None, None, None)
    grads = adaln.adaln_bwd(case["grad"], stored, mean, rstd, case["scale"], *after, True)
    for results in ((normed, summed, mean, rstd), grads):  # operators may not return one memory twice
        assert len({result.untyped_storage()._cdata for result in results}) == len(results)
    names = ("grad_x", "grad_residual", "grad_scale", "grad_shift", "grad_gate")
    outputs = {"normed": normed, "summed": summed, "mean": mean, "rstd": rstd, **dict(zip(names, grads, strict=True))}
    outputs["again"] = adaln.adaln_apply(stored, mean, rstd, case["scale"], case["shift"])
    return outputs


def run_formula(case: dict[str, Any], stored: Tensor | None, double: bool) -> dict[str, Tensor]:
    """The reference and its gradients by autograd, in float64 or in the dtypes of the case.

    stored: the sum as the kernel rounded it, which is what is normalized; None without a residual.
    """
    inputs = {key: value.detach().cpu().double() if double else value.detach() for key, value in case.items()}
    dtype = torch.float64 if double else case["x"].dtype
    scale, shift, gate = (inputs[key].requires_grad_() for key in ("scale", "shift", "gate"))
    x, residual = inputs["x"].requires_grad_(), inputs["residual"].requires_grad_()
    outputs = {}
    if stored is None:
        normed = formulas.adaln(x, scale, shift, EPS).to(dtype)
        grads = torch.autograd.grad(normed, (x, scale, shift), inputs["grad"])
    else:
        summed = gated_residual_formula(x, residual, gate).to(dtype)
        outputs["summed"] = summed.detach()
        # The gradient passes through the rounding, whose result is put in the place of the sum.
        summed = summed + (stored.detach().to(summed) - summed).detach()
        normed = formulas.adaln(summed, scale, shift, EPS).to(dtype)
        upstream = [inputs["grad"], inputs["grad_summed"]]
        leaves = (x, scale, shift, residual, gate)
        *grads, outputs["grad_residual"], outputs["grad_gate"] = torch.autograd.grad((normed, summed), leaves, upstream)
    return {"normed": normed.detach(), **dict(zip(OUTPUTS[1:], grads, strict=True)), **outputs}


def assert_matches_reference(case: dict[str, Any], gated: bool) -> None:
    got = run_kernels(case, gated)
    stored = got["summed"] if gated else None
    truth, eager = (run_formula(case, stored, double) for double in (True, False))
    exact = (case["x"] if stored is None else stored).cpu().double()
    mean, variance = exact.mean(-1), exact.var(-1, correction=0)
    rstd = (variance + EPS).rsqrt()
    w = case["grad"].cpu().double() * (1 + case["scale"].cpu().double()[:, None])
    terms = {"grad_x": rstd[..., None] * w, "grad_residual": rstd[..., None] * w * case["gate"].cpu().double()[:, None]}
    for key in GATED_OUTPUTS if gated else OUTPUTS:
        want, sums = truth[key], key in ("grad_scale", "grad_shift", "grad_gate")
        assert got[key].shape == want.shape
        assert got[key].dtype == (FP32 if sums else case["x"].dtype), key
        error = (got[key].cpu().double() - want).abs().max()
        eager_error = (eager[key].cpu().double() - want).abs().max()
        # Two units in the last place of the largest value: one for the interpreter, which truncates where a GPU
        # rounds, one for float32 arithmetic before it. The eager formula rounds several times on its way.
        largest = want.abs().max()
        if w.shape[-1] == 1 and key in terms:  # which cancel, and a GPU contracts a product into their difference
            largest = max(largest, terms[key].abs().max())
        unit = torch.finfo(got[key].dtype).eps * largest
        assert error <= 2 * eager_error + 2 * unit, (key, float(error), float(eager_error), float(unit))
    assert torch.equal(got["again"], got["normed"])
    # float32 sums of C terms of the size of x.
    torch.testing.assert_close(got["mean"].cpu().double(), mean, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))
    # The variance of a row of one value is rounding, (1e-7 |x|)^2, beside eps.
    torch.testing.assert_close(got["rstd"].cpu().double(), rstd, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_shape(shape, gated, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case(shape, device=kernel_device), gated)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 320), (2, 3, 333)], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_every_dtype(dtypes, shape, gated, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case(shape, dtypes, kernel_device), gated)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_mean_far_from_zero(dtype, gated, kernel_device, poisoned) -> None:
    """`E[x^2] - E[x]^2` would lose three digits here."""
    assert_matches_reference(make_case((2, 3, 515), (dtype,) * 3, kernel_device, mean=30.0), gated)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_rows_of_one_value(dtype, kernel_device, poisoned) -> None:
    """Zeros, and a constant: nothing to normalize, only eps keeps the scale finite."""
    from fastguard.kernels import adaln

    case = make_case((2, 3, 96), (dtype,) * 3, kernel_device)
    case["x"][:, 1] = 0
    case["x"][:, 2] = 4
    normed, _, mean, rstd = adaln.adaln_fwd(case["x"], None, None, case["scale"], case["shift"], EPS)
    assert torch.equal(normed[:, 1:], case["shift"][:, None].expand(2, 2, 96))
    assert torch.equal(mean[:, 1:].cpu(), torch.tensor([0.0, 4.0]).expand(2, 2))
    torch.testing.assert_close(rstd[:, 1:].cpu(), torch.full((2, 2), EPS**-0.5), rtol=1e-5, atol=0)
    assert_matches_reference(case, gated=False)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rows", [7, 8, 9])
def test_several_rows_per_program(gated, rows, kernel_device, poisoned, monkeypatch) -> None:
    """Two to five rows a program, the last program with fewer; and fewer programs than allowed."""
    from fastguard.kernels import adaln

    monkeypatch.setattr(adaln, "PROGRAMS", 4)
    monkeypatch.setattr(adaln, "SUM_PROGRAMS", 2)
    assert_matches_reference(make_case((2, rows, 130), (BF16, BF16, BF16), kernel_device), gated)


@pytest.mark.parametrize("staged_bytes", [0, 5000, 10**6])
def test_rows_ahead_do_not_change_the_results(staged_bytes, kernel_device, monkeypatch) -> None:
    from fastguard.kernels import adaln

    case = make_case((1, 9, 300), (BF16, BF16, BF16), kernel_device)
    monkeypatch.setattr(adaln, "PROGRAMS", 2)
    monkeypatch.setattr(adaln, "SUM_PROGRAMS", 2)
    want = run_kernels(case)
    monkeypatch.setattr(adaln, "STAGED_BYTES", staged_bytes)
    for key, value in run_kernels(case).items():
        assert torch.equal(value, want[key]), key


def test_backward_computes_what_is_asked_for(kernel_device, poisoned) -> None:
    """Each output is the same whichever others are computed beside it, and empty if not asked for."""
    from fastguard.kernels import adaln

    case = make_case((2, 5, 48), device=kernel_device)
    x, scale, gate, residual = (case[key] for key in ("x", "scale", "gate", "residual"))
    _, _, mean, rstd = adaln.adaln_fwd(x, None, None, scale, case["shift"], EPS)
    for grad_summed in (None, case["grad_summed"]):
        everything = adaln.adaln_bwd(case["grad"], x, mean, rstd, scale, grad_summed, residual, gate, True)
        for given, asked, need_modulation in [
            (None, None, False), (None, None, True), (None, gate, False), (None, gate, True), (residual, gate, False),
        ]:  # fmt: skip
            got = adaln.adaln_bwd(case["grad"], x, mean, rstd, scale, grad_summed, given, asked, need_modulation)
            is_asked = (True, asked is not None, need_modulation, need_modulation, given is not None)
            for value, whole, wanted in zip(got, everything, is_asked, strict=True):
                assert value.dtype == FP32
                if not wanted:
                    assert value.shape == (0,)
                    continue
                # Sums have twice the warps, and add up a row in another order: float32 rounding on values of size 1.
                torch.testing.assert_close(value, whole, rtol=1e-5, atol=1e-5)


def test_views_into_larger_buffers(kernel_device, poisoned) -> None:
    """Text and image of a joined tensor, padded channels, modulation of one sample for all: NaN all around."""
    case = make_case((2, 5, 48), (BF16, BF16, BF16), kernel_device)
    case["scale"] = case["scale"][:1].expand(2, 48)
    want = run_kernels({key: value.contiguous() for key, value in case.items()})
    views = {}
    for index, (key, value) in enumerate(case.items()):
        if value.ndim == 3:
            around = torch.full((3, 16, 64), float("nan"), dtype=value.dtype, device=kernel_device)
            view = around[1:, 4 + index : 9 + index, 8:56]
            view.copy_(value)
            views[key] = view
    for key, value in run_kernels({**case, **views}).items():
        assert torch.equal(value, want[key]), key


def test_channels_that_are_not_contiguous(kernel_device, poisoned) -> None:
    """Transposed and repeated tensors: same numbers as contiguous copies."""
    case = make_case((3, 4, 50), device=kernel_device)
    strided = {key: value.transpose(0, -1).contiguous().transpose(0, -1) for key, value in case.items()}
    strided["grad"] = case["grad"] = torch.tensor(0.7, device=kernel_device).expand(3, 4, 50)
    want = run_kernels(case)
    for key, value in run_kernels(strided).items():
        assert torch.equal(value, want[key]), key


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 0, 8)], ids=str)
def test_nothing_to_do(shape, kernel_device, poisoned) -> None:
    for gated in (False, True):
        got = run_kernels(make_case(shape, device=kernel_device), gated)
        assert got["normed"].shape == got["again"].shape == got["grad_x"].shape == shape
        assert got["mean"].shape == got["rstd"].shape == shape[:2]
        for key in ("grad_scale", "grad_shift") + (("grad_gate",) if gated else ()):
            assert torch.equal(got[key], torch.zeros(shape[0], shape[2], device=kernel_device))


def test_repeatable_and_independent_of_the_batch(kernel_device, monkeypatch) -> None:
    from fastguard.kernels import adaln

    monkeypatch.setattr(adaln, "SUM_PROGRAMS", 3)
    case = make_case((4, 10, 136), (BF16, BF16, BF16), kernel_device)
    want = run_kernels(case)
    for key, value in run_kernels(case).items():
        assert torch.equal(value, want[key]), key
    for key, value in run_kernels({key: value[2:3] for key, value in case.items()}).items():
        assert torch.equal(value, want[key][2:3]), key


def test_a_row_that_is_not_finite_stays_alone(kernel_device, poisoned) -> None:
    case = make_case((2, 4, 40), device=kernel_device)
    case["x"][0, 1, 3] = float("inf")
    got = run_kernels(case)
    for key in ("normed", "grad_x", "grad_residual"):
        finite = got[key].isfinite().all(-1)
        assert finite.tolist() == [[True, False, True, True], [True] * 4], key
    assert got["grad_scale"][1].isfinite().all()
    assert not got["grad_scale"][0].isfinite().any()


@pytest.mark.parametrize("n_channels", [8192, 16384])
def test_the_longest_rows(n_channels, kernel_device, poisoned) -> None:
    assert_matches_reference(make_case((1, 2, n_channels), (BF16, BF16, BF16), kernel_device), gated=True)
    assert_matches_reference(make_case((1, 1, n_channels), device=kernel_device), gated=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 512, 3072), (1, 4608, 3072)], ids=str)
def test_flux_sizes(dtypes, shape, poisoned) -> None:
    assert_matches_reference(make_case(shape, dtypes, "cuda"), gated=True)


@pytest.mark.xdist_group("large")
@pytest.mark.gpu
def test_more_than_2_31_elements_in_total() -> None:
    """Row offsets beyond 32 bits: the last rows equal the same rows alone."""
    from fastguard.kernels import adaln

    rows, channels = 2**20 + 4, 2048
    case = make_case((1, 4, channels), (BF16, BF16, BF16), "cuda")
    x, grad = (torch.zeros(1, rows, channels, dtype=BF16, device="cuda") for _ in range(2))
    x[:, -4:], grad[:, -4:] = case["x"], case["grad"]
    normed, _, mean, rstd = adaln.adaln_fwd(x, None, None, case["scale"], case["shift"], EPS)
    grad_x, *_ = adaln.adaln_bwd(grad, x, mean, rstd, case["scale"], None, None, None, True)
    want = run_kernels(case, gated=False)
    assert torch.equal(normed[:, -4:], want["normed"])
    assert torch.equal(grad_x[:, -4:], want["grad_x"])
    assert grad_x[:, :-4].abs().max().item() == 0
