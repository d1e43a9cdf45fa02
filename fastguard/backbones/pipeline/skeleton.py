"""The real modules of a pipeline at full size, without weights: settings and meta modules, for the planner.

Axes: B image, P prompt, S image token, T text token, C channel.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fastguard.backbones.base import Skeleton, TextEncoder
from fastguard.backbones.folder import described_by, read_json
from fastguard.backbones.pipeline import TINY
from fastguard.backbones.pipeline.backbone import PipelineBackbone, blocks_of, prepare_transformer
from fastguard.backbones.pipeline.spec import Configs, PipelineSpec
from fastguard.backbones.quantize import format_of, quantize_layers
from fastguard.backbones.sizes import size_problems
from fastguard.config import Encoders, LoraConfig, ModelConfig, Recompute
from fastguard.errors import UserError
from fastguard.prompts import EncodedPrompts, Prompt

FOLDER = "folder"
"""Key of the folder in `Configs` that were read from one."""


def pipeline_configs(spec: PipelineSpec, path: str) -> Configs:
    """Settings of `model.path`: a local folder in diffusers' layout, "tiny", or a name in `spec.known`.

    Raises UserError for any other name, for the planner downloads nothing, and for settings that are damaged.
    """
    folder = Path(path)
    if os.path.isdir(folder):
        spec.family.require_kind(folder)
        missing = [name for name in spec.parts.modules if not (folder / name / "config.json").is_file()]
        if missing:
            raise UserError(f'model.path = "{path}" has no config.json in {", ".join(missing)}')
        index = folder / "model_index.json"
        return {
            **{name: _settings(spec, folder, name) for name in spec.parts.modules},
            "pipeline": read_json(index) if index.is_file() else {},
            FOLDER: {"path": folder},
        }
    if path == TINY:
        return _tiny_configs(type(spec), spec.family)
    if path in spec.known:
        return {"pipeline": {}, **spec.known[path]}
    raise UserError(
        f'model.path = "{path}" is neither a local folder nor one of {", ".join([TINY, *spec.known])}; '
        "the planner downloads nothing, so download the pipeline and give its folder"
    )


def _settings(spec: PipelineSpec, folder: Path, part: str) -> dict[str, Any]:
    """A part's config.json. Raises UserError for one that is damaged, or has sizes that nobody means."""
    file = folder / part / "config.json"
    values = read_json(file)
    for problem in size_problems(spec.parts.largest[part], file, values):
        raise UserError(f"model.path: {problem}")
    return values


@lru_cache(maxsize=8)
def _tiny_configs(kind: type[PipelineSpec], family: Any) -> Configs:
    with torch.random.fork_rng(devices=[]):
        pipe: Any = kind(family).tiny()
    parts = {name: getattr(pipe, name).config for name in kind.parts.modules}
    settings = {
        name: config.to_dict() if hasattr(config, "to_dict") else dict(config) for name, config in parts.items()
    }
    return {**settings, "pipeline": dict(pipe.config)}


@contextmanager
def _meta_modules(configs: Configs, part: str) -> Iterator[None]:
    file = configs[FOLDER]["path"] / part / "config.json" if FOLDER in configs else None
    with described_by(file), torch.device("meta"):
        yield


def _from_config(spec: PipelineSpec, configs: Configs, part: str, dtype: torch.dtype) -> Any:
    """A module of diffusers."""
    with _meta_modules(configs, part):
        kind = spec.parts.modules[part][0]
        return _cast(kind.from_config({k: v for k, v in configs[part].items() if not k.startswith("_")}), dtype)


def meta_transformer(spec: PipelineSpec, configs: Configs, dtype: torch.dtype) -> Any:
    return _from_config(spec, configs, "transformer", dtype)


def meta_vae(spec: PipelineSpec, configs: Configs, dtype: torch.dtype) -> Any:
    return _from_config(spec, configs, "vae", dtype).requires_grad_(False)


def meta_encoder(spec: PipelineSpec, configs: Configs, part: str, dtype: torch.dtype) -> Any:
    """A module of transformers."""
    with _meta_modules(configs, part):
        kind = spec.parts.modules[part][0]
        return _cast(kind(kind.config_class(**configs[part])), dtype)


