"""The kernels of fused blocks, and whole blocks: bytes, and times beside eager, torch.compile and copying.

    python benchmarks/bench_blocks.py           times on a GPU
    python benchmarks/bench_blocks.py --bytes   bytes that each kernel moves; on any machine
    pytest benchmarks/bench_blocks.py           small blocks on the device at hand, by pytest-benchmark

One sample at 1024^2 in bfloat16: 4,096 image and 512 text tokens of 3,072 channels, as in Flux.1-dev, FLUX.2-klein-4B
and Qwen-Image; for blocks of Stable Diffusion 3.5 Medium 333 text tokens and 1,536 channels. LoRA of rank 64 is on all
linear layers of a block but those of its modulation. Correctness is asserted before anything is timed.

Each kind of block is measured in a process of its own. In all forms attention gets contiguous gradients: PyTorch's
cuDNN attention reads a gradient by the strides of the first one, and those of diffusers' single blocks have others.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import rows
import torch
from bench_loss import CUDA, DEVICE, DTYPE, cold_calls, time_kernel
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers import transformer_flux, transformer_flux2
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from diffusers.models.transformers.transformer_flux2 import (
    Flux2PosEmbed,
    Flux2SingleTransformerBlock,
    Flux2TransformerBlock,
)
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope, QwenImageTransformerBlock
from launches import moved_bytes, recorded
from operator_calls import BF16, FLUX_1024, FP32, Size, relative_error, timed_block_calls
from peft import LoraConfig, inject_adapter_in_model
from processes import CHILD, Processes, serve
from rows import Measured
from timing import copy_times, graph_times, kept_bytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import fastguard as fg
from fastguard.config import Recompute

ATTENTION = "attention"
LEVELS: tuple[Recompute, ...] = ("none", "pointwise", "mlp")
SD35_1024 = Size(samples=1, image=4096, text=333, heads=24, head=64)
TOY = Size(samples=1, image=64, text=16, heads=4, head=16)


@dataclass(frozen=True)
class Kind:
    """A kind of block, and how it is called."""

    block: Callable[..., nn.Module]
    rest: Callable[[Size, Callable[..., Tensor], str], tuple[Any, ...]]
    """the arguments after the streams, from a size, a maker of tensors and a device"""
    size: Size = FLUX_1024
    joined: bool = False
    """whether image and text are one stream"""


def _axes(head: int) -> list[int]:
    """Channels of a head for each axis of the positions of Flux.1 and Qwen-Image."""
    vertical = head * 7 // 32 * 2
    return [head - 2 * vertical, vertical, vertical]


def _ids(size: Size, device: str) -> Tensor:
    return torch.arange(size.image + size.text, device=device).float()[:, None] / 64


def _flux_rope(size: Size, device: str) -> Any:
    return FluxPosEmbed(theta=10000, axes_dim=_axes(size.head))(_ids(size, device).expand(-1, 3).floor())


def _flux2_rope(size: Size, device: str) -> Any:
    return Flux2PosEmbed(theta=2000, axes_dim=[size.head // 4] * 4)(_ids(size, device).expand(-1, 4).floor())


def _qwen_rope(size: Size, device: str) -> Any:
    side = math.isqrt(size.image)
    rope = QwenEmbedRope(theta=10000, axes_dim=_axes(size.head), scale_rope=True)
    return rope([(1, side, side)], device=torch.device(device), max_txt_seq_len=size.text)


KINDS = {
    "double": Kind(FluxTransformerBlock, lambda s, normal, on: (normal(1, s.width), _flux_rope(s, on))),
    "single": Kind(FluxSingleTransformerBlock, lambda s, normal, on: (normal(1, s.width), _flux_rope(s, on))),
    "flux2 double": Kind(
        Flux2TransformerBlock,
        lambda s, normal, on: (normal(1, 6 * s.width), normal(1, 6 * s.width), _flux2_rope(s, on)),
    ),
    "flux2 single": Kind(
        Flux2SingleTransformerBlock,
        lambda s, normal, on: (None, normal(1, 3 * s.width), _flux2_rope(s, on)),
        joined=True,
    ),
    "sd3.5": Kind(
        partial(JointTransformerBlock, qk_norm="rms_norm"), lambda s, normal, on: (normal(1, s.width),), SD35_1024
    ),
    "sd3.5 dual": Kind(
        partial(JointTransformerBlock, qk_norm="rms_norm", use_dual_attention=True),
        lambda s, normal, on: (normal(1, s.width),),
        SD35_1024,
    ),
    "qwen_image": Kind(QwenImageTransformerBlock, lambda s, normal, on: (None, normal(1, s.width), _qwen_rope(s, on))),
}


def measure_bytes(name: str) -> Measured:
    """Bytes that a kernel moves and the least possible, from its launches at full size."""
    call = timed_block_calls(FLUX_1024, BF16, "cpu", filled=False)[name]
    with recorded():
        least = call.least_bytes()
    yield "kernel", "launch", {"moved_bytes": moved_bytes(call), "least_bytes": least}


def measure_kernel(name: str, size: Size, dtype: torch.dtype, device: str) -> Measured:
    """A kernel and its eager form, with the copy bandwidth of the same moment."""
    cuda, copied = device == "cuda", copy_times((size.image + size.text, size.width), dtype, device)
    yield "copy", "copy", copied
    call = timed_block_calls(size, dtype, device)[name]
    yield "kernel", "launch", time_kernel(call, cuda, copied["bandwidth_gb_per_s"])
    if call.eager:
        yield "eager", "launch", graph_times([each.run_eager for each in cold_calls(call, cuda)], cuda)


def make_block(kind: str, size: Size, dtype: torch.dtype, device: str, rank: int) -> nn.Module:
    """Random weights of a plausible size, frozen, and LoRA adapters."""
    torch.manual_seed(0)
    with torch.device(device):
        block = KINDS[kind].block(dim=size.width, num_attention_heads=size.heads, attention_head_dim=size.head)
        block.requires_grad_(False)
        linears = [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        layers = [name for name in linears if "norm" not in name and "_mod" not in name]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights=False)
        block = inject_adapter_in_model(config, block)
    return block.to(dtype)


class Blocks:
    """A block in each form, with the inputs of a call and the upstream gradients."""

    def __init__(self, kind: str, size: Size, dtype: torch.dtype, device: str) -> None:
        block = make_block(kind, size, dtype, device, rank=64 if size.width >= 1024 else 4)
        torch._dynamo.reset()
        compiled = partial(torch.compile, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")
        self.forms: dict[str, Callable[..., Any]] = {"eager": block.forward}
        self.forms |= {f"fused {level}": self._fused(block, level) for level in LEVELS}
        # Last what may break the process.
        self.forms["fused pointwise, compiled"] = compiled(self._fused(block, "pointwise"))
        self.forms["compiled"] = compiled(block.forward)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        lengths = [size.image + size.text] if KINDS[kind].joined else [size.image, size.text]
        self._streams = [normal(1, length, size.width).requires_grad_() for length in lengths]
        rest = KINDS[kind].rest(size, normal, device)
        self.args = (*self._streams, *rest)
        self._upstream = [torch.randn_like(stream) for stream in reversed(self._streams)]
        ropes = [table for rope in rest if isinstance(rope, tuple) for table in rope]
        self._held = [*block.parameters(), *ropes]

    @staticmethod
    def _fused(block: nn.Module, recompute: Recompute) -> nn.Module:
        """With the same weights; the block itself stays as it is."""
        other = copy.copy(block)
        report = fg.fuse(other, recompute=recompute)
        assert (len(report.fused), report.kept) == (1, {}), str(report)
        return other

    def inference(self, form: str) -> Any:
        with torch.no_grad():
            return self.forms[form](*self.args)

    def training(self, form: str) -> list[Tensor]:
        """Forward and backward; the gradients of the streams."""
        return list(torch.autograd.grad(self.forms[form](*self.args), self._streams, self._upstream))

    def kept_bytes(self, form: str) -> int:
        return kept_bytes(partial(self.forms[form], *self.args), self._held)

    def assert_correct(self, *forms: str) -> None:
        """Every form is as close to eager as two computations in the storage dtype are."""
        want = self.training("eager")
        tolerance = 1e-4 if want[0].dtype == FP32 else 0.03
        for form in forms:
            for got, expected in zip(self.training(form), want, strict=True):
                off = relative_error(got, expected)
                assert off < tolerance, f"{form}: gradient off by {off:.1e}"


class ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


@cache
def give_attention_contiguous_gradients() -> None:
    """In this process, for the models whose own blocks do not."""
    modules: list[Any] = [transformer_flux, transformer_flux2]
    for module in modules:
        attend = module.dispatch_attention_fn

        def wrapped(*args: Any, attend: Callable[..., Any] = attend, **kwargs: Any) -> Any:
            return ContiguousGradient.apply(attend(*args, **kwargs))

        module.dispatch_attention_fn = wrapped


def measure_block(kind: str, size: Size, dtype: torch.dtype, device: str) -> Measured:
    """Forward without a graph of gradients, forward + backward, and bytes kept, of each form. One may fail."""
    blocks, cuda = Blocks(kind, size, dtype, device), device == "cuda"
    for form in blocks.forms:
        try:
            blocks.assert_correct(form)
            yield form, "inference", graph_times([partial(blocks.inference, form)] * 4, cuda)
            yield form, "training", graph_times([partial(blocks.training, form)] * 2, cuda)
            if "compiled" not in form:
                yield form, "training", {"kept_bytes": blocks.kept_bytes(form)}
        except Exception as error:
            traceback.print_exc()
            yield form, "", rows.problem(error)


class Attention:
    """Attention as a fused block calls it: query, key, value and gradient are contiguous, (1, S, H, D)."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        shape = (1, size.image + size.text, size.heads, size.head)
        self.inputs = [torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3)]
        self.upstream = torch.randn(shape, device=device).to(dtype)

    def run(self, *inputs: Tensor) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in inputs)
        return scaled_dot_product_attention(query, key, value).transpose(1, 2)

    def inference(self) -> Tensor:
        with torch.no_grad():
            return self.run(*self.inputs)

    def training(self, upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.run(*self.inputs), self.inputs, upstream)

    def errors(self, upstream: Tensor) -> dict[str, float]:
        """Largest error of the three gradients against float64."""
        found = self.training(upstream)
        wide = [tensor.detach().double().requires_grad_() for tensor in self.inputs]
        with sdpa_kernel(SDPBackend.MATH):
            exact = torch.autograd.grad(self.run(*wide), wide, upstream.double())
        errors = [relative_error(got, want) for got, want in zip(found, exact, strict=True)]
        return {"error": math.inf if any(map(math.isnan, errors)) else max(errors)}


