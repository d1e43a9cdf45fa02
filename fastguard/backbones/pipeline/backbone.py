"""A loaded pipeline: its transformer as a policy with LoRA adapters, its VAE, and its schedule.

Axes: B image, P prompt, S image token, C channel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from huggingface_hub import save_torch_state_dict
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from fastguard.backbones.base import to_pixels
from fastguard.backbones.folder import pipeline_folder, read_json, weights_to_load
from fastguard.backbones.lora import ADAPTER, add_lora
from fastguard.backbones.pipeline.policy import PipelinePolicy
from fastguard.backbones.pipeline.spec import PipelineSpec
from fastguard.backbones.quantize import StoredTensors, adopt_quantized, format_of, load_quantized
from fastguard.blocks import FuseReport, OffloadedCheckpoints, fuse, fusible
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


# --- the transformer ------------------------------------------------------------------------------------------------


def prepare_transformer(
    spec: PipelineSpec, transformer: Any, model: ModelConfig, lora: LoraConfig, recompute: Recompute
) -> FuseReport | None:
    """Choose what is trained and how, in place: adapters or all weights, fused and compiled blocks, attention backend.

    Args:
        recompute: level of model.recompute, "auto" resolved. Blocks without a fused form save the same at "pointwise"
            and "mlp" as at "none".

    Returns what was fused; None with model.fuse = false.
    """
    if recompute not in (levels := recompute_levels(model.fuse)):
        raise UserError(f"model.fuse = {model.fuse} knows recompute = {', '.join(levels)}; got {recompute!r}")
    if model.train == "lora":
        add_lora(transformer, lora, spec.family.lora_targets, spec.unused(transformer))
    else:
        transformer.requires_grad_(True)
        for name in spec.unused(transformer):
            transformer.get_submodule(name).requires_grad_(False)
    report = None
    if model.fuse and fusible(transformer):
        report = fuse(transformer, recompute=recompute)
    else:
        if model.fuse:
            reason = f"there are no fused blocks for a {type(transformer).__name__}"
            report = FuseReport((), dict.fromkeys(blocks_of(spec, transformer), reason), {})
        if recompute in ("block", "offload"):
            transformer.enable_gradient_checkpointing(OffloadedCheckpoints() if recompute == "offload" else None)
    active, _ = _AttentionBackendRegistry.get_active_backend()  # the environment may name one
    if (model.attention, active.value) != ("native", "native"):
        set_attention(spec, transformer, model.attention)
    if model.compile == "blocks":
        compile_blocks(transformer, blocks_of(spec, transformer).values())
    return report


MASKED_ATTENTION = (
    "native",
    "_native_cudnn",
    "_native_efficient",
    "_native_math",
    "flash_varlen_hub",
    "_flash_3_varlen_hub",
)
"""Attention backends of diffusers that pass over the tokens of a mask wherever they are. Of the others, most refuse
masks. `flash_varlen`, `_flash_varlen_3` and `sage_varlen` pass over as many tokens at the end of the sequence instead,
and `xformers` adds the mask to the logits, as 0 and 1."""


def set_attention(spec: PipelineSpec, transformer: Any, backend: str) -> None:
    """Choose the attention backend by diffusers' name.

    Raises UserError for an unknown one, one that cannot run, or one without the mask that the family needs.
    """
    if spec.masked and backend.lower() not in MASKED_ATTENTION:
        raise UserError(
            f"model.attention = {backend!r}: a {type(transformer).__name__} needs attention with a mask of the text's "
            f"padding; choose one of {', '.join(MASKED_ATTENTION)}"
        )
    try:
        transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"model.attention = {backend!r}: {' '.join(str(error).split())}") from error


def leave_out_cudnn(spec: PipelineSpec, fused: FuseReport | None, attention: str) -> None:
    """Where blocks run unfused, keep PyTorch from choosing cuDNN for attention, in the whole process.

    PyTorch plans cuDNN's backward pass once for a layout of query, key and value, with the strides of the first
    gradient that it meets. It reads later gradients by those, whatever their own (pytorch/pytorch#191576). The strides
    differ among diffusers' blocks of Flux, whose gradients are then wrong, or NaN. They do not among fused blocks. What
    a compiler makes of unfused blocks is not known.

    Raises UserError as `refuse_cudnn` does.
    """
    if fused is not None and not fused.left:
        return
    refuse_cudnn(spec, attention, "model.fuse = false" if fused is None else next(iter(fused.left.values())))
    torch.backends.cuda.enable_cudnn_sdp(False)


def refuse_cudnn(spec: PipelineSpec, attention: str, why: str) -> None:
    """Raise UserError for cuDNN's attention in blocks that are not fused, where its gradients are known to be wrong."""
    if attention.lower() == "_native_cudnn" and not spec.one_gradient_layout:
        raise UserError(
            f"model.attention = {attention!r} gives wrong gradients in blocks that are not fused ({why}), because of a "
            'fault in PyTorch; set model.attention = "native"'
        )


def blocks_of(spec: PipelineSpec, transformer: Any) -> dict[str, nn.Module]:
    """The blocks by name."""
    return {f"{kind}.{i}": block for kind in spec.blocks.values() for i, block in enumerate(getattr(transformer, kind))}


def load_transformer(spec: PipelineSpec, recipe: Recipe, device: torch.device) -> Any:
    """The transformer of model.path on the device, its frozen weights as in model.quantize."""
    model, dtype = recipe.model, getattr(torch, recipe.model.dtype)
    kind, files_name = spec.parts.modules["transformer"]
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
        transformer: Any = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, device_map={"": device})
        adopt_quantized(transformer)
        return transformer
    if model.quantize == "none":
        return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True).to(device)
    with torch.device("meta"):
        transformer = kind.from_config(config)
    files, blocks = weights_to_load(folder, files_name), blocks_of(spec, transformer)
    load_quantized(transformer, blocks, files, model.quantize, dtype, recipe.prompts.cache, device)
    spec.remake_tables(transformer)
    return transformer.eval()


