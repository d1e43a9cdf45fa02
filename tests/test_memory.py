"""The memory planner: its counter against graphs done by hand, its passes against known numbers of Flux.1-dev."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastguard.backbones.flux import prepare_transformer
from fastguard.backbones.tiny import _pipeline, make_tiny_flux
from fastguard.config import (
    HardwareConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    PromptsConfig,
    Recipe,
    RewardConfig,
    SamplerConfig,
    UpdateConfig,
)
from fastguard.memory import choose_checkpointing, plan, update_flops
from fastguard.memory.live import LiveBytes, allocated, use_cuda_kernels
from fastguard.memory.passes import PassSettings, Sizes, as_built, rollout_pass, update_pass, weights_of
from fastguard.memory.phases import optimizer_bytes, planned_phases
from fastguard.optim import build_optimizer

GIB = 2**30
KIB = 2**10


def recipe(**sections: dict[str, Any]) -> Recipe:
    """Flux.1-dev with LoRA as in the public recipe, with fields of `sections` changed."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {"checkpointing": "on"},
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
        objective=ObjectiveConfig(**merged["objective"]),
        hardware=HardwareConfig(**merged["hardware"]),
        lora=LoraConfig(**merged["lora"]),
        rewards=(RewardConfig("jpeg_compressibility"),),
    )


def tiny(**sections: dict[str, Any]) -> Recipe:
    model = {"path": "tiny", "dtype": "float32", "height": 64, "width": 64, "checkpointing": "off"}
    small = {
        "prompts": {"per_epoch": 2, "max_tokens": 32},
        "sampler": {"num_steps": 4, "sde_steps": 2, "group_size": 4, "batch_size": 4, "decode_batch": 2},
        "update": {"minibatches": 1, "micro_batch": 4},
    }
    mine = {**small, **{k: {**small.get(k, {}), **v} for k, v in sections.items()}}
    return recipe(**{**mine, "model": {**model, **sections.get("model", {})}})


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


# --- Flux.1-dev: the known numbers -----------------------------------------------------------------------------------


def reference_settings(side: int, checkpointing: bool) -> PassSettings:
    """The reference measurement: adapters in bf16, 512 text tokens, one sample, RMSNorm taken apart as on a CPU."""
    return PassSettings(
        as_built(ModelConfig(height=side, width=side)), LoraConfig(), ObjectiveConfig(), max_tokens=512, micro_batch=1,
        checkpointing=checkpointing, accumulate=False, adapter_dtype=torch.bfloat16, cuda_kernels=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("side", "checkpointing", "kept", "peak"),
    [(1024, False, 24.3, 47.8), (1024, True, 1.5, 25.4), (512, False, 8.1, 31.4), (512, True, 0.5, 23.9)],
)
def test_flux_dev_with_bf16_adapters_takes_the_known_memory(
    side: int, checkpointing: bool, kept: float, peak: float
) -> None:
    trained = weights_of(as_built(ModelConfig()), LoraConfig()).trained.count
    assert trained == pytest.approx(179e6, rel=0.005)
    run = update_pass(reference_settings(side, checkpointing))
    # The known numbers are rounded to 0.1 GiB.
    assert run.at_peak["weights"] / GIB == pytest.approx(22.5, abs=0.05)
    assert run.kept / GIB == pytest.approx(kept, abs=0.06)
    adam = 2 * 2 * trained
    assert (run.peak + adam) / GIB == pytest.approx(peak, abs=0.06)


def test_lora_at_512_fits_in_30_gib_and_is_planned_within_a_minute() -> None:
    start = time.perf_counter()
    found = plan(recipe())
    assert time.perf_counter() - start < 60
    assert found.peak <= 30 * GIB
    assert found.fits
    assert found.suggestions == ()
    update = found.phase("update")
    assert update.weights / GIB == pytest.approx(22.17 + 0.668 + 0.156, abs=0.02)  # frozen, float32 adapters, VAE
    assert update.optimizer == 2 * 4 * 179_306_496
    assert update.gradients == 4 * 179_306_496
    assert [p.name for p in found.phases] == ["encode", "rollout", "decode", "update"]
    assert f"{update.peak / GIB:.2f}" in found.table().splitlines()[4]


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

    on_host = {p.name: p for p in planned_phases(recipe_with(full, "update", optimizer="adamw_cpu"), True)}["update"]
    assert on_host.optimizer == 0
    assert on_host.host == pytest.approx(12 * n, rel=0.01)
    masters = {p.name: p for p in planned_phases(recipe_with(full, "update", optimizer="adamw"), True)}["update"]
    assert masters.optimizer == 12 * n


def recipe_with(base: Recipe, section: str, **values: Any) -> Recipe:
    return replace(base, **{section: replace(getattr(base, section), **values)})


