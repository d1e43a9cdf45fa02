"""FLUX.2's classes, and how its two pipelines use them.

Axes: B image, P prompt, S image token, T text token, C channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fastguard.backbones.folder import PipelineParts, pipeline_folder
from fastguard.backbones.pipeline.spec import (
    Configs,
    EncoderCall,
    EncodeSettings,
    Grid,
    PipelineSpec,
    Text,
    TextPart,
    guidance_input,
    texts,
)
from fastguard.backbones.pipeline.tiny import TEXT_DIM, qwen_tokenizer
from fastguard.backbones.sizes import LANGUAGE_SIZES, MOST_CHANNELS, MOST_LAYERS, VAE_SIZES
from fastguard.config import ModelConfig
from fastguard.prompts import Prompt

_LAYER = ("hidden_size", "intermediate_size", "num_attention_heads")
_VISION = {
    "num_hidden_layers": MOST_LAYERS,
    **dict.fromkeys((*_LAYER, "num_channels", "image_size", "patch_size"), MOST_CHANNELS),
}
_TRANSFORMER_SIZES = {
    "num_layers": MOST_LAYERS,
    "num_single_layers": MOST_LAYERS,
    **dict.fromkeys(
        (
            "patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads",
            "joint_attention_dim", "timestep_guidance_channels", "axes_dims_rope",
        ),
        MOST_CHANNELS,
    ),
}  # fmt: skip


def _parts(encoder: Any, tokenizer: Any, encoder_sizes: Mapping[str, int]) -> PipelineParts:
    return PipelineParts(
        modules={
            "transformer": (Flux2Transformer2DModel, "diffusion_pytorch_model"),
            "vae": (AutoencoderKLFlux2, "diffusion_pytorch_model"),
            "text_encoder": (encoder, "model"),
        },
        tokenizers={"tokenizer": (tokenizer, "text_encoder")},
        largest={
            "transformer": _TRANSFORMER_SIZES,
            "vae": {**VAE_SIZES, "patch_size": MOST_CHANNELS},
            "text_encoder": encoder_sizes,
        },
        chat=("tokenizer",),
    )


# --- models on the hub ----------------------------------------------------------------------------------------------

# The transformers' sizes are those of diffusers' script that converts the published weights
# (scripts/convert_flux2_to_diffusers.py), and the VAE has the defaults of its class, which the script takes.
DEV_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 128,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": True,
}
KLEIN_4B_TRANSFORMER = {
    **DEV_TRANSFORMER,
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
KLEIN_9B_TRANSFORMER = {
    **KLEIN_4B_TRANSFORMER,
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
}
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 32,
    "norm_num_groups": 32,
}
# Mistral-Small-3.2-24B: the defaults of transformers' Mistral3Config, but for the output layer, which has weights of
# its own there: without them it would have 23.3 billion, not 24.0.
MISTRAL = {
    "text_config": {
        "model_type": "mistral",
        "vocab_size": 131072,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "sliding_window": None,
    },
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 1540,
        "patch_size": 14,
    },
    "tie_word_embeddings": False,
}
# Qwen3-4B and Qwen3-8B.
QWEN_4B = {
    "vocab_size": 151936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
QWEN_8B = {**QWEN_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
_KLEIN_4B: Configs = {"transformer": KLEIN_4B_TRANSFORMER, "vae": VAE, "text_encoder": QWEN_4B}
_KLEIN_9B: Configs = {"transformer": KLEIN_9B_TRANSFORMER, "vae": VAE, "text_encoder": QWEN_8B}
_DISTILLED: Configs = {"pipeline": {"is_distilled": True}}


# --- what both pipelines do -----------------------------------------------------------------------------------------


def _encode(pipe: Any, prompts: Sequence[Prompt], asked: EncodeSettings) -> dict[str, Tensor]:
    """Padding is a part of the embeddings: the transformer attends to it."""
    embeds, _ = pipe.encode_prompt(texts(prompts), device=asked.device, max_sequence_length=asked.max_tokens)
    return {"embeds": embeds.to(asked.dtype)}


def _stacked(layers: Sequence[int], encoder: Any, ids: Tensor) -> Tensor:
    """The encoder's call in `encode_prompt`: hidden states of these layers side by side, (P, T, layers * C)."""
    out = encoder(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
    ).hidden_states
    return torch.stack([out[layer] for layer in layers], dim=1).permute(0, 2, 1, 3).flatten(2)


