"""Quantized weights of a transformer: codes, files, a run on them, and models that others have quantized."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxPipeline, FluxTransformer2DModel
from helpers.flux_models import distance
from helpers.quantized_models import FORMATS, by_library, dequantized
from helpers.toys import MemoryRecorder, pool
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastguard.backbones import quantize as module
from fastguard.backbones.flux import Flux
from fastguard.backbones.folder import weights_to_load
from fastguard.backbones.pipeline.backbone import PipelineBackbone, blocks_of, load_pipeline
from fastguard.backbones.pipeline.encoding import encode_prompts
from fastguard.backbones.pipeline.policy import PipelinePolicy
from fastguard.backbones.pipeline.skeleton import pipeline_skeleton
from fastguard.backbones.quantize import (
    adopt_quantized,
    empty,
    format_of,
    load_quantized,
    quantize,
)
from fastguard.blocks.linear import QuantizedLinear
from fastguard.config import HardwareConfig, LoraConfig, ModelConfig, Recipe, SamplerConfig, UpdateConfig
from fastguard.errors import UserError
from fastguard.prompts import EncodedPrompts
from fastguard.recipe import find_recipe, load_recipe
from fastguard.train.build import gather_prompts
from fastguard.train.rollout import ode_schedule, rollout
from fastguard.train.trainer import train
from fastguard.utils.sharding import trained_parameters

CPU = torch.device("cpu")
FP32 = torch.float32


# --- one weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", FORMATS)
def test_values_are_the_libraries(how: Any, dtype: torch.dtype) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = quantize(weight, how)
    layer = by_library(_holder(weight), how).transformer_blocks[0].layer
    if how == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        want = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    else:
        want = layer.weight.dequantize()
    got = found.dequantize(dtype, "torch")
    assert torch.equal(got, want) or distance(got, want) < 1e-7 + torch.finfo(dtype).eps * (dtype != FP32)
    assert distance(got, weight) < {"int8": 0.01, "float8": 0.05, "nf4": 0.12}[how]
    shapes = [(t.shape, t.dtype) for t in found]
    assert [(t.shape, t.dtype) for t in empty(96, 128, how)] == shapes  # what the planner counts


def _holder(weight: Tensor) -> Any:
    model: Any = nn.Module()
    block: Any = nn.Module()
    block.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    block.layer.weight = nn.Parameter(weight, requires_grad=False)
    model.transformer_blocks, model.single_transformer_blocks = nn.ModuleList([block]), nn.ModuleList()
    return model


@pytest.mark.parametrize("how", FORMATS)
def test_a_missing_library_is_named(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao.quantization", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"model.quantize = .{how}. needs {module.LIBRARIES[how]}.*\[lowbit\]"):
        module.require_library_of_model(how)


# --- files


class Blank:
    """Loads the transformer of a pipeline, and says which weights were quantized for it."""

    def __init__(self, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config = json.loads((folder / "transformer" / "config.json").read_text())
        self.files = weights_to_load(folder / "transformer", "diffusion_pytorch_model")
        self.cache, self.quantized, self.fails_after, self.required = cache, 0, 10**9, 0
        real = module.quantize

        def spy(weight: Tensor, how: Any) -> Any:
            self.quantized += 1
            if self.quantized > self.fails_after:
                raise KeyboardInterrupt
            return real(weight, how)

        monkeypatch.setattr(module, "quantize", spy)
        monkeypatch.setattr(module, "require_library_of_model", self.require)

    def __call__(self, how: Any = "int8", dtype: torch.dtype = FP32) -> Any:
        with torch.device("meta"):
            model: Any = FluxTransformer2DModel.from_config(self.config)
        load_quantized(model, blocks_of(Flux().spec, model), self.files, how, dtype, self.cache, CPU)
        assert not any(parameter.is_meta for parameter in model.parameters())
        return model

    def require(self, how: Any) -> None:
        self.required += 1

    def count(self, how: Any = "int8", dtype: torch.dtype = FP32) -> int:
        """Weights that are quantized by this load."""
        before = self.quantized
        self(how, dtype)
        return self.quantized - before


@pytest.fixture
def blank(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Blank:
    return Blank(folder, tmp_path / "cache", monkeypatch)


def test_weights_are_quantized_once(blank: Blank) -> None:
    first = blank()
    layers = [layer for layer in first.modules() if isinstance(layer, QuantizedLinear)]
    assert blank.quantized == len(layers) == 26
    assert blank.required == 4
    again = blank()
    assert (blank.quantized, blank.required) == (len(layers), 4)
    for (name, got), (_, want) in zip(again.state_dict().items(), first.state_dict().items(), strict=True):
        assert torch.equal(got, want), name
    plain = dequantized(FluxTransformer2DModel.from_pretrained(blank.files[0].parent), first).float()
    outside = {name: tensor for name, tensor in plain.state_dict().items() if "blocks" not in name}
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in outside.items())
    # Other formats and dtypes have files of their own, and so have other weights.
    assert [blank.count("nf4"), blank.count("int8", torch.bfloat16), blank.count()] == [26, 26, 0]
    changed = blank.files[0].stat().st_mtime_ns
    save_file({name: 2 * t for name, t in load_file(blank.files[0]).items()}, blank.files[0], {"format": "pt"})
    os.utime(blank.files[0], ns=(changed, changed))  # as copies of two models may have it
    assert blank.count() == 26


def test_weights_that_are_not_there_are_named(blank: Blank) -> None:
    weights = load_file(blank.files[0])
    del weights["proj_out.bias"]
    save_file(weights, blank.files[0], {"format": "pt"})
    with pytest.raises(UserError, match=r"transformer lacks weights .*\(proj_out.bias\): download it again"):
        blank()


def test_the_files_of_an_index_are_loaded_and_no_others(blank: Blank) -> None:
    name = "diffusion_pytorch_model"
    folder = blank.files[0].parent
    index = {"weight_map": {"a": f"{name}-00002-of-00002.safetensors", "b": f"{name}-00001-of-00002.safetensors"}}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    found = weights_to_load(folder, name)
    assert [file.name for file in found] == sorted(index["weight_map"].values())


def test_a_killed_start_goes_on_and_damage_is_mended(blank: Blank) -> None:
    blank.fails_after = 17
    with pytest.raises(KeyboardInterrupt):
        blank()
    blank.fails_after = 10**9
    kept = sorted(file.name for file in blank.cache.rglob("*.safetensors"))
    assert kept == ["transformer_blocks.0.safetensors"]
    assert blank.count() == 26 - 14
    assert sorted(file.stem for file in blank.cache.rglob("*.safetensors")) == [
        "rest", "single_transformer_blocks.0", "single_transformer_blocks.1", "transformer_blocks.0",
    ]  # fmt: skip
    assert not [file for file in blank.cache.rglob("*") if file.name.startswith(".part")]
    damaged = next(blank.cache.rglob("single_transformer_blocks.1.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    assert blank.count() == 6
    assert blank.count() == 0


def test_neither_host_nor_device_holds_more_than_a_block(blank: Blank, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most = 0
    real = module.StoredTensors.__getitem__

    def spy(stored: Any, name: str) -> Tensor:
        nonlocal most
        tensor = real(stored, name)
        key = id(tensor)
        alive.add(key)
        weakref.finalize(tensor, alive.discard, key)
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(module.StoredTensors, "__getitem__", spy)
    blank("nf4")
    config = FluxTransformer2DModel.from_config(blank.config)
    assert (
        0
        < most
        <= max(len(block.state_dict()) for block in blocks_of(Flux().spec, config).values())
        < len(config.state_dict())
    )


def test_weights_that_are_not_finite_are_named(blank: Blank) -> None:
    weights = load_file(blank.files[0])
    weights["single_transformer_blocks.1.proj_mlp.weight"][3, 3] = float("nan")
    save_file(weights, blank.files[0], {"format": "pt"})
    with pytest.raises(UserError, match=r"single_transformer_blocks.1.proj_mlp.weight holds NaN or infinity"):
        blank()


# --- a run


@pytest.fixture
def recipe(folder: Path, tiny_flux: Path) -> Recipe:
    tiny = load_recipe(find_recipe("flux_tiny"))
    return replace(
        tiny,
        run=replace(tiny.run, epochs=2, trackers=()),
        model=replace(tiny.model, path=str(folder)),
        prompts=replace(tiny.prompts, cache=tiny_flux.parent / "prompts"),
        objective=replace(tiny.objective, kl_weight=0.01),
        update=replace(
            tiny.update, inner_epochs=1, ema_decay=0.5, ema_every=2, learning_rate=1e-3, micro_batch=16
        ),
        monitor=type(tiny.monitor)(),
    )  # fmt: skip


def encode(recipe: Recipe) -> EncodedPrompts:
    path, cache = recipe.model.path, recipe.prompts.cache
    return encode_prompts(Flux().spec, gather_prompts(recipe).all, path, recipe.prompts.max_tokens, cache, FP32, CPU)


def load(recipe: Recipe, how: Any, dtype: str = "float32", fuse: bool = True) -> PipelineBackbone:
    chosen = replace(recipe, model=replace(recipe.model, quantize=how, dtype=dtype, fuse=fuse))
    encoded = encode(recipe)
    torch.manual_seed(0)
    return load_pipeline(Flux().spec, chosen, encoded, len(encoded.prompts), CPU, "pointwise" if fuse else "none")


def dark(images: Tensor, prompts: Any, metadata: Any) -> Tensor:
    return -images.float().mean((1, 2, 3))


@pytest.mark.parametrize(("how", "dtype"), [*((how, "float32") for how in FORMATS), ("nf4", "bfloat16")])
def test_training_with_a_kl_and_an_average(recipe: Recipe, how: Any, dtype: str) -> None:
    backbone = load(recipe, how, dtype)
    before = {name: p.detach().clone() for name, p in backbone.policy.named_parameters()}
    with pool(recipe, backbone, dark) as rewards:
        logs = train(backbone, recipe, rewards, MemoryRecorder(), Accelerator(cpu=True))
    assert logs[0].updates[0].ratio.bias == 0  # rollout and update share the quantized weights
    assert logs[0].updates[0].ratio.kl == 0
    assert logs[1].updates[-1].ratio.kl > 0
    moved = {name for name, p in backbone.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= set(trained_parameters(backbone.policy))
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize("how", FORMATS)
def test_exported_adapters_load_on_the_model_in_full_precision(
    recipe: Recipe, folder: Path, tmp_path: Path, how: Any
) -> None:
    backbone = load(recipe, how)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trained_parameters(backbone.policy).items():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    backbone.export(tmp_path, {n: p.detach() for n, p in trained_parameters(backbone.policy).items()})
    pipe: Any = FluxPipeline.from_pretrained(folder)
    plain = _images(backbone, pipe.transformer)
    pipe.load_lora_weights(tmp_path)
    loaded, trained = _images(backbone, pipe.transformer), _images(backbone, None)
    assert distance(loaded, trained) < 0.5 * distance(plain, trained)
    assert distance(loaded, dequantized_images(backbone, folder, tmp_path)) < 0.5 * distance(plain, trained)


def dequantized_images(backbone: PipelineBackbone, folder: Path, adapters: Path) -> Tensor:
    """By plain diffusers, with the values of the quantized weights."""
    pipe: Any = FluxPipeline.from_pretrained(folder)
    for name, layer in backbone.policy.transformer.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain = pipe.transformer.get_submodule(name.removesuffix(".base_layer"))
            plain.weight.data = layer.quantized.dequantize(FP32, "torch")
    pipe.load_lora_weights(adapters)
    images = _images(backbone, pipe.transformer)
    assert distance(images, _images(backbone, None)) < 1e-4
    return images


def _images(backbone: PipelineBackbone, transformer: Any) -> Tensor:
    """Final latents of two prompts, by another transformer if one is given."""
    backbone.load_prompts([0, 1])
    policy = backbone.policy
    if transformer is not None:
        policy = PipelinePolicy(Flux().spec, transformer, backbone._grid, backbone._recipe.model, guided=False)
        policy.row_of, policy.text = (
            backbone.policy.row_of, backbone.policy.text,
        )  # fmt: skip
    prompts = torch.tensor([0, 1])
    seeds = torch.arange(2 * 5).view(2, 5)
    return rollout(
        policy, prompts, seeds, backbone.latent_shape, ode_schedule(SamplerConfig(shift=3.0), backbone.sigmas, 4)
    ).latents


def test_what_cannot_be_quantized_is_refused(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r'quantize = "nf4" takes frozen weights, and train = "full"'):
        ModelConfig(quantize="nf4", train="full")
    with pytest.raises(UserError, match=r'model.quantize = "int8" cannot be sharded.*hardware.sharding = "none"'):
        replace(
            recipe, model=ModelConfig(quantize="int8"), hardware=HardwareConfig(sharding="fsdp2"), update=UpdateConfig()
        )


# --- models that others have quantized


@pytest.mark.parametrize("how", FORMATS)
def test_layers_of_the_libraries_are_adopted_without_a_copy(folder: Path, how: str) -> None:
    model = by_library(FluxTransformer2DModel.from_pretrained(folder / "transformer"), how)
    want = {name: layer for name, layer in model.named_modules() if type(layer).__name__ in ("Linear4bit", "Linear")}
    adopt_quantized(model)
    adopted = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(adopted) == 26
    for name, layer in adopted.items():
        old: Any = want[name].weight
        codes = old.data if how == "nf4" else old.qdata
        assert layer.weight.untyped_storage()._cdata == codes.untyped_storage()._cdata
        assert layer.bias.data_ptr() == want[name].bias.data_ptr()


def test_tensors_that_round_activations_are_not_adopted(folder: Path) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    from fastguard.blocks.linear import linear_weights

    layer = nn.Linear(64, 64)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    model = nn.Sequential(layer)
    adopt_quantized(model)
    assert model[0] is layer
    assert "has a weight of type" in str(linear_weights(layer, FP32, autocast=False))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_codes_in_numbers_of_other_dtypes_are_adopted(storage: torch.dtype) -> None:
    import bitsandbytes

    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    layer = bitsandbytes.nn.Linear4bit(64, 96, bias=False, quant_type="nf4", quant_storage=storage)
    params = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", quant_storage=storage)
    layer.weight = params._quantize("cpu")
    model = nn.Sequential(layer)
    adopt_quantized(model)
    adopted: Any = model[0]
    assert torch.equal(adopted.quantized.dequantize(FP32, "torch"), quantize(weight, "nf4").dequantize(FP32, "torch"))


def test_8_bit_layers_of_bitsandbytes_are_adopted() -> None:
    import bitsandbytes

    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    layer = bitsandbytes.nn.Linear8bitLt(64, 96, bias=False, has_fp16_weights=False)
    codes, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    layer.weight = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)
    model = nn.Sequential(layer)
    adopt_quantized(model)
    adopted: Any = model[0]
    assert isinstance(adopted, QuantizedLinear)
    assert distance(adopted.quantized.dequantize(FP32, "torch"), weight) < 0.01


@pytest.fixture
def stored_quantized(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The pipeline's folder, its transformer as diffusers writes one in 4 bits; on the CPU it asks for a GPU."""
    from diffusers import BitsAndBytesConfig
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *args, **kwargs: None)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model: Any = FluxTransformer2DModel.from_pretrained(
        folder / "transformer", quantization_config=config, device_map={"": "cpu"}
    )
    for file in (folder / "transformer").iterdir():
        file.unlink()
    model.save_pretrained(folder / "transformer")
    return folder


