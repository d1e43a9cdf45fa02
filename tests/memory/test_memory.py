"""The memory planner: its counter against graphs done by hand, its passes against known numbers of Flux.1-dev."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.tiny_pipelines import make_tiny_flux
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastguard.backbones.flux import Flux
from fastguard.backbones.flux.spec import PARTS, FluxSpec
from fastguard.backbones.folder import pipeline_problems
from fastguard.backbones.pipeline import backbone as backbone_module
from fastguard.backbones.pipeline.backbone import prepare_transformer
from fastguard.backbones.pipeline.skeleton import pipeline_skeleton
from fastguard.blocks.linear import QuantizedLinear
from fastguard.config import (
    Encoders,
    HardwareConfig,
    LoraConfig,
    ModelConfig,
    PromptsConfig,
    Recipe,
    Recompute,
    RewardConfig,
    SamplerConfig,
    UpdateConfig,
    advantages_config,
    objective_config,
    recompute_levels,
)
from fastguard.memory import (
    choose_recompute,
    compare_kept,
    executed_flops,
    kept_activations,
    passes,
    plan,
    rollout_flops,
    update_bytes,
    update_flops,
)
from fastguard.memory.live import Label, LiveBytes, allocated, use_cuda_kernels
from fastguard.memory.passes import Pass, PassSettings, Sizes, as_built, rollout_pass, update_pass, weights_of
from fastguard.memory.phases import (
    LIBRARY_BYTES,
    Phase,
    _encode,
    buffer_bytes,
    optimizer_bytes,
    planned_phases,
    sampling_settings,
)
from fastguard.train.optim import build_optimizer

GIB = 2**30
KIB = 2**10


def recipe(**sections: dict[str, Any]) -> Recipe:
    """Flux.1-dev with LoRA as in the public recipe, with fields of `sections` changed."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {"recompute": "block"},
        "sampler": {"num_steps": 6, "sde_steps": 6, "noise_level": 0.9},
        "update": {"minibatches": 4, "micro_batch": 3},
        "prompts": {},
        "objective": {},
        "hardware": {},
        "lora": {},
    }
    merged = {name: {**values, **sections.get(name, {})} for name, values in defaults.items()}
    return Recipe(
        model=ModelConfig(**merged["model"]),
        sampler=SamplerConfig(**{"store": "device", **merged["sampler"]}),
        update=UpdateConfig(**merged["update"]),
        prompts=PromptsConfig(**merged["prompts"]),
        objective=objective_config(**merged["objective"]),
        hardware=HardwareConfig(**merged["hardware"]),
        lora=LoraConfig(**merged["lora"]),
        rewards=(RewardConfig("jpeg_compressibility"),),
    )


