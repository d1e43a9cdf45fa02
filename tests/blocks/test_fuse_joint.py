"""Fused blocks of Stable Diffusion 3 and Qwen-Image: what holds for each of them, against diffusers' own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)
from helpers.flux_models import FLOAT32, LEVELS, REPEATED, assert_agree, distance
from helpers.joint_models import (
    ATTENTION,
    BLOCKS,
    KINDS,
    LORA_TARGETS,
    MODELS,
    add_adapters,
    as_dtype,
    block_results,
    in_float64,
    make_block,
    make_inputs,
    make_model,
    run,
    saved_at_real_size,
)
from helpers.quantized_models import FORMATS, dequantized, saved_bytes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastguard as fg
from fastguard.backbones.quantize import quantize_linears
from fastguard.blocks.architecture import FusedBlock
from fastguard.blocks.compiled import compile_blocks
from fastguard.blocks.fuse import ARCHITECTURES

# --- outputs and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_computes_what_diffusers_does(name: str, train: str, recompute: Any) -> None:
    model = make_model(name, train)
    classes, names = [type(block) for block in model.transformer_blocks], list(model.state_dict())
    want = run(name, model)
    report = fg.fuse(model, recompute=recompute)
    assert str(report) == f"{BLOCKS[name]} of {BLOCKS[name]} blocks fused"
    got = run(name, model)
    assert list(model.state_dict()) == names
    assert_agree(got, want, FLOAT32)
    assert not all(torch.equal(got[1][key], want[1][key]) for key in want[1])  # it did run fused
    fg.unfuse(model)
    assert [type(block) for block in model.transformer_blocks] == classes
    assert_agree(run(name, model), want, REPEATED)


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("name", MODELS)
def test_kernels_compute_what_diffusers_does(name: str, train: str, kernel_device: str, poisoned: None) -> None:
    model = make_model(name, train).to(kernel_device)
    inputs = make_inputs(name, device=kernel_device, batch=1)
    want = run(name, model, inputs)
    fg.fuse(model, backend="triton")
    assert_agree(run(name, model, inputs), want, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_as_exact_as_diffusers(kind: str, train: str, dtype: torch.dtype) -> None:
    assert_as_exact(kind, train, dtype, "torch", "cpu")


@pytest.mark.parametrize("kind", ["sd3.5 dual", "sd3.5 last", "qwen_image"])
def test_a_block_of_kernels_is_as_exact_as_diffusers(kind: str, kernel_device: str) -> None:
    assert_as_exact(kind, "full", torch.bfloat16, "triton", kernel_device)


def assert_as_exact(kind: str, train: str, dtype: torch.dtype, backend: str, device: str) -> None:
    """Error against float64, of every output and gradient: at most twice that of diffusers' block in this dtype."""
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(3):  # together: of a single block, the rounding of either may be lucky
        block, inputs = make_block(kind, train, seed)
        with in_float64():
            truth = block_results(copy.deepcopy(block).double(), inputs, torch.float64, "cpu")
        block = block.to(device, dtype)
        plain = block_results(block, inputs, dtype, device)
        assert fg.fuse(block, backend=backend).fused
        fused = block_results(block, inputs, dtype, device)
        assert fused.keys() == truth.keys()
        assert any(not torch.equal(fused[name], plain[name]) for name in truth)  # it did run fused
        for name, exact in truth.items():
            found.setdefault(name, []).append((fused[name], plain[name], exact))
    # The interpreter truncates float32 to bfloat16: up to twice the rounding error, on top of diffusers' own.
    factor = 4 if (backend, device) == ("triton", "cpu") else 2
    for name, results in found.items():
        ours, theirs, exact = (torch.cat([t.flatten() for t in parts]) for parts in zip(*results, strict=True))
        floor = torch.finfo(dtype).eps / 4  # diffusers may be lucky, with a single rounding
        assert distance(ours, exact) <= factor * max(distance(theirs, exact), floor), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("name", "batch", "side", "text"), [("sd3.5", 1, 1, 1), ("sd3.5", 3, 2, 0), ("qwen_image", 1, 1, 1)]
)
def test_streams_of_any_length(name: str, batch: int, side: int, text: int, backend: str, kernel_device: str) -> None:
    # No attention to a single token: its gradients of query and key are 0, but for rounding.
    config = {"dual_attention_layers": ()} if name == "sd3.5" else {}
    model = make_model(name, "full", **config).to(kernel_device)
    inputs = make_inputs(name, device=kernel_device, batch=batch, side=side, text=text, masked=False)
    want = run(name, model, inputs)
    fg.fuse(model, backend=backend)
    got = run(name, model, inputs)
    assert_agree((got[0], {key: grad for key, grad in got[1].items() if key in want[1]}), want, FLOAT32)


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_the_bits_of_its_samples(name: str) -> None:
    """A rollout of four images without gradients, then updates of one with them: the first ratio is 1, to the bit."""
    model = make_model(name, "lora").bfloat16()
    fg.fuse(model)
    inputs = make_inputs(name, torch.bfloat16, batch=4, side=4, text=8)
    with torch.no_grad():
        old = model(**inputs)[0]
    for i in range(4):
        sample = {key: value if key == "return_dict" else value[i : i + 1] for key, value in inputs.items()}
        assert torch.equal(model(**sample)[0], old[i : i + 1])