# --- the backbone ---------------------------------------------------------------------------------------------------


class PipelineBackbone:
    """A pipeline of any family; the protocol is `backbones.base.Backbone`.

    Args:
        transformer: on the device and already prepared by `prepare_transformer`.
        pipeline: settings of the pipeline, its model_index.json.
        encoded: embeddings of the prompts, on the host; with classifier-free guidance the last is the negative prompt.
        num_trained_prompts: the first so many of them are trained on.
        fused: what `prepare_transformer` returned.
    """

    def __init__(
        self,
        spec: PipelineSpec,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        pipeline: Mapping[str, Any],
        encoded: EncodedPrompts,
        num_trained_prompts: int,
        recipe: Recipe,
        device: torch.device,
        fused: FuseReport | None = None,
    ) -> None:
        configs = {"pipeline": pipeline, "transformer": transformer.config, "vae": vae.config}
        self._grid = grid = spec.grid(configs, recipe.model)
        guided = spec.guided(configs, recipe.model)
        self.policy = PipelinePolicy(spec, transformer, grid, recipe.model, guided)
        self.prompts: Sequence[Prompt] = encoded.prompts[:-1] if guided else encoded.prompts
        self.num_trained_prompts = num_trained_prompts
        self.latent_shape = spec.latent_shape(configs, grid)
        # Not the transformer's: diffusers takes that of its first parameter, which may be a float32 scale of codes.
        self.dtype: torch.dtype = getattr(torch, recipe.model.dtype)
        self.has_adapters = recipe.model.train == "lora"
        self.fused = fused
        self._spec, self._transformer, self._vae, self._scheduler = spec, transformer, vae, scheduler
        self._encoded, self._recipe, self._device = encoded, recipe, device
        if recipe.sampler.decode_tiled:
            spec.decode_in_tiles(vae, TILE)

    @property
    def shift(self) -> float:
        return self._spec.shift(self._scheduler, self._grid, self._recipe.sampler.num_steps)

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        return self._spec.sigmas(self._scheduler, self._grid, num_steps)

    def load_prompts(self, prompt_indices: Iterable[int]) -> None:
        indices = sorted(set(prompt_indices))
        rows = [*indices, len(self._encoded.prompts) - 1] if self.policy.guided else indices
        text = self._spec.text(self._encoded.load(rows))
        self.policy.set_prompts(indices, {name: self._on_device(values) for name, values in text.items()})

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self._device, self.dtype if values.is_floating_point() else values.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        chunks = latents.split(self._recipe.sampler.decode_batch)
        return torch.cat([to_pixels(self._spec.decode(self._vae, chunk, self._grid)) for chunk in chunks])

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        self._transformer.disable_adapters()
        try:
            yield
        finally:
            self._transformer.enable_adapters()

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """LoRA: a file for `pipe.load_lora_weights(folder)`; full: a folder for the transformer's
        `from_pretrained(folder)`.

        The file's alpha is its rank, and alpha / rank of the training is multiplied into B.
        """
        ours = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
        if self._recipe.model.train == "full":
            folder.mkdir(parents=True)
            self._transformer.save_config(folder)
            ours |= self._untrained(ours)
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
        self._spec.pipeline.save_lora_weights(
            folder,
            transformer_lora_layers=layers,
            save_function=lambda tensors, file: save_file(tensors, file, metadata=header),
        )

    def _untrained(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model's files hold beside: layers that are not used, and tables. Those in memory may be sharded."""
        folder = pipeline_folder(self._recipe.model.path) / "transformer"
        stored = StoredTensors(weights_to_load(folder, self._spec.parts.modules["transformer"][1]))
        return {name: stored[name] for name in stored.files if name not in trained}


def load_pipeline(
    spec: PipelineSpec,
    recipe: Recipe,
    encoded: EncodedPrompts,
    num_trained_prompts: int,
    device: torch.device,
    recompute: Recompute,
) -> PipelineBackbone:
    """Load the transformer, VAE and scheduler (not the text encoders) of `recipe.model.path`.

    Raises UserError for weights that are not finite.
    """
    path = recipe.model.path
    options = {"dtype": getattr(torch, recipe.model.dtype), "use_safetensors": True}  # no pickle is ever opened
    with fitting(f"model.path = {path!r}: the pipeline", "`fastguard plan` says what it needs"):
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(path, subfolder="scheduler")
        vae = spec.parts.modules["vae"][0].from_pretrained(path, subfolder="vae", **options)
        vae = vae.requires_grad_(False).to(device)
        transformer = load_transformer(spec, recipe, device)
    require_finite(vae, "vae", path)
    require_finite(transformer, "transformer", path)
    fused = prepare_transformer(spec, transformer, recipe.model, recipe.lora, recompute)
    leave_out_cudnn(spec, fused, recipe.model.attention)
    pipeline = read_json(pipeline_folder(path) / "model_index.json")
    return PipelineBackbone(
        spec, transformer, vae, scheduler, pipeline, encoded, num_trained_prompts, recipe, device, fused
    )
