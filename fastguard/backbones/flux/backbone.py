"""Flux.1 as a policy: diffusers' transformer with its LoRA adapters, its VAE, and its schedule.

Axes: B image, S image token, T text token, C channel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import save_torch_state_dict
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from fastguard.backbones.base import to_pixels
from fastguard.backbones.flux import Flux
from fastguard.backbones.flux.parts import PARTS
from fastguard.backbones.folder import pipeline_folder, read_json, weights_to_load
from fastguard.backbones.lora import ADAPTER, add_lora
from fastguard.backbones.quantize import adopt_quantized, format_of, load_quantized
from fastguard.backbones.schedule import schedule_shift
from fastguard.blocks import FuseReport, OffloadedCheckpoints, fuse_flux
from fastguard.blocks.compiled import compile_blocks
from fastguard.config import LoraConfig, ModelConfig, Recipe, Recompute, recompute_levels
from fastguard.errors import UserError
from fastguard.prompts import EncodedPrompts, Prompt
from fastguard.utils.files import fitting
from fastguard.utils.finite import require_finite

WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"
"""diffusers' name for the files of a model."""
TILE = 512
"""Pixels of a side of the tiles of sampler.decode_tiled."""


class FluxPolicy(nn.Module):
    """velocity = policy(latents (B, S, C), sigma (B,), prompt_indices (B,)).

    Prompt embeddings are plain attributes, not buffers: DDP would send buffers from rank 0 to all at every forward.
    """

    def __init__(self, transformer: Any, rows: int, columns: int, guidance: float) -> None:
        super().__init__()
        self.transformer: Any = transformer  # diffusers' mixins hide from mypy that it is a Module
        self.guidance = guidance
        rows_and_columns = torch.arange(rows, device="cpu"), torch.arange(columns, device="cpu")
        y, x = torch.meshgrid(*rows_and_columns, indexing="ij")
        self.image_ids = torch.stack([torch.zeros_like(y), y, x], dim=-1).reshape(-1, 3).float()
        self.row_of = self.embeds = self.pooled = torch.empty(0)

    def set_prompts(self, indices: Sequence[int], embeds: Tensor, pooled: Tensor) -> None:
        """Keep the embeddings of these prompts: embeds (P, T, C) and pooled (P, C), on the policy's device."""
        row_of = torch.zeros(max(indices) + 1, dtype=torch.int64, device="cpu")
        row_of[torch.tensor(indices, device="cpu")] = torch.arange(len(indices), device="cpu")
        # A table on the device: looking prompts up on the host would wait for the GPU at every step.
        self.row_of, self.embeds, self.pooled = row_of.to(embeds.device), embeds, pooled

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        device = latents.device
        row = self.row_of[prompt_indices]
        embeds = self.embeds[row]
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(latents),), self.guidance, dtype=torch.float32, device=device)
        return self.transformer(
            hidden_states=latents,
            encoder_hidden_states=embeds,
            pooled_projections=self.pooled[row],
            timestep=sigma,
            guidance=guidance,
            img_ids=self.image_ids.to(device, latents.dtype),
            txt_ids=torch.zeros(embeds.shape[1], 3, device=device, dtype=latents.dtype),
            return_dict=False,
        )[0]


def prepare_transformer(
    transformer: Any, model: ModelConfig, lora: LoraConfig, recompute: Recompute
) -> FuseReport | None:
    """Choose what is trained and how, in place: adapters or all weights, fused and compiled blocks, attention backend.

    Args:
        recompute: level of model.recompute, "auto" resolved.

    Returns what was fused; None with model.fuse = false.
    """
    if recompute not in (levels := recompute_levels(model.fuse)):
        raise UserError(f"model.fuse = {model.fuse} knows recompute = {', '.join(levels)}; got {recompute!r}")
    if model.train == "lora":
        add_lora(transformer, lora, Flux.lora_targets)
    else:
        transformer.requires_grad_(True)
    report = None
    if model.fuse:
        report = fuse_flux(transformer, recompute)
    elif recompute != "none":
        transformer.enable_gradient_checkpointing(OffloadedCheckpoints() if recompute == "offload" else None)
    if model.attention != "native":
        set_attention(transformer, model.attention)
    if model.compile == "blocks":
        compile_blocks(transformer, blocks_of(transformer).values())
    return report


