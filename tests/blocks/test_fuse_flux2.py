"""Fused FLUX.2 blocks against diffusers' own: outputs, gradients, bytes saved for backward, and what runs unfused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_flux2
from diffusers.models.transformers.transformer_flux2 import (
    Flux2AttnProcessor,
    Flux2FeedForward,
    Flux2KVAttnProcessor,
    Flux2KVParallelSelfAttnProcessor,
    Flux2PosEmbed,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2TransformerBlock,
)
from helpers.flux2_models import linears_of, make_flux2, make_flux2_inputs, run_flux2
from helpers.flux_models import (
    FLOAT32,
    LEVELS,
    ONE_OF_EACH,
    REPEATED,
    assert_agree,
    assert_as_exact,
    batch_and_its_samples,
    distance,
    handed_bytes,
    run,
)
from helpers.quantized_models import FORMATS, dequantized, quantized, saved_bytes
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import fastguard as fg
from fastguard.backbones.lora import add_lora
from fastguard.blocks.compiled import compile_blocks
from fastguard.blocks.flux2 import FLUX2
from fastguard.config import LoraConfig as OurLoraConfig
from fastguard.memory.live import LiveBytes, use_cuda_kernels
from fastguard.memory.passes import materialize

BLOCKS = {f"{kind}.{i}" for kind in ("transformer_blocks", "single_transformer_blocks") for i in range(2)}

# --- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", LEVELS)
@pytest.mark.parametrize("train", ["full", "lora"])
def test_a_fused_model_computes_what_diffusers_does(train: str, recompute: Any) -> None:
    model = make_flux2(train)
    names = list(model.state_dict())
    want = run_flux2(model)
    report = fg.fuse(model, recompute=recompute)
    assert (set(report.fused), report.left, report.kept) == (BLOCKS, {}, {})
    got = run_flux2(model)
    assert list(model.state_dict()) == names
    assert_agree(got, want, FLOAT32)
    assert any(not torch.equal(got[1][name], gradient) for name, gradient in want[1].items())  # it did run fused
    fg.unfuse(model)
    assert type(model.transformer_blocks[0]) is Flux2TransformerBlock
    assert_agree(run_flux2(model), want, REPEATED)


@pytest.mark.parametrize("train", ["full", "lora"])
def test_kernels_compute_what_diffusers_does(train: str, kernel_device: str, poisoned: None) -> None:
    model = make_flux2(train, **ONE_OF_EACH).to(kernel_device)
    inputs = make_flux2_inputs(device=kernel_device, batch=1)
    want = run(model, inputs)
    fg.fuse(model, recompute="mlp", backend="triton")
    assert_agree(run(model, inputs), want, FLOAT32)


def one_block(kind: str, train: str, seed: int, bias: bool = False) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A block of width 64 with its inputs; values are bfloat16's, so that every dtype works on the same numbers."""
    torch.manual_seed(seed)
    cls = Flux2TransformerBlock if kind == "double" else Flux2SingleTransformerBlock
    block = cls(dim=64, num_attention_heads=4, attention_head_dim=16, bias=bias)
    for parameter in block.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if train == "lora":
        targets = [name for name, layer in block.named_modules() if isinstance(layer, nn.Linear)]
        config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
        block = get_peft_model(block, config).base_model.model
    block = block.to(torch.bfloat16)
    rope = Flux2PosEmbed(theta=2000, axes_dim=(4, 4, 4, 4))(torch.randint(0, 9, (20, 4)).float())
    shapes = [(13, 64), (7, 64), (384,), (384,)] if kind == "double" else [(20, 64), (192,)]
    return block, (*(torch.randn(2, *shape).bfloat16() for shape in shapes), *rope)