@pytest.mark.parametrize("name", MODELS)
def test_one_embedding_of_time_for_a_batch(name: str) -> None:
    """It is broadcast, as diffusers does."""
    block, inputs = make_block({"sd3": "sd3", "sd3.5": "sd3.5 dual", "qwen_image": "qwen_image"}[name])
    block, inputs = block.float(), as_dtype(inputs, torch.float32)
    inputs["temb"] = inputs["temb"][:1]
    want = block(**inputs)
    fg.fuse(block)
    for got, expected in zip(block(**inputs), want, strict=True):
        assert distance(got, expected) <= FLOAT32


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str) -> None:
    """Blocks whose streams are float32 while their matmuls are bfloat16."""
    model = make_model(name, "lora")
    exact = run(name, model)
    own = run(name, model, autocast=True)
    fg.fuse(model)
    got = run(name, model, autocast=True)
    assert got[0].dtype == own[0].dtype
    assert 1e-3 < distance(got[0], exact[0]) < 1.3 * distance(own[0], exact[0])
    for key, gradient in exact[1].items():
        assert distance(got[1][key], gradient) < 1.3 * distance(own[1][key], gradient) + 0.01, key


# --- what is saved for backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [ATTENTION, LORA_TARGETS], ids=["attention", "all layers"])
@pytest.mark.parametrize("name", MODELS)
def test_bytes_saved_for_backward(name: str, targets: list[str]) -> None:
    """At each level what its definition says, in units of one token's width, and nothing of that size besides.

    For each token of a block 10: its input, query, key and value, attention's output, the sum before the feed-forward,
    and the feed-forward before its activation (4). A second attention of the image adds query, key, value and its
    output. The last block's text, which has no feed-forward, lacks the last 5. `none` adds the results of each
    LayerNorm whose layers are trained, and of the activation (4).
    """
    side, text, head_dim, width = 8, 32, 128, 256
    image, both = side * side, side * side + text
    of_qwen = name == "qwen_image"
    tokens = both * (2 if of_qwen else 3)  # of all blocks
    fed_forward = tokens - (0 if of_qwen else text)
    dual = image if name == "sd3.5" else 0
    pointwise = 5 * tokens + 5 * fed_forward + 4 * dual
    expected = {
        "none": pointwise + tokens + dual + (5 * fed_forward if targets is LORA_TARGETS else 0),
        "pointwise": pointwise,
        "mlp": pointwise - 4 * fed_forward,
        "block": tokens,
    }
    wide = {"attention_head_dim": head_dim, "num_attention_heads": 2}
    wide |= {"axes_dims_rope": (16, 56, 56)} if of_qwen else {"caption_projection_dim": width}
    inputs = make_inputs(name, side=side, text=text, masked=False)
    found = {}
    for level in (None, *expected):
        model = make_model(name, "lora", targets, rank=1, **wide)  # rank 1: what adapters save is of no interest here
        if level is not None:
            fg.fuse(model, recompute=level)  # type: ignore[arg-type]
        found[level] = saved_bytes(model, inputs)[0] / (2 * width * 4)
    assert found[None] > found["none"]
    # The image once more before the last layer, the tables of the rotary embedding, and of each block its modulations
    # and statistics.
    outside = image + (both * head_dim / width if of_qwen else 0) + 30 * BLOCKS[name]
    for level, units in expected.items():
        assert units <= found[level] <= 1.01 * units + outside, level


