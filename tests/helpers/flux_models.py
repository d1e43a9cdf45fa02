"""Tiny Flux transformers with random weights, and what they compute, for the tests of fused blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastguard as fg
from fastguard.backbones.flux import Flux
from fastguard.backbones.lora import add_lora
from fastguard.config import LoraConfig as OurLoraConfig

LEVELS = ["none", "pointwise", "mlp", "block", "offload"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out"]
LORA_TARGETS = [*ATTENTION, "net.0.proj", "net.2", "proj_mlp", "proj_out"]
CONFIG: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
ONE_OF_EACH = {"num_layers": 1, "num_single_layers": 1}  # blocks, where each takes seconds
Result = tuple[Tensor, dict[str, Tensor]]


def make_transformer(train: str = "full", **config: Any) -> Any:
    """A tiny transformer whose weights are all random."""
    torch.manual_seed(0)
    return randomized(FluxTransformer2DModel(**{**CONFIG, **config}), train, Flux.lora_targets)


def randomized(model: Any, train: str, lora_targets: Sequence[str]) -> Any:
    """With weights that are all random, in place: a fresh one has norms of 1 and adapters that do nothing."""
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    if train == "lora":
        add_lora(model, OurLoraConfig(rank=4, alpha=6.0), lora_targets)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
    return model


def make_inputs(
    dtype: torch.dtype = torch.float32, batch: int = 2, device: str = "cpu", tokens: int = 9, text: int = 5
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return {
        "hidden_states": randn(batch, tokens, 16),
        "encoder_hidden_states": randn(batch, text, 32),
        "pooled_projections": randn(batch, 32),
        "timestep": torch.rand(batch, generator=generator).to(device, dtype),
        "guidance": torch.full((batch,), 3.5, device=device, dtype=dtype),
        "img_ids": torch.randint(0, 3, (tokens, 3), generator=generator).float().to(device),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


def run(
    model: Any, inputs: dict[str, Any] | None = None, autocast: bool = False, exact_attention: bool = True, **extra: Any
) -> Result:
    """The output and the gradients of every trained parameter, for a random upstream gradient.

    exact_attention: by PyTorch's formula, not by one of its kernels, on a GPU.
    """
    parameter = next(model.parameters())
    inputs = inputs or make_inputs(parameter.dtype, device=str(parameter.device))
    model.zero_grad()
    # On a GPU float32 attention would go through tf32, three times each, and be a part of the difference. In backward,
    # too, which may run attention again.
    with sdpa_kernel(SDPBackend.MATH) if parameter.is_cuda and exact_attention else nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(**inputs, **extra)[0]
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out))
    # Wrappers put their name before the parameters'.
    gradients = {n.split("module.")[-1].split("_orig_mod.")[-1]: p.grad for n, p in model.named_parameters()}
    return out.detach(), {name: grad.clone() for name, grad in gradients.items() if grad is not None}


def compiled_graphs(model: Any, inputs: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """Forward and backward of a compiled model, as the default partitioner of inductor has them."""
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph.graph)
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    torch.compile(model, backend=compiler, fullgraph=True)(**(inputs or make_inputs()))[0].square().sum().backward()
    forward, backward = graphs
    return forward, backward


def handed_bytes(model: Any, inputs: dict[str, Any] | None = None) -> int:
    """What a compiled model hands from forward to backward."""
    forward, _ = compiled_graphs(model, inputs)
    return sum(node.meta["val"].nbytes for node in forward.output_node().args[0] if node.op != "placeholder")


def batch_and_its_samples(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The outputs for a batch without gradients, and for its samples one by one with them."""
    with torch.no_grad():
        old = model(**inputs)[0]
    return old, torch.cat([model(**sample_of(inputs, i))[0] for i in range(len(old))]).detach()


def sample_of(inputs: dict[str, Any], i: int) -> dict[str, Any]:
    """One sample of a batch of inputs."""
    shared = ("img_ids", "txt_ids", "return_dict")
    return {name: value if name in shared or len(value) == 1 else value[i : i + 1] for name, value in inputs.items()}


def assert_as_exact(
    one_block: Callable[[int], tuple[Any, Any]],
    results: Callable[[Any, Any, torch.dtype, str], dict[str, Tensor]],
    dtype: torch.dtype,
    backend: str,
    device: str,
) -> None:
    """Error against float64, of every output and gradient: at most twice that of diffusers' block in this dtype.

    one_block: a block and its inputs, of a seed. results: outputs and gradients in a dtype on a device.
    """
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(3):  # together: of a single block, the rounding of either may be lucky
        block, inputs = one_block(seed)
        truth = results(copy.deepcopy(block).double(), inputs, torch.float64, "cpu")
        block = block.to(device, dtype)
        plain = results(block, inputs, dtype, device)
        fg.fuse(block, backend=backend)
        fused = results(block, inputs, dtype, device)
        assert fused.keys() == truth.keys()
        assert any(not torch.equal(fused[name], plain[name]) for name in truth)  # it did run fused
        for name, exact in truth.items():
            found.setdefault(name, []).append((fused[name], plain[name], exact))
    # The interpreter truncates float32 to bfloat16: up to twice the rounding error, on top of diffusers' own.
    factor = 4 if (backend, dtype, device) == ("triton", torch.bfloat16, "cpu") else 2
    for name, parts in found.items():
        ours, theirs, exact = (torch.cat([t.flatten() for t in each]) for each in zip(*parts, strict=True))
        floor = torch.finfo(dtype).eps / 4  # diffusers may be lucky, with a single rounding
        off, theirs_off = distance(ours, exact), distance(theirs, exact)
        assert off <= factor * max(theirs_off, floor), f"{name}: off by {off:.1e}, diffusers' by {theirs_off:.1e}"


def distance(got: Tensor, want: Tensor) -> float:
    got, want = got.detach(), want.detach()
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def assert_agree(got: Result, want: Result, tolerance: float) -> None:
    assert distance(got[0], want[0]) <= tolerance
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert got[1][name].dtype == gradient.dtype
        assert distance(got[1][name], gradient) <= tolerance, name


# Sums of some hundred float32 terms in another order; diffusers' rotary embedding is float32 whatever the dtype.
FLOAT32 = 3e-6
# The same computation twice: matmuls on a CPU may depend on where their inputs lie in memory.
REPEATED = 1e-6


def add_adapters(model: Any, **options: Any) -> Any:
    model.requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LORA_TARGETS, init_lora_weights=False, **options)
    model.add_adapter(config, adapter_name="first")
    return model