def block_results(block: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Outputs, and gradients of inputs and parameters."""
    leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs[:-2]]
    block.zero_grad()
    args = leaves if len(leaves) == 4 else [leaves[0], None, leaves[1]]
    out = block(*args, image_rotary_emb=tuple(t.to(device) for t in inputs[-2:]))
    outputs = [*out] if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward(outputs, [torch.randn(t.shape, generator=generator).to(t) for t in outputs])
    found = {f"output {i}": t for i, t in enumerate(outputs)}
    found |= {f"grad of input {i}": t.grad for i, t in enumerate(leaves)}
    found |= {f"grad of {n}": p.grad for n, p in block.named_parameters() if p.grad is not None}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_block_is_as_exact_as_diffusers(kind: str, train: str, dtype: torch.dtype) -> None:
    assert_as_exact(functools.partial(one_block, kind, train), block_results, dtype, "torch", "cpu")


@pytest.mark.parametrize(("kind", "train"), [("double", "full"), ("single", "lora")])
def test_a_block_of_kernels_is_as_exact_as_diffusers(kind: str, train: str, kernel_device: str) -> None:
    blocks = functools.partial(one_block, kind, train)
    assert_as_exact(blocks, block_results, torch.bfloat16, "triton", kernel_device)


@pytest.mark.parametrize("recompute", ["pointwise", "mlp"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_layers_with_biases(kind: str, recompute: Any) -> None:
    """No model has them, but the classes take them: the first layer of a feed-forward adds its own."""
    block, inputs = one_block(kind, "full", seed=0, bias=True)
    want = block_results(block.float(), inputs, torch.float32, "cpu")
    assert sum("bias" in name for name in want) == (12 if kind == "double" else 2)
    fg.fuse(block, recompute=recompute)
    got = block_results(block, inputs, torch.float32, "cpu")
    assert got.keys() == want.keys()
    assert {
        name: distance(got[name], exact) for name, exact in want.items() if distance(got[name], exact) > FLOAT32
    } == {}


@pytest.mark.parametrize("recompute", LEVELS)
def test_a_batch_gives_the_bits_of_its_samples(recompute: Any) -> None:
    """A rollout of six images without gradients, then updates of one with them: the first ratio is 1, to the bit."""
    model = make_flux2("lora").bfloat16()
    inputs = make_flux2_inputs(torch.bfloat16, batch=6, tokens=16, text=8)
    own = distance(*batch_and_its_samples(model, inputs))
    fg.fuse(model, recompute=recompute)
    old, new = batch_and_its_samples(model, inputs)
    assert distance(new, old) <= 2 * own


def test_autocast() -> None:
    """As near to float32 as diffusers' own under autocast; backward runs outside of it."""
    model = make_flux2("lora")
    exact, own = run_flux2(model), run_flux2(model, autocast=True)
    fg.fuse(model, recompute="mlp")
    got = run_flux2(model, autocast=True)
    assert 1e-3 < distance(got[0], exact[0]) < 1.3 * distance(own[0], exact[0])
    for name, gradient in exact[1].items():
        assert distance(got[1][name], gradient) < 1.3 * distance(own[1][name], gradient) + 0.01, name


def test_offloaded_checkpoints_give_the_gradients_of_block_to_the_bit() -> None:
    found = []
    for level in ("block", "offload"):
        model = make_flux2("lora")
        fg.fuse(model, recompute=level)  # type: ignore[arg-type]
        found.append(run_flux2(model))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[1][1][name], gradient) for name, gradient in found[0][1].items())


# --- what a call may look like --------------------------------------------------------------------------------------


