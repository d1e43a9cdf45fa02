"""The real modules of a Flux pipeline at full size, without weights: configurations and meta modules, for the planner.

Axes: B image, S image token, T text token, C channel.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fastguard.backbones.base import Skeleton, TextEncoder
from fastguard.backbones.flux import TINY
from fastguard.backbones.flux.backbone import FluxBackbone, blocks_of, latent_grid, prepare_transformer
from fastguard.backbones.flux.parts import PARTS
from fastguard.backbones.flux.tiny import _pipeline
from fastguard.backbones.folder import described_by, read_json
from fastguard.backbones.quantize import format_of, quantize_layers
from fastguard.backbones.sizes import size_problems
from fastguard.config import Encoders, LoraConfig, ModelConfig, Recompute
from fastguard.errors import UserError
from fastguard.prompts import EncodedPrompts

FLUX_TRANSFORMER = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
FLUX_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_CLIP = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
}
FLUX_T5 = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}


@dataclass(frozen=True)
class PipelineConfigs:
    """Configuration of each module of a pipeline, as in its config.json."""

    transformer: dict[str, Any]
    vae: dict[str, Any]
    clip: dict[str, Any]
    t5: dict[str, Any]
    folder: Path | None = None
    """where they were read"""


FLUX_DEV = PipelineConfigs(FLUX_TRANSFORMER, FLUX_VAE, FLUX_CLIP, FLUX_T5)
KNOWN = {
    "black-forest-labs/FLUX.1-dev": FLUX_DEV,
    "black-forest-labs/FLUX.1-schnell": PipelineConfigs(
        {**FLUX_TRANSFORMER, "guidance_embeds": False}, FLUX_VAE, FLUX_CLIP, FLUX_T5
    ),
}


def pipeline_configs(path: str) -> PipelineConfigs:
    """Configurations of `model.path`: a local folder in diffusers' layout, "tiny", or a name in `KNOWN`.

    Raises UserError for any other name, for the planner downloads nothing, and for a configuration that is damaged.
    """
    folder = Path(path)
    if os.path.isdir(folder):
        names = ("transformer", "vae", "text_encoder", "text_encoder_2")
        missing = [name for name in names if not (folder / name / "config.json").is_file()]
        if missing:
            raise UserError(f'model.path = "{path}" has no config.json in {", ".join(missing)}')
        transformer, vae, clip, t5 = (_settings(folder, name) for name in names)
        return PipelineConfigs(transformer, vae, clip, t5, folder)
    if path == TINY:
        return _tiny_configs()
    if path in KNOWN:
        return KNOWN[path]
    raise UserError(
        f'model.path = "{path}" is neither a local folder nor one of {", ".join([TINY, *KNOWN])}; '
        "the planner downloads nothing, so download the pipeline and give its folder"
    )


def _settings(folder: Path, part: str) -> dict[str, Any]:
    """A part's config.json. Raises UserError for one that is damaged, or has sizes that nobody means."""
    file = folder / part / "config.json"
    values = read_json(file)
    for problem in size_problems(PARTS.largest[part], file, values):
        raise UserError(f"model.path: {problem}")
    return values


@lru_cache(maxsize=1)
def _tiny_configs() -> PipelineConfigs:
    with torch.random.fork_rng(devices=[]):
        pipe: Any = _pipeline()
    return PipelineConfigs(
        dict(pipe.transformer.config),
        dict(pipe.vae.config),
        pipe.text_encoder.config.to_dict(),
        pipe.text_encoder_2.config.to_dict(),
    )


@contextmanager
def _meta_modules(configs: PipelineConfigs, part: str) -> Iterator[None]:
    file = None if configs.folder is None else configs.folder / part / "config.json"
    with described_by(file), torch.device("meta"):
        yield


