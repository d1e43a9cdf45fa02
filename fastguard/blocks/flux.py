"""Fused blocks of diffusers' Flux; their forwards read as diffusers' do, with its modules and parameters.

Axes: B sample, S image token, T text token, C channel, H head, D head channel.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.models.activations import GELU
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from fastguard.blocks.architecture import Architecture, BlockSpec, FusedBlock, runs_fused
from fastguard.blocks.parts import (
    IMAGE_QKV,
    TEXT_QKV,
    activate,
    attention,
    feed_forward_parts,
    fits_rope,
    gated_residual,
    into_attention,
    modulate,
    modulation,
    out_of_attention,
    per_sample,
    project_with_hidden,
    unfit_adaln,
    unfit_feed_forward,
    unfit_gelu,
    within_float16,
)

ATTENTION = {"attn": FluxAttention, "attn.processor": FluxAttnProcessor}


def _runs_fused(block: Any, image: Tensor, text: Tensor, temb: Tensor, rope: Any, kwargs: dict[str, Any]) -> bool:
    """`runs_fused`, and whether rope and kwargs are what the fused forward knows."""
    if not runs_fused(block, image, text, temb) or set(kwargs) - {"attention_mask"}:
        return False
    return fits_rope(rope, text.shape[1] + image.shape[1], block.attn.head_dim)


# --- double blocks --------------------------------------------------------------------------------------------------


def _unfit_double(block: Any) -> str | None:
    if block.attn.fused_projections:
        return "its query, key and value projections are fused by diffusers"
    unfit_norms = unfit_adaln(block, "norm1", "norm1_context")
    return unfit_norms or unfit_feed_forward(block, "ff") or unfit_feed_forward(block, "ff_context")


class FusedDoubleBlock(FusedBlock):
    """`FluxTransformerBlock`: image and text have weights of their own, and attend together."""

    spec = BlockSpec(
        block=FluxTransformerBlock,
        parts={
            **ATTENTION,
            "attn.to_out.1": nn.Dropout,
            "norm1": AdaLayerNormZero,
            "norm1_context": AdaLayerNormZero,
            **feed_forward_parts("ff"),
            **feed_forward_parts("ff_context"),
        },
        layer_norms=("norm1.norm", "norm1_context.norm", "norm2", "norm2_context"),
        qk_norms=("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
        linears=(
            *(*IMAGE_QKV, *TEXT_QKV, "attn.to_out.0", "attn.to_add_out"),
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        ),
        unfit=_unfit_double,
    )

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, S, C), encoder_hidden_states (B, T, C), temb (B, C); returns the new encoder_hidden_states
        and hidden_states."""
        image, text, rope, kwargs = hidden_states, encoder_hidden_states, image_rotary_emb, joint_attention_kwargs or {}
        temb = per_sample(temb, image)
        if rope is None or not _runs_fused(self, image, text, temb, rope, kwargs):
            return super().forward(image, text, temb, rope, joint_attention_kwargs)
        attn, fusion = self.attn, self.fusion
        shift, scale, *later = modulation(self.norm1, temb)
        text_shift, text_scale, *text_later = modulation(self.norm1_context, temb)
        layers = [attn.to_q, attn.to_k, attn.to_v]
        qkv = into_attention(image, self.norm1.norm, scale, shift, layers, fusion)
        layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        text_qkv = into_attention(text, self.norm1_context.norm, text_scale, text_shift, layers, fusion)
        joined = attention(self, transformer_flux, qkv, text_qkv, rope, kwargs.get("attention_mask"))
        # Not slices: the backward of each fills a tensor of the joined size with zeros.
        text_out, image_out = joined.split_with_sizes([text.shape[1], image.shape[1]], dim=1)
        image = out_of_attention(image, image_out, attn.to_out[0], self.norm2, self.ff, later, fusion)
        text = out_of_attention(
            text, text_out, attn.to_add_out, self.norm2_context, self.ff_context, text_later, fusion
        )
        return within_float16(text), image


# --- single blocks --------------------------------------------------------------------------------------------------


def _unfit_single(block: Any) -> str | None:
    if block.attn.fused_projections:
        return "its query, key and value projections are fused by diffusers"
    return unfit_gelu(block.act_mlp)


class FusedSingleBlock(FusedBlock):
    """`FluxSingleTransformerBlock`: image and text are one stream, with the feed-forward beside attention."""

    spec = BlockSpec(
        block=FluxSingleTransformerBlock,
        parts={**ATTENTION, "norm": AdaLayerNormZeroSingle, "act_mlp": nn.GELU},
        layer_norms=("norm.norm",),
        qk_norms=("attn.norm_q", "attn.norm_k"),
        linears=(*IMAGE_QKV, "proj_mlp", "proj_out"),
        unfit=_unfit_single,
    )

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results are those of `FusedDoubleBlock.forward`."""
        image, text, rope, kwargs = hidden_states, encoder_hidden_states, image_rotary_emb, joint_attention_kwargs or {}
        temb = per_sample(temb, image)
        if rope is None or not _runs_fused(self, image, text, temb, rope, kwargs):
            return super().forward(image, text, temb, rope, joint_attention_kwargs)
        attn, fusion = self.attn, self.fusion
        joined = torch.cat([text, image], dim=1)
        shift, scale, gate = modulation(self.norm, temb, count=3)
        normed, _ = modulate(joined, self.norm.norm, scale, shift, fusion)
        qkv, hidden = project_with_hidden(normed, [attn.to_q, attn.to_k, attn.to_v], self.proj_mlp, fusion)
        attended = attention(self, transformer_flux, qkv, None, rope, kwargs.get("attention_mask"))
        out = gated_residual(joined, activate(hidden, self.proj_out, fusion, prefix=attended), gate, fusion)
        # Unlike split_with_sizes, it lets its results be changed in place, as diffusers' slices do.
        text, image = torch.unsafe_split_with_sizes(within_float16(out), [text.shape[1], image.shape[1]], dim=1)
        return text, image


FLUX = Architecture(
    models=(FluxTransformer2DModel, FluxControlNetModel),
    kinds=(FusedDoubleBlock, FusedSingleBlock),
    functions=(
        (FluxAttnProcessor, "__call__"),
        (GELU, "gelu"),
        (transformer_flux, "_get_qkv_projections"),
        (transformer_flux, "_get_projections"),
        (transformer_flux, "apply_rotary_emb"),
    ),
)