def block_call(kind: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A block in float32, and the arguments of a call as the model makes it."""
    block, inputs = one_block(kind, "lora", seed=0)
    *tensors, cos, sin = (t.float() for t in inputs)
    names = ["hidden_states", "encoder_hidden_states", "temb_mod_img", "temb_mod_txt"]
    if kind == "single":
        names, tensors = ["hidden_states", "encoder_hidden_states", "temb_mod"], [tensors[0], None, tensors[1]]
    return block.float(), {**dict(zip(names, tensors, strict=True)), "image_rotary_emb": (cos, sin), **changes}


def own_and_fused(block: Any, args: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What the block gives before and after it is fused."""

    def results() -> list[Tensor]:
        out = block(**args)
        return [*out] if isinstance(out, tuple) else [out]

    want = results()
    fg.fuse(block)
    return want, results()


def ran_fused(out: Tensor) -> bool:
    """Whether it was made by the last part of a fused block; its values may be those of diffusers to the bit."""
    node: Any = out.grad_fn
    while node.name().startswith(("Slice", "Cat")):
        node = node.next_functions[0][0]
    return node.name() == "GatedResidualFunctionBackward"


def test_a_single_block_takes_joined_streams_or_two_and_splits_its_result() -> None:
    block, args = block_call("single")
    joined = args["hidden_states"]
    apart = {**args, "hidden_states": joined[:, 7:], "encoder_hidden_states": joined[:, :7]}
    (want,) = own_and_fused(block, args)[0]
    for given, lengths in (
        (args, None),
        (apart, None),
        ({**args, "split_hidden_states": True, "text_seq_len": 7}, [7, 13]),
        ({**apart, "split_hidden_states": True}, [7, 13]),
    ):
        out = block(**given)
        if lengths is not None:
            assert [part.shape[1] for part in out] == lengths
            out = torch.cat(out, dim=1)
        assert ran_fused(out)
        assert distance(out, want) <= FLOAT32


@pytest.mark.parametrize("kind", ["double", "single"])
def test_a_modulation_of_one_row_runs_fused(kind: str) -> None:
    """(B, 1, 6 C) as (B, 6 C), and one row for the whole batch."""
    block, args = block_call(kind)
    names = [name for name in args if name.startswith("temb_mod")]
    for rows in (lambda mod: mod[:, None], lambda mod: mod[:1], lambda mod: mod[:1, None]):
        given = {**args, **{name: rows(args[name]) for name in names}}
        for want, got in zip(*own_and_fused(block, given), strict=True):
            assert ran_fused(got)
            assert distance(got, want) <= FLOAT32
        fg.unfuse(block)


def per_token(args: dict[str, Any]) -> dict[str, Any]:
    """A modulation for each token, as with reference images."""
    name, tokens = next(name for name in args if name.startswith("temb_mod")), args["hidden_states"].shape[1]
    spread = torch.randn(2, tokens, 1, generator=torch.Generator().manual_seed(6))
    return {**args, name: args[name][:, None] * spread}


def without_rope(args: dict[str, Any]) -> dict[str, Any]:
    return {**args, "image_rotary_emb": None}


def with_a_cache(args: dict[str, Any]) -> dict[str, Any]:
    """The plain processor warns of these arguments, and ignores them."""
    return {**args, "joint_attention_kwargs": {"kv_cache": None, "kv_cache_mode": "extract", "num_ref_tokens": 3}}


@pytest.mark.parametrize("change", [per_token, without_rope, with_a_cache], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["double", "single"])
def test_other_calls_run_the_own_forward_to_the_bit(kind: str, change: Callable[[Any], dict[str, Any]]) -> None:
    block, args = block_call(kind)
    for want, got in zip(*own_and_fused(block, change(args)), strict=True):
        assert torch.equal(got, want)
        assert not ran_fused(got)
    usual = block(**args)
    assert ran_fused(usual if kind == "single" else usual[0])


def test_inputs_that_diffusers_refuses() -> None:
    """A kernel would read past their ends."""
    for kind, name, message in (("double", "temb_mod_txt", "size of tensor"), ("single", "temb_mod", "size of tensor")):
        block, args = block_call(kind)
        fg.fuse(block)
        with pytest.raises(RuntimeError, match=message):
            block(**{**args, name: args[name][:, :-7]})
        short = tuple(table[:-1] for table in args["image_rotary_emb"])
        with pytest.raises(RuntimeError, match="must match the size of tensor b"):
            block(**{**args, "image_rotary_emb": short})


def test_an_attention_mask() -> None:
    block, args = block_call("double")
    mask = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(4)) < 0.7
    want = own_and_fused(block, args)[1]
    fg.unfuse(block)
    masked = own_and_fused(block, {**args, "joint_attention_kwargs": {"attention_mask": mask}})
    for plain, own, got in zip(want, *masked, strict=True):
        assert ran_fused(got)
        assert distance(got, own) <= FLOAT32
        assert distance(got, plain) > 1e-2


# --- blocks that are left -------------------------------------------------------------------------------------------


