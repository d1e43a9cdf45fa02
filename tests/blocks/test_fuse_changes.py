"""What others do to a fused model or to the classes it is made of: results stay right, or the block is reported."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry, ModelHook
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from helpers.flux_models import (
    FLOAT32,
    ONE_OF_EACH,
    REPEATED,
    add_adapters,
    assert_agree,
    distance,
    make_inputs,
    make_transformer,
    run,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as torch_module
from torch.utils.flop_counter import FlopCounterMode

import fastguard as fg
from fastguard.blocks.architecture import _own, qk_norms, unfuse_block
from fastguard.blocks.flux import FLUX

ALL = {f"{kind}.{i}" for kind in ("transformer_blocks", "single_transformer_blocks") for i in range(2)}


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Bytes of everything saved for backward inside, parameters and repetitions included."""
    found: list[int] = [0]

    def pack(tensor: Tensor) -> Tensor:
        found[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def bytes_of(model: Any) -> int:
    with saved_bytes() as found:
        model(**make_inputs())
    return found[0]


# --- parts of other classes -----------------------------------------------------------------------------------------


class Louder(FeedForward):
    """A feed-forward that somebody derived from diffusers'."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().forward(*args, **kwargs)


class Wrapper(nn.Module):
    """Somebody's wrapper that passes attributes on."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.inner(*args, **kwargs)
        return (1.5 * out[0], *out[1:]) if isinstance(out, tuple) else 1.5 * out


class Hidden(nn.Module):
    """A wrapper that shows nothing of what is inside."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class ShiftedNorm(AdaLayerNormZero):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, *rest = super().forward(*args, **kwargs)
        return (out + 0.1, *rest)


class ShiftedSingleNorm(AdaLayerNormZeroSingle):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, gate = super().forward(*args, **kwargs)
        return out + 0.1, gate


class OtherGELU(GELU):
    def gelu(self, gate: Tensor) -> Tensor:
        return torch.relu(gate)


class OtherProcessor(FluxAttnProcessor):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        return tuple(1.5 * t for t in out) if isinstance(out, tuple) else 1.5 * out


def of_class(cls: type, *path: str) -> Callable[[Any], None]:
    """A change of the part at `path` of a block: to another class, with the same weights."""

    def change(block: Any) -> None:
        functools.reduce(getattr, path, block).__class__ = cls

    return change


def wrapped(cls: type, name: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        setattr(block, name, cls(getattr(block, name)))

    return change


def longer(block: Any) -> None:
    block.ff.net.append(nn.Tanh())


def shorter(block: Any) -> None:
    block.ff_context.net = nn.ModuleList([block.ff_context.net[0], nn.Linear(256, 64)])


def sequential(block: Any) -> None:
    block.ff.net = nn.Sequential(*block.ff.net, nn.Tanh())


def wrapped_activation(block: Any) -> None:
    block.ff.net[0] = Wrapper(block.ff.net[0])


def with_its_own_embedding(block: Any) -> None:
    class Embedding(nn.Module):
        def forward(self, timestep: Any, labels: Any, hidden_dtype: Any = None) -> Tensor:
            return torch.ones(2, 64)

    block.norm1.emb = Embedding()


def processor(block: Any) -> None:
    block.attn.processor = OtherProcessor()


def replaced_method(block: Any) -> None:
    block.ff.net[0].gelu = torch.relu


CHANGES: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "derived feed-forward": ("double", of_class(Louder, "ff"), "its ff is a Louder, not a FeedForward"),
    "wrapped feed-forward": ("double", wrapped(Wrapper, "ff_context"), "its ff_context is a Wrapper"),
    "hidden feed-forward": ("double", wrapped(Hidden, "ff"), "its ff is a Hidden"),
    "derived AdaLN": ("double", of_class(ShiftedNorm, "norm1_context"), "its norm1_context is a ShiftedNorm"),
    "wrapped AdaLN": ("double", wrapped(Wrapper, "norm1"), "its norm1 is a Wrapper"),
    "derived single AdaLN": ("single", of_class(ShiftedSingleNorm, "norm"), "its norm is a ShiftedSingleNorm"),
    "wrapped single AdaLN": ("single", wrapped(Hidden, "norm"), "its norm is a Hidden"),
    "wrapped LayerNorm": ("double", wrapped(Wrapper, "norm2"), "its norm2 is a Wrapper"),
    "derived activation": ("double", lambda b: of_class(OtherGELU)(b.ff.net[0]), "its ff.net.0 is a OtherGELU"),
    "wrapped activation": ("double", wrapped_activation, "its ff.net.0 is a Wrapper"),
    "wrapped single activation": ("single", wrapped(Wrapper, "act_mlp"), "its act_mlp is a Wrapper"),
    "a layer more": ("double", longer, "its ff.net has 4 layers, not 3"),
    "a layer less": ("double", shorter, "its ff_context.net.1 is a Linear, not a Dropout"),
    "a Sequential": ("double", sequential, "its ff.net is a Sequential, not a ModuleList"),
    "wrapped attention": ("double", wrapped(Wrapper, "attn"), "its attn is a Wrapper"),
    "derived processor": ("single", processor, "its attn.processor is a OtherProcessor"),
    "replaced method": ("double", replaced_method, "the gelu of its ff.net.0 was replaced"),
    "embeds the timestep": ("double", with_its_own_embedding, "embed the timestep themselves"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_parts_of_other_classes(change: str, when: str) -> None:
    kind, apply, reason = CHANGES[change]
    model = make_transformer()
    name = "transformer_blocks.0" if kind == "double" else "single_transformer_blocks.0"
    before = run(model)
    if when == "after":
        fg.fuse_flux(model)
    apply(model.get_submodule(name))
    if when == "before":
        report = fg.fuse_flux(model)
        assert reason in report.left[name]
        assert set(report.fused) == ALL - {name}
    got = run(model)
    fg.unfuse_flux(model)
    want = run(model)
    if "hidden" not in change and "single AdaLN" not in change:
        assert distance(got[0], before[0]) > 1e-4  # the change matters
    assert_agree(got, want, FLOAT32)


def test_adapters_made_of_other_linear_layers() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = add_adapters(make_transformer())
    model.transformer_blocks[0].attn.to_q.lora_A["first"].__class__ = Doubled
    want = run(model)
    report = fg.fuse_flux(model)
    assert report.kept["transformer_blocks.0.attn.to_q"] == "saves its input, because it has an adapter of other layers"
    assert_agree(run(model), want, FLOAT32)


# --- hooks that come and go -----------------------------------------------------------------------------------------


class Nothing(ModelHook):
    """A hook of diffusers that changes nothing."""


def accelerates_hooks(model: Any) -> Iterator[None]:
    for module in list(model.modules()):
        add_hook_to_module(module, AlignDevicesHook())
    yield
    remove_hook_from_module(model, recurse=True)


def diffusers_hooks(model: Any) -> Iterator[None]:
    for module in list(model.modules()):
        HookRegistry.check_if_exists_or_initialize(module).register_hook(Nothing(), "nothing")
    yield
    HookRegistry.check_if_exists_or_initialize(model).remove_hook("nothing", recurse=True)


def a_cache(model: Any) -> Iterator[None]:
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    yield
    model.disable_cache()


@pytest.mark.parametrize("hooks", [accelerates_hooks, diffusers_hooks, a_cache], ids=lambda f: f.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_that_were_removed_leave_no_trace(hooks: Callable[[Any], Iterator[None]], when: str) -> None:
    """They leave the original forward, bound, in the dict of every module that they were on."""
    fresh = make_transformer("lora")
    fg.fuse_flux(fresh)
    want, saved = run(fresh), bytes_of(fresh)

    model = make_transformer("lora")
    if when == "after":
        fg.fuse_flux(model)
    steps = hooks(model)
    next(steps)
    with torch.no_grad(), model.cache_context("c") if hooks is a_cache else nullcontext():
        assert distance(model(**make_inputs())[0], want[0]) <= FLOAT32
    next(steps, None)
    if when == "before":
        assert set(fg.fuse_flux(model).fused) == ALL
    assert_agree(run(model), want, REPEATED)
    assert bytes_of(model) == saved
    fg.unfuse_flux(model)
    assert_agree(run(model), want, FLOAT32)


def test_group_offloading_runs_its_hooks() -> None:
    """Its hooks bring weights to the device: they have to run before a weight is read."""
    model = make_transformer()
    want = run(model)[0]
    fg.fuse_flux(model)
    apply_group_offloading(
        model, onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with torch.no_grad():
        assert distance(model(**make_inputs())[0], want) <= FLOAT32


# --- functions and classes that were changed for all models ----------------------------------------------------------


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As a patch would: a decorator that copies the name and the module of what it replaces."""

    @functools.wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        if isinstance(out, tuple):
            return tuple(None if t is None else 1.5 * t for t in out)
        return 1.5 * out

    return patched


PATCHES: list[tuple[Any, str]] = [
    (FluxAttnProcessor, "__call__"),
    (FluxAttention, "forward"),
    (FluxTransformerBlock, "forward"),
    (FluxSingleTransformerBlock, "forward"),
    (FeedForward, "forward"),
    (AdaLayerNormZero, "forward"),
    (AdaLayerNormZeroSingle, "forward"),
    (GELU, "gelu"),
    (nn.GELU, "forward"),
    (nn.LayerNorm, "forward"),
    (nn.RMSNorm, "forward"),
    (nn.Linear, "forward"),
    (FluxAttention, "__call__"),
    (FeedForward, "__call__"),
    (nn.RMSNorm, "__call__"),
    (nn.Module, "__call__"),
    (nn.Module, "_call_impl"),
    (transformer_flux, "_get_projections"),
    (transformer_flux, "apply_rotary_emb"),
    (transformer_flux, "dispatch_attention_fn"),
    (nn.functional, "linear"),
    (nn.functional, "dropout"),
]


@pytest.mark.parametrize(("owner", "name"), PATCHES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("when", ["before", "after"])
def test_patches_of_classes_and_functions(owner: Any, name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_transformer()
    plain = run(model)[0]
    if when == "after":
        fg.fuse_flux(model)
    monkeypatch.setattr(owner, name, doubled(getattr(owner, name)))
    if when == "before":
        report = fg.fuse_flux(model)
        if name != "dispatch_attention_fn":  # which fused blocks call
            assert "was replaced" in str(report)
            assert set(report.left) == ALL
    got = run(model)
    if "fusion" in vars(model.transformer_blocks[0]):
        fg.unfuse_flux(model)
    want = run(model)
    assert distance(want[0], plain) > 1e-3  # the patch matters
    assert_agree(got, want, FLOAT32)


def test_a_patch_from_before_the_import_is_seen() -> None:
    assert _own(FeedForward, "forward") is FeedForward.forward
    assert _own(nn.functional, "linear") is nn.functional.linear
    holder = type("FeedForward", (FeedForward,), {"forward": doubled(FeedForward.forward)})
    holder.__module__ = FeedForward.__module__
    assert _own(holder, "forward") is None
    assert all(function is not None for *_, function in FLUX.bypassed_functions)


def test_global_module_hooks_are_called() -> None:
    model = make_transformer(**ONE_OF_EACH)
    fg.fuse_flux(model)
    seen: list[str] = []
    handle = torch_module.register_module_forward_hook(lambda module, _, out: seen.append(type(module).__name__))
    try:
        run(model)
        assert seen.count("FeedForward") == 2
        assert seen.count("LayerNorm") >= 5
        assert "there are global module hooks" in str(fg.fuse_flux(make_transformer()))
    finally:
        handle.remove()
    seen.clear()
    run(model)
    assert not seen


def test_a_flop_counter_counts_what_runs() -> None:
    """It registers global hooks as well, to know in which module it is."""
    model = add_adapters(make_transformer())
    counts = {}
    for recompute in ("none", "mlp"):
        fg.fuse_flux(model, recompute)  # type: ignore[arg-type]
        with FlopCounterMode(display=False) as counter:
            run(model)
        counts[recompute] = counter.get_total_flops()
        fg.unfuse_flux(model)
    assert counts["mlp"] > 1.05 * counts["none"]


def test_a_memory_tracker_tracks_what_runs() -> None:
    """It registers global hooks too."""
    peaks = []
    for recompute in (None, "mlp"):
        model = make_transformer()
        if recompute:
            fg.fuse_flux(model, recompute)  # type: ignore[arg-type]
        inputs = make_inputs(tokens=100, text=50)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            model(**inputs)
            peaks.append(sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("current").values()))
    assert peaks[1] < 0.8 * peaks[0]


# --- copies ---------------------------------------------------------------------------------------------------------


def replica(module: nn.Module) -> Any:
    """As DataParallel makes them: the module's dict, with dicts of parameters and children of its own."""
    other: Any = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        setattr(other, name, None if parameter is None else 0.5 * parameter.detach())
    for name, child in module._modules.items():
        other._modules[name] = None if child is None else replica(child)
    return other


def test_replicas_compute_with_their_own_weights() -> None:
    model = make_transformer()
    halved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in halved.parameters():
            parameter.mul_(0.5)
        want = halved(**make_inputs())[0]
        fg.fuse_flux(model)
        got = replica(model)(**make_inputs())[0]
    assert distance(got, want) <= FLOAT32


def test_shallow_copies_compute_with_their_own_weights() -> None:
    model = make_transformer()
    fg.fuse_flux(model)
    block = model.transformer_blocks[0]
    other = copy.copy(block)
    other._modules = dict(block._modules)
    other.ff = copy.deepcopy(block.ff)
    with torch.no_grad():
        other.ff.net[2].weight.mul_(3.0)
        generator = torch.Generator().manual_seed(0)
        args = [torch.randn(2, *shape, generator=generator) for shape in ((9, 64), (5, 64), (64,))]
        rope = model.pos_embed(torch.ones(14, 3))
        got = other(*args, rope)
        plain = copy.copy(other)
        unfuse_block(plain)
        for ours, want, original in zip(got, plain(*args, rope), block(*args, rope), strict=True):
            assert distance(ours, want) <= FLOAT32
            assert ours is not original
    assert distance(got[1], block(*args, rope)[1]) > 1e-2


def test_copies_keep_a_class_that_others_derive_from_a_fused_one() -> None:
    model = make_transformer()
    fg.fuse_flux(model)
    block = model.transformer_blocks[0]

    class Mine(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            text, image = super().forward(*args, **kwargs)
            return text, 2 * image

    block.__class__ = Mine
    assert distance(run(copy.deepcopy(model))[0], run(model)[0]) <= REPEATED


def test_blocks_that_are_left_are_of_the_class_of_the_others() -> None:
    """A wrap policy that is told a name takes the class of the first block that has it."""
    model = make_transformer()
    longer(model.transformer_blocks[1])
    want = run(model)
    fg.fuse_flux(model)
    first = type(model.transformer_blocks[0])
    assert all(isinstance(block, first) for block in model.transformer_blocks)
    assert_agree(run(model), want, FLOAT32)
    fg.unfuse_flux(model)
    assert {type(block) for block in model.transformer_blocks} == {FluxTransformerBlock}
    assert_agree(run(model), want, REPEATED)


def test_a_fused_model_is_freed_at_once() -> None:
    model = make_transformer()
    fg.fuse_flux(model)
    run(model)
    gone = weakref.ref(model.transformer_blocks[0])
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_names_and_classes_stay_for_those_who_look_for_them() -> None:
    model = make_transformer()
    fg.fuse_flux(model)
    block = model.transformer_blocks[0]
    assert type(block).__name__ == "FluxTransformerBlock"
    assert isinstance(block, FluxTransformerBlock)
    fg.unfuse_flux(model)
    assert type(block) is FluxTransformerBlock
    assert "forward" not in vars(block)


# --- checkpointing, wrappers, dtypes, transforms ---------------------------------------------------------------------


def test_checkpointing_of_the_caller_stays() -> None:
    model = make_transformer("lora")
    calls: list[Any] = []

    def own(block: Any, *args: Any) -> Any:
        calls.append(block)
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

    model.enable_gradient_checkpointing(own)
    fg.fuse_flux(model, "block")
    run(model)
    assert len(calls) == 4
    fg.unfuse_flux(model)
    assert model.is_gradient_checkpointing
    run(model)
    assert len(calls) == 8


def test_nothing_is_checkpointed_where_nothing_is_fused() -> None:
    model = make_transformer()
    with torch.no_grad():
        model.fuse_qkv_projections()
    assert not fg.fuse_flux(model, "block").fused
    assert not model.is_gradient_checkpointing


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_fsdp1(one_process: None, when: str, use_orig_params: bool) -> None:
    """Its wrapper is opened; a norm whose weight is not there to be looked at keeps more, and is reported."""
    model = make_transformer()
    want = run(model)[0]
    if when == "before":
        fg.fuse_flux(model)
    model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    if when == "after":
        report = fg.fuse_flux(model)
        assert len(report.fused) == 4
    with torch.no_grad():
        assert distance(model(**make_inputs())[0], want) <= FLOAT32
    out = model(**make_inputs())[0]
    out.square().sum().backward()
    assert distance(out, want) <= FLOAT32
    fg.unfuse_flux(model)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("inside", "norms"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_norms_of_another_dtype_run_fused(
    inside: torch.dtype, norms: torch.dtype, backend: str, kernel_device: str
) -> None:
    """PyTorch's RMSNorm gives its input's dtype back, whatever its weight's."""
    model = make_transformer(**ONE_OF_EACH).to(kernel_device, inside)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        for norm in qk_norms(block, FLUX.kind_of(block).spec):
            norm.to(norms)
    inputs = make_inputs(inside, device=kernel_device)
    exact = run(copy.deepcopy(model).double(), make_inputs(torch.float64, device=kernel_device))
    own = run(model, inputs)
    assert len(fg.fuse_flux(model, backend=backend).fused) == 2
    saved = bytes_saved_by(model, inputs)
    got = run(model, inputs)
    assert got[0].dtype == own[0].dtype
    factor = 4 if (backend, inside, kernel_device) == ("triton", torch.bfloat16, "cpu") else 2  # truncates there
    for name, gradient in exact[1].items():
        floor = torch.finfo(gradient.dtype if inside == norms else torch.bfloat16).eps
        assert got[1][name].dtype == own[1][name].dtype
        assert distance(got[1][name], gradient) <= factor * distance(own[1][name], gradient) + floor, name
    fg.unfuse_flux(model)
    assert saved < 0.9 * bytes_saved_by(model, inputs)


def bytes_saved_by(model: Any, inputs: dict[str, Any]) -> int:
    with saved_bytes() as found:
        model(**inputs)
    return found[0]


@pytest.mark.parametrize("recompute", ["none", "pointwise", "mlp"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_backward_inside_autocast(train: str, recompute: Any) -> None:
    """Forward outside of it: the gradients are as exact as diffusers', but for the chance of a rounding in bf16."""
    model = make_transformer(train)
    exact = run(model)

    def inside() -> dict[str, Tensor]:
        model.zero_grad()
        out = model(**make_inputs())[0]
        with torch.autocast("cpu", torch.bfloat16):
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    own = inside()
    fg.fuse_flux(model, recompute)
    got = inside()
    assert got.keys() == own.keys()
    for name, gradient in exact[1].items():
        assert distance(got[name], gradient) <= 1.05 * distance(own[name], gradient) + FLOAT32, name


def test_backward_inside_autocast_of_its_forward() -> None:
    model = make_transformer("lora")
    fg.fuse_flux(model, "mlp")

    def gradients(backward_inside: bool) -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(**make_inputs())[0]
            if backward_inside:
                out.square().sum().backward()
        if not backward_inside:
            out.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want, got = gradients(False), gradients(True)
    for name, gradient in want.items():
        assert distance(got[name], gradient) < 2e-2, name


def test_transforms_of_torch_func() -> None:
    """They cannot look into a custom Function without its own rules: blocks run as diffusers wrote them."""
    model = make_transformer(**ONE_OF_EACH)
    inputs = make_inputs()

    def loss(latents: Tensor) -> Tensor:
        return model(**{**inputs, "hidden_states": latents})[0].square().sum()

    want = torch.func.grad(loss)(inputs["hidden_states"])
    fg.fuse_flux(model)
    assert distance(torch.func.grad(loss)(inputs["hidden_states"]), want) <= FLOAT32
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
        _, tangent = torch.func.jvp(loss, (inputs["hidden_states"],), (torch.ones_like(want),))
    assert tangent.item() == pytest.approx(want.sum().item(), rel=1e-4)


def test_transforms_of_torch_func_when_compiled() -> None:
    model = make_transformer(**ONE_OF_EACH)
    block, rope = model.transformer_blocks[0], model.pos_embed(torch.ones(14, 3))
    image, text, temb = torch.randn(2, 9, 64), torch.randn(2, 5, 64), torch.randn(2, 64)

    def loss(x: Tensor) -> Tensor:
        return block(x, text, temb, rope)[1].square().sum()

    want = torch.func.grad(loss)(image)
    fg.fuse_flux(model)
    torch._dynamo.reset()
    assert distance(torch.compile(torch.func.grad(loss), backend="eager")(image), want) <= FLOAT32


@pytest.mark.parametrize("change", [processor, longer], ids=lambda f: f.__name__)
def test_blocks_that_are_left_compile_without_a_graph_break(change: Callable[[Any], None]) -> None:
    model = make_transformer()
    fg.fuse_flux(model)
    change(model.transformer_blocks[0])
    want = run(model)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        got = torch.compile(model, backend=counter, fullgraph=True)(**make_inputs())[0]
    assert counter.frame_count == 1
    assert distance(got, want[0]) <= FLOAT32
