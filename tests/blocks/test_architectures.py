"""A new architecture is one file and one row: the toy's blocks run fused, and the errors know them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import bench_blocks
import pytest
import torch
from diffusers import FluxTransformer2DModel
from helpers.flux_models import FLOAT32, REPEATED, assert_agree, distance
from helpers.toy_architecture import HEAD_DIM, TOY, WIDTH, ToyBlock, ToyTransformer
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

import fastguard as fg
from fastguard.backbones.flux import Flux
from fastguard.backbones.flux2 import Flux2Klein
from fastguard.backbones.qwen_image import QwenImage
from fastguard.backbones.sd3 import SD3
from fastguard.blocks.architecture import FusedBlock
from fastguard.blocks.fuse import ARCHITECTURES

LEVELS: list[Any] = ["none", "pointwise", "mlp"]


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "toy", "helpers.toy_architecture:TOY")


def make_toy(train: str = "full") -> Any:
    """With weights that are all random; with adapters, only they are trained."""
    torch.manual_seed(0)
    model: Any = ToyTransformer()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if train == "lora":
        layers = ["query", "key", "value", "out", "up", "down"]
        model.requires_grad_(False)
        model = inject_adapter_in_model(LoraConfig(r=2, target_modules=layers, init_lora_weights=False), model)
    return model


def make_inputs(device: str = "cpu", batch: int = 2, tokens: int = 7) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(1)
    x, temb = (torch.randn(batch, *shape, generator=generator).to(device) for shape in ((tokens, WIDTH), (WIDTH,)))
    angles = torch.rand(tokens, HEAD_DIM // 2, generator=generator).repeat_interleave(2, dim=1).to(device)
    return x.requires_grad_(), temb.requires_grad_(), (angles.cos(), angles.sin())


def run(model: Any, inputs: tuple[Any, ...] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the inputs and of everything that is trained."""
    x, temb, rope = inputs or make_inputs()
    trained = {"x": x, "temb": temb, **{name: p for name, p in model.named_parameters() if p.requires_grad}}
    out = model(x, temb, rope)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    return out.detach(), dict(zip(trained, torch.autograd.grad(out, list(trained.values()), upstream), strict=True))


def saved_bytes(model: Any) -> int:
    """Bytes of the distinct tensors that the forward pass saves for backward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*make_inputs(tokens=64))
    assert out.requires_grad
    return sum(size for pointer, size in found.items() if pointer not in parameters)


@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_fused_toy_computes_what_the_toy_does(train: str, recompute: Any) -> None:
    model = make_toy(train)
    want = run(model)
    report = fg.fuse(model, recompute=recompute)
    assert report.fused == ("blocks.0", "blocks.1")
    assert str(report) == "2 of 2 blocks fused"
    got = run(model)
    assert_agree(got, want, FLOAT32)
    assert not torch.equal(got[1]["x"], want[1]["x"])  # it did run fused
    fg.unfuse(model)
    assert {type(block) for block in model.blocks} == {ToyBlock}
    assert_agree(run(model), want, REPEATED)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_kernels_compute_what_the_toy_does(train: str, kernel_device: str, poisoned: None) -> None:
    model = make_toy(train).to(kernel_device)
    inputs = make_inputs(kernel_device, batch=1)
    want = run(model, inputs)
    fg.fuse(model, backend="triton")
    assert_agree(run(model, inputs), want, FLOAT32)


def test_each_level_saves_less_for_backward() -> None:
    """In units of tokens x width x float32: none still saves what LayerNorm and GELU give, pointwise what they read
    and mlp not that of GELU, which is 4 wide."""
    model = make_toy("lora")
    saved = {"unfused": saved_bytes(model)}
    for recompute in LEVELS:
        fg.fuse(model, recompute=recompute)
        saved[recompute] = saved_bytes(model)
        fg.unfuse(model)
    unit = 2 * (2 * 64 * WIDTH * 4)  # two blocks, two samples, 64 tokens
    assert saved["none"] < saved["unfused"]
    assert saved["none"] - saved["pointwise"] >= 0.95 * (1 + 1 + 4) * unit
    assert saved["pointwise"] - saved["mlp"] >= 0.95 * 4 * unit


def test_a_fused_toy_compiles_without_a_graph_break() -> None:
    model = make_toy()
    want = run(model)
    fg.fuse(model)
    torch._dynamo.reset()
    assert_agree(run(torch.compile(model, backend="aot_eager", fullgraph=True)), want_of_compiled(want), FLOAT32)


def want_of_compiled(want: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    prefix = "_orig_mod."
    return want[0], {name if name in ("x", "temb") else prefix + name: grad for name, grad in want[1].items()}


def test_copies_and_pickles_of_a_fused_toy_are_fused() -> None:
    model = make_toy()
    fg.fuse(model)
    want = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(isinstance(block, FusedBlock) for block in other.blocks)
        assert_agree(run(other), want, FLOAT32)


def exact_gelu(block: Any) -> None:
    block.gelu = nn.GELU()


def other_norm(block: Any) -> None:
    block.norm2 = nn.LayerNorm(WIDTH)


def hooked(block: Any) -> None:
    block.norm_key.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (exact_gelu, "its activation is not the GELU with tanh"),
        (other_norm, "its norms are not LayerNorms without weights"),
        (hooked, "its norm_key has hooks"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_toy_block_that_is_not_fit_is_reported_and_runs_unfused(change: Callable[[Any], None], reason: str) -> None:
    model = make_toy()
    change(model.blocks[1])
    want = run(model)
    report = fg.fuse(model)
    assert report.fused == ("blocks.0",)
    assert report.left == {"blocks.1": reason}
    assert str(report) == f"1 of 2 blocks fused\nunfused, because {reason}: blocks.1"
    assert_agree(run(model), want, FLOAT32)


def test_parts_of_the_toy_that_save_more_are_reported() -> None:
    model = make_toy()
    with torch.no_grad():
        model.blocks[1].norm_key.weight[0] = 0.0
    model.blocks[0].up.register_forward_hook(lambda *_: None)
    want = run(model)
    report = fg.fuse(model)
    assert report.kept == {
        "blocks.0.up": "saves its input, because it has hooks",
        "blocks.1": "saves query and key, because a weight of their norms is too small to divide by",
    }
    assert_agree(run(model), want, FLOAT32)


def test_a_patched_part_of_the_toy_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes of the parts and of the block are watched, without a word in the architecture's file."""
    assert all(function is not None for *_, function in TOY.bypassed_functions)
    model = make_toy()
    fg.fuse(model)
    plain = run(model)[0]
    monkeypatch.setattr(ToyBlock, "forward", lambda self, x, temb, rope: 2 * x)
    got = model(*make_inputs())
    assert torch.equal(got, 4 * make_inputs()[0])
    assert distance(got, plain) > 1e-2


