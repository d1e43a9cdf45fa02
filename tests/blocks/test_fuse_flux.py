"""Fused Flux blocks against diffusers' own: outputs, gradients, and everything that a model can have around it."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import FluxControlNetModel, FluxPipeline, SD3Transformer2DModel
from diffusers.models.transformers.transformer_flux import (
    FluxIPAdapterAttnProcessor,
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from helpers.flux_models import (
    CONFIG,
    FLOAT32,
    LEVELS,
    LORA_TARGETS,
    ONE_OF_EACH,
    REPEATED,
    add_adapters,
    assert_agree,
    assert_as_exact,
    batch_and_its_samples,
    compiled_graphs,
    distance,
    handed_bytes,
    make_inputs,
    make_transformer,
    run,
    sample_of,
)
from helpers.tiny_pipelines import make_tiny_flux
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import fastguard as fg
from fastguard.blocks import linear
from fastguard.blocks.architecture import qk_norms
from fastguard.blocks.flux import FusedDoubleBlock
from fastguard.ops.adaln import adaln
from fastguard.ops.gated_residual import gated_residual
from fastguard.ops.qk_norm_rope import qk_norm_rope

# --- the reference is what diffusers computes -----------------------------------------------------------------------


def test_reference_of_the_modulation_is_diffusers() -> None:
    block = FluxTransformerBlock(dim=24, num_attention_heads=2, attention_head_dim=12).double()
    x, temb = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)
    want, gate, *_ = block.norm1(x, emb=temb)
    shift, scale, *_ = block.norm1.linear(block.norm1.silu(temb)).chunk(6, dim=1)
    torch.testing.assert_close(adaln(x, scale, shift, 1e-6), want, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gated_residual(x, want, gate), x + gate.unsqueeze(1) * want)


def test_reference_of_query_and_key_is_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught where attention would read them."""
    from diffusers.models.transformers import transformer_flux

    block = FluxTransformerBlock(dim=24, num_attention_heads=2, attention_head_dim=12).double()
    attn = block.attn
    for norm in qk_norms(block, FusedDoubleBlock.spec):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
    seen: list[Tensor] = []

    def catch(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        seen.extend((q, k, v))
        return v

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", catch)
    image, text = torch.randn(2, 6, 24, dtype=torch.float64), torch.randn(2, 4, 24, dtype=torch.float64)
    rope = FluxPosEmbed(theta=10000, axes_dim=(4, 4, 4))(torch.randint(0, 5, (10, 3)).float())
    attn(image, text, image_rotary_emb=rope)
    text_qkv = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
    weights = tuple(norm.weight for norm in qk_norms(block, FusedDoubleBlock.spec))
    ours = qk_norm_rope(attn.to_q(image), attn.to_k(image), attn.to_v(image), text_qkv, weights, *rope, 1e-6)
    for got, want in zip(ours, seen, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # diffusers rotates in float32


# --- the whole model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_fused_model_computes_what_diffusers_does(train: str, recompute: Any) -> None:
    model = make_transformer(train)
    names = list(model.state_dict())
    want = run(model)
    report = fg.fuse_flux(model, recompute)
    assert len(report.fused) == 4
    assert not report.left
    assert not report.kept
    got = run(model)
    assert list(model.state_dict()) == names
    assert_agree(got, want, FLOAT32)
    fg.unfuse_flux(model)
    assert_agree(run(model), want, REPEATED)


@pytest.mark.parametrize("recompute", ["pointwise", "mlp"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_kernels_compute_what_diffusers_does(train: str, recompute: Any, kernel_device: str, poisoned: None) -> None:
    model = make_transformer(train).to(kernel_device)
    inputs = make_inputs(device=kernel_device, batch=1)
    want = run(model, inputs)
    fg.fuse_flux(model, recompute, backend="triton")
    assert_agree(run(model, inputs), want, FLOAT32)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("batch", "tokens", "text"), [(1, 1, 1), (3, 4, 0), (1, 9, 0)])
def test_streams_of_any_length(batch: int, tokens: int, text: int, backend: str, kernel_device: str) -> None:
    model = make_transformer("full", **ONE_OF_EACH).to(kernel_device)
    inputs = make_inputs(device=kernel_device, batch=batch, tokens=tokens, text=text)
    want = run(model, inputs)
    fg.fuse_flux(model, backend=backend)
    got = run(model, inputs)
    assert_agree((got[0], {n: g for n, g in got[1].items() if n in want[1]}), want, FLOAT32)


def one_block(kind: str, train: str, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A block of width 64 with its inputs; values are bfloat16's, so that every dtype works on the same numbers."""
    torch.manual_seed(seed)
    cls = FluxTransformerBlock if kind == "double" else FluxSingleTransformerBlock
    block = cls(dim=64, num_attention_heads=4, attention_head_dim=16)
    for parameter in block.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if train == "lora":
        config = LoraConfig(r=4, lora_alpha=4, target_modules=LORA_TARGETS, init_lora_weights=False)
        block = get_peft_model(block, config).base_model.model
    block = block.to(torch.bfloat16)
    rope = FluxPosEmbed(theta=10000, axes_dim=(4, 6, 6))(torch.randint(0, 9, (20, 3)).float())
    inputs = [torch.randn(2, n, 64).bfloat16() for n in (13, 7)] + [torch.randn(2, 64).bfloat16()]
    return block, (*inputs, *rope)


def block_results(block: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Outputs, and gradients of inputs and parameters."""
    leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs[:3]]
    block.zero_grad()
    text, image = block(*leaves, image_rotary_emb=tuple(t.to(device) for t in inputs[3:]))
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(t.shape, generator=generator).to(t) for t in (text, image)]
    torch.autograd.backward([text, image], upstream)
    found = {"text": text, "image": image}
    found |= {f"grad of {n}": t.grad for n, t in zip(("image", "text", "temb"), leaves, strict=True)}
    found |= {f"grad of {n}": p.grad for n, p in block.named_parameters() if p.grad is not None}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("kind", ["double", "single"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_block_is_as_exact_as_diffusers(
    kind: str, train: str, dtype: torch.dtype, backend: str, kernel_device: str
) -> None:
    assert_as_exact(functools.partial(one_block, kind, train), block_results, dtype, backend, kernel_device)


ADAPTERS: dict[str, Callable[[], Any]] = {
    "full": lambda: make_transformer("full"),
    "lora": lambda: make_transformer("lora"),
    "peft": lambda: with_adapters(),
    "dora": lambda: with_adapters(use_dora=True),
}


@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_a_batch_gives_the_bits_of_its_samples(adapters: str, dtype: torch.dtype, recompute: Any) -> None:
    """A rollout of six images without gradients, then updates of one with them: the first ratio is 1, to the bit.

    Where a CPU's matrix product itself rounds by its number of rows (in float32; in float16 with AVX512-FP16), neither
    does diffusers give those bits, and the two are as near.
    """
    model = ADAPTERS[adapters]().to(dtype)
    inputs = make_inputs(dtype, batch=6, tokens=16, text=8)
    own = distance(*batch_and_its_samples(model, inputs))
    fg.fuse_flux(model, recompute)
    old, new = batch_and_its_samples(model, inputs)
    assert distance(new, old) <= 2 * own
    assert own < {torch.bfloat16: 1e-2, torch.float16: 1e-3, torch.float32: 1e-6}[dtype]
    step = fg.flow_sde(0.7, 0.6)
    for objective in ("grpo_guard", "flow_grpo"):
        result = fg.guard_loss(new, old, torch.randn_like(old), torch.ones(6), step, objective=objective)
        assert own > 0 or not result.log_ratio.any()


def test_kernels_give_a_batch_the_bits_of_its_samples(kernel_device: str) -> None:
    model = make_transformer("lora", **ONE_OF_EACH).bfloat16().to(kernel_device)
    fg.fuse_flux(model, backend="triton")
    inputs = make_inputs(torch.bfloat16, batch=2, device=kernel_device, tokens=5, text=3)
    old, new = batch_and_its_samples(model, inputs)
    if kernel_device == "cuda":  # cuBLAS chooses an algorithm by the number of rows
        assert distance(new, old) < 1e-2
    else:
        assert torch.equal(new, old)


def test_an_embedding_for_the_whole_batch_gives_the_same_bits() -> None:
    """diffusers broadcasts it; for one sample there is nothing to broadcast."""
    model = make_transformer().bfloat16()
    fg.fuse_flux(model)
    inputs = make_inputs(torch.bfloat16, batch=6)
    inputs |= {name: inputs[name][:1] for name in ("pooled_projections", "timestep", "guidance")}
    want = model(**inputs)[0]
    assert torch.equal(torch.cat([model(**sample_of(inputs, i))[0] for i in range(6)]), want)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_fifty_updates_agree(train: str) -> None:
    """Losses of the fused and the unfused model, in float32: within 1e-5 at each of 50 updates."""

    def losses(recompute: Any) -> list[float]:
        model = make_transformer(train)
        if recompute:
            fg.fuse_flux(model, recompute)
        inputs = make_inputs(batch=4)
        generator = torch.Generator().manual_seed(7)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=3e-4 if train == "full" else 3e-3)
        found = []
        for _ in range(50):
            target = torch.randn(4, 9, 16, generator=generator) * 0.1 + inputs["hidden_states"]
            loss = (model(**inputs)[0] - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    plain = losses(None)
    assert plain[-1] < 0.7 * plain[0]
    for recompute in ("pointwise", "mlp"):
        assert losses(recompute) == pytest.approx(plain, rel=1e-5)


def test_a_pipeline_paints_the_same_images(tmp_path: Any) -> None:
    """In bfloat16 the fused pipeline is as far from the float32 images as diffusers' own bfloat16."""
    folder = make_tiny_flux(tmp_path / "tiny")

    def images(dtype: torch.dtype, fuse: bool) -> Tensor:
        pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        if fuse:
            fg.fuse_flux(pipe.transformer)
        found = pipe(
            ["a cat", "a dog"], height=32, width=48, num_inference_steps=4, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return found.images

    exact = images(torch.float32, fuse=False)
    assert distance(images(torch.float32, fuse=True), exact) < 1e-5
    own = distance(images(torch.bfloat16, fuse=False), exact)
    assert own > 1e-3
    assert distance(images(torch.bfloat16, fuse=True), exact) < 1.5 * own


# --- what a model can have around it --------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["full", "lora"])
def test_compiled_without_a_graph_break(train: str) -> None:
    model = make_transformer(train, **ONE_OF_EACH)
    want = run(model)
    fg.fuse_flux(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_agree(run(compiled), want, FLOAT32)
    with torch.no_grad():
        assert distance(compiled(**make_inputs())[0], want[0]) <= FLOAT32


def test_compiled_products_are_added_in_place() -> None:
    """torch.compile makes of `addmm_` one that copies the sum to other memory: 0.1 GB each at 1024^2."""
    model = make_transformer("lora", **ONE_OF_EACH)
    fg.fuse_flux(model, "mlp")
    nodes = [node for graph in compiled_graphs(model) for node in graph.nodes]
    assert all(node.args[0].meta["val"].ndim == 1 for node in nodes if node.target is torch.ops.aten.addmm.default)
    in_place = [node for node in nodes if torch.ops.fastguard.add_product_.default in node.args]
    assert len(in_place) > 2 * 8


@pytest.mark.parametrize(
    "recompute", ["pointwise", *(pytest.param(level, marks=pytest.mark.slow) for level in ("block", "offload"))]
)
def test_blocks_compiled_one_by_one_share_their_code(recompute: Any) -> None:
    """diffusers' compile_repeated_blocks: four blocks of a kind are compiled like one, not each anew."""
    model = make_transformer("lora", num_layers=4, num_single_layers=4)
    want = run(model)
    fg.fuse_flux(model, recompute)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert_agree(run(model), want, FLOAT32)
    # Twice for each kind: the first block's inputs differ, in what needs a gradient.
    assert counter.frame_count <= 4


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "pointwise", "mlp"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_compiled_by_inductor(train: str, recompute: Any) -> None:
    """In bfloat16: as far from float32 as diffusers' own bfloat16, within a factor of 2."""
    model = make_transformer(train, **ONE_OF_EACH)
    exact = run(model)
    model = model.to("cuda", torch.bfloat16)
    own = run(model)
    fg.fuse_flux(model, recompute)
    torch._dynamo.reset()
    compiled = run(torch.compile(model, fullgraph=True))
    assert compiled[1].keys() == exact[1].keys()
    results = [(r[0], *(r[1][name] for name in exact[1])) for r in (compiled, own, exact)]
    for got, plain, truth in zip(*results, strict=True):
        assert distance(got.cpu(), truth) <= 2 * distance(plain.cpu(), truth) + torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_gradients_are_right_with_cudnn(recompute: Any) -> None:
    """It plans its backward pass with the strides of the first gradient that it meets, of whatever block."""
    model = make_transformer("full")
    exact = run(model.double())
    fg.fuse_flux(model.to("cuda", torch.bfloat16), recompute)
    own = run(model)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        got = run(model, exact_attention=False)
    for name, truth in exact[1].items():
        assert distance(got[1][name].cpu(), truth) <= 2 * distance(own[1][name].cpu(), truth) + 0.01, name


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", ["none", "pointwise", "mlp"])
@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_captured_in_a_cuda_graph(kind: str, train: str, recompute: Any) -> None:
    """Forward and backward of a block: a replay gives the eager bits."""
    block, inputs = one_block(kind, train)
    block = block.cuda()
    fg.fuse(block, recompute=recompute)
    *leaves, cos, sin = [t.cuda() for t in inputs]
    leaves = [t.requires_grad_() for t in leaves]
    trained = [*leaves, *(p for p in block.parameters() if p.requires_grad)]
    upstream = [torch.randn_like(t) for t in (leaves[1], leaves[0])]

    def update() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # the backward pass of flash attention adds in any order
            outputs = block(*leaves, (cos, sin))
        gradients = torch.autograd.grad(outputs, trained, upstream)
        return [t.detach() for t in (*outputs, *gradients)]

    want = update()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        update()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = update()
    graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.slow
def test_a_compiler_keeps_no_more() -> None:
    """What a compiled model hands from forward to backward: neither a normalized input nor an activation."""
    kept = []
    for recompute in ("none", "pointwise", "mlp"):
        model = add_adapters(make_transformer(**ONE_OF_EACH))
        fg.fuse_flux(model, recompute)
        kept.append(handed_bytes(model))
    none, pointwise, mlp = kept
    # In units of 14 tokens x 64 channels x 4 bytes x 2 samples: 2 LayerNorm outputs and GELU's of 4 in a double block,
    # one and 5 in a single one (attention's output beside GELU's, which may be kept once more); GELU's inputs, 4 each.
    unit = 14 * 64 * 4 * 2
    assert none - pointwise >= (1 + 1 + 4 + 1 + 4) * unit * 0.95
    assert pointwise - mlp >= (4 + 4) * unit * 0.95


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("recompute", ["none", "pointwise", "mlp"])
def test_inside_gradient_checkpointing(recompute: Any, use_reentrant: bool) -> None:
    model = make_transformer("lora")
    want = run(model)
    fg.fuse_flux(model, recompute)

    def checkpoint(block: Any, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=use_reentrant)

    model.enable_gradient_checkpointing(checkpoint)
    model.x_embedder.weight.requires_grad_()  # reentrant checkpoints need an input with a gradient
    unwanted = "x_embedder.weight"
    got = run(model)
    assert_agree((got[0], {n: g for n, g in got[1].items() if n != unwanted}), want, FLOAT32)


def test_inside_selective_checkpointing() -> None:
    """A policy that keeps the results of matmuls must find them as they were."""
    model = make_transformer("lora", **ONE_OF_EACH)
    want = run(model)
    fg.fuse_flux(model, "mlp")

    def checkpoint(block: Any, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False, context_fn=policy)

    policy = functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    )
    model.enable_gradient_checkpointing(checkpoint)
    assert_agree(run(model), want, FLOAT32)


def test_block_switches_checkpointing_on_and_unfuse_off() -> None:
    model = make_transformer()
    fg.fuse_flux(model, "block")
    assert model.is_gradient_checkpointing
    fg.unfuse_flux(model)
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_attention_backends(name: str) -> None:
    model = make_transformer("lora")
    want = run(model)
    fg.fuse_flux(model)
    try:
        model.set_attention_backend(name)
        assert_agree(run(model), want, FLOAT32)
    finally:
        model.set_attention_backend("native")  # the choice is global


@pytest.mark.parametrize("recompute", ["pointwise", "mlp"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_autocast(train: str, recompute: Any) -> None:
    """Backward runs outside of it, as PyTorch advises, and float32 residuals keep the stream in float32."""
    model = make_transformer(train)
    extra = {"controlnet_block_samples": [torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(4))]}
    exact = run(model, **extra)
    own = run(model, autocast=True, **extra)
    fg.fuse_flux(model, recompute)
    got = run(model, autocast=True, **extra)
    assert got[0].dtype == own[0].dtype
    assert 1e-3 < distance(got[0], exact[0]) < 1.3 * distance(own[0], exact[0])
    for name, gradient in exact[1].items():
        assert distance(got[1][name], gradient) < 1.3 * distance(own[1][name], gradient) + 0.01, name


def test_controlnet_residuals_and_an_attention_mask() -> None:
    model = make_transformer("lora")
    generator = torch.Generator().manual_seed(4)
    extra = {
        "controlnet_block_samples": [torch.randn(2, 9, 64, generator=generator) for _ in range(2)],
        "controlnet_single_block_samples": [torch.randn(2, 9, 64, generator=generator)],
        "joint_attention_kwargs": {"attention_mask": torch.rand(2, 1, 14, 14, generator=generator) < 0.7},
    }
    want = run(model, **extra)
    fg.fuse_flux(model)
    assert_agree(run(model, **extra), want, FLOAT32)
    assert distance(run(model)[0], want[0]) > 1e-2  # they matter


def test_controlnet_model() -> None:
    torch.manual_seed(0)
    net: Any = FluxControlNetModel(**CONFIG)
    for parameter in net.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    inputs = make_inputs()
    inputs["controlnet_cond"] = inputs["hidden_states"]
    want = net(**inputs)
    assert len(fg.fuse_flux(net).fused) == 4
    for got, expected in zip(net(**inputs), want, strict=True):
        torch.testing.assert_close(got, expected)


def test_deep_copies_and_pickles_are_fused_on_their_own() -> None:
    model = make_transformer("full")
    fg.fuse_flux(model)
    want = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for parameter in other.parameters():
            parameter.data.mul_(0.5)
        assert distance(run(other)[0], want[0]) > 1e-2
        assert distance(run(model)[0], want[0]) <= REPEATED
        fg.unfuse_flux(other)
        assert "fusion" in vars(model.transformer_blocks[0])


def test_wrappers_are_opened() -> None:
    model = make_transformer("full")
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q"]))
    assert len(fg.fuse_flux(torch.compile(wrapped)).fused) == 4
    fg.unfuse_flux(model)


# --- adapters -------------------------------------------------------------------------------------------------------


def with_adapters(**options: Any) -> Any:
    return add_adapters(make_transformer(), **options)


def two_adapters() -> Any:
    model = with_adapters()
    model.add_adapter(
        LoraConfig(r=3, lora_alpha=1, target_modules=["to_q", "proj_out"], init_lora_weights=False), "second"
    )
    model.set_adapters(["first", "second"], [0.7, 1.3])
    return model


def switched_off() -> Any:
    model = with_adapters()
    model.disable_adapters()
    model.x_embedder.weight.requires_grad_()
    return model


def merged() -> Any:
    model = with_adapters()
    model.fuse_lora()
    model.x_embedder.weight.requires_grad_()
    return model


@pytest.mark.parametrize("make", [with_adapters, two_adapters, switched_off, merged], ids=lambda f: f.__name__)
@pytest.mark.parametrize("recompute", ["pointwise", "mlp"])
def test_adapters_of_peft(make: Callable[[], Any], recompute: Any) -> None:
    model = make()
    want = run(model)
    assert want[1]
    report = fg.fuse_flux(model, recompute)
    assert not report.kept
    assert_agree(run(model), want, FLOAT32)


def test_adapters_that_come_and_go_after_fusing() -> None:
    model = make_transformer("full")
    plain = run(model)[0]
    fg.fuse_flux(model)
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGETS, init_lora_weights=False), "late")
    got = run(model)
    assert distance(got[0], plain) > 1e-2
    fg.unfuse_flux(model)
    assert_agree(got, run(model), FLOAT32)
    fg.fuse_flux(model)
    model.delete_adapters("late")
    with torch.no_grad():
        assert distance(model(**make_inputs())[0], plain) <= FLOAT32


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_the_scale_of_a_call(scale: float) -> None:
    model = with_adapters()
    extra = {"joint_attention_kwargs": {"scale": scale}}
    want = run(model, joint_attention_kwargs=dict(extra["joint_attention_kwargs"]))
    fg.fuse_flux(model)
    assert_agree(run(model, joint_attention_kwargs=dict(extra["joint_attention_kwargs"])), want, FLOAT32)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_adapters_of_other_kinds_are_called(options: dict[str, Any]) -> None:
    model = with_adapters(**options).train()
    torch.manual_seed(9)
    want = run(model)
    report = fg.fuse_flux(model)
    assert "transformer_blocks.0.attn.to_q" in report.kept
    torch.manual_seed(9)
    got = run(model)
    if "lora_dropout" not in options:  # whose masks are drawn in another order
        assert_agree(got, want, FLOAT32)
    model.eval()
    want = run(model)
    fg.unfuse_flux(model)
    assert_agree(run(model), want, FLOAT32)


def test_float32_adapters_that_cast_their_input_are_called() -> None:
    """peft's default for float32 adapters on bfloat16 weights: exact, at the cost of a float32 copy of each input."""
    model = with_adapters().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    want = run(model)
    report = fg.fuse_flux(model)
    assert "saves its input, because it has a torch.float32 adapter for torch.bfloat16 inputs" in str(report)
    got = run(model)
    assert got[1].keys() == want[1].keys()
    assert distance(got[0], want[0]) < 0.05


# --- what cannot be fused -------------------------------------------------------------------------------------------


def ip_adapter(model: Any) -> None:
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(64, 8, num_tokens=(4,)))


def fused_projections(model: Any) -> None:
    with torch.no_grad():
        model.fuse_qkv_projections()


def hooked(model: Any) -> None:
    model.transformer_blocks[0].attn.register_forward_hook(lambda *_: None)


def dropout(model: Any) -> None:
    model.transformer_blocks[0].ff.net[1].p = 0.1


def attention_kwargs(model: Any) -> dict[str, Any]:
    if isinstance(model.transformer_blocks[0].attn.processor, FluxIPAdapterAttnProcessor):
        image = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(8))
        return {"joint_attention_kwargs": {"ip_hidden_states": [image]}}
    return {}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (ip_adapter, "FluxIPAdapterAttnProcessor"),
        (fused_projections, "fused by diffusers"),
        (hooked, "hooks"),
        (dropout, "dropout"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_blocks_that_are_left_as_they_are(change: Callable[[Any], None], reason: str, when: str) -> None:
    model = make_transformer("full").train(change is dropout)
    torch.manual_seed(11)
    if when == "before":
        change(model)
    report = fg.fuse_flux(model)
    if when == "after":
        change(model)
    else:
        assert reason in report.left["transformer_blocks.0"]
        assert reason in str(report)
        assert ("single_transformer_blocks.1" in report.fused) == (change is not fused_projections)
    torch.manual_seed(12)
    got = run(model, **attention_kwargs(model))
    if report.fused:
        fg.unfuse_flux(model)
    torch.manual_seed(12)
    assert_agree(got, run(model, **attention_kwargs(model)), FLOAT32)


def test_a_forward_that_was_replaced() -> None:
    model = make_transformer()
    block = model.transformer_blocks[0]
    block.forward = lambda *args: None
    report = fg.fuse_flux(model)
    assert "forward was replaced" in report.left["transformer_blocks.0"]
    other = model.transformer_blocks[1]
    other.forward = lambda *args: None
    with pytest.raises(ValueError, match=r"transformer_blocks\.1 was replaced after fuse"):
        fg.unfuse_flux(model)


def test_inputs_of_mixed_dtypes_run_as_diffusers_wrote_them() -> None:
    model = make_transformer().bfloat16()
    block = model.single_transformer_blocks[0]
    rope = model.pos_embed(torch.zeros(14, 3))
    args = (torch.randn(1, 9, 64), torch.randn(1, 5, 64), torch.randn(1, 64), rope)
    with torch.no_grad(), pytest.raises(RuntimeError) as own:
        block(*args)
    fg.fuse_flux(model)
    with torch.no_grad(), pytest.raises(RuntimeError) as fused:
        block(*args)
    assert str(fused.value) == str(own.value)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-4, 0.1])
def test_small_weights_of_query_and_key_norms(value: float, loaded: bool) -> None:
    """Then the projections are kept: dividing by such a weight would lose the normalized value."""
    model = make_transformer("lora")
    fg.fuse_flux(model)
    state = model.state_dict()
    state["transformer_blocks.0.attn.norm_k.weight"] = state["transformer_blocks.0.attn.norm_k.weight"].clone()
    state["transformer_blocks.0.attn.norm_k.weight"][3] = value
    if loaded:
        model.load_state_dict(state)
    else:
        fg.unfuse_flux(model)
        model.load_state_dict(state)
        report = fg.fuse_flux(model)
        assert list(report.kept) == ["transformer_blocks.0.attn"]
    assert not model.transformer_blocks[0].fusion.rotated
    assert model.transformer_blocks[1].fusion.rotated
    got = run(model)
    assert all(gradient.isfinite().all() for gradient in got[1].values())
    fg.unfuse_flux(model)
    assert_agree(got, run(model), FLOAT32)


class OwnBlock(FluxTransformerBlock):
    """Somebody's variant."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        text, image = super().forward(*args, **kwargs)
        return text, 2 * image


def test_parts_of_other_classes_run_as_they_are() -> None:
    model = make_transformer(num_layers=5, num_single_layers=2)
    own = OwnBlock(64, 4, 16)
    own.load_state_dict(model.transformer_blocks[0].state_dict())
    model.transformer_blocks[0] = own
    model.transformer_blocks[1].norm2 = nn.LayerNorm(64)
    model.transformer_blocks[2].ff.net[0].approximate = "none"
    model.transformer_blocks[3].attn.to_out[1] = nn.Tanh()
    model.single_transformer_blocks[0].act_mlp = nn.ReLU()
    want = run(model)
    report = fg.fuse_flux(model)
    assert set(report.fused) == {"transformer_blocks.4", "single_transformer_blocks.1"}
    assert_agree(run(model), want, FLOAT32)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_inputs_that_diffusers_broadcasts_or_refuses(backend: str, kernel_device: str) -> None:
    """A kernel would read past their ends."""
    model = make_transformer().to(kernel_device)
    one = make_inputs(device=kernel_device)
    one |= {name: one[name][:1] for name in ("pooled_projections", "timestep", "guidance")}
    want = run(model, one)
    fg.fuse_flux(model, backend=backend)
    assert_agree(run(model, one), want, FLOAT32)
    short = make_inputs(device=kernel_device)
    short["img_ids"] = short["img_ids"][:6]
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        model(**short)


def test_a_block_whose_output_is_changed_in_place() -> None:
    model = make_transformer()
    for block in model.single_transformer_blocks:
        block.register_forward_hook(lambda _, __, out: (out[0], out[1].mul_(0.5)))
    want = run(model)
    fg.fuse_flux(model)
    assert_agree(run(model), want, FLOAT32)


def test_the_rotary_table_gets_its_gradient() -> None:
    model = make_transformer()
    fg.fuse_flux(model)
    cos, sin = (table.requires_grad_() for table in model.pos_embed(torch.ones(14, 3)))
    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(2, *shape, generator=generator) for shape in ((9, 64), (5, 64), (64,))]
    model.single_transformer_blocks[0](*args, (cos, sin))[1].sum().backward()
    assert cos.grad.abs().sum() > 0


def test_errors() -> None:
    model = make_transformer()
    with pytest.raises(
        TypeError, match=r"expected diffusers\.FluxTransformer2DModel or diffusers\.FluxControlNetModel, got Linear"
    ):
        fg.fuse_flux(nn.Linear(2, 2))
    other = SD3Transformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16)
    with pytest.raises(TypeError, match="got SD3Transformer2DModel"):
        fg.fuse_flux(other)
    holder = nn.Module()
    holder.transformer = model
    with pytest.raises(TypeError, match=r"pass its transformer: pipeline\.transformer"):
        fg.fuse_flux(holder)
    with pytest.raises(ValueError, match="recompute must be one of none, pointwise, mlp, block, offload; got 'all'"):
        fg.fuse_flux(model, "all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend must be one of"):
        fg.fuse_flux(model, backend="cuda")
    with pytest.raises(ValueError, match="not fused"):
        fg.unfuse_flux(model)
    fg.fuse_flux(model)
    with pytest.raises(ValueError, match=r"fused already.*unfuse"):
        fg.fuse_flux(model)


def test_gradients_of_gradients_are_refused() -> None:
    model = make_transformer()
    fg.fuse_flux(model)
    out = model(**make_inputs())[0]
    with pytest.raises(RuntimeError, match="a fused block can be differentiated once"):
        torch.autograd.grad(out.sum(), model.x_embedder.weight, create_graph=True)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_inference(mode: Any) -> None:
    model = make_transformer("lora").requires_grad_(False)
    with mode():
        want = model(**make_inputs())[0]
        fg.fuse_flux(model)
        torch.testing.assert_close(model(**make_inputs())[0], want, rtol=1e-5, atol=1e-5)


def test_hooks_of_linear_layers_are_called() -> None:
    """An offloading library's hook has to run before a weight is read."""
    model = make_transformer("full")
    fg.fuse_flux(model)
    seen = []
    model.transformer_blocks[0].ff.net[2].register_forward_pre_hook(lambda *_: seen.append(1))
    run(model)
    assert seen == [1]
    assert isinstance(linear.linear_weights(model.transformer_blocks[0].ff.net[2], torch.float32, False), str)