def _cast(module: Any, dtype: torch.dtype) -> Any:
    """`module.to(dtype)`, without diffusers' warning about weights that are only meta."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module


def pipeline_skeleton(spec: PipelineSpec, model: ModelConfig, lora: LoraConfig, recompute: Recompute) -> Skeleton:
    """The transformer and the VAE of `model.path`, the transformer as `prepare_transformer` prepares it.

    Raises UserError as `pipeline_configs`, `PipelineSpec.grid` and `add_lora` do.
    """
    configs, dtype = pipeline_configs(spec, model.path), getattr(torch, model.dtype)
    vae = meta_vae(spec, configs, dtype)
    grid = spec.grid({**configs, "vae": vae.config}, model)
    transformer = meta_transformer(spec, configs, dtype)
    with torch.device("meta"):
        stored = format_of(configs["transformer"])
        if stored is not None and model.train == "full":
            raise UserError(f'model.train = "full", but {model.path} is quantized ({stored}): set model.train = "lora"')
        how = stored or model.quantize
        if how != "none":
            quantize_layers(transformer, blocks_of(spec, transformer), how)
        fused = prepare_transformer(spec, transformer, model, lora, recompute)
    built = {"pipeline": configs["pipeline"], "transformer": transformer.config, "vae": vae.config}
    one, two = (_elements(spec.text_shapes(built, grid, tokens)) for tokens in (1, 2))
    return Skeleton(
        transformer=transformer,
        decoder=vae,
        blocks={kind: getattr(transformer, name) for kind, name in spec.blocks.items()},
        latent_shape=spec.latent_shape(built, grid),
        tokens=spec.tokens(grid),
        branches=2 if spec.guided(built, model) and model.guidance_gradient == "both" else 1,
        width=spec.width(transformer.config),
        text=(two - one, one - (two - one)),
        fused=fused,
        assemble=partial(_assemble, spec, transformer, vae, built, model),
    )


def _elements(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _assemble(
    spec: PipelineSpec,
    transformer: Any,
    vae: Any,
    configs: Configs,
    model: ModelConfig,
    max_tokens: int,
    decode_batch: int,
    decode_tiled: bool,
) -> PipelineBackbone:
    """The product's own backbone around these modules, with the embeddings of one prompt."""
    spec.remake_tables(transformer)
    sampler = SimpleNamespace(decode_batch=decode_batch, decode_tiled=decode_tiled)
    recipe: Any = SimpleNamespace(model=model, sampler=sampler)
    backbone = PipelineBackbone(
        spec,
        transformer,
        vae,
        scheduler=None,
        pipeline=configs["pipeline"],
        encoded=EncodedPrompts([Prompt("")], []),
        num_trained_prompts=0,
        recipe=recipe,
        device=torch.device("cpu"),
    )
    grid = spec.grid(configs, model)
    if decode_tiled:
        spec.decode_last_tiles(vae, grid)
    shapes = spec.text_shapes(configs, grid, max_tokens)
    backbone.policy.row_of = torch.empty(1, dtype=torch.int64)
    backbone.policy.text = {name: torch.empty(1, *shape, dtype=backbone.dtype) for name, shape in shapes.items()}
    return backbone


def meta_text_encoders(
    spec: PipelineSpec, model: ModelConfig, max_tokens: int, encoders: Encoders
) -> Sequence[TextEncoder]:
    """The text encoders, as the pipeline calls them; large ones in 8 bits with encoders = "int8"."""
    configs, dtype = pipeline_configs(spec, model.path), getattr(torch, model.dtype)
    calls, found = spec.encoder_calls(configs, max_tokens), []
    for part in spec.text_parts:
        for name in (name for name in part.encoders if name in calls):
            module, call = meta_encoder(spec, configs, name, dtype), calls[name]
            if encoders == "int8" and part.quantizable:
                with torch.device("meta"):
                    quantize_layers(module, {"": module}, "int8")
            found.append(TextEncoder(module, call.tokens, partial(call.embed, module)))
    return found