def measure_attention(size: Size, dtype: torch.dtype, device: str) -> Measured:
    """PyTorch's kernels: times, and errors of gradients, also after one that was laid out in another way."""
    cuda = device == "cuda"
    attention, kernels = Attention(size, dtype, device), [SDPBackend.FLASH_ATTENTION]
    wide = torch.randn(1, size.image + size.text, size.heads, 5 * size.head, device=device).to(dtype)
    sliced = wide[..., : size.head].copy_(attention.upstream)
    for kernel in kernels + [SDPBackend.CUDNN_ATTENTION] * cuda:
        name = kernel.name.partition("_")[0].lower()
        with sdpa_kernel(kernel):
            yield name, "gradient", attention.errors(attention.upstream)
            yield name, "inference", graph_times([attention.inference] * 4, cuda)
            yield name, "training", graph_times([partial(attention.training, attention.upstream)] * 2, cuda)
            yield name, "gradient of other strides", attention.errors(sliced)


def measure_in_child(case: str, toy: bool) -> Measured:
    how = (FP32, "cpu") if toy else (BF16, "cuda")
    if case == ATTENTION:
        return measure_attention(TOY if toy else FLUX_1024, *how)
    give_attention_contiguous_gradients()
    kind = case.removesuffix(" block")
    return measure_block(kind, TOY if toy else KINDS[kind].size, *how)


