"""Fused blocks of Qwen-Image: what is their own. What holds for other models too: test_fuse_joint.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import QwenImageControlNetModel
from diffusers.models.transformers import transformer_qwenimage
from helpers.flux_models import FLOAT32, assert_agree, distance
from helpers.joint_models import CONFIGS, as_dtype, make_block, make_inputs, make_model, run
from helpers.quantized_models import saved_bytes

import fastguard as fg
from fastguard.blocks.qwen_image import _cos_and_sin

NAME = "qwen_image"


def test_the_mask_of_the_text_matters() -> None:
    """Of the second sample, whose last text token nobody may attend to."""
    model = make_model(NAME)
    fg.fuse(model)
    with torch.no_grad():
        masked, open_ = (model(**make_inputs(NAME, masked=which))[0] for which in (True, False))
        inputs = make_inputs(NAME)
        inputs["encoder_hidden_states"][1, -1] = 7.0
        other = model(**inputs)[0]
    assert distance(open_[0], masked[0]) <= FLOAT32
    assert distance(open_[1], masked[1]) > 1e-3
    assert distance(other, masked) <= FLOAT32


def test_the_tables_are_those_of_the_angles() -> None:
    _, inputs = make_block(NAME)
    image, text = inputs["image_rotary_emb"]
    cos, sin = _cos_and_sin(image, text)
    assert cos.shape == sin.shape == (7 + 12, 16)
    angles = torch.cat([text, image]).angle().repeat_interleave(2, dim=1)
    torch.testing.assert_close((cos, sin), (angles.cos(), angles.sin()), rtol=1e-5, atol=1e-6)


def test_blocks_share_the_tables_of_a_pass() -> None:
    """Each saves them for backward."""
    sizes = []
    for blocks in (1, 2):
        model = make_model(NAME, "lora", num_layers=blocks)
        fg.fuse(model)
        shapes = saved_bytes(model, make_inputs(NAME, masked=False))[1]
        sizes.append(shapes.count((5 + 9, 16)))
    assert sizes == [2, 2]
    image, text = torch.ones(4, 8, dtype=torch.complex64), torch.ones(3, 8, dtype=torch.complex64)
    assert _cos_and_sin(image, text)[0] is _cos_and_sin(image, text)[0]
    assert _cos_and_sin(image, text[:2])[0].shape == (6, 16)
    with torch.inference_mode():
        tables = _cos_and_sin(image.clone(), text)
    assert tables[0].is_inference()
    with torch.inference_mode():
        sampled = _cos_and_sin(image, text.clone())
    assert sampled[0].is_inference()
    assert not _cos_and_sin(image, text)[0].is_inference()


def test_a_pass_under_inference_mode_leaves_training_alone() -> None:
    model = make_model(NAME, "lora")
    inputs = make_inputs(NAME)
    want = run(NAME, model, inputs)
    fg.fuse(model)
    with torch.inference_mode():
        model(**inputs)
    assert_agree(run(NAME, model, inputs), want, FLOAT32)


@pytest.mark.parametrize("value", [1e-4, 0.1])
def test_small_weights_of_query_and_key_norms(value: float) -> None:
    """A rotation mixes the rounding of a pair: neither may be small beside the other."""
    model = make_model(NAME, "lora")
    with torch.no_grad():
        model.transformer_blocks[0].attn.norm_added_k.weight[3] = value
    want = run(NAME, model)
    assert list(fg.fuse(model).kept) == ["transformer_blocks.0.attn"]
    assert_agree(run(NAME, model), want, FLOAT32)


def test_edit_models_are_left() -> None:
    """They modulate tokens of reference images with another embedding."""
    model = make_model(NAME, zero_cond_t=True)
    inputs = make_inputs(NAME, side=3)
    inputs |= {"img_shapes": [[(1, 2, 3), (1, 1, 3)]] * 2}
    want = run(NAME, model, inputs)
    report = fg.fuse(model)
    assert not report.fused
    assert "zero_cond_t" in report.left["transformer_blocks.0"]
    assert torch.equal(run(NAME, model, inputs)[0], want[0])


@pytest.mark.parametrize(
    "change",
    [
        {"modulate_index": torch.zeros(2, 12, dtype=torch.int)},
        {"joint_attention_kwargs": {"attention_mask": None}},
        {"image_rotary_emb": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arguments_that_run_as_diffusers_wrote_them(change: dict[str, Any]) -> None:
    """To the bit, forward and backward."""
    block, inputs = make_block(NAME)
    inputs |= change
    if "modulate_index" in change:  # for which diffusers takes an embedding more a sample
        block.zero_cond_t = True
        inputs["temb"] = torch.cat([inputs["temb"]] * 2)
        want = block(**inputs)
        block.zero_cond_t = False
        fg.fuse(block)
        block.zero_cond_t = True
    else:
        want = block(**inputs)
        fg.fuse(block)
    for got, expected in zip(block(**inputs), want, strict=True):
        assert torch.equal(got, expected)


def test_a_trained_rotary_table_gets_its_gradient() -> None:
    block, inputs = make_block(NAME)
    fg.fuse(block)
    image, text = (table.clone().requires_grad_() for table in inputs["image_rotary_emb"])
    block(**{**inputs, "image_rotary_emb": (image, text)})[1].sum().backward()
    assert image.grad.abs().sum() > 0


def test_float16_is_clipped_to_its_range() -> None:
    """As diffusers does, in both streams."""
    block, inputs = make_block(NAME)
    block, inputs = block.half(), as_dtype(inputs, torch.float16)
    for stream in ("hidden_states", "encoder_hidden_states"):
        inputs[stream][0, 0, 0] = 65504.0
    with torch.no_grad():
        for layer in (block.img_mlp.net[2], block.txt_mlp.net[2]):
            layer.bias.fill_(60000.0)
        want = block(**inputs)
        fg.fuse(block)
        got = block(**inputs)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.isfinite().all() == theirs.isfinite().all()
        assert ours.max() == theirs.max() == 65504.0


@pytest.mark.parametrize("name", ["native", "_native_math"])
def test_attention_backends(name: str) -> None:
    model = make_model(NAME, "lora")
    want = run(NAME, model)
    fg.fuse(model)
    try:
        model.set_attention_backend(name)
        assert_agree(run(NAME, model), want, FLOAT32)
    finally:
        model.set_attention_backend("native")  # the choice is global


def test_a_replaced_modulation_is_seen() -> None:
    model = make_model(NAME)
    block = model.transformer_blocks[0]
    block._modulate = lambda x, parameters, index=None: (x, parameters[:, None, :64])
    want = run(NAME, model)
    assert fg.fuse(model).left == {"transformer_blocks.0": "its _modulate was replaced"}
    assert_agree(run(NAME, model), want, FLOAT32)


def test_attention_is_looked_up_where_others_replace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(NAME)
    fg.fuse(model)
    plain = model(**make_inputs(NAME))[0]
    monkeypatch.setattr(transformer_qwenimage, "dispatch_attention_fn", lambda q, k, v, **_: 2 * v)
    assert distance(model(**make_inputs(NAME))[0], plain) > 1e-2


def test_controlnet_model() -> None:
    torch.manual_seed(0)
    net: Any = QwenImageControlNetModel(**CONFIGS[NAME])
    for parameter in net.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    inputs = make_inputs(NAME)
    inputs["controlnet_cond"] = torch.randn(2, 9, 16)
    want = net(**inputs)[0]
    assert len(fg.fuse(net).fused) == 2
    for got, expected in zip(net(**inputs)[0], want, strict=True):
        assert distance(got, expected) <= FLOAT32
