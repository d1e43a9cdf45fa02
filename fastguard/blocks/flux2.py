"""Fused blocks of diffusers' FLUX.2; their forwards read as diffusers' do, with its modules and parameters.

Unlike those of Flux.1, all blocks of a kind share one modulation, feed-forwards are SwiGLU, and one layer of a single
block gives query, key, value and the feed-forward before its gate.

Axes: B sample, S image token, T text token, C channel, H head, D head channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers import transformer_flux2
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2FeedForward,
    Flux2Modulation,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2TransformerBlock,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fastguard.blocks.architecture import Architecture, BlockSpec, FusedBlock, Fusion, runs_fused
from fastguard.blocks.linear import Normed
from fastguard.blocks.parts import (
    IMAGE_QKV,
    TEXT_QKV,
    activate,
    attention,
    fits_rope,
    gated_residual,
    into_attention,
    modulate,
    out_of_attention,
    per_sample,
    project_with_hidden,
    within_float16,
)


def _swiglu_parts(name: str) -> dict[str, type]:
    return {name: Flux2SwiGLU, f"{name}.gate_fn": nn.SiLU}


def _rows(modulation: Tensor, x: Tensor, n_sets: int) -> Sequence[Tensor]:
    """Shift, scale and gate of each set of a modulation, (B, C) each; none where it differs between tokens, as with the
    tokens of reference images."""
    if modulation.ndim == 3 and modulation.shape[1] == 1:
        modulation = modulation[:, 0]
    return per_sample(modulation, x).chunk(3 * n_sets, dim=1) if modulation.ndim == 2 else ()


def _runs_fused(
    block: Any, streams: Sequence[Tensor], modulations: Sequence[Sequence[Tensor]], rope: Any, kwargs: dict[str, Any]
) -> bool:
    """`runs_fused`, and whether modulations, rope and kwargs are what the fused forward knows."""
    if not all(modulations) or set(kwargs) - {"attention_mask"}:
        return False
    if not runs_fused(block, *streams, *(row for rows in modulations for row in rows)):
        return False
    return fits_rope(rope, sum(x.shape[1] for x in streams), block.attn.head_dim)


# --- double blocks --------------------------------------------------------------------------------------------------


def _unfit_double(block: Any) -> str | None:
    return "its query, key and value projections are fused by diffusers" if block.attn.fused_projections else None


def _feed_forward(normed: Normed, ff: Any, fusion: Fusion) -> Tensor:
    _, hidden = project_with_hidden(normed, [], ff.linear_in, fusion, "swiglu")
    return activate(hidden, ff.linear_out, fusion)


class FusedDoubleBlock(FusedBlock):
    """`Flux2TransformerBlock`: image and text have weights of their own, and attend together."""

    spec = BlockSpec(
        block=Flux2TransformerBlock,
        parts={
            **{"attn": Flux2Attention, "attn.processor": Flux2AttnProcessor, "attn.to_out.1": nn.Dropout},
            **{"ff": Flux2FeedForward, **_swiglu_parts("ff.act_fn")},
            **{"ff_context": Flux2FeedForward, **_swiglu_parts("ff_context.act_fn")},
        },
        layer_norms=("norm1", "norm1_context", "norm2", "norm2_context"),
        qk_norms=("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
        linears=(
            *IMAGE_QKV,
            *TEXT_QKV,
            *("attn.to_out.0", "attn.to_add_out"),
            *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        ),
        unfit=_unfit_double,
    )

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb_mod_img: Tensor,
        temb_mod_txt: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """hidden_states (B, S, C), encoder_hidden_states (B, T, C), temb_mod_img and temb_mod_txt (B, 6 C) or
        (B, 1, 6 C); returns the new encoder_hidden_states and hidden_states."""
        image, text, rope, kwargs = hidden_states, encoder_hidden_states, image_rotary_emb, joint_attention_kwargs or {}
        rows, text_rows = _rows(temb_mod_img, image, 2), _rows(temb_mod_txt, text, 2)
        if rope is None or not _runs_fused(self, (image, text), (rows, text_rows), rope, kwargs):
            return super().forward(image, text, temb_mod_img, temb_mod_txt, rope, joint_attention_kwargs)
        attn, fusion = self.attn, self.fusion
        (shift, scale, *later), (text_shift, text_scale, *text_later) = rows, text_rows
        layers = [attn.to_q, attn.to_k, attn.to_v]
        qkv = into_attention(image, self.norm1, scale, shift, layers, fusion)
        layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
        text_qkv = into_attention(text, self.norm1_context, text_scale, text_shift, layers, fusion)
        joined = attention(self, transformer_flux2, qkv, text_qkv, rope, kwargs.get("attention_mask"))
        # Not slices: the backward of each fills a tensor of the joined size with zeros.
        text_out, image_out = joined.split_with_sizes([text.shape[1], image.shape[1]], dim=1)
        image = out_of_attention(image, image_out, attn.to_out[0], self.norm2, self.ff, later, fusion, _feed_forward)
        text = out_of_attention(
            text, text_out, attn.to_add_out, self.norm2_context, self.ff_context, text_later, fusion, _feed_forward
        )
        return within_float16(text), image


# --- single blocks --------------------------------------------------------------------------------------------------


class FusedSingleBlock(FusedBlock):
    """`Flux2SingleTransformerBlock`: image and text are one stream, with the feed-forward beside attention."""

    spec = BlockSpec(
        block=Flux2SingleTransformerBlock,
        parts={
            **{"attn": Flux2ParallelSelfAttention, "attn.processor": Flux2ParallelSelfAttnProcessor},
            **_swiglu_parts("attn.mlp_act_fn"),
        },
        layer_norms=("norm",),
        qk_norms=("attn.norm_q", "attn.norm_k"),
        linears=("attn.to_qkv_mlp_proj", "attn.to_out"),
    )

    def forward(
        self: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb_mod: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        split_hidden_states: bool = False,
        text_seq_len: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """hidden_states (B, S, C) and encoder_hidden_states (B, T, C), or (B, T + S, C) and None; temb_mod (B, 3 C) or
        (B, 1, 3 C). Returns the new hidden_states of both or, split, the text's and the image's."""
        image, text, rope, kwargs = hidden_states, encoder_hidden_states, image_rotary_emb, joint_attention_kwargs or {}
        rows, streams = _rows(temb_mod, image, 1), [image] if text is None else [text, image]
        if rope is None or not _runs_fused(self, streams, [rows], rope, kwargs):
            further = (rope, joint_attention_kwargs, split_hidden_states, text_seq_len)
            return super().forward(image, text, temb_mod, *further)
        attn, fusion = self.attn, self.fusion
        joined = image if text is None else torch.cat([text, image], dim=1)
        shift, scale, gate = rows
        normed, _ = modulate(joined, self.norm, scale, shift, fusion)
        sizes = (*[attn.inner_dim] * 3, attn.mlp_hidden_dim * attn.mlp_mult_factor)
        qkv, hidden = project_with_hidden(normed, [], attn.to_qkv_mlp_proj, fusion, "swiglu", sizes)
        attended = attention(self, transformer_flux2, qkv, None, rope, kwargs.get("attention_mask"))
        out = gated_residual(joined, activate(hidden, attn.to_out, fusion, prefix=attended), gate, fusion)
        out = within_float16(out)
        if not split_hidden_states:
            return out
        n_text = text_seq_len if text is None else text.shape[1]
        return out[:, :n_text], out[:, n_text:]


FLUX2 = Architecture(
    models=(Flux2Transformer2DModel,),
    kinds=(FusedDoubleBlock, FusedSingleBlock),
    functions=(
        (Flux2AttnProcessor, "__call__"),
        (Flux2ParallelSelfAttnProcessor, "__call__"),
        (Flux2Modulation, "split"),
        (transformer_flux2, "_get_qkv_projections"),
        (transformer_flux2, "_get_projections"),
        (transformer_flux2, "apply_rotary_emb"),
        (F, "silu"),
    ),
)
