"""Linear layers with frozen weights in 8 or 4 bits, fused and not: values, gradients, what is saved for backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.flux_models import (
    LEVELS,
    ONE_OF_EACH,
    Result,
    assert_agree,
    distance,
    handed_bytes,
    make_inputs,
    make_transformer,
    run,
)
from helpers.quantized_models import FORMATS, by_library, dequantized, quantized, saved_bytes, with_adapters
from torch import nn
from torch.utils._pytree import tree_map

import fastguard as fg
from fastguard.blocks.linear import QuantizedLinear, linear_weights

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def pair(how: str) -> tuple[Any, Any]:
    """A quantized model with adapters, and the same with dequantized weights in float64."""
    model = quantized(make_transformer(), how)
    reference = dequantized(make_transformer(), model)
    return with_adapters(model), with_adapters(reference).double()


@pytest.mark.parametrize("level", ["unfused", *LEVELS])
@pytest.mark.parametrize("how", FORMATS)
def test_gradients_are_those_of_the_dequantized_weights(how: str, level: str) -> None:
    model, reference = pair(how)
    if level != "unfused":
        report = fg.fuse(model, recompute=level)
        assert (len(report.fused), report.left, report.kept) == (4, {}, {})
    assert_near(run(model), run(reference, make_inputs(FP64)), 3e-6)


@pytest.mark.parametrize("how", FORMATS)
def test_float32_adapters_on_bfloat16_activations(how: str) -> None:
    """As a run has them: as exact as with the dequantized weights in bfloat16."""
    model = quantized(make_transformer(), how)
    models = [with_adapters(each.to(BF16)) for each in (model, dequantized(make_transformer(), model))]
    for each in models:
        fg.fuse(each)
    got, want = (run(each, make_inputs(BF16)) for each in models)
    assert_agree(got, want, 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("how", FORMATS)
def test_no_more_is_saved_for_backward(how: str, level: str) -> None:
    """Beside the parameters: no dequantized weight, and the input of no layer that saves none in full precision."""
    kept = []
    for model in (with_adapters(make_transformer()), pair(how)[0]):
        fg.fuse(model, recompute=level)
        kept.append(saved_bytes(model, make_inputs()))
    (full, _), (found, shapes) = kept
    assert 0 < found <= 1.01 * full
    weights = {tuple(layer.quantized.shape) for layer in model.modules() if isinstance(layer, QuantizedLinear)}
    assert not weights & {shape for shape in shapes} - {(64, 64)}


@pytest.mark.parametrize("how", FORMATS)
def test_layers_of_the_libraries(how: str) -> None:
    """Under adapters, as diffusers and peft set them up: the same results fused, and less saved for backward."""
    from peft import LoraConfig as PeftLoraConfig

    model = by_library(make_transformer(), how).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_mlp", "proj_out"]
    model.add_adapter(PeftLoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    assert not any(type(layer) is QuantizedLinear for layer in model.modules())
    want, (unfused, _) = run(model), saved_bytes(model, make_inputs())
    assert fg.fuse(model).kept == {}
    assert_agree(run(model), want, 3e-6)
    fused, _ = saved_bytes(model, make_inputs())
    full = make_transformer().requires_grad_(False)
    full.add_adapter(PeftLoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    fg.fuse(full)
    assert fused <= 1.01 * saved_bytes(full, make_inputs())[0] < unfused


def test_bitsandbytes_own_8_bit_layers_are_called() -> None:
    """They round their input, too."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    assert linear_weights(layer, FP32, autocast=False) == "is a Linear8bitLt"


@pytest.mark.parametrize("how", FORMATS)
def test_a_layer_moves_and_copies_with_its_scales_in_float32(how: str) -> None:
    layer = quantized(make_transformer(**ONE_OF_EACH), how).transformer_blocks[0].ff.net[2]
    want = layer.quantized.dequantize(FP32, "torch")
    narrow = copy.deepcopy(layer).to(BF16).cpu()
    assert narrow.bias.dtype == BF16
    assert torch.equal(narrow.quantized.dequantize(FP32, "torch"), want)
    other = copy.deepcopy(layer)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.quantized.dequantize(FP32, "torch"), want)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    with torch.autocast("cpu", BF16):
        wide = torch.randn(3, want.shape[1], requires_grad=True)
        narrow_out = layer(wide)
        narrow_out.sum().backward()
    assert (narrow_out.dtype, wide.grad.dtype) == (BF16, FP32)
    x = torch.randn(3, 64 if want.shape[1] == 64 else want.shape[1], requires_grad=True)
    out = layer(x)
    assert distance(out, nn.functional.linear(x, want, layer.bias)) < 1e-6
    out.sum().backward()
    assert distance(x.grad, want.sum(0).expand(3, -1)) < 1e-6


def test_the_kernels_serve_fused_layers(kernel_device: str) -> None:
    for how in FORMATS:
        torch.manual_seed(0)
        model, reference = pair(how)
        model.to(kernel_device)
        fg.fuse(model, recompute="mlp", backend="triton")
        assert_near(run(model, make_inputs(FP32, device=kernel_device)), run(reference, make_inputs(FP64)), 3e-5)


def assert_near(got: Result, want: Result, tolerance: float) -> None:
    """As `assert_agree`, of results in another dtype and place."""
    assert_agree(tree_map(lambda tensor: tensor.cpu().double(), got), want, tolerance)


@pytest.fixture(scope="module")
def handed_in_full_precision() -> int:
    model = with_adapters(make_transformer(**ONE_OF_EACH))
    fg.fuse(model)
    return handed_bytes(model)


@pytest.mark.parametrize("how", ["nf4", *(pytest.param(how, marks=pytest.mark.slow) for how in ("int8", "float8"))])
def test_a_compiler_saves_no_dequantized_weight(how: str, handed_in_full_precision: int) -> None:
    """Two equal calls in one graph would become one, whose result is handed from forward to backward."""
    model = with_adapters(quantized(make_transformer(**ONE_OF_EACH), how))
    fg.fuse(model)
    assert handed_bytes(model) <= 1.01 * handed_in_full_precision
