"""The kernels of Flux blocks and whole blocks: bytes, and times beside eager, torch.compile and copying.

    python benchmarks/bench_blocks.py           times on a GPU, at the width of Flux.1-dev
    python benchmarks/bench_blocks.py --bytes   bytes that each kernel moves; on any machine
    pytest benchmarks/bench_blocks.py           small blocks on the device at hand, by pytest-benchmark

One sample at 1024^2: 4,096 image and 512 text tokens of 3,072 channels in bfloat16, LoRA of rank 64 on all linear
layers of a block. Correctness is asserted before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import rows
import torch
from bench_loss import CUDA, DEVICE, DTYPE, cold_calls, time_kernel
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
from launches import moved_bytes, recorded
from operator_calls import BF16, FLUX_1024, FP32, Size, relative_error, timed_block_calls
from peft import LoraConfig, inject_adapter_in_model
from rows import Measured
from timing import copy_times, graph_times, kept_bytes
from torch import Tensor, nn

from fastguard.blocks.architecture import Fusion, fuse_block
from fastguard.blocks.flux import FLUX
from fastguard.blocks.flux2 import FLUX2
from fastguard.config import Recompute

LEVELS: tuple[Recompute, ...] = ("none", "pointwise", "mlp")
KINDS: dict[str, type] = {
    "double": FluxTransformerBlock,
    "single": FluxSingleTransformerBlock,
    "flux2 double": Flux2TransformerBlock,
    "flux2 single": Flux2SingleTransformerBlock,
}
TOY = Size(samples=1, image=64, text=16, heads=4, head=16)


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
        block: nn.Module = KINDS[kind](dim=size.width, num_attention_heads=size.heads, attention_head_dim=size.head)
        block.requires_grad_(False)
        linears = [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        layers = [name for name in linears if "norm" not in name]  # without those of the timestep
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights=False)
        block = inject_adapter_in_model(config, block)
    return block.to(dtype)


def make_rope(kind: str, size: Size, device: str) -> tuple[Tensor, Tensor]:
    """cos and sin of some positions."""
    ids = torch.arange(size.image + size.text, device=device).float()[:, None] / 64
    if kind.startswith("flux2"):
        return Flux2PosEmbed(theta=2000, axes_dim=[size.head // 4] * 4)(ids.expand(-1, 4).floor())
    vertical = size.head * 7 // 32 * 2
    axes = [size.head - 2 * vertical, vertical, vertical]
    return FluxPosEmbed(theta=10000, axes_dim=axes)(ids.expand(-1, 3).floor())


class Blocks:
    """A block in each form, with the inputs of a call and the upstream gradients."""

    def __init__(self, kind: str, size: Size, dtype: torch.dtype, device: str) -> None:
        block = make_block(kind, size, dtype, device, rank=64 if size.width >= 1024 else 4)
        torch._dynamo.reset()
        compiled = partial(torch.compile, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager")
        self.forms: dict[str, Callable[..., Any]] = {"eager": block.forward, "compiled": compiled(block.forward)}
        self.forms |= {f"fused {level}": self._fused(block, level) for level in LEVELS}
        self.forms["fused pointwise, compiled"] = compiled(self._fused(block, "pointwise"))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        rope = make_rope(kind, size, device)
        lengths = [size.image + size.text] if kind == "flux2 single" else [size.image, size.text]
        self._streams = [normal(1, length, size.width).requires_grad_() for length in lengths]
        modulations: dict[str, list[Tensor | None]] = {
            "flux2 double": [normal(1, 6 * size.width), normal(1, 6 * size.width)],
            "flux2 single": [None, normal(1, 3 * size.width)],  # no second stream
        }
        modulation = modulations.get(kind) or [normal(1, size.width)]
        self.args = (*self._streams, *modulation, rope)
        self._upstream = [torch.randn_like(stream) for stream in reversed(self._streams)]
        self._held = [*block.parameters(), *rope]

    @staticmethod
    def _fused(block: nn.Module, recompute: Recompute) -> nn.Module:
        """With the same weights; the block itself stays as it is."""
        other = copy.copy(block)
        kind = FLUX.kind_of(other) or FLUX2.kind_of(other)
        fuse_block(other, kind, Fusion(recompute, "auto", rotated=True))
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


def measure_block(kind: str, size: Size, dtype: torch.dtype, device: str) -> Measured:
    """Forward without a graph of gradients, forward + backward, and bytes kept, of each form."""
    blocks, cuda = Blocks(kind, size, dtype, device), device == "cuda"
    blocks.assert_correct(*blocks.forms)
    for form in blocks.forms:
        yield form, "inference", graph_times([partial(blocks.inference, form)] * 4, cuda)
        yield form, "training", graph_times([partial(blocks.training, form)] * 2, cuda)
        if "compiled" not in form:
            yield form, "training", {"kept_bytes": blocks.kept_bytes(form)}


@pytest.mark.parametrize("form", ["eager", "compiled", "fused none", "fused pointwise", "fused mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_block(benchmark: Any, kind: str, form: str) -> None:
    size = FLUX_1024 if CUDA else TOY
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
    sized = (TOY, FP32, "cpu") if args.toy else (FLUX_1024, BF16, "cuda")
    blocks = {f"{kind} block": partial(measure_block, kind, *sized) for kind in KINDS}
    return "blocks", {**{name: partial(measure_kernel, name, *sized) for name in names}, **blocks}


if __name__ == "__main__":
    rows.main(__doc__, suite, bytes="count the bytes that each kernel moves")