def tiny(**sections: dict[str, Any]) -> Recipe:
    model = {"path": "tiny", "dtype": "float32", "height": 64, "width": 64, "recompute": "none"}
    small = {
        "prompts": {"per_epoch": 2, "max_tokens": 32},
        "sampler": {"num_steps": 4, "sde_steps": 2, "group_size": 4, "batch_size": 4, "decode_batch": 2},
        "update": {"minibatches": 1, "micro_batch": 4},
    }
    mine = {**small, **{k: {**small.get(k, {}), **v} for k, v in sections.items()}}
    return recipe(**{**mine, "model": {**model, **sections.get("model", {})}})


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny pipeline with four single blocks after its double one; with two, offloading does not lower its peak."""
    folder = make_tiny_flux(tmp_path_factory.mktemp("deep") / "tiny")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_single_layers": 4}))
    return str(folder)


# --- the counter against graphs done by hand -------------------------------------------------------------------------


def test_live_bytes_of_a_small_graph_done_by_hand() -> None:
    with FakeTensorMode():
        live = LiveBytes()
        x = torch.empty(64, 256)  # 64 KiB
        frozen, trained = torch.empty(256, 256), nn.Parameter(torch.empty(256, 256))  # 256 KiB each
        live.hold([frozen, trained], "weights")
        live.hold_gradients([trained])
        with live:
            hidden = (x @ trained).relu()  # the product dies with the expression: relu keeps its own output
            assert live.live == {"weights": 512 * KIB, "activations": 64 * KIB}
            assert live.peak == (512 + 2 * 64) * KIB
            out = (hidden @ frozen).sum()  # 64 KiB die again; a scalar takes one block of 512 bytes
            assert live.live["activations"] == 64 * KIB + 512
            del hidden  # autograd keeps it
            assert live.live["activations"] == 64 * KIB + 512
            out.backward()
            assert live.live == {"weights": 512 * KIB, "activations": 512, "gradients": 256 * KIB}
            # relu's input gradient and the weight's gradient are there together, and the scalars
            assert live.peak == sum(live.at_peak.values())
            assert 512 + 64 + 256 <= live.peak / KIB <= 512 + 64 + 256 + 2
            del out
    assert live.live["activations"] == 0


def test_host_memory_has_a_peak_of_its_own() -> None:
    with FakeTensorMode():
        live = LiveBytes()
        with live:
            x = torch.empty(3, 100)  # 1200 bytes
            with live.making("host"):
                copied = torch.empty_like(x).copy_(x)
            assert live.live == {"activations": 1536, "host": 2048}  # pinned memory comes in powers of two
            assert [label.n_bytes for label in live.labels("host")] == [2048]
            del copied
            back = torch.empty_like(x)
            assert back.shape == x.shape
        assert live.live == {"activations": 2 * 1536, "host": 0}
        assert (live.peak, live.at_peak) == (2 * 1536, {"activations": 2 * 1536})
        assert live.host_peak == 2048


def test_views_share_a_storage_and_allocations_are_rounded_up() -> None:
    with FakeTensorMode():
        live = LiveBytes()
        with live:
            x = torch.empty(3, 100)  # 1200 bytes
            views = [x.t(), x[0], x.view(300)]
            assert live.live["activations"] == 1536
            del x
            assert live.live["activations"] == 1536
            del views
    assert live.live["activations"] == 0


def test_attention_keeps_no_matrix_of_scores() -> None:
    with FakeTensorMode():
        live = LiveBytes()
        q, k, v = (torch.empty(1, 2, 1024, 128, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        with live:
            out = F.scaled_dot_product_attention(q, k, v)
            assert live.live["activations"] == 2 * 1024 * (128 * 2 + 4)  # out in bf16, logsumexp in float32
            out.sum().backward()
    assert live.peak < 2 * 1024 * 1024 * 2 + 2 * 1024 * 128 * 14  # gradients and workspace, less than the scores alone


def test_rms_norm_keeps_what_the_cuda_kernel_keeps() -> None:
    def kept(cuda: bool) -> int:
        with FakeTensorMode():
            norm = nn.RMSNorm(128, dtype=torch.bfloat16).requires_grad_(False)
            if cuda:
                use_cuda_kernels(norm)
            x = torch.empty(64, 128, dtype=torch.bfloat16, requires_grad=True)
            live = LiveBytes()
            with live:
                y = norm(x)
                found = live.live["activations"]
                y.sum().backward()
                assert x.grad is not None
                assert x.grad.shape == x.shape
            return found

    assert kept(cuda=True) == 64 * 128 * 2 + 512  # the output and 64 float32 numbers
    assert kept(cuda=False) > 2.5 * kept(cuda=True)


def test_storages_are_labelled_with_the_module_and_the_operator_that_made_them() -> None:
    with FakeTensorMode():
        first, second = nn.Linear(8, 256), nn.Linear(256, 4)
        live = LiveBytes()
        live.hold(first.parameters(), "weights")
        live.watch(first, "first")
        live.watch(second, "second")
        with live:
            hidden = F.gelu(first(torch.ones(2, 8)))
            out = second(hidden)
        made = live.labels("activations")
        assert Label("first", "linear", (2, 256), torch.float32, 2048) in made  # gelu keeps it
        assert Label("", "aten::gelu", (2, 256), torch.float32, 2048) in made  # outside of both
        assert Label("second", "linear", (2, 4), torch.float32, 512) in made
        assert sum(label.n_bytes for label in made) == live.live["activations"]
        assert [label.place for label in live.labels("weights")] == ["", ""]
        del hidden, out
        assert live.labels("activations") == []


# --- Flux.1-dev: the known numbers -----------------------------------------------------------------------------------


def reference_settings(side: int, fuse: bool, recompute: Recompute) -> PassSettings:
    """The reference measurement: adapters in bf16, 512 text tokens, one sample, RMSNorm taken apart as on a CPU."""
    return PassSettings(
        as_built(ModelConfig(height=side, width=side, fuse=fuse)), LoraConfig(), objective_config(), max_tokens=512,
        micro_batch=1, recompute=recompute, accumulate=False, adapter_dtype=torch.bfloat16, cuda_kernels=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("side", "recompute", "kept", "peak"),
    [
        pytest.param(1024, "none", 24.3, 47.8, marks=pytest.mark.slow),
        pytest.param(1024, "block", 1.5, 25.4, marks=pytest.mark.slow),
        pytest.param(512, "none", 8.1, 31.4, marks=pytest.mark.slow),
        (512, "block", 0.5, 23.9),
    ],
)
def test_unfused_flux_dev_with_bf16_adapters_takes_the_known_memory(
    side: int, recompute: Recompute, kept: float, peak: float
) -> None:
    trained = weights_of(as_built(ModelConfig()), LoraConfig()).trained.count
    assert trained == pytest.approx(179e6, rel=0.005)
    run = update_pass(reference_settings(side, fuse=False, recompute=recompute))
    # The known numbers are rounded to 0.1 GiB.
    assert run.at_peak["weights"] / GIB == pytest.approx(22.5, abs=0.05)
    assert run.kept / GIB == pytest.approx(kept, abs=0.06)
    adam = 2 * 2 * trained
    assert (run.peak + adam) / GIB == pytest.approx(peak, abs=0.06)


@pytest.mark.parametrize(
    "float32_adapters",
    [pytest.param(False, marks=pytest.mark.slow, id="bf16_adapters"), pytest.param(True, id="float32_adapters")],
)
@pytest.mark.parametrize(
    ("recompute", "at_1024", "at_512"),
    [pytest.param("pointwise", 15.5, 5.2, marks=pytest.mark.slow), ("mlp", 9.5, 3.2)],
)
def test_fused_flux_dev_keeps_no_more_than_it_must(
    recompute: Recompute, at_1024: float, at_512: float, float32_adapters: bool
) -> None:
    for side, most in ((1024, at_1024), (512, at_512)):
        settings = reference_settings(side, fuse=True, recompute=recompute)
        if float32_adapters:
            # Accumulating changes nothing here, and is the pass that the next test takes, too.
            settings = replace(settings, adapter_dtype=torch.float32, cuda_kernels=True, accumulate=True)
        assert update_pass(settings).kept / GIB <= most


@pytest.mark.parametrize(
    ("level", "double", "single"),
    [
        pytest.param("none", 16, 10, marks=pytest.mark.slow),
        ("pointwise", 10, 9),
        pytest.param("mlp", 6, 5, marks=pytest.mark.slow),
        pytest.param("block", 1, 1, marks=pytest.mark.slow),
        ("offload", 0, 0),
    ],
)
def test_what_flux_dev_keeps_is_accounted_for_tensor_by_tensor(level: Recompute, double: int, single: int) -> None:
    """In units of tokens x width: pointwise keeps what enters and leaves attention, what LayerNorms read, and the
    feed-forward before its activation (4); mlp all but the last."""
    one = recipe(model={"height": 1024, "width": 1024}, prompts={"max_tokens": 512}, update={"micro_batch": 1})
    kept = kept_activations(recipe_with(one, "model", recompute=level))
    assert kept.unit == 4608 * 3072 * 2
    assert kept.blocks == {"double": 19, "single": 38, "outside": 1}
    settings = PassSettings(as_built(one.model), one.lora, one.objective, 512, 1, kept.recompute)
    assert kept.total == update_pass(settings).kept
    adapters = 0.7  # units: their weights in bf16, and inputs projected to their rank
    assert double <= kept.units("double") <= double + adapters
    assert single <= kept.units("single") <= single + adapters
    found = {(t.block, t.operator, t.shape): t for t in kept.tensors}
    hidden = found.get(("double", "linear", (4096, 12288)))
    assert (hidden is not None) == (level in ("none", "pointwise"))
    if hidden is not None:
        assert hidden.total == 19 * 4096 * 12288 * 2
        rotated = found["single", "fastguard::qk_norm_rope_fwd", (1, 4608, 24, 128)]
        assert (rotated.count, rotated.blocks, rotated.dtype) == (2, 38, torch.bfloat16)
        assert rotated.n_bytes == 2 * kept.unit


def test_lora_at_512_fits_in_30_gib_and_is_planned_by_one_pass_for_each_phase() -> None:
    def runs() -> list[int]:
        each = (passes.encode_pass, passes.rollout_pass, passes.decode_pass, passes.update_pass)
        return [one.cache_info().misses for one in each]

    before = runs()
    found = plan(recipe())
    assert all(now <= then + 1 for now, then in zip(runs(), before, strict=True))
    assert found.peak <= 30 * GIB
    assert found.fits
    update = found.phase("update")
    assert update.weights / GIB == pytest.approx(22.17 + 0.668 + 0.156, abs=0.02)  # frozen, float32 adapters, VAE
    assert update.optimizer == 2 * 4 * 179_306_496
    assert update.gradients == 4 * 179_306_496
    assert [p.name for p in found.phases] == ["encode", "rollout", "decode", "update"]
    assert f"{update.peak / GIB:.2f}" in found.table().splitlines()[4]


@pytest.mark.slow
def test_lora_at_1024_fits_in_30_gib_with_transitions_on_the_host() -> None:
    at_1024 = recipe(
        model={"height": 1024, "width": 1024}, update={"micro_batch": 1}, sampler={"store": "cpu", "decode_batch": 1}
    )
    found = plan(at_1024)
    assert found.peak <= 30 * GIB
    update = found.phase("update")
    transitions = 48 * 24 * 6 * 3 * 4096 * 64 * 2
    assert update.trajectories < 0.1 * GIB  # the prompts, and one micro-batch
    assert transitions <= update.host <= 2 * transitions  # pinned memory comes in powers of two


def test_full_fine_tuning_at_512_fits_on_one_gpu_with_8_bit_or_host_state() -> None:
    full = recipe(model={"train": "full"}, update={"micro_batch": 1, "optimizer": "adamw8bit"})
    eight_bit = plan(full)
    assert eight_bit.peak <= 78 * GIB
    assert eight_bit.fits
    weights = weights_of(as_built(full.model), full.lora)
    n = weights.transformer.count
    assert n == pytest.approx(11.9e9, rel=0.002)
    update = eight_bit.phase("update")
    assert update.gradients == pytest.approx(2 * n, rel=1e-4)
    assert update.optimizer == pytest.approx(2 * n * (1 + 4 / 256), rel=1e-6)

    on_host = {p.name: p for p in planned_phases(recipe_with(full, "update", optimizer="adamw_cpu"), "block")}["update"]
    assert on_host.optimizer == 0
    assert on_host.host == pytest.approx(12 * n, rel=0.01)
    masters = {p.name: p for p in planned_phases(recipe_with(full, "update", optimizer="adamw"), "block")}["update"]
    assert masters.optimizer == 12 * n


def recipe_with(base: Recipe, section: str, **values: Any) -> Recipe:
    return replace(base, **{section: replace(getattr(base, section), **values)})


@pytest.mark.parametrize("tokens", [128, pytest.param(512, marks=pytest.mark.slow)])
def test_flux_devs_text_encoders_take_what_the_page_says(tokens: int) -> None:
    """T5 has 4.63 billion weights in linear layers, and 0.13 billion in its embedding; CLIP is gone before T5 comes."""
    linear, rows, rest = 24 * (4 * 4096**2 + 3 * 4096 * 10240), 24 * (5 * 4096 + 2 * 10240), 32128 * 4096
    base = recipe(prompts={"max_tokens": tokens})
    device, eight, host = encode_phase(base, "device"), encode_phase(base, "int8"), encode_phase(base, "cpu")
    assert device.weights == pytest.approx(2 * (linear + rest), rel=1e-3)
    assert eight.weights == pytest.approx(linear + 5 * rows + 2 * rest, rel=1e-3)
    assert (host.peak, device.host, eight.host) == (0, 0, 0)
    assert host.host == device.peak - LIBRARY_BYTES
    table = {row[0]: row[1:] for row in rows_of_the_page('| `"')}
    assert table['`"device"`'][tokens == 512] == f"{device.peak / GIB:.1f}"
    assert table['`"int8"`'][tokens == 512] == f"{eight.peak / GIB:.1f}"
    assert table['`"cpu"`'][2].split(" and ")[tokens == 512] == f"{host.host / GIB:.1f}"


def rows_of_the_page(start: str) -> list[list[str]]:
    """Cells of the lines of docs/training.md that begin so."""
    lines = (ROOT / "docs" / "training.md").read_text().splitlines()
    return [line.strip("| ").split(" | ") for line in lines if line.startswith(start)]


@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", [pytest.param(512, marks=pytest.mark.slow), 1024])
def test_flux_devs_decoding_takes_what_the_page_says(side: int, batch: int) -> None:
    settings = sampling_settings(recipe(model={"height": side, "width": side}))
    whole, tiled = (passes.decode_pass(settings, batch, tiles).at_peak["activations"] for tiles in (False, True))
    assert tiled == whole if side == 512 else tiled < 0.3 * whole
    (cells,) = rows_of_the_page(f"| {side} x {side} |")
    assert cells[1:][2 * (batch == 4) :][:2] == [f"{n / GIB:.1f}" for n in (whole, tiled)]


# --- everything else on the tiny model -------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["lora", "full"])
def test_weights_gradients_and_state_of_the_tiny_model_are_the_closed_form(train: str) -> None:
    small = tiny(model={"train": train})
    transformer: Any = Flux().spec.tiny().transformer
    prepare_transformer(Flux().spec, transformer, small.model, small.lora, "none")
    trained = [p for p in transformer.parameters() if p.requires_grad]

    def rounded(tensors: Any, bytes_each: int = 4) -> int:
        return sum(-(-t.numel() * bytes_each // 512) * 512 for t in tensors)

    update = plan(small).phase("update")
    assert update.weights == rounded(transformer.parameters()) + rounded(Flux().spec.tiny().vae.parameters())
    assert update.gradients == rounded(trained)
    assert update.optimizer == 8 * sum(p.numel() for p in trained)
    eight_bit = plan(recipe_with(small, "update", optimizer="adamw8bit")).phase("update")
    assert eight_bit.optimizer < update.optimizer / 3.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizer_state_is_what_the_optimizer_makes(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(64, 128, dtype=dtype))
    optimizer = build_optimizer([parameter], UpdateConfig())
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    made = sum(t.nbytes for key, t in optimizer.state_of(parameter).items() if key != "step")
    size = allocated(parameter.nbytes)
    sizes = Sizes(parameter.numel(), size, block_bytes=0, largest_block=0, largest=parameter.numel())
    assert optimizer_bytes(tiny(), sizes).device == made
    on_host = optimizer_bytes(recipe_with(tiny(), "update", optimizer="adamw_cpu"), sizes)
    assert on_host.device == 0
    assert on_host.host == (12 + 4) * parameter.numel()  # master, two moments, and a gradient


def encode_phase(base: Recipe, encoders: Encoders) -> Phase:
    return _encode(recipe_with(base, "prompts", encoders=encoders))


def test_text_encoders_in_8_bits_are_planned_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    passes.encode_pass.cache_clear()
    small = tiny(prompts={"max_tokens": 512})  # T5 is the larger one then
    assert 0 < encode_phase(small, "int8").peak < encode_phase(small, "device").peak


def test_tiles_that_are_not_decoded_take_the_memory_that_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "TILE", 32)
    wide = tiny(model={"height": 56, "width": 40}, sampler={"decode_batch": 2})

    def peak() -> Pass:
        passes.decode_pass.cache_clear()
        return replace(passes.decode_pass(sampling_settings(wide), 2, True), flops=0)  # which are fewer

    few = peak()
    with monkeypatch.context() as patched:
        patched.setattr(FluxSpec, "decode_last_tiles", lambda *_: None)
        assert few == peak()
    assert few.peak < passes.decode_pass(sampling_settings(wide), 2, False).peak
    passes.decode_pass.cache_clear()


def test_8_bit_state_is_what_torchao_makes() -> None:
    optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    parameter = nn.Parameter(torch.zeros(64, 4096, dtype=torch.bfloat16))
    states = [optim.AdamW8bit([parameter])._new_buffer(parameter, signed) for signed in (True, False)]
    made = sum(part.nbytes for s in states for part in (s.codes, s.scale))  # and a table of 256 values
    sizes = Sizes(parameter.numel(), parameter.nbytes, block_bytes=0, largest_block=0, largest=parameter.numel())
    assert optimizer_bytes(recipe_with(tiny(), "update", optimizer="adamw8bit"), sizes).device == made


def test_a_pipeline_folder_is_planned_from_its_config_files(tmp_path: Path) -> None:
    folder = make_tiny_flux(tmp_path / "tiny")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()  # only configurations are read
    small = tiny()
    assert plan(recipe_with(small, "model", path=str(folder))).phases == plan(small).phases


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("transformer", "num_layers", 10**9),
        ("transformer", "num_single_layers", 10**9),
        ("transformer", "in_channels", 10**12),
        ("transformer", "attention_head_dim", 0),
        ("transformer", "joint_attention_dim", "32"),
        ("vae", "block_out_channels", [8, 10**9]),
        ("vae", "block_out_channels", [8] * 1000),
        ("vae", "layers_per_block", 10**9),
        ("text_encoder", "num_hidden_layers", 10**9),
        ("text_encoder_2", "num_layers", -1),
        ("scheduler", "num_train_timesteps", 10**12),
    ],
)
def test_absurd_sizes_of_a_pipeline_are_named_before_anything_is_built(
    tmp_path: Path, part: str, key: str, value: Any
) -> None:
    folder = make_tiny_flux(tmp_path / "tiny")
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    message = rf"{re.escape(str(file))}: {key} must be a whole number in \[\d, \d+\], got .{{,90}}: download it again"
    assert re.fullmatch(message, "; ".join(pipeline_problems(folder, PARTS)))
    if part != "scheduler":  # which the planner does not read
        with pytest.raises(ValueError, match=f"^model.path: {message}$"):
            plan(recipe_with(tiny(), "model", path=str(folder)))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [("vae", "act_fn", 3), ("vae", "scaling_factor", "x"), ("text_encoder", "hidden_act", "no"),
     ("transformer", "axes_dims_rope", [2, 2, 2])],
)  # fmt: skip
def test_odd_settings_of_a_pipeline_are_named_on_one_line(tmp_path: Path, part: str, key: str, value: Any) -> None:
    folder = make_tiny_flux(tmp_path / "tiny")
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    odd = recipe_with(tiny(), "model", path=str(folder))
    with pytest.raises(ValueError, match=rf"^model\.path: what {folder}\S* describes cannot be planned \(\w+: .+\)"):
        plan(odd)


def test_parts_of_a_batch_that_are_not_decoded_take_the_memory_that_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def peaks() -> list[int]:
        passes.decode_pass.cache_clear()
        cases = ((15, 1), (16, 3), (20, 4))
        return [passes.decode_pass(sampling_settings(many(batch)), part).peak for batch, part in cases]

    def many(batch: int) -> Recipe:
        return tiny(sampler={"batch_size": batch}, prompts={"per_epoch": batch})

    few = peaks()
    with monkeypatch.context() as patched:
        patched.setattr(passes, "DECODED_PARTS", 10**6)
        assert few == peaks()
    thousands = passes.decode_pass(sampling_settings(many(65_536)), 1)  # in seconds, not in hours
    assert thousands.peak > 65_536 * 3 * 64**2


def test_trajectories_are_counted_where_they_are_stored() -> None:
    small = tiny()
    stored = 2 * 4 * 2 * 3 * (8 * 8) * 16 * 4  # prompts, group, steps, tensors, tokens, channels, bytes
    on_device, on_host = plan(small), plan(recipe_with(small, "sampler", store="cpu"))
    difference = on_device.phase("update").trajectories - on_host.phase("update").trajectories
    assert difference == stored
    assert on_device.phase("update").host == 0
    assert on_host.phase("update").host == stored  # a power of two for each rollout batch
    assert on_device.phase("decode").trajectories > stored
    with_reference = plan(recipe_with(small, "objective", kl_weight=0.1)).phase("decode").trajectories
    assert with_reference - on_device.phase("decode").trajectories == (stored + stored // 2) // 3


def test_images_after_each_step_are_counted_while_they_wait_to_be_decoded() -> None:
    small = tiny(sampler={"sde_steps": 3, "num_steps": 4, "group_size": 4, "batch_size": 4})
    per_step = replace(small, advantages=advantages_config("vgpo"))
    plain, more = plan(small), plan(per_step)
    image = 4 * (8 * 8) * 16 * 4  # images, tokens, channels, bytes
    for name in ("rollout", "decode"):
        difference = more.phase(name).trajectories - plain.phase(name).trajectories
        assert difference == 2 * 2 * image  # of two rollout batches; the last image of each is there anyway
    assert more.phase("update") == plain.phase("update")
    (note,) = set(more.notes) - set(plain.notes)
    assert "advantages.name = vgpo: 3 images per sample wait" in note
    assert "24 per epoch in place of 8" in note


@pytest.mark.parametrize("name", ["tempflow", "noise_level"])
def test_weights_of_the_schedule_are_planned_as_others(name: str) -> None:
    small = tiny()
    weighted = recipe_with(small, "objective", reweight=name)
    assert plan(weighted).peak == pytest.approx(plan(small).peak, rel=1e-3)


def test_earlier_rollouts_are_counted_where_they_are_stored() -> None:
    one = 2 * 4 * 2 * 3 * (8 * 8) * 16 * 4  # prompts, group, steps, tensors, tokens, channels, bytes
    on_device = {}
    for window in (1, 2, 3):
        small = tiny(objective={"name": "rpg", "window": window})
        on_device[window] = plan(small).phase("decode").trajectories
        on_host = plan(recipe_with(small, "sampler", store="cpu"))
        assert on_host.phase("decode").host == on_host.phase("update").host == window * one
        assert buffer_bytes(small) == (window - 1) * one
        assert any("objective.window" in note for note in on_host.notes) == (window > 1)
    assert on_device[3] - on_device[2] == on_device[2] - on_device[1] == one
    best = tiny(objective={"name": "op_grpo", "window": 3, "replayed": 0.5, "keep": 0.5})
    assert buffer_bytes(best) == 2 * one // 4  # of two rollouts, half the images, and half of their steps
    fresh = plan(recipe_with(best, "objective", window=1))
    grown = {
        name: plan(best).phase(name).trajectories - fresh.phase(name).trajectories for name in ("decode", "update")
    }
    assert grown == {"decode": one // 2, "update": one // 2 + one // 4}  # and a copy of what is replayed


def test_copies_of_weights_are_counted_where_they_wait() -> None:
    full = tiny(model={"train": "full"}, objective={"kl_weight": 0.1}, update={"ema_decay": 0.99})
    plain = plan(tiny(model={"train": "full"})).phase("update")
    n = weights_of(as_built(full.model), full.lora).trained
    device = plan(full).phase("update")
    host = plan(recipe_with(full, "update", copies="cpu")).phase("update")
    assert device.weights - plain.weights == 4 * n.count + n.n_bytes
    assert host.weights == plain.weights
    assert host.host == 4 * n.count + n.n_bytes


def test_what_objectives_of_final_latents_store_is_counted() -> None:
    """Draws of each pass in the place of steps; an average that samples; the model before training without a KL."""
    steps = plan(tiny()).phase("update")
    for name, extra in (("awm", 0), ("diffusion_nft", 1)):
        recipe = replace(tiny(update={"inner_epochs": 3, "draws": 2}), objective=objective_config(name))
        drawn = plan(recipe).phase("update")
        stored = 2 * 4 * 2 * 3 * (8 * 8) * 16 * 4  # of 2 steps, as above; here 2 draws in each of 3 passes
        assert drawn.trajectories - steps.trajectories == 2 * stored
        n = weights_of(as_built(recipe.model), recipe.lora).trained
        assert drawn.weights - steps.weights == extra * 4 * n.count
    full = tiny(model={"train": "full"}, update={"draws": 2})
    n = weights_of(as_built(full.model), full.lora).trained
    plain, preferred = (plan(replace(full, objective=objective_config(name))) for name in ("awm", "dgpo"))
    assert preferred.phase("update").weights - plain.phase("update").weights == n.n_bytes


def test_more_processes_take_buckets_or_shares() -> None:
    one = plan(tiny(model={"train": "full"})).phase("update")
    ddp = plan(tiny(model={"train": "full"}, hardware={"processes": 2})).phase("update")
    assert ddp.gradients == 2 * one.gradients
    sharded = plan(tiny(model={"train": "full"}, hardware={"processes": 2, "sharding": "fsdp2"})).phase("update")
    assert one.optimizer / 2 < sharded.optimizer < 0.8 * one.optimizer


def test_peaks_rise_with_the_batch_and_fall_with_recomputation() -> None:
    small = tiny()
    more = recipe_with(small, "update", micro_batch=8)
    assert plan(more).phase("update").activations > 1.5 * plan(small).phase("update").activations - 64 * 2**20
    unfused = update_pass(
        PassSettings(as_built(replace(small.model, fuse=False)), small.lora, small.objective, 32, 8, "none")
    )
    runs = [unfused] + [
        update_pass(PassSettings(as_built(small.model), small.lora, small.objective, 32, 8, level))
        for level in recompute_levels(fuse=True)
    ]
    for more, less in itertools.pairwise(runs):
        assert less.kept < more.kept
        assert less.peak < more.peak or less is runs[-1]  # too few blocks for it
    assert runs[-1].kept < 0.3 * runs[1].kept
    sampled = rollout_pass(PassSettings(as_built(small.model), small.lora, objective_config(), 32, 8, "none"))
    assert sampled.at_peak["activations"] < runs[1].kept


def test_compiled_blocks_save_for_backward_in_a_rollout_one_at_a_time() -> None:
    """By the wrapper that a run has, without the compiler: what a block saves is freed before the next one runs."""
    small = tiny(model={"height": 256, "width": 256})
    compiled = recipe_with(small, "model", compile="blocks")
    before = torch._dynamo.utils.counters["frames"]["total"]
    plain, *rollouts = (
        rollout_pass(sampling_settings(each, level)).at_peak["activations"]
        for each, level in [(small, "none"), *((compiled, level) for level in recompute_levels(fuse=True))]
    )
    assert torch._dynamo.utils.counters["frames"]["total"] == before
    update = update_pass(PassSettings(as_built(small.model), small.lora, small.objective, 32, 4, "none"))
    of_a_block = [
        sum(label.n_bytes for label in update.kept_tensors if label.place == place)
        for place in ("double 0", "single 0", "single 1")
    ]
    assert 0.3 * max(of_a_block) < rollouts[0] - plain < 1.1 * max(of_a_block) < 0.6 * sum(of_a_block)
    none, pointwise, mlp, block, offload = rollouts
    assert none > pointwise >= mlp > block >= plain > 0.99 * block
    assert offload <= block
    planned = [plan(recipe_with(each, "model", recompute="none")).phase("rollout") for each in (small, compiled)]
    assert planned[1].activations - planned[0].activations == rollouts[0] - plain


@pytest.mark.parametrize("fuse", [True, False])
def test_offloaded_checkpoints_are_counted_on_the_host(fuse: bool, deep: str) -> None:
    """Of five blocks, the first one's inputs need no gradient, and the last one's stay."""
    small = tiny(model={"path": deep, "fuse": fuse}, update={"micro_batch": 8})
    block, offload = (
        plan(recipe_with(small, "model", recompute=level)).phase("update") for level in ("block", "offload")
    )
    runs = [
        update_pass(PassSettings(as_built(small.model), small.lora, small.objective, 32, 8, level))
        for level in ("block", "offload")
    ]
    image, text = 8 * 64 * 64 * 4, 8 * 32 * 64 * 4
    checkpoint = image + text
    assert runs[0].kept - runs[1].kept == 3 * checkpoint
    # The last one's have a copy, too. Single blocks after the first join image and text in 1.5 powers of two.
    assert runs[1].host == offload.host - block.host == checkpoint + 3 * 2 * image
    assert runs[0].host == block.host == 0
    # While the last block is recomputed, the inputs of the block before are there again. Unfused blocks then take more
    # somewhere else.
    saved = block.activations - offload.activations
    assert saved == 2 * checkpoint if fuse else 0 < saved < 2 * checkpoint


@pytest.mark.parametrize("fuse", [True, False])
def test_auto_takes_the_fastest_level_that_fits(fuse: bool, deep: str) -> None:
    model = {"path": deep, "fuse": fuse, "recompute": "auto"}
    small = tiny(model=model, update={"micro_batch": 128}, sampler={"batch_size": 8, "group_size": 32})
    levels = recompute_levels(fuse)
    peaks = [plan(recipe_with(small, "model", recompute=level)).phase("update").peak for level in levels]
    for level, next_level, peak in zip(levels, [*levels[1:], levels[-1]], peaks, strict=True):
        roomy = recipe_with(small, "hardware", memory_gb=peak / 0.949e9)
        assert choose_recompute(roomy) == level
        found = plan(roomy)
        assert (found.recompute, found.phase("update").peak) == (level, peak)
        assert f'model.recompute = "auto" is "{level}": the fastest that leaves 5%' in found.notes[0]
        tight = recipe_with(small, "hardware", memory_gb=peak / 0.951e9)  # fits, but without the reserve of 5%
        assert choose_recompute(tight) == next_level
    assert 'is "offload": the smallest; none leaves 5%' in plan(tight).notes[0]
    assert choose_recompute(recipe_with(tight, "model", recompute="none")) == "none"
    assert (plan(small).fused is not None) == fuse


@pytest.mark.parametrize("how", ["int8", "float8", "nf4"])
def test_quantized_weights_take_their_bytes_and_are_dequantized_where_a_matmul_needs_them(how: Any) -> None:
    small = tiny(model={"quantize": how, "recompute": "pointwise"})
    full = recipe_with(small, "model", quantize="none")
    held, moved = 0, 0
    transformer = pipeline_skeleton(Flux().spec, small.model, small.lora, "pointwise").transformer
    for name, layer in transformer.named_modules():
        if isinstance(layer, QuantizedLinear):
            codes = sum(t.nbytes for t in layer.quantized if t is not None)
            held += sum(allocated(t.nbytes) for t in layer.quantized if t is not None)
            # Nothing before the first block is trained, nor what makes modulations.
            forward_alone = ".linear" in name or re.match(r"transformer_blocks.0.attn.(to|add)_[qkv]", name)
            moved += (1 if forward_alone else 2) * (codes + 4 * math.prod(layer.quantized.shape))
    assert update_bytes(small)[1] == moved
    assert update_bytes(full)[1] == 0
    weights = [plan(each).phase("update").weights for each in (full, small)]
    plain = sum(
        allocated(4 * math.prod(layer.quantized.shape))
        for layer in transformer.modules()
        if isinstance(layer, QuantizedLinear)
    )
    assert weights[0] - weights[1] == plain - held


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to plan"):
        plan(Recipe(model=ModelConfig(kind="digits"), rewards=(RewardConfig("digits"),)))
    with pytest.raises(ValueError, match=r'model\.path = "nobody/nothing" is neither'):
        plan(recipe(model={"path": "nobody/nothing"}))
    with pytest.raises(ValueError, match=r"model\.height must be a multiple of"):
        plan(tiny(model={"height": 60}))


def test_flops_of_an_update_are_those_of_its_matmuls() -> None:
    full = tiny(model={"train": "full"})
    transformer: Any = Flux().spec.tiny().transformer.requires_grad_(True)
    counts: dict[str, int] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda m, inputs, out, name=name: counts.__setitem__(name, 2 * out.numel() * m.in_features)
            )
    batch, tokens, text = 4, 64, 32
    transformer(
        hidden_states=torch.zeros(batch, tokens, 16),
        encoder_hidden_states=torch.zeros(batch, text, 32),
        pooled_projections=torch.zeros(batch, 32),
        timestep=torch.full((batch,), 0.5),
        guidance=torch.full((batch,), 3.5),
        img_ids=torch.zeros(tokens, 3),
        txt_ids=torch.zeros(text, 3),
    )
    attention = 3 * 4 * batch * 4 * (tokens + text) ** 2 * 16  # blocks, two matmuls, heads, tokens, channels
    inputs = sum(n for name, n in counts.items() if name in ("x_embedder", "context_embedder") or "linear_1" in name)
    forward = sum(counts.values()) + attention
    assert update_flops(full) == 3 * forward - inputs  # data needs no gradient
    assert rollout_flops(tiny(model={"train": "full"}, sampler={"batch_size": batch})) == forward
    assert update_flops(tiny(lora={"rank": 1})) < 0.9 * update_flops(full)  # frozen weights need none either


def test_pointwise_recomputes_no_matmul_and_mlp_only_the_first_feed_forward_layers() -> None:
    small = tiny(update={"micro_batch": 2})
    unfused = executed_flops(recipe_with(small, "model", fuse=False))
    executed = {
        level: executed_flops(recipe_with(small, "model", recompute=level)) for level in recompute_levels(fuse=True)
    }
    assert executed["none"] == executed["pointwise"] == unfused == update_flops(small)
    assert update_flops(recipe_with(small, "model", recompute="mlp")) == unfused  # what is needed, not what is done
    width, hidden, image, text, rank = 64, 256, 64, 32, 64
    doubles = (image + text) * (hidden * width + hidden * rank)  # with its adapter; single blocks have none there
    singles = 2 * (image + text) * hidden * width
    assert executed["mlp"] - unfused == 2 * 2 * (doubles + singles)
    assert executed["mlp"] < executed["block"] == executed["offload"]


def test_the_table_of_what_is_kept_adds_up() -> None:
    small = tiny()
    kept = kept_activations(recipe_with(small, "model", recompute="pointwise"))
    assert kept.total == sum(t.n_bytes * t.blocks for t in kept.tensors)
    rows = [line.split() for line in kept.table().splitlines()[2:]]
    for block in ("double", "single", "outside"):
        *parts, whole = [float(row[-1]) for row in rows if row[0] == block]
        assert sum(parts) == pytest.approx(whole, abs=0.01 * len(parts))
    text = compare_kept(small)
    assert "unfused blocks, recompute = none" in text
    assert all(f"fused blocks, recompute = {level}" in text for level in recompute_levels(fuse=True))
    with pytest.raises(ValueError, match="nothing to plan"):
        kept_activations(Recipe(model=ModelConfig(kind="digits"), rewards=(RewardConfig("digits"),)))