def set_attention(transformer: Any, backend: str) -> None:
    """Choose the attention backend by diffusers' name. Raises UserError for an unknown one, or one that cannot run."""
    try:
        transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.attention = {backend!r}: {' '.join(str(error).split())}") from error


def blocks_of(transformer: Any) -> dict[str, nn.Module]:
    """The blocks by name."""
    return {
        f"{kind}.{i}": block
        for kind in ("transformer_blocks", "single_transformer_blocks")
        for i, block in enumerate(getattr(transformer, kind))
    }


def _load_transformer(recipe: Recipe, device: torch.device) -> Any:
    """The transformer of model.path on the device, its frozen weights as in model.quantize."""
    model, dtype = recipe.model, getattr(torch, recipe.model.dtype)
    folder = pipeline_folder(model.path) / "transformer"
    config = read_json(folder / "config.json")
    if (stored := format_of(config)) is not None:
        for field, value, works in (
            ("model.quantize", model.quantize, "none"),
            ("model.train", model.train, "lora"),
            ("hardware.sharding", recipe.hardware.sharding, "none"),
        ):
            if value != works:
                raise UserError(
                    f'{field} = "{value}", but the transformer of {model.path} is quantized already ({stored}): set '
                    f'{field} = "{works}", or take a model that is not'
                )
        transformer: Any = FluxTransformer2DModel.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, device_map={"": device}
        )
        adopt_quantized(transformer)
        return transformer
    if model.quantize == "none":
        return FluxTransformer2DModel.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(config)
    files = weights_to_load(folder, PARTS.modules["transformer"][1])
    load_quantized(transformer, blocks_of(transformer), files, model.quantize, dtype, recipe.prompts.cache, device)
    return transformer.eval()


def latent_grid(vae_config: Any, model: ModelConfig) -> tuple[int, int]:
    """(rows, columns) of image tokens: the VAE's factor, then patches of 2 x 2.

    Raises UserError if the image does not divide into them.
    """
    factor = 2 ** (len(vae_config.block_out_channels) - 1) * 2
    for name in ("height", "width"):
        if getattr(model, name) % factor:
            raise UserError(f"model.{name} must be a multiple of {factor} pixels, got {getattr(model, name)}")
    return model.height // factor, model.width // factor


def _decode_in_tiles(vae: Any) -> None:
    """Decode in tiles that overlap by a quarter, and blend them; an image that is no larger than one is decoded whole.

    The VAE's own tiles would be as large as the images that it was trained with: 1024 pixels, for Flux.1-dev.
    """
    vae.enable_tiling()
    vae.tile_sample_min_size = TILE
    vae.tile_latent_min_size = TILE // 2 ** (len(vae.config.block_out_channels) - 1)