class OtherSwiGLU(Flux2SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


def other_gate(block: Any) -> None:
    (block.ff.act_fn if hasattr(block, "ff") else block.attn.mlp_act_fn).gate_fn = nn.GELU()


def derived(path: str, cls: type) -> Callable[[Any], None]:
    return lambda block: setattr(block.get_submodule(path), "__class__", cls)


CHANGES: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "kv processor": (
        "transformer_blocks.1",
        lambda block: block.attn.set_processor(Flux2KVAttnProcessor()),
        "its attn.processor is a Flux2KVAttnProcessor, not a Flux2AttnProcessor",
    ),
    "single kv processor": (
        "single_transformer_blocks.0",
        lambda block: block.attn.set_processor(Flux2KVParallelSelfAttnProcessor()),
        "its attn.processor is a Flux2KVParallelSelfAttnProcessor, not a Flux2ParallelSelfAttnProcessor",
    ),
    "fused projections": (
        "transformer_blocks.0",
        lambda block: block.attn.fuse_projections(),
        "its query, key and value projections are fused by diffusers",
    ),
    "derived gate": (
        "transformer_blocks.0",
        derived("ff_context.act_fn", OtherSwiGLU),
        "its ff_context.act_fn is a OtherSwiGLU, not a Flux2SwiGLU",
    ),
    "other gate": ("transformer_blocks.0", other_gate, "its ff.act_fn.gate_fn is a GELU, not a SiLU"),
    "other single gate": (
        "single_transformer_blocks.1",
        other_gate,
        "its attn.mlp_act_fn.gate_fn is a GELU, not a SiLU",
    ),
    "hook": (
        "transformer_blocks.0",
        lambda block: block.ff.register_forward_hook(lambda *_: None),
        "its ff has hooks",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_blocks_that_are_not_fit_are_reported_and_run_unfused(change: str) -> None:
    name, apply, reason = CHANGES[change]
    model = make_flux2()
    with torch.no_grad():
        apply(model.get_submodule(name))
    want = run_flux2(model)
    report = fg.fuse(model)
    assert report.left == {name: reason}
    assert set(report.fused) == BLOCKS - {name}
    assert_agree(run_flux2(model), want, FLOAT32)


def test_reference_images_of_a_kv_model_run_as_diffusers_has_them() -> None:
    """Blended modulations and a cache: blocks with these processors, and those that a user left without."""
    model = make_flux2()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        single = isinstance(block, Flux2SingleTransformerBlock)
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor() if single else Flux2KVAttnProcessor())
    inputs = {**make_flux2_inputs(), "kv_cache_mode": "extract", "num_ref_tokens": 3}
    with torch.no_grad():
        want = model(**inputs)[0]
        assert not fg.fuse(model).fused
        assert torch.equal(model(**inputs)[0], want)


def test_patched_functions_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(function is not None for *_, function in FLUX2.bypassed_functions)
    model = make_flux2(**ONE_OF_EACH)
    fg.fuse(model)
    plain = run_flux2(model)[0]
    for owner, name in (
        (Flux2FeedForward, "forward"),
        (Flux2SwiGLU, "forward"),
        (Flux2AttnProcessor, "__call__"),
        (nn.SiLU, "forward"),
        (nn.functional, "silu"),
        (transformer_flux2, "apply_rotary_emb"),
    ):
        function: Any = getattr(owner, name)
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, lambda *args, f=function, **kwargs: _scaled(f(*args, **kwargs)))
            got = run_flux2(model)[0]
            fg.unfuse(model)
            assert distance(got, plain) > 1e-3
            assert torch.equal(got, run_flux2(model)[0]), name
            assert f"{name} was replaced" in str(fg.fuse(model))
        fg.fuse(model)


def _scaled(out: Any) -> Any:
    return tuple(1.5 * t for t in out) if isinstance(out, tuple) else 1.5 * out


# --- adapters and quantized weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["none", "mlp"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=str)
def test_adapters_of_peft(options: dict[str, Any], recompute: Any) -> None:
    """Of the kinds that are not known, layers are called and their inputs saved."""
    model = make_flux2().requires_grad_(False)
    targets = linears_of(model)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    model.add_adapter(config, adapter_name="first")
    want = run_flux2(model)
    report = fg.fuse(model, recompute=recompute)
    assert set(report.fused) == BLOCKS
    assert set(report.kept) == (set(targets) if options else set())
    assert_agree(run_flux2(model), want, FLOAT32)


