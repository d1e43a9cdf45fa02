"""Fused blocks of diffusers' Qwen-Image; the forward reads as theirs, with its modules and parameters.

Axes: B sample, S image token, T text token, C channel, H head, D head channel.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel
from diffusers.models.activations import GELU
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_qwenimage
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenImageTransformerBlock,
)
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fastguard.blocks.architecture import Architecture, BlockSpec, FusedBlock, norm_size, runs_fused
from fastguard.blocks.parts import (
    IMAGE_QKV,
    TEXT_QKV,
    attention,
    feed_forward_parts,
    into_attention,
    out_of_attention,
    per_sample,
    unfit_feed_forward,
    within_float16,
)

# --- the rotary embedding -------------------------------------------------------------------------------------------

_TABLES: Any = WeakTensorKeyDictionary()
"""by the image's angles: the text's, cos and sin"""


def _runs_fused(block: Any, image: Tensor, text: Tensor, temb: Tensor, rope: Any) -> bool:
    """`runs_fused`, and whether rope is a pair of tables of `exp(i angle)`, (S, D / 2) and (T, D / 2) complex, that get
    no gradient."""
    if not runs_fused(block, image, text, temb) or not isinstance(rope, tuple) or len(rope) != 2:
        return False
    pairs = norm_size(block.attn.norm_q) // 2
    return all(
        table.is_complex() and table.shape == (stream.shape[1], pairs) and not table.requires_grad
        for table, stream in zip(rope, (image, text), strict=True)
    )


def _cos_and_sin(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (T + S, D) float32, text first. The blocks of a pass share them, since each saves them."""
    if not torch.compiler.is_compiling():
        known = _TABLES.get(image)
        if known is not None and known[0] is text:
            return known[1:]
    pairs = torch.cat([torch.view_as_real(text), torch.view_as_real(image)])
    cos, sin = (part.repeat_interleave(2, dim=1) for part in pairs.unbind(-1))
    if not torch.compiler.is_compiling() and not cos.is_inference():
        _TABLES[image] = text, cos, sin
    return cos, sin


# --- attention ------------------------------------------------------------------------------------------------------


def _joined_mask(text_mask: Tensor | None, image: Tensor) -> Tensor | None:
    """(B, 1, 1, T + S): which tokens are attended to, from those of the text, (B, T)."""
    if text_mask is None:
        return None
    ones = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    return torch.cat([text_mask, ones], dim=1)[:, None, None]


# --- blocks ---------------------------------------------------------------------------------------------------------


def _unfit(block: Any) -> str | None:
    if block.zero_cond_t:
        return "its images have tokens with different modulations (zero_cond_t)"
    if "_modulate" in vars(block):
        return "its _modulate was replaced"
    return unfit_feed_forward(block, "img_mlp") or unfit_feed_forward(block, "txt_mlp")


class FusedQwenImageBlock(FusedBlock):
    """`QwenImageTransformerBlock`: image and text have weights of their own, and attend together."""

    spec = BlockSpec(
        block=QwenImageTransformerBlock,
        parts={
            "attn": Attention,
            "attn.processor": QwenDoubleStreamAttnProcessor2_0,
            "attn.to_out.1": nn.Dropout,
            **feed_forward_parts("img_mlp"),
            **feed_forward_parts("txt_mlp"),
        },
        layer_norms=("img_norm1", "txt_norm1", "img_norm2", "txt_norm2"),
        qk_norms=("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
        qk_norm=RMSNorm,
        linears=(
            *IMAGE_QKV,
            *TEXT_QKV,
            *("attn.to_out.0", "attn.to_add_out"),
            *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
        ),
        unfit=_unfit,
    )

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Any = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, S, C), encoder_hidden_states (B, T, C) and its mask (B, T), temb (B, C); returns the new
        encoder_hidden_states and hidden_states."""
        image, text, mask, rope = hidden_states, encoder_hidden_states, encoder_hidden_states_mask, image_rotary_emb
        temb = per_sample(temb, image)
        further = joint_attention_kwargs or modulate_index is not None
        if further or rope is None or not _runs_fused(self, image, text, temb, rope):
            return super().forward(image, text, mask, temb, rope, joint_attention_kwargs, modulate_index)
        attn, fusion = self.attn, self.fusion
        shift, scale, *later = self.img_mod(temb).chunk(6, dim=-1)
        text_shift, text_scale, *text_later = self.txt_mod(temb).chunk(6, dim=-1)
        layers = [attn.to_q, attn.to_k, attn.to_v]
        qkv = into_attention(image, self.img_norm1, scale, shift, layers, fusion)
        layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        text_qkv = into_attention(text, self.txt_norm1, text_scale, text_shift, layers, fusion)
        joined = attention(self, transformer_qwenimage, qkv, text_qkv, _cos_and_sin(*rope), _joined_mask(mask, image))
        # Not slices: the backward of each fills a tensor of the joined size with zeros.
        text_out, image_out = joined.split_with_sizes([text.shape[1], image.shape[1]], dim=1)
        image = out_of_attention(image, image_out, attn.to_out[0], self.img_norm2, self.img_mlp, later, fusion)
        text = out_of_attention(text, text_out, attn.to_add_out, self.txt_norm2, self.txt_mlp, text_later, fusion)
        return within_float16(text), within_float16(image)


QWEN_IMAGE = Architecture(
    models=(QwenImageTransformer2DModel, QwenImageControlNetModel),
    kinds=(FusedQwenImageBlock,),
    functions=(
        (QwenImageTransformerBlock, "_modulate"),
        (QwenDoubleStreamAttnProcessor2_0, "__call__"),
        (GELU, "gelu"),
        (transformer_qwenimage, "apply_rotary_emb_qwen"),
    ),
)