SOME_BLOCKS: list[tuple[str, dict[str, Any]]] = [
    ("SD3.5 Medium", {"num_layers": 4, "dual_attention_layers": (0, 1)}),
    ("SD3.5 Large", {"num_layers": 2}),
    ("Qwen-Image", {"num_layers": 2}),
]


@pytest.mark.parametrize(("name", "config"), SOME_BLOCKS)
def test_bytes_saved_at_real_sizes(name: str, config: dict[str, Any]) -> None:
    """The default level saves at most 0.65 of what diffusers' own blocks save."""
    assert saved_at_real_size(name, "pointwise", **config) <= 0.65 * saved_at_real_size(name, "unfused", **config)


# --- what a model can have around it --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_compiled_without_a_graph_break(name: str) -> None:
    model = make_model(name, "lora")
    want = run(name, model)
    fg.fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_agree_but_for_zeros(run(name, compiled), want)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd3.5", "qwen_image"])
def test_blocks_compiled_one_by_one(name: str) -> None:
    """As `model.compile = "blocks"` does it: a graph for each kind of inputs, and the rollout's are the update's."""
    model = make_model(name, "lora", num_layers=2)
    want = run(name, model)
    fg.fuse(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, model.transformer_blocks, backend=counter)
    with torch.no_grad():
        sampled = model(**make_inputs(name))[0]
    got = run(name, model)
    assert_agree_but_for_zeros(got, want)
    assert torch.equal(sampled, got[0])
    assert counter.frame_count == 2


def assert_agree_but_for_zeros(got: Any, want: Any) -> None:
    """A compiled graph gives a gradient of 0 to what has none: all that serves nothing but the last block's text."""
    assert not any(gradient.any() for key, gradient in got[1].items() if key not in want[1])
    assert_agree((got[0], {key: gradient for key, gradient in got[1].items() if key in want[1]}), want, FLOAT32)