@pytest.mark.parametrize("form", ["eager", "compiled", "fused none", "fused pointwise", "fused mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_block(benchmark: Any, kind: str, form: str) -> None:
    give_attention_contiguous_gradients()
    size = KINDS[kind].size if CUDA else TOY
    blocks = Blocks(kind, size, DTYPE, DEVICE)
    blocks.assert_correct(form)
    benchmark.group = f"{kind} block, forward + backward, {size} {DTYPE} {DEVICE}"
    if form != "compiled":
        benchmark.extra_info["kept_bytes"] = blocks.kept_bytes(form)

    def run() -> None:
        blocks.training(form)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=3)


def suite(args: argparse.Namespace) -> tuple[str, rows.Cases]:
    names = list(timed_block_calls(TOY, FP32, "cpu"))
    if args.bytes:
        return "bytes", {name: partial(measure_bytes, name) for name in names}
    how = (FP32, "cpu") if args.toy else (BF16, "cuda")
    kernels = {name: partial(measure_kernel, name, TOY if args.toy else FLUX_1024, *how) for name in names}
    processes = Processes(__file__, args, os.environ)
    others = {case: partial(processes.measure, case) for case in (*(f"{kind} block" for kind in KINDS), ATTENTION)}
    return "blocks", {**kernels, **others}


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        serve(measure_in_child)
    else:
        rows.main(__doc__, suite, bytes="count the bytes that each kernel moves")