# --- everything else on the tiny model -------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["lora", "full"])
def test_weights_gradients_and_state_of_the_tiny_model_are_the_closed_form(train: str) -> None:
    small = tiny(model={"train": train})
    transformer: Any = _pipeline().transformer
    prepare_transformer(transformer, small.model, small.lora, checkpointing=False)
    trained = [p for p in transformer.parameters() if p.requires_grad]

    def rounded(tensors: Any, bytes_each: int = 4) -> int:
        return sum(-(-t.numel() * bytes_each // 512) * 512 for t in tensors)

    update = plan(small).phase("update")
    assert update.weights == rounded(transformer.parameters()) + rounded(_pipeline().vae.parameters())
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


def test_copies_of_weights_are_counted_where_they_wait() -> None:
    full = tiny(model={"train": "full"}, objective={"kl_weight": 0.1}, update={"ema_decay": 0.99})
    plain = plan(tiny(model={"train": "full"})).phase("update")
    n = weights_of(as_built(full.model), full.lora).trained
    device = plan(full).phase("update")
    host = plan(recipe_with(full, "update", copies="cpu")).phase("update")
    assert device.weights - plain.weights == 4 * n.count + n.n_bytes
    assert host.weights == plain.weights
    assert host.host == 4 * n.count + n.n_bytes


def test_more_processes_take_buckets_or_shares() -> None:
    one = plan(tiny(model={"train": "full"})).phase("update")
    ddp = plan(tiny(model={"train": "full"}, hardware={"processes": 2})).phase("update")
    assert ddp.gradients == 2 * one.gradients
    sharded = plan(tiny(model={"train": "full"}, hardware={"processes": 2, "sharding": "fsdp2"})).phase("update")
    assert one.optimizer / 2 < sharded.optimizer < 0.8 * one.optimizer


def test_peaks_rise_with_the_batch_and_fall_with_checkpointing() -> None:
    small = tiny()
    more = recipe_with(small, "update", micro_batch=8)
    assert plan(more).phase("update").activations > 1.5 * plan(small).phase("update").activations - 64 * 2**20
    on, off = (
        update_pass(PassSettings(as_built(small.model), small.lora, small.objective, 32, 8, checkpointing))
        for checkpointing in (True, False)
    )
    assert on.kept < 0.3 * off.kept
    assert on.peak < off.peak
    sampled = rollout_pass(PassSettings(as_built(small.model), small.lora, ObjectiveConfig(), 32, 8, False))
    assert sampled.at_peak["activations"] < off.kept


def test_auto_checkpoints_only_where_the_update_would_not_fit() -> None:
    small = tiny(model={"checkpointing": "auto"}, update={"micro_batch": 16}, sampler={"batch_size": 8})
    off = plan(recipe_with(small, "model", checkpointing="off")).phase("update").peak
    roomy = recipe_with(small, "hardware", memory_gb=off / 0.94e9)
    tight = recipe_with(small, "hardware", memory_gb=off / 0.96e9)  # fits, but without the reserve of 5%
    assert not choose_checkpointing(roomy)
    assert choose_checkpointing(tight)
    assert not plan(roomy).checkpointing
    found = plan(tight)
    assert found.checkpointing
    assert "auto" in found.notes[0]
    assert found.phase("update").peak < off
    assert choose_checkpointing(recipe_with(roomy, "model", checkpointing="on"))


def test_suggestions_are_planned_and_true() -> None:
    large = tiny(update={"micro_batch": 16}, sampler={"batch_size": 8})
    peak = plan(large).peak
    assert plan(large).phase("update").peak == peak
    tight = recipe_with(large, "hardware", memory_gb=0.95 * peak / 1e9)
    found = plan(tight)
    assert not found.fits
    assert "does not fit" in str(found)
    assert any(s.startswith('model.checkpointing = "on": peak') and s.endswith("fits") for s in found.suggestions)
    smaller = next(s for s in found.suggestions if s.startswith("update.micro_batch = "))
    value = int(smaller.split("= ")[1].split(":")[0])
    assert plan(recipe_with(tight, "update", micro_batch=value)).fits
    assert not plan(recipe_with(tight, "update", micro_batch=2 * value)).fits


def test_what_fits_only_together_is_said_so_and_what_never_fits_too() -> None:
    large = tiny(
        model={"height": 128, "width": 128}, update={"micro_batch": 4}, sampler={"batch_size": 1, "decode_batch": 1}
    )
    least = plan(recipe_with(recipe_with(large, "model", checkpointing="on"), "update", micro_batch=1)).peak
    suggestions = plan(recipe_with(large, "hardware", memory_gb=1.001 * least / 1e9)).suggestions
    assert all("not enough alone" in s for s in suggestions[:-1])
    assert suggestions[-1].startswith('model.checkpointing = "on" and update.micro_batch = 1: peak')
    assert suggestions[-1].endswith(", fits")
    assert plan(recipe_with(large, "hardware", memory_gb=0.01)).suggestions[-1].endswith("still does not fit")


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to plan"):
        plan(Recipe(model=ModelConfig(kind="digits"), rewards=(RewardConfig("digits"),)))
    with pytest.raises(ValueError, match=r'model\.path = "nobody/nothing" is neither'):
        plan(recipe(model={"path": "nobody/nothing"}))
    with pytest.raises(ValueError, match=r"model\.height must be a multiple of"):
        plan(tiny(model={"height": 60}))


def test_flops_of_an_update_are_those_of_its_matmuls() -> None:
    full = tiny(model={"train": "full"})
    transformer: Any = _pipeline().transformer.requires_grad_(True)
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
    assert update_flops(full) == 3 * (sum(counts.values()) + attention) - inputs  # data needs no gradient
    assert update_flops(tiny(lora={"rank": 1})) < 0.9 * update_flops(full)  # frozen weights need none either
