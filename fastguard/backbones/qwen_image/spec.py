"""Qwen-Image's classes, and how its pipeline uses them.

Axes: B image, P prompt, S image token, T text token, C channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from fastguard.backbones.folder import PipelineParts
from fastguard.backbones.pipeline.spec import (
    Configs,
    EncoderCall,
    EncodeSettings,
    Grid,
    PipelineSpec,
    Text,
    TextPart,
    decode_last_only,
    texts,
)
from fastguard.backbones.pipeline.tiny import TEXT_DIM, bytes_vocabulary
from fastguard.backbones.sizes import LANGUAGE_SIZES, MOST_CHANNELS, MOST_LAYERS, MOST_LEVELS
from fastguard.config import ModelConfig
from fastguard.errors import UserError
from fastguard.prompts import Prompt

MOST_TOKENS = 1024
"""Of a prompt: the pipeline cuts longer ones, and the transformer has positions for few more."""
_VISION = {
    "depth": MOST_LAYERS,
    "patch_size": 256,
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_heads", "out_hidden_size"), MOST_CHANNELS),
}
PARTS = PipelineParts(
    modules={
        "transformer": (QwenImageTransformer2DModel, "diffusion_pytorch_model"),
        "vae": (AutoencoderKLQwenImage, "diffusion_pytorch_model"),
        "text_encoder": (Qwen2_5_VLForConditionalGeneration, "model"),
    },
    tokenizers={"tokenizer": (Qwen2Tokenizer, "text_encoder")},
    largest={
        "transformer": {
            "num_layers": MOST_LAYERS,
            **dict.fromkeys(
                (
                    "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
                    "joint_attention_dim", "axes_dims_rope",
                ),
                MOST_CHANNELS,
            ),
        },
        "vae": {
            "num_res_blocks": MOST_LEVELS,
            **dict.fromkeys(("base_dim", "z_dim", "dim_mult", "input_channels"), MOST_CHANNELS),
        },
        "text_encoder": {
            **LANGUAGE_SIZES,  # of older files, which are flat
            **{f"text_config.{name}": most for name, most in LANGUAGE_SIZES.items()},
            **{f"vision_config.{name}": most for name, most in _VISION.items()},
        },
    },
)  # fmt: skip
TRANSFORMER = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
VAE = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
QWEN_2_5_VL_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "tie_word_embeddings": False,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
"""Of Qwen/Qwen2.5-VL-7B-Instruct; its file is flat, too."""
QWEN_IMAGE: Configs = {"transformer": TRANSFORMER, "vae": VAE, "text_encoder": QWEN_2_5_VL_7B}


def _check_tokens(max_tokens: int) -> None:
    if max_tokens > MOST_TOKENS:
        raise UserError(f"prompts.max_tokens must be at most {MOST_TOKENS} for Qwen-Image, got {max_tokens}")


def _encode(pipe: Any, prompts: Sequence[Prompt], asked: EncodeSettings) -> dict[str, Tensor]:
    """Embeddings (P, T, C) and their mask (P, T) bool, T = max_tokens, which the pipeline leaves shorter."""
    _check_tokens(asked.max_tokens)
    pipe.tokenizer_max_length = asked.max_tokens  # beside the template; the pipeline would encode 1024 and cut them
    embeds, mask = pipe.encode_prompt(texts(prompts), device=asked.device, max_sequence_length=asked.max_tokens)
    if mask is None:  # all of one length
        mask = torch.ones(embeds.shape[:2], device=embeds.device)
    missing = asked.max_tokens - embeds.shape[1]
    return {"embeds": F.pad(embeds.to(asked.dtype), (0, 0, 0, missing)), "mask": F.pad(mask.bool(), (0, missing))}


def _embed(qwen: Any, ids: Tensor) -> Tensor:
    return qwen(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states[-1]


class QwenImageSpec(PipelineSpec):
    """QwenImagePipeline.

    The pipeline fills prompts up to the longest of a batch, and here all have one length. Their positions do not depend
    on it, and attention passes over what is filled up, so the velocity is the same.
    """

    pipeline = QwenImagePipeline
    parts = PARTS
    blocks: ClassVar[Mapping[str, str]] = {"double": "transformer_blocks"}
    known: ClassVar[Mapping[str, Configs]] = {"Qwen/Qwen-Image": QWEN_IMAGE, "Qwen/Qwen-Image-2512": QWEN_IMAGE}
    text_parts = (TextPart(("text_encoder",), _encode),)
    masked = True
    one_gradient_layout = True

    def vae_factor(self, vae: Mapping[str, Any]) -> int:
        return 2 ** len(vae["temperal_downsample"])

    def text_shapes(self, configs: Configs, grid: Grid, max_tokens: int) -> Mapping[str, tuple[int, ...]]:
        _check_tokens(max_tokens)
        return {"embeds": (max_tokens, configs["transformer"]["joint_attention_dim"]), "mask": (max_tokens,)}

    def encoder_calls(self, configs: Configs, max_tokens: int) -> Mapping[str, EncoderCall]:
        bare: Any = QwenImagePipeline(None, None, None, None, None)
        return {"text_encoder": EncoderCall(max_tokens + bare.prompt_template_encode_start_idx, _embed)}

    def positions(self, grid: Grid) -> Grid:
        return grid

    def unused(self, transformer: Any) -> Sequence[str]:
        """Of the last block, what comes after attention in the text's stream."""
        last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
        return [f"{last}.{name}" for name in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")]

    def remake_tables(self, transformer: Any) -> None:
        rope = transformer.pos_embed
        with torch.device("cpu"):
            transformer.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)

    def velocity(
        self, transformer: Any, latents: Tensor, sigma: Tensor, text: Text, guidance: float, positions: Grid
    ) -> Tensor:
        return transformer(
            hidden_states=latents,
            encoder_hidden_states=text["embeds"],
            encoder_hidden_states_mask=text["mask"],
            timestep=sigma,
            img_shapes=[[(1, positions.rows, positions.columns)]] * len(latents),
            return_dict=False,
        )[0]

    def guided(self, configs: Configs, model: ModelConfig) -> bool:
        return model.guidance > 1

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance with the norm of each token as in the prompt's branch, as the pipeline has it."""
        guided = super().guide(conditional, unconditional, guidance)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def decode(self, vae: Any, latents: Tensor, grid: Grid) -> Tensor:
        z = QwenImagePipeline._unpack_latents(latents, grid.height, grid.width, self.vae_factor(vae.config))
        z = z.to(vae.dtype)  # (B, C, one frame, H, W)
        mean, std = (
            torch.tensor(values, device=z.device, dtype=z.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode(z * std + mean, return_dict=False)[0][:, :, 0]

    def decode_in_tiles(self, vae: Any, side: int) -> None:
        step = side * 3 // 4
        vae.enable_tiling(side, side, step, step)

    def decode_last_tiles(self, vae: Any, grid: Grid) -> None:
        factor = self.vae_factor(vae.config)
        side, step = vae.tile_sample_min_height // factor, vae.tile_sample_stride_height // factor
        decode_last_only(vae, grid, factor, side, step, vae.config.input_channels)

    def tiny(self) -> Any:
        pipe: Any = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 2, 2],
                num_res_blocks=1,
                temperal_downsample=[False, True],
                latents_mean=[-0.3, 0.1, 0.2, -0.1],
                latents_std=[1.3, 0.8, 1.1, 0.9],
            ),
            text_encoder=None,
            tokenizer=None,
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=4,
                joint_attention_dim=TEXT_DIM,
                axes_dims_rope=(4, 6, 6),
            ),
        )
        tokenizer = _tokenizer(pipe.prompt_template_encode)
        encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config={
                    "vocab_size": len(tokenizer),
                    "hidden_size": TEXT_DIM,
                    "intermediate_size": 2 * TEXT_DIM,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "num_key_value_heads": 1,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
                    "bos_token_id": tokenizer.eos_token_id,
                    "eos_token_id": tokenizer.eos_token_id,
                },
                vision_config={
                    "depth": 1,
                    "hidden_size": TEXT_DIM,
                    "intermediate_size": 2 * TEXT_DIM,
                    "num_heads": 2,
                    "out_hidden_size": TEXT_DIM,
                    "patch_size": 4,
                    "fullatt_block_indexes": [0],
                },
            )
        )
        pipe.register_modules(text_encoder=encoder, tokenizer=tokenizer)
        return pipe


def _tokenizer(template: str) -> Qwen2Tokenizer:
    """Bytes, and the words of the pipeline's template: its beginning has as many tokens as the pipeline drops."""
    special = ["<|im_start|>", "<|im_end|>"]
    letters = bytes_vocabulary()
    split = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(letters)}, merges=[]).backend_tokenizer
    for token in special:
        template = template.replace(token, "{}")
    assert split.pre_tokenizer is not None
    words = [word for text in template.split("{}") for word, _ in split.pre_tokenizer.pre_tokenize_str(text)]
    # Those after a space come first: the others' merges would break them up.
    words = sorted(dict.fromkeys(words), key=lambda word: not word.startswith("Ġ"))
    merges = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    vocabulary = dict.fromkeys([*letters, *(a + b for a, b in merges)])
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=list(merges),  # type: ignore[arg-type]  # of older versions
        additional_special_tokens=special,
    )