def test_a_pipeline_that_diffusers_has_quantized(stored_quantized: Path, recipe: Recipe) -> None:
    assert load(recipe, "none", "bfloat16").dtype == torch.bfloat16
    backbone = load(recipe, "none")
    layers = [layer for layer in backbone.policy.transformer.modules() if isinstance(layer, QuantizedLinear)]
    assert len(layers) >= 26
    assert {layer.kind for layer in layers} == {"blocks"}
    with pool(recipe, backbone, dark) as rewards:
        logs = train(backbone, recipe, rewards, MemoryRecorder(), Accelerator(cpu=True))
    assert logs[0].updates[0].ratio.bias == 0
    with pytest.raises(UserError, match=r'model.quantize = "int8".*is quantized already \(nf4\)'):
        load(recipe, "int8")
    with pytest.raises(UserError, match=r'model.train = "full", but the transformer .* set model.train = "lora"'):
        load(replace(recipe, model=replace(recipe.model, train="full")), "none")
    planned = pipeline_skeleton(Flux().spec, replace(recipe.model, quantize="none"), LoraConfig(), "none").transformer
    assert sum(isinstance(layer, QuantizedLinear) for layer in planned.modules()) == 26


def test_formats_of_diffusers_configurations() -> None:
    def settings(**values: Any) -> dict[str, Any]:
        return {"quantization_config": values}

    assert format_of({}) is None
    assert format_of(settings(quant_method="bitsandbytes", load_in_4bit=True)) == "nf4"
    assert format_of(settings(quant_method="bitsandbytes", load_in_8bit=True)) == "int8"
    assert format_of(settings(quant_method="torchao", quant_type="int8wo")) == "int8"
    kind = {"default": {"_type": "Float8WeightOnlyConfig", "_data": {}}}
    assert format_of(settings(quant_method="torchao", quant_type=kind)) == "float8"
    for odd in ({"quant_method": "gguf"}, {"quant_method": "torchao", "quant_type": "Int8DynamicActivationInt4Weight"}):
        with pytest.raises(UserError, match=f"quantized by {odd['quant_method']}"):
            format_of(settings(**odd))