def _from_config(cls: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    return _cast(cls.from_config({k: v for k, v in config.items() if not k.startswith("_")}), dtype)


def meta_transformer(configs: PipelineConfigs, dtype: torch.dtype) -> Any:
    with _meta_modules(configs, "transformer"):
        return _from_config(FluxTransformer2DModel, configs.transformer, dtype)


def meta_vae(configs: PipelineConfigs, dtype: torch.dtype) -> Any:
    with _meta_modules(configs, "vae"):
        return _from_config(AutoencoderKL, configs.vae, dtype).requires_grad_(False)


def meta_encoders(configs: PipelineConfigs, dtype: torch.dtype) -> tuple[Any, Any]:
    """(CLIP, T5), as `FluxPipeline.from_pretrained` holds them: T5 keeps its `wo` in float32 under float16."""
    with _meta_modules(configs, "text_encoder"):
        clip = CLIPTextModel(CLIPTextConfig(**configs.clip))
    with _meta_modules(configs, "text_encoder_2"):
        t5 = T5EncoderModel(T5Config(**configs.t5))
    _cast(clip, dtype)
    _cast(t5, dtype)
    if dtype == torch.float16:
        for name, module in t5.named_modules():
            if name.endswith(".wo"):
                _cast(module, torch.float32)
    return clip, t5


def _cast(module: Any, dtype: torch.dtype) -> Any:
    """`module.to(dtype)`, without diffusers' warning about weights that are only meta."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module


def flux_skeleton(model: ModelConfig, lora: LoraConfig, recompute: Recompute) -> Skeleton:
    """The transformer and the VAE of `model.path`, the transformer as `prepare_transformer` prepares it.

    Raises UserError as `pipeline_configs`, `latent_grid` and `add_lora` do.
    """
    configs, dtype = pipeline_configs(model.path), getattr(torch, model.dtype)
    vae = meta_vae(configs, dtype)
    rows, columns = latent_grid(vae.config, model)
    transformer = meta_transformer(configs, dtype)
    with torch.device("meta"):
        stored = format_of(configs.transformer)
        if stored is not None and model.train == "full":
            raise UserError(f'model.train = "full", but {model.path} is quantized ({stored}): set model.train = "lora"')
        how = stored or model.quantize
        if how != "none":
            quantize_layers(transformer, blocks_of(transformer), how)
        fused = prepare_transformer(transformer, model, lora, recompute)
    return Skeleton(
        transformer=transformer,
        decoder=vae,
        blocks={"double": transformer.transformer_blocks, "single": transformer.single_transformer_blocks},
        latent_shape=(rows * columns, transformer.config.in_channels),
        width=transformer.inner_dim,
        text=(transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim),
        fused=fused,
        assemble=partial(_assemble, transformer, vae, model),
    )


def _assemble(
    transformer: Any, vae: Any, model: ModelConfig, max_tokens: int, decode_batch: int, decode_tiled: bool
) -> FluxBackbone:
    """The product's own backbone around these modules, with the embeddings of one prompt."""
    scheduler = SimpleNamespace(config=SimpleNamespace(use_dynamic_shifting=False, shift=1.0))
    sampler = SimpleNamespace(decode_batch=decode_batch, decode_tiled=decode_tiled)
    recipe: Any = SimpleNamespace(model=model, sampler=sampler)
    backbone = FluxBackbone(
        transformer,
        vae,
        scheduler,
        encoded=EncodedPrompts([], []),
        num_trained_prompts=0,
        recipe=recipe,
        device=torch.device("cpu"),
    )
    if decode_tiled:
        _decode_last_tiles(vae, model)
    policy, config = backbone.policy, transformer.config
    policy.row_of = torch.empty(1, dtype=torch.int64)
    policy.embeds = torch.empty(1, max_tokens, config.joint_attention_dim, dtype=backbone.dtype)
    policy.pooled = torch.empty(1, config.pooled_projection_dim, dtype=backbone.dtype)
    return backbone


def _decode_last_tiles(vae: Any, model: ModelConfig) -> None:
    """Of each image, decode the last tile of each size alone, and blend nothing: the peak is the same, within seconds.

    At an earlier tile of the same size fewer others wait. Blending is in place, thousands of small operations.
    """
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side, height, width = vae.tile_latent_min_size, model.height // factor, model.width // factor
    if height <= side and width <= side:
        return
    step = int(side * (1 - vae.tile_overlap_factor))
    tiles = [
        (min(side, height - y), min(side, width - x)) for y in range(0, height, step) for x in range(0, width, step)
    ]
    last = {size: i for i, size in enumerate(tiles)}
    decoded = itertools.cycle(last[size] == i for i, size in enumerate(tiles))
    whole = vae.decoder.forward

    def decode(z: Tensor) -> Tensor:
        if next(decoded):
            return whole(z)
        return z.new_empty(len(z), vae.config.out_channels, z.shape[2] * factor, z.shape[3] * factor)

    vae.decoder.forward = decode
    vae.blend_v = vae.blend_h = lambda _, tile, __: tile


def flux_text_encoders(model: ModelConfig, max_tokens: int, encoders: Encoders) -> Sequence[TextEncoder]:
    """CLIP and T5, as `FluxPipeline.encode_prompt` calls them; T5 in 8 bits with encoders = "int8"."""
    clip, t5 = meta_encoders(pipeline_configs(model.path), getattr(torch, model.dtype))
    if encoders == "int8":
        with torch.device("meta"):
            quantize_layers(t5, {"": t5}, "int8")
    return (
        TextEncoder(
            clip, clip.config.max_position_embeddings, lambda ids: clip(ids, output_hidden_states=False).pooler_output
        ),
        TextEncoder(t5, max_tokens, lambda ids: t5(ids, output_hidden_states=False)[0]),
    )