@pytest.mark.parametrize("name", MODELS)
def test_deep_copies_and_pickles_are_fused_on_their_own(name: str) -> None:
    model = make_model(name)
    fg.fuse(model)
    want = run(name, model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(isinstance(block, FusedBlock) for block in other.transformer_blocks)
        for parameter in other.parameters():
            parameter.data.mul_(0.5)
        assert distance(run(name, other)[0], want[0]) > 1e-2
    assert distance(run(name, model)[0], want[0]) <= REPEATED


@pytest.mark.parametrize(("how", "level"), list(zip(FORMATS * 2, LEVELS, strict=False)))
@pytest.mark.parametrize("name", ["sd3.5", "qwen_image"])
def test_quantized_frozen_weights_train(name: str, how: Any, level: Any) -> None:
    """The gradients are those of the dequantized weights in float64, and no more is saved than with dense weights."""
    model, reference, dense = make_model(name), make_model(name), make_model(name, "lora")
    for block in model.transformer_blocks:
        quantize_linears(block, torch.device("cpu"), how)
    dequantized(reference, model)
    for each in (model, reference):
        torch.manual_seed(4)
        add_adapters(each)
    reference.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" in key}, strict=False)
    with in_float64():
        want = run(name, reference.double(), make_inputs(name, torch.float64))
    assert fg.fuse(model, recompute=level).kept == {}
    got = run(name, model)
    assert_agree((got[0].double(), {key: grad.double() for key, grad in got[1].items()}), want, 3e-6)
    fg.fuse(dense, recompute=level)
    assert saved_bytes(model, make_inputs(name))[0] <= 1.01 * saved_bytes(dense, make_inputs(name))[0]


# --- what is left unfused -------------------------------------------------------------------------------------------


class OtherJointProcessor(JointAttnProcessor2_0):
    pass


class OtherQwenProcessor(QwenDoubleStreamAttnProcessor2_0):
    pass


def feed_forward_of(block: Any) -> Any:
    return block.img_mlp if isinstance(block, QwenImageTransformerBlock) else block.ff


def processor(block: Any) -> None:
    other = OtherQwenProcessor if isinstance(block, QwenImageTransformerBlock) else OtherJointProcessor
    block.attn.set_processor(other())


def exact_gelu(block: Any) -> None:
    feed_forward_of(block).net[0].approximate = "none"


def hooked(block: Any) -> None:
    feed_forward_of(block).register_forward_hook(lambda *_: None)


def norm_with_bias(block: Any) -> None:
    norm = RMSNorm(16, eps=1e-6, bias=True)
    norm.bias.data.normal_()
    block.attn.norm_k = norm


def other_eps(block: Any) -> None:
    block.attn.norm_q.eps = 1e-2


def layer_norm(block: Any) -> None:
    block.attn.norm_added_q = nn.LayerNorm(16)


def no_dropout(block: Any) -> None:
    del block.attn.to_out[1]


UNFIT: list[tuple[Callable[[Any], None], str]] = [
    (processor, "its attn.processor is a Other"),
    (exact_gelu, "its activation is not the GELU with tanh"),
    (hooked, "has hooks"),
    (norm_with_bias, "its query and key norms have a bias"),
    (other_eps, "its query and key norms have different eps"),
    (layer_norm, "its attn.norm_added_q is a LayerNorm, not a RMSNorm"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("change", "reason"), UNFIT, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("name", ["sd3.5", "qwen_image"])
def test_blocks_that_are_left_as_they_are(name: str, change: Callable[[Any], None], reason: str, when: str) -> None:
    model = make_model(name)
    if when == "after":
        fg.fuse(model)
    change(model.transformer_blocks[1])
    if when == "before":
        report = fg.fuse(model)
        assert list(report.left) == ["transformer_blocks.1"]
        assert reason in report.left["transformer_blocks.1"]
    got = run(name, model)
    fg.unfuse(model)
    assert_agree(got, run(name, model), FLOAT32)


def test_qwen_image_without_a_dropout_layer_is_left() -> None:
    model = make_model("qwen_image")
    no_dropout(model.transformer_blocks[0])
    assert fg.fuse(model).left == {"transformer_blocks.0": "its attn.to_out.1 is a NoneType, not a Dropout"}


@pytest.mark.parametrize("name", MODELS)
def test_patches_of_functions_and_classes_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the parts, of the block, and of the functions that its fused forward does the work of."""
    model = make_model(name)
    fg.fuse(model)
    architecture = type(model.transformer_blocks[0]).architecture
    assert all(function is not None for *_, function in architecture.bypassed_functions)
    owners = {owner for owner, *_ in architecture.bypassed_functions}
    assert owners >= {Attention, FeedForward, GELU, RMSNorm, nn.LayerNorm, nn.Linear}
    plain = run(name, model)
    for owner, attribute, function in architecture.bypassed_functions:
        if owner is not nn.Module:
            with monkeypatch.context() as patched:
                patched.setattr(owner, attribute, lambda *args, function=function, **kwargs: function(*args, **kwargs))
                got = run(name, model)
                report = fg.fuse(make_model(name))
            assert set(report.left.values()) == {f"{owner.__name__}.{attribute} was replaced"}
            assert any(not torch.equal(got[1][key], plain[1][key]) for key in plain[1])


def test_a_function_for_one_architecture_refuses_the_others() -> None:
    for name in MODELS:
        with pytest.raises(TypeError, match="known architectures: flux$"):
            fg.fuse_flux(make_model(name))
    assert {"flux", "sd3", "qwen_image"} <= ARCHITECTURES.keys()