def test_adapters_on_some_layers() -> None:
    model = make_flux2().requires_grad_(False)
    add_lora(model, OurLoraConfig(rank=4, alpha=6), linears_of(model, "to_qkv_mlp_proj", "linear_out", "add_q_proj"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    want = run_flux2(model)
    for recompute in ("pointwise", "mlp"):
        fg.fuse(model, recompute=recompute)  # type: ignore[arg-type]
        assert_agree(run_flux2(model), want, FLOAT32)
        fg.unfuse(model)


@pytest.mark.parametrize("recompute", ["none", "pointwise", "mlp"])
@pytest.mark.parametrize("how", FORMATS)
def test_quantized_frozen_weights_train(how: str, recompute: Any) -> None:
    """Gradients are those of the dequantized weights in float64, and no more is saved than with full precision."""

    def with_adapters(model: Any) -> Any:
        add_lora(model, OurLoraConfig(rank=4, alpha=6), LAYERS)
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        return model

    LAYERS = linears_of(make_flux2())
    model = quantized(make_flux2(), how)
    reference = with_adapters(dequantized(make_flux2(), model)).double()
    model, full = with_adapters(model), with_adapters(make_flux2())
    for each in (model, full):
        report = fg.fuse(each, recompute=recompute)
        assert (len(report.fused), report.left, report.kept) == (4, {}, {})
    got, want = run_flux2(model), run_flux2(reference)
    assert_agree((got[0].double(), {n: g.double() for n, g in got[1].items()}), want, 3e-6)
    found, shapes = saved_bytes(model, make_flux2_inputs())
    assert found <= 1.01 * saved_bytes(full, make_flux2_inputs())[0]
    assert not {(576, 64), (64, 256), (384, 64), (64, 192)} & set(shapes)


# --- torch.compile --------------------------------------------------------------------------------------------------


def test_compiled_without_a_graph_break() -> None:
    model = make_flux2(**ONE_OF_EACH)
    want = run_flux2(model)
    fg.fuse(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_agree(run_flux2(compiled), want, FLOAT32)


@pytest.mark.slow
def test_a_compiler_keeps_no_more() -> None:
    """What a compiled model hands from forward to backward: neither a normalized input nor an activation."""
    kept = []
    for recompute in ("none", "pointwise", "mlp"):
        model = make_flux2("lora", num_layers=0, num_single_layers=1)
        fg.fuse(model, recompute=recompute)  # type: ignore[arg-type]
        kept.append(handed_bytes(model, make_flux2_inputs(tokens=90, text=10)))
    none, pointwise, mlp = kept
    # In units of 100 tokens x 64 channels x 4 bytes x 2 samples: the LayerNorm's output and 3 that SwiGLU gives
    # (attention's output beside them may be kept once more); 6 that it reads.
    unit = 100 * 64 * 4 * 2
    assert none - pointwise >= (1 + 3) * unit * 0.95
    assert pointwise - mlp >= 6 * unit * 0.95


@pytest.mark.slow
def test_blocks_of_a_kind_share_their_graphs() -> None:
    """Of double blocks, the first has inputs without a gradient. So is the rollout before an update."""
    model = make_flux2("lora", num_layers=3, num_single_layers=3)
    want = run_flux2(model)
    fg.fuse(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, [*model.transformer_blocks, *model.single_transformer_blocks], backend=counter)
    with torch.no_grad():
        sampled = model(**make_flux2_inputs())[0]
    got = run_flux2(model)
    assert_agree(got, want, FLOAT32)
    assert torch.equal(sampled, got[0])
    assert counter.frame_count == 3


# --- what is saved for backward -------------------------------------------------------------------------------------

KLEIN_4B = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
SIZES: dict[str, dict[str, Any]] = {"dev": {}, "klein-4B": {**KLEIN_4B, "guidance_embeds": False}}


def saved_units(level: str, names: tuple[str, ...] = ("attn",), **config: Any) -> dict[str, float]:
    """What a block of each kind saves in an update of one image of 1024 x 1024 with 512 text tokens, in units of
    tokens x width in bfloat16; counted on tensors without data, with LoRA of rank 32 on the layers so named."""
    with torch.device("meta"):
        model: Any = transformer_flux2.Flux2Transformer2DModel(**{**config, "num_layers": 2, "num_single_layers": 2})
        model = model.to(torch.bfloat16)
        add_lora(model, OurLoraConfig(rank=32, alpha=32), linears_of(model, *names))
    if level != "unfused":
        assert len(fg.fuse(model, recompute=level).fused) == 4  # type: ignore[arg-type]
    live = LiveBytes()
    with FakeTensorMode():
        if level == "unfused":
            use_cuda_kernels(model)
        materialize(model)
        live.hold(model.parameters(), "weights")
        for kind, block in (("double", model.transformer_blocks[1]), ("single", model.single_transformer_blocks[1])):
            live.watch(block, kind)
        with live:
            out = model(
                hidden_states=torch.empty(1, 4096, 128, dtype=torch.bfloat16),
                encoder_hidden_states=torch.empty(1, 512, model.config.joint_attention_dim, dtype=torch.bfloat16),
                timestep=torch.empty(1, dtype=torch.bfloat16),
                guidance=torch.empty(1, dtype=torch.bfloat16) if model.config.guidance_embeds else None,
                img_ids=torch.empty(4096, 4),
                txt_ids=torch.empty(512, 4),
                return_dict=False,
            )[0]
            assert out.requires_grad
        unit, found = 4608 * model.inner_dim * 2, live.labels("activations")
    return {kind: sum(each.n_bytes for each in found if each.place == kind) / unit for kind in ("double", "single")}


@pytest.mark.parametrize("size", SIZES)
def test_what_a_model_of_real_size_saves(size: str) -> None:
    """The blocks of a whole model, with LoRA on attention, beside diffusers' own."""
    config = SIZES[size]
    units = {level: saved_units(level, **config) for level in ("unfused", "none", "pointwise", "mlp")}
    counts = {"double": config.get("num_layers", 8), "single": config.get("num_single_layers", 48)}
    total = {level: sum(each[kind] * n for kind, n in counts.items()) for level, each in units.items()}
    assert total["none"] < total["unfused"]
    assert total["pointwise"] <= 0.56 * total["unfused"]
    assert total["mlp"] <= 0.27 * total["unfused"]
