"""Fused blocks of diffusers' Stable Diffusion 3 and 3.5; the forward reads as theirs, with its modules and parameters.

Axes: B sample, S image token, T text token, C channel, H head, D head channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from types import NoneType
from typing import Any

import torch
from diffusers import SD3ControlNetModel, SD3Transformer2DModel
from diffusers.models.activations import GELU
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    RMSNorm,
    SD35AdaLayerNormZeroX,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fastguard.blocks.architecture import Architecture, BlockSpec, FusedBlock, runs_fused
from fastguard.blocks.parts import (
    TEXT_QKV,
    feed_forward_parts,
    gated_residual,
    into_attention,
    linear,
    modulation,
    out_of_attention,
    per_sample,
    qk_norm_rope,
    unfit_adaln,
    unfit_feed_forward,
)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, S, H D) from (B, S, H, D) each."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False)
    return out.transpose(1, 2).flatten(2).to(q.dtype)


def _joint_attention(block: Any, image: Sequence[Tensor], text: Sequence[Tensor]) -> Tensor:
    """(B, S + T, H D) from the projections (query, key, value) of the streams, image first."""
    attn = block.attn
    if attn.norm_q is None:
        joined = (torch.cat(pair, dim=1) for pair in zip(image, text, strict=True))
        return _attend(*(tensor.unflatten(-1, (attn.heads, -1)) for tensor in joined))
    norms = [attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k]
    return _attend(*qk_norm_rope(text, image, norms, None, block.fusion))


def _image_attention(block: Any, image: Sequence[Tensor]) -> Tensor:
    """(B, S, H D): the attention of dual blocks, of the image alone."""
    attn = block.attn2
    if attn.norm_q is None:
        return _attend(*(tensor.unflatten(-1, (attn.heads, -1)) for tensor in image))
    return _attend(*qk_norm_rope(image, None, [attn.norm_q, attn.norm_k], None, block.fusion))


# --- what blocks are made of ----------------------------------------------------------------------------------------


def _unfit(block: Any) -> str | None:
    if block._chunk_size is not None:
        return "its feed-forward runs in chunks"
    streams = ("ff",) if block.context_pre_only else ("ff", "ff_context")
    reasons = (unfit_adaln(block, "norm1", "norm1_context"), *(unfit_feed_forward(block, name) for name in streams))
    return next(filter(None, reasons), None)


def _spec(dual: bool, last: bool, normed: bool) -> BlockSpec:
    """Of a block with a second attention of the image alone; of the last one, which gives no text; with RMSNorms of
    query and key."""
    attentions = ("attn", "attn2") if dual else ("attn",)
    parts: dict[str, type] = {name: Attention for name in attentions}
    parts |= {f"{name}.processor": JointAttnProcessor2_0 for name in attentions}
    parts |= {f"{name}.to_out.1": nn.Dropout for name in attentions}
    parts["norm1"] = SD35AdaLayerNormZeroX if dual else AdaLayerNormZero
    parts["norm1_context"] = AdaLayerNormContinuous if last else AdaLayerNormZero
    parts |= feed_forward_parts("ff")
    linears = [f"{name}.{layer}" for name in attentions for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    linears += [*TEXT_QKV, "ff.net.0.proj", "ff.net.2"]
    layer_norms = ["norm1.norm", "norm1_context.norm", "norm2"]
    if not last:
        parts |= feed_forward_parts("ff_context")
        linears += ["attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"]
        layer_norms += ["norm2_context"]
    norms = [f"attn.{name}" for name in ("norm_added_q", "norm_added_k", "norm_q", "norm_k")]
    norms += ["attn2.norm_q", "attn2.norm_k"] if dual else []
    return BlockSpec(
        block=JointTransformerBlock,
        parts=parts if normed else {**parts, **dict.fromkeys(norms, NoneType)},
        layer_norms=tuple(layer_norms),
        qk_norms=tuple(norms) if normed else (),
        qk_norm=RMSNorm,
        rope=False,
        linears=tuple(linears),
        unfit=_unfit,
    )


SPECS = {which: _spec(*which) for which in product((False, True), repeat=3)}


class FusedJointBlock(FusedBlock):
    """`JointTransformerBlock`: image and text have weights of their own, and attend together."""

    spec = SPECS[False, False, True]
    variants = tuple(SPECS.values())

    @classmethod
    def spec_of(cls, block: Any) -> BlockSpec:
        normed = getattr(block.attn, "norm_q", None) is not None
        return SPECS[block.use_dual_attention, block.context_pre_only, normed]

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """hidden_states (B, S, C), encoder_hidden_states (B, T, C), temb (B, C); returns the new encoder_hidden_states,
        None from the last block, and hidden_states."""
        image, text = hidden_states, encoder_hidden_states
        temb = per_sample(temb, image)
        if joint_attention_kwargs or not runs_fused(self, image, text, temb):
            return super().forward(image, text, temb, joint_attention_kwargs)
        attn, fusion = self.attn, self.fusion
        if self.use_dual_attention:
            shift, scale, gate, *later, shift2, scale2, gate2 = modulation(self.norm1, temb, count=9)
        else:
            shift, scale, gate, *later = modulation(self.norm1, temb)
        if self.context_pre_only:
            text_scale, text_shift = modulation(self.norm1_context, temb, count=2)
        else:
            text_shift, text_scale, *text_later = modulation(self.norm1_context, temb)
        layers = [attn.to_q, attn.to_k, attn.to_v]
        qkv = into_attention(image, self.norm1.norm, scale, shift, layers, fusion)
        layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        text_qkv = into_attention(text, self.norm1_context.norm, text_scale, text_shift, layers, fusion)
        joined = _joint_attention(self, qkv, text_qkv)
        # Not slices: the backward of each fills a tensor of the joined size with zeros.
        image_out, text_out = joined.split_with_sizes([image.shape[1], text.shape[1]], dim=1)
        layer = attn.to_out[0]
        if self.use_dual_attention:
            # The same LayerNorm once more: it reads the image again, and saves nothing but the image.
            layers = [self.attn2.to_q, self.attn2.to_k, self.attn2.to_v]
            qkv = into_attention(image, self.norm1.norm, scale2, shift2, layers, fusion)
            image = gated_residual(image, linear(image_out, layer, fusion), gate, fusion)
            image_out, layer, gate = _image_attention(self, qkv), self.attn2.to_out[0], gate2
        image = out_of_attention(image, image_out, layer, self.norm2, self.ff, [gate, *later], fusion)
        if self.context_pre_only:
            return None, image
        text = out_of_attention(
            text, text_out, attn.to_add_out, self.norm2_context, self.ff_context, text_later, fusion
        )
        return text, image


SD3 = Architecture(
    models=(SD3Transformer2DModel, SD3ControlNetModel),
    kinds=(FusedJointBlock,),
    functions=((JointAttnProcessor2_0, "__call__"), (GELU, "gelu")),
)