class FluxBackbone:
    """Flux.1-dev, or any pipeline of its kind; the protocol is `backbones.base.Backbone`.

    Args:
        transformer: on the device and already prepared by `prepare_transformer`.
        encoded: embeddings of the prompts, on the host.
        num_trained_prompts: the first so many of them are trained on.
        fused: what `prepare_transformer` returned.
    """

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        encoded: EncodedPrompts,
        num_trained_prompts: int,
        recipe: Recipe,
        device: torch.device,
        fused: FuseReport | None = None,
    ) -> None:
        rows, columns = latent_grid(vae.config, recipe.model)
        self.policy = FluxPolicy(transformer, rows, columns, recipe.model.guidance)
        self.prompts: Sequence[Prompt] = encoded.prompts
        self.num_trained_prompts = num_trained_prompts
        self.latent_shape = (rows * columns, transformer.config.in_channels)
        # Not the transformer's: diffusers takes that of its first parameter, which may be a float32 scale of codes.
        self.dtype: torch.dtype = getattr(torch, recipe.model.dtype)
        self.shift = schedule_shift(scheduler.config, rows * columns)
        self.has_adapters = recipe.model.train == "lora"
        self.fused = fused
        self._vae, self._encoded, self._recipe, self._device = vae, encoded, recipe, device
        self._transformer = transformer
        if recipe.sampler.decode_tiled:
            _decode_in_tiles(vae)

    @classmethod
    def load(
        cls,
        recipe: Recipe,
        encoded: EncodedPrompts,
        num_trained_prompts: int,
        device: torch.device,
        recompute: Recompute,
    ) -> FluxBackbone:
        """Load the transformer, VAE and scheduler (not the text encoders) from `recipe.model.path`.

        Raises UserError for weights that are not finite.
        """
        path = recipe.model.path
        options = {"dtype": getattr(torch, recipe.model.dtype), "use_safetensors": True}  # no pickle is ever opened
        with fitting(f"model.path = {path!r}: the pipeline", "`fastguard plan` says what it needs"):
            scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")
            vae = AutoencoderKL.from_pretrained(path, subfolder="vae", **options).requires_grad_(False).to(device)
            transformer = _load_transformer(recipe, device)
        require_finite(vae, "vae", path)
        require_finite(transformer, "transformer", path)
        fused = prepare_transformer(transformer, recipe.model, recipe.lora, recompute)
        return cls(transformer, vae, scheduler, encoded, num_trained_prompts, recipe, device, fused)

    def load_prompts(self, prompt_indices: Iterable[int]) -> None:
        indices = sorted(set(prompt_indices))
        encoded = self._encoded.load(indices)
        embeds, pooled = (encoded[name].to(self._device, self.dtype) for name in ("embeds", "pooled"))
        self.policy.set_prompts(indices, embeds, pooled)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        model, config = self._recipe.model, self._vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        images = []
        for chunk in latents.split(self._recipe.sampler.decode_batch):
            z = FluxPipeline._unpack_latents(chunk, model.height, model.width, factor)
            z = (z / config.scaling_factor + config.shift_factor).to(self._vae.dtype)
            images.append(to_pixels(self._vae.decode(z, return_dict=False)[0]))
        return torch.cat(images)

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        self._transformer.disable_adapters()
        try:
            yield
        finally:
            self._transformer.enable_adapters()

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """LoRA: a file for `pipe.load_lora_weights(folder)`; full: a folder for
        `FluxTransformer2DModel.from_pretrained(folder)`.

        The file's alpha is its rank, and alpha / rank of the training is multiplied into B.
        """
        ours = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        if self._recipe.model.train == "full":
            folder.mkdir(parents=True)
            self._transformer.save_config(folder)
            ours = {name: tensor.to(self.dtype).contiguous() for name, tensor in ours.items()}
            # Not save_pretrained: it writes the model's own tensors, neither the average nor whole when sharded.
            save_torch_state_dict(ours, folder, filename_pattern=WEIGHTS)
            return
        config = self._transformer.peft_config[ADAPTER]
        scale = config.lora_alpha / config.r
        layers = get_peft_model_state_dict(self._transformer, ours, adapter_name=ADAPTER)
        # Only the file's header holds alpha, and tools that do not read it multiply by 1. All of the scale goes into B:
        # a power of two, as in the recipes, is then exact, and any other costs one rounding.
        layers = {name: tensor * scale if ".lora_B." in name else tensor for name, tensor in layers.items()}
        settings = {**config.to_dict(), "lora_alpha": config.r}
        ordered = {f"transformer.{key}": sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
        # One entry: safetensors writes several in an order of chance, and equal runs write equal files.
        header = {LORA_ADAPTER_METADATA_KEY: json.dumps(ordered, indent=2, sort_keys=True)}
        FluxPipeline.save_lora_weights(
            folder,
            transformer_lora_layers=layers,
            save_function=lambda tensors, file: save_file(tensors, file, metadata=header),
        )