def test_one_block_is_fused_on_its_own() -> None:
    block = make_toy().blocks[0]
    want = run(block)
    assert fg.fuse(block).fused == ("ToyBlock",)
    assert_agree(run(block), want, FLOAT32)
    fg.unfuse(block)
    assert type(block) is ToyBlock


def test_errors_list_the_known_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ARCHITECTURES]:
        if name not in ("flux", "toy"):
            monkeypatch.delitem(ARCHITECTURES, name)
    expected = (
        "expected diffusers.FluxTransformer2DModel or diffusers.FluxControlNetModel or helpers.ToyTransformer, got "
        "Linear; known architectures: flux, toy"
    )
    for call in (fg.fuse, fg.unfuse):
        with pytest.raises(TypeError) as error:
            call(nn.Linear(2, 2))
        assert str(error.value) == expected
    for call in (fg.fuse_flux, fg.unfuse_flux):
        with pytest.raises(TypeError, match="FluxControlNetModel, got ToyTransformer; known architectures: flux$"):
            call(make_toy())
    for level in ("block", "offload"):
        message = f'recompute="{level}" needs gradient checkpointing, but ToyTransformer has no'
        with pytest.raises(ValueError, match=message):
            fg.fuse(make_toy(), recompute=level)  # type: ignore[arg-type]


def test_fuse_finds_flux() -> None:
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8)
    assert fg.fuse(model).fused == ("transformer_blocks.0", "single_transformer_blocks.0")
    with pytest.raises(ValueError, match="fused already"):
        fg.fuse_flux(model)
    fg.unfuse_flux(model)


# --- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", ["fused", "called"])
@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("kind", bench_blocks.KINDS)
def test_attention_gets_gradients_laid_out_as_its_results(
    kind: str, recompute: Any, layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's cuDNN attention makes a plan for the first layout of a gradient, and reads all others by it."""
    same_layout: list[bool] = []

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = scaled_dot_product_attention(query, *args, **kwargs)
        out.register_hook(lambda grad: same_layout.append(grad.stride() == out.stride()))
        return out

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    blocks = bench_blocks.Blocks(kind, bench_blocks.TOY, torch.float32, "cpu")
    block = blocks.forms[f"fused {recompute}"]
    if layers == "called":  # as where a layer has DoRA or a hook
        for module in block.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda *_: None)
    blocks.training(f"fused {recompute}")
    assert same_layout
    assert all(same_layout)


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        (Flux, ["double", "single"]),
        (Flux2Klein, ["flux2 double", "flux2 single"]),
        (SD3, ["sd3.5", "sd3.5 dual"]),
        (QwenImage, ["qwen_image"]),
    ],
)
def test_where_diffusers_blocks_give_gradients_of_one_layout(family: Any, kinds: list[str], monkeypatch) -> None:
    """For each layout of query, key and value: there the trainer lets cuDNN run in blocks that are not fused."""
    layouts: dict[Any, set[Any]] = {}

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = scaled_dot_product_attention(query, key, value, *args, **kwargs)
        of_inputs = tuple((t.shape, t.stride()) for t in (query, key, value))
        out.register_hook(lambda grad: layouts.setdefault(of_inputs, set()).add(grad.stride()))
        return out

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    for kind in kinds:
        bench_blocks.Blocks(kind, bench_blocks.TOY, torch.float32, "cpu").training("eager")
    assert layouts
    assert all(len(found) == 1 for found in layouts.values()) == family().spec.one_gradient_layout
