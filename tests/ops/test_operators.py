"""What holds for every kernel alike: the rules of torch.library, the plain backend's results, no races, CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from operator_calls import FLUX_512, ODD, SMALL, Call, assert_agrees, calls, strided
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map

from fastguard.ops import registry
from fastguard.ops.dequantize import dequantize_blocks, dequantize_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLUX = replace(FLUX_512, samples=2)


def test_no_operator_is_left_out() -> None:
    called = {call.op.name() for call in calls(FP32, "cpu")}
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("fastguard::")}
    assert called == registered


@pytest.mark.parametrize("dtype", [torch.float64, BF16], ids=str)
def test_operators_keep_the_rules_of_torch_library(dtype: torch.dtype, kernel_device: str) -> None:
    backend = "torch" if dtype == torch.float64 else "triton"
    for call in calls(dtype, kernel_device, backend=backend):
        torch.library.opcheck(call.op.overload, call.args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_results_are_contiguous_whatever_the_strides_of_the_arguments(backend: str, kernel_device: str) -> None:
    """torch.compile trusts a fake's strides, and attention's backward may lay its gradients out in any way."""

    def laid_out(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim < 2:  # public functions prepare what is per sample
            return leaf
        return strided(leaf) if leaf.ndim > 2 else leaf.t().contiguous().t()

    for call in calls(FP32, kernel_device, SMALL, backend):
        if call.op in (dequantize_rows, dequantize_blocks):  # which take contiguous codes alone
            continue
        first, *others = call.args
        given = (first if call.op.overload._schema.is_mutable else laid_out(first), *tree_map(laid_out, tuple(others)))
        for got, want in zip(replace(call, args=given)(), call(), strict=True):
            assert got.is_contiguous(), call.name
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=call.name)
        torch.library.opcheck(call.op.overload, given, test_utils="test_faketensor")


@pytest.mark.parametrize("size", [SMALL, ODD], ids=["small", "odd"])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_kernels_agree_with_the_plain_backend_in_float64(dtype, size, kernel_device, poisoned) -> None:
    """Each with every kind of arguments; the finer tests of values are in each kernel's own file."""
    for call in calls(dtype, kernel_device, size):
        assert_agrees(call)


def test_negative_views(kernel_device) -> None:
    """Autograd makes them of complex numbers: their memory holds the negative of their values."""

    def negative(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dtype != FP32:
            return leaf
        view = torch.complex(torch.zeros_like(leaf), -leaf).conj().imag
        assert view.is_neg()
        return view

    for call in calls(FP32, kernel_device, SMALL):
        first, *others = call.args
        given = [first if call.overwrites else negative(first), *map(negative, others)]
        for got, want in zip(replace(call, args=tuple(given))(), call(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=call.name)


def test_a_call_that_is_off_is_seen() -> None:
    right = calls(FP32, "cpu", backend="torch")[0]
    assert_agrees(right)

    def op(*args: Any) -> list[Tensor]:
        results = right.op(*args)
        return [result * 1.001 if result.dtype == FP32 else result for result in results]

    with pytest.raises(AssertionError, match="guard_loss: 1.0e-03 off"):
        assert_agrees(replace(right, op=op))
    eager = next(call for call in calls(FP32, "cpu", backend="torch") if call.eager)
    with pytest.raises(AssertionError, match="adaln_fwd: the eager form is"):
        assert_agrees(replace(eager, eager=lambda *args: eager.op(*args, "torch")[0] * 1.001))


def test_a_fake_runs_its_formula_once_for_each_layout() -> None:
    runs = []

    def formula(x: Tensor, weights: list[Tensor], scale: float, flag: bool) -> tuple[Tensor, Tensor]:
        runs.append(x.shape)
        return (x * scale).t(), weights[0].double() if flag else x.sum()

    fake = registry._once_a_layout(formula)
    symbolic = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(4, 6))
    with FakeTensorMode():
        x, weight = torch.empty(3, 5), torch.empty(7)
        others = [
            (x, [weight], 2.0, True), (x, [weight], 1.0, False), (x.double(), [weight], 1.0, True),
            (x, [weight.half()], 1.0, True), (torch.empty(5, 3).t(), [weight], 1.0, True), (x[:2], [weight], 1.0, True),
        ]  # fmt: skip
        for n, arguments in enumerate([(x, [weight], 1.0, True), *others], 1):
            first, again = fake(*arguments), fake(*arguments)
            assert len(runs) == n
            for one, other in zip(first, again, strict=True):
                assert other is not one
                assert (other.shape, other.stride(), other.dtype) == (one.shape, one.stride(), one.dtype)
    assert isinstance(symbolic.shape[0], torch.SymInt)
    for _ in range(2):  # a size that is not known yet is not remembered
        result, _ = fake(symbolic, [weight], 1.0, True)
        assert isinstance(result.shape[1], torch.SymInt)
    assert len(runs) == n + 2


# --- races ----------------------------------------------------------------------------------------------------------


def assert_repeats(call: Call, times: int, busy: Tensor | None = None) -> None:
    """Every repetition gives the bits of the first; `busy` is multiplied on a second stream meanwhile."""
    want = call()
    differ = torch.zeros((), dtype=torch.bool, device=want[0].device)
    other = None if busy is None else torch.cuda.Stream()
    for _ in range(times):
        if busy is not None:
            with torch.cuda.stream(other):
                busy @ busy
        for got, first in zip(call(), want, strict=True):
            differ |= (got != first).any()  # compared on the device: waiting for it would keep launches apart
    assert not differ.item(), call.name


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_repeated_runs_are_bitwise_equal(dtype: torch.dtype, kernel_device: str) -> None:
    """A race would show as a moving result: 1,000 runs of each kernel at Flux's sizes on a GPU, alone on it."""
    cuda = kernel_device == "cuda"
    for call in calls(dtype, kernel_device, FLUX if cuda else SMALL):
        assert_repeats(call, 1000 if cuda else 2)


@pytest.mark.gpu
def test_repeated_runs_under_load_are_bitwise_equal() -> None:
    """The same while a second stream keeps taking multiprocessors away."""
    busy = torch.randn(2048, 2048, device="cuda", dtype=BF16)
    for call in calls(BF16, "cuda", FLUX):
        assert_repeats(call, 1000, busy)


def test_a_result_that_moves_is_seen() -> None:
    moving = iter(range(9))
    call = Call("moving", lambda backend: torch.tensor([float(next(moving) == 2)]), ("torch",))
    with pytest.raises(AssertionError, match="moving"):
        assert_repeats(call, 3)


# --- CUDA graphs ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_captured_in_a_cuda_graph(dtype: torch.dtype) -> None:
    """Every operator, with its launches, waits for nobody on the host; replays give the eager bits."""
    for call in calls(dtype, "cuda", ODD):
        want = call()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for result in captured:
            result.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for got, first in zip(captured, want, strict=True):
            assert torch.equal(got, first), call.name