class _Flux2Spec(PipelineSpec):
    one_gradient_layout = True
    blocks: ClassVar[Mapping[str, str]] = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
    text_parts = (TextPart(("text_encoder",), _encode),)
    layers: ClassVar[tuple[int, ...]]
    """of the text encoder, whose outputs are the embeddings"""

    def text_shapes(self, configs: Configs, grid: Grid, max_tokens: int) -> Mapping[str, tuple[int, ...]]:
        return {"embeds": (max_tokens, configs["transformer"]["joint_attention_dim"])}

    def encoder_calls(self, configs: Configs, max_tokens: int) -> Mapping[str, EncoderCall]:
        return {"text_encoder": EncoderCall(max_tokens, partial(_stacked, self.layers))}

    def positions(self, grid: Grid) -> Tensor:
        """(S, 4) int64: time, row, column, text token. In bfloat16, the 512 of the last would be rounded."""
        zero, rows, columns = (torch.arange(n, device="cpu") for n in (1, grid.rows, grid.columns))
        return torch.cartesian_prod(zero, rows, columns, zero)

    def velocity(
        self, transformer: Any, latents: Tensor, sigma: Tensor, text: Text, guidance: float, positions: Any
    ) -> Tensor:
        embeds, device = text["embeds"], latents.device
        return transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds,
            timestep=sigma,
            guidance=guidance_input(transformer, guidance, latents),
            img_ids=positions.to(device),
            txt_ids=F.pad(torch.arange(embeds.shape[1], device=device)[:, None], (3, 0)),
            return_dict=False,
        )[0]

    def mu(self, scheduler: Any, grid: Grid, num_steps: int) -> float:
        return compute_empirical_mu(grid.tokens, num_steps)

    def decode(self, vae: Any, latents: Tensor, grid: Grid) -> Tensor:
        z = latents.mT.unflatten(-1, (grid.rows, grid.columns))
        std = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        std, mean = (values.view(1, -1, 1, 1).to(z.device, z.dtype) for values in (std, vae.bn.running_mean))
        z = Flux2Pipeline._unpatchify_latents(z * std + mean).to(vae.dtype)
        return vae.decode(z, return_dict=False)[0]

    def _tiny_parts(self, guidance_embeds: bool) -> dict[str, Any]:
        vae: Any = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        )
        vae.bn.running_mean.normal_(std=0.3)  # trained ones are neither 0 nor 1
        vae.bn.running_var.uniform_(4, 9)
        transformer = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=len(self.layers) * TEXT_DIM,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        return {"scheduler": scheduler, "vae": vae, "transformer": transformer}

    def _tiny_language_model(self, tokenizer: Any) -> dict[str, Any]:
        return {
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_DIM,
            "intermediate_size": 2 * TEXT_DIM,
            "num_hidden_layers": self.layers[-1] + 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        }


# --- dev ------------------------------------------------------------------------------------------------------------


class DevSpec(_Flux2Spec):
    """Flux2Pipeline.

    Its `tokenizer` is a PixtralProcessor, which takes images, too, and needs torchvision. Text goes through the
    processor's own tokenizer, and that is what is loaded here.
    """

    pipeline = Flux2Pipeline
    parts = _parts(
        Mistral3ForConditionalGeneration,
        PreTrainedTokenizerFast,
        {
            **{f"text_config.{key}": most for key, most in LANGUAGE_SIZES.items()},
            **{f"vision_config.{key}": most for key, most in _VISION.items()},
        },
    )
    known: ClassVar[Mapping[str, Configs]] = {
        "black-forest-labs/FLUX.2-dev": {"transformer": DEV_TRANSFORMER, "vae": VAE, "text_encoder": MISTRAL},
    }
    layers = (10, 20, 30)

    def encoding_pipeline(self, path: str, **options: Any) -> Any:
        pipe = super().encoding_pipeline(path, tokenizer=None, **options)
        folder = pipeline_folder(path)
        pipe.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, subfolder="tokenizer")
        return pipe

    def tiny(self) -> Any:
        tokenizer: Any = _mistral_tokenizer()
        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = Mistral3Config(
            text_config={"model_type": "mistral", **self._tiny_language_model(tokenizer)},
            vision_config={"model_type": "pixtral", **vision},
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        )
        return Flux2Pipeline(
            text_encoder=Mistral3ForConditionalGeneration(config), tokenizer=tokenizer, **self._tiny_parts(True)
        )


def _mistral_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that knows the words of the pipeline's system message."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SYSTEM_MESSAGE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=(
            "<s>{% for message in messages %}{% set name = 'SYSTEM_PROMPT' if message.role == 'system' else 'INST' %}"
            "[{{ name }}]{% for part in message.content %}{{ part.text }}{% endfor %}[/{{ name }}]{% endfor %}"
        ),
    )


# --- klein ----------------------------------------------------------------------------------------------------------


class KleinSpec(_Flux2Spec):
    """Flux2KleinPipeline."""

    pipeline = Flux2KleinPipeline
    parts = _parts(Qwen3ForCausalLM, Qwen2Tokenizer, LANGUAGE_SIZES)
    known: ClassVar[Mapping[str, Configs]] = {
        "black-forest-labs/FLUX.2-klein-base-4B": _KLEIN_4B,
        "black-forest-labs/FLUX.2-klein-base-9B": _KLEIN_9B,
        "black-forest-labs/FLUX.2-klein-4B": {**_KLEIN_4B, **_DISTILLED},
        "black-forest-labs/FLUX.2-klein-9B": {**_KLEIN_9B, **_DISTILLED},
    }
    layers = (9, 18, 27)

    def reads_guidance(self, configs: Configs) -> bool:
        return not configs["pipeline"].get("is_distilled", False)

    def guided(self, configs: Configs, model: ModelConfig) -> bool:
        return model.guidance > 1 and self.reads_guidance(configs)

    def tiny(self) -> Any:
        tokenizer = qwen_tokenizer()
        encoder = Qwen3ForCausalLM(Qwen3Config(**self._tiny_language_model(tokenizer), tie_word_embeddings=True))
        return Flux2KleinPipeline(text_encoder=encoder, tokenizer=tokenizer, **self._tiny_parts(False))
