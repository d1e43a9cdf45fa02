"""Fused blocks of Stable Diffusion 3 and 3.5: what is their own. What holds for other models too: test_fuse_joint.py"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3ControlNetModel
from helpers.flux_models import FLOAT32, assert_agree, distance
from helpers.joint_models import CONFIGS, make_inputs, make_model, run
from torch import Tensor

import fastguard as fg


def test_last_and_dual_blocks_are_there() -> None:
    """The tests of both files see every kind of block."""
    blocks = make_model("sd3.5").transformer_blocks
    assert [(block.use_dual_attention, block.context_pre_only) for block in blocks] == [
        (True, False), (False, False), (False, True),
    ]  # fmt: skip
    assert make_model("sd3").transformer_blocks[0].attn.norm_q is None


def test_a_last_block_with_two_attentions() -> None:
    model = make_model("sd3.5", dual_attention_layers=(0, 1, 2))
    want = run("sd3.5", model)
    assert len(fg.fuse(model).fused) == 3
    assert_agree(run("sd3.5", model), want, FLOAT32)


def test_arguments_of_attention_run_as_diffusers_wrote_them() -> None:
    """To the bit, in each kind of block; the scale of adapters is no such argument."""
    model = make_model("sd3.5", "lora")
    extra: dict[str, Any] = {"joint_attention_kwargs": {"ip_hidden_states": None}}
    want, scaled = run("sd3.5", model, **extra), run("sd3.5", model, joint_attention_kwargs={"scale": 0.5})
    fg.fuse(model)
    got = run("sd3.5", model, **extra)
    assert torch.equal(got[0], want[0])
    assert all(torch.equal(got[1][key], grad) for key, grad in want[1].items())
    got = run("sd3.5", model, joint_attention_kwargs={"scale": 0.5})
    assert_agree(got, scaled, FLOAT32)
    assert not torch.equal(got[0], scaled[0])  # it did run fused


def test_a_feed_forward_in_chunks_is_left() -> None:
    model = make_model("sd3.5")
    fg.fuse(model)
    model.enable_forward_chunking(1, 0)
    got = run("sd3.5", model)
    fg.unfuse(model)
    want = run("sd3.5", model)
    assert torch.equal(got[0], want[0])
    assert set(fg.fuse(model).left.values()) == {"its feed-forward runs in chunks"}
    model.disable_forward_chunking()
    assert len(fg.fuse(model).fused) == 3


def test_projections_fused_by_diffusers_are_left() -> None:
    model = make_model("sd3.5")
    with torch.no_grad():
        model.fuse_qkv_projections()
    report = fg.fuse(model)
    assert "FusedJointAttnProcessor2_0" in report.left["transformer_blocks.0"]


@pytest.mark.parametrize("value", [0.0, 1e-4, 0.02])
@pytest.mark.parametrize("norm", ["attn.norm_added_k", "attn2.norm_q"])
def test_small_weights_of_query_and_key_norms(norm: str, value: float) -> None:
    """Nothing is rotated, so each weight is divided by alone: it may be small beside the others, but not tiny."""
    model = make_model("sd3.5", "lora")
    with torch.no_grad():
        model.transformer_blocks[0].get_submodule(norm).weight[3] = value
    want = run("sd3.5", model)
    report = fg.fuse(model)
    assert ("transformer_blocks.0.attn" in report.kept) == (value < 1e-3)
    assert_agree(run("sd3.5", model), want, FLOAT32)


def test_a_missing_norm_of_one_attention_is_seen() -> None:
    model = make_model("sd3.5")
    model.transformer_blocks[0].attn2.norm_q = None
    assert fg.fuse(model).left == {"transformer_blocks.0": "its attn2.norm_q is a NoneType, not a RMSNorm"}
    model = make_model("sd3")
    model.transformer_blocks[0].attn.norm_k = make_model("sd3.5").transformer_blocks[0].attn.norm_k
    assert fg.fuse(model).left == {"transformer_blocks.0": "its attn.norm_k is a RMSNorm, not a NoneType"}


def test_skipped_layers_and_residuals_of_a_controlnet() -> None:
    model = make_model("sd3.5", "lora")
    residuals = [torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    extra: dict[str, Any] = {"block_controlnet_hidden_states": residuals, "skip_layers": [1]}
    want = run("sd3.5", model, **extra)
    fg.fuse(model)
    assert_agree(run("sd3.5", model, **extra), want, FLOAT32)


def test_controlnet_model() -> None:
    torch.manual_seed(0)
    config = {key: value for key, value in CONFIGS["sd3.5"].items() if key != "pos_embed_max_size"}
    net: Any = SD3ControlNetModel(**config, pos_embed_max_size=8)
    for parameter in net.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    inputs = make_inputs("sd3.5")
    inputs["controlnet_cond"] = torch.randn_like(inputs["hidden_states"])
    want = net(**inputs)[0]
    assert len(fg.fuse(net).fused) == 3
    for got, expected in zip(net(**inputs)[0], want, strict=True):
        assert distance(got, expected) <= FLOAT32


def test_attention_is_looked_up_where_others_replace_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the image first, and heads before tokens, as diffusers gives them."""
    model = make_model("sd3.5")
    seen: list[tuple[int, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def catch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen.append(tuple(q.shape))
        queries.append(q[0, :, 0].detach().clone())
        return attend(q, k, v, **options)

    queries: list[Tensor] = []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", catch)
    with torch.no_grad():
        model(**make_inputs("sd3.5"))
        fg.fuse(model)
        model(**make_inputs("sd3.5"))
    assert seen == 2 * [(2, 4, 14, 16), (2, 4, 9, 16), (2, 4, 14, 16), (2, 4, 14, 16)]
    for theirs, ours in zip(queries[:4], queries[4:], strict=True):
        assert distance(ours, theirs) <= FLOAT32
