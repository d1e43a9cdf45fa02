"""Families of diffusers pipelines: what is known of one without its weights, and where the rest is.

A family has two halves. Its `PipelineFamily` answers commands while they read a recipe. Its `PipelineSpec` knows
diffusers' classes and what is particular to them. The other files here are the same for all families. They and the spec
import diffusers and transformers, which takes seconds: methods import them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastguard.backbones.base import Backbone, Family, Skeleton, TextEncoder
from fastguard.config import Encoders, LoraConfig, ModelConfig, Recipe, Recompute
from fastguard.errors import UserError
from fastguard.prompts import EncodedPrompts, Prompt, cache_folder
from fastguard.utils.findings import Finding

if TYPE_CHECKING:
    from fastguard.backbones.pipeline.spec import PipelineSpec

TINY = "tiny"
"""model.path of the random pipeline that is made on first use."""
JOINT_ATTENTION = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
"""Layers of attention over image and text, in blocks where each has its own."""


_NO_BRANCH = "this model takes its guidance as an input, and has no second branch"
GUIDANCE_IS_AN_INPUT = {"model.negative_prompt": _NO_BRANCH, "model.guidance_gradient": _NO_BRANCH}
"""For `unread`, of guidance-distilled models."""


class PipelineFamily(Family):
    """A family whose models are folders in diffusers' layout, with one transformer that is trained."""

    pipeline: ClassVar[str]
    """name of diffusers' class of the pipeline"""
    transformer: ClassVar[str]
    """name of diffusers' class of the transformer"""
    download: ClassVar[str]
    """what to know before a model is downloaded, as part of a sentence"""

    @property
    @abstractmethod
    def spec(self) -> PipelineSpec:
        """Diffusers' classes and what is particular to them."""

    def require_kind(self, folder: Path) -> None:
        """Raise UserError for a folder with another pipeline than the family's."""
        from fastguard.backbones.build import FAMILIES, family_of
        from fastguard.backbones.folder import read_json

        try:
            found = read_json(folder / "model_index.json").get("_class_name")
        except (OSError, UserError):
            return  # what is missing or damaged is told with the other parts
        if found is None or found == self.pipeline:
            return
        families = {kind: family_of(kind) for kind in FAMILIES}
        kinds = [kind for kind, family in families.items() if getattr(family, "pipeline", None) == found]
        remedy = f'set model.kind = "{kinds[0]}"' if kinds else "no model.kind takes it, choose another model"
        raise UserError(f"model.path: {folder} holds a {found}, and this model.kind takes a {self.pipeline}: {remedy}")

    def prepare(self, recipe: Recipe) -> Recipe:
        """Makes the tiny random pipeline if it is asked for."""
        if recipe.model.path != TINY:
            return recipe
        from fastguard.backbones.pipeline.tiny import make_tiny

        folder = make_tiny(self.spec, cache_folder(recipe.prompts.cache) / f"tiny_{recipe.model.kind}")
        return replace(recipe, model=replace(recipe.model, path=str(folder)))

    def encode(self, recipe: Recipe, prompts: Sequence[Prompt], device: torch.device) -> EncodedPrompts:
        from fastguard.backbones.folder import check_pipeline, pipeline_folder
        from fastguard.backbones.pipeline.encoding import encode_prompts
        from fastguard.backbones.pipeline.skeleton import pipeline_configs

        spec, model, config = self.spec, recipe.model, recipe.prompts
        folder = pipeline_folder(model.path)
        self.require_kind(folder)
        check_pipeline(folder, spec.parts)
        if spec.guided(pipeline_configs(spec, str(folder)), model):
            prompts = [*prompts, Prompt(model.negative_prompt)]
        dtype = getattr(torch, model.dtype)
        size = model.height, model.width
        return encode_prompts(
            spec, prompts, model.path, config.max_tokens, config.cache, dtype, device, config.encoders, size
        )

    def load(
        self, recipe: Recipe, encoded: Any, num_trained_prompts: int, device: torch.device, recompute: Recompute
    ) -> Backbone:
        from fastguard.backbones.pipeline.backbone import load_pipeline

        return load_pipeline(self.spec, recipe, encoded, num_trained_prompts, device, recompute)

    def describe(self, model: ModelConfig) -> str:
        return f"{model.path} ({model.train})"

    def how_to_load(self, model: ModelConfig, folder: Path) -> str:
        if model.train == "lora":
            return f'pipe.load_lora_weights("{folder}")'
        return f'{self.transformer}.from_pretrained("{folder}")'

    def examine(self, recipe: Recipe) -> Iterator[Finding]:
        path = recipe.model.path
        if path == TINY:
            yield Finding("ok", "the tiny random pipeline is made on first use")
            return
        from fastguard.backbones.folder import examine_pipeline
        from fastguard.backbones.pipeline.skeleton import pipeline_configs

        spec = self.spec
        self.require_kind(Path(path))
        found = list(examine_pipeline(path, spec.parts, self.download))
        yield from found
        whole = (Path(path).is_dir() or path in spec.known) and not any(one.level == "FAIL" for one in found)
        if whole and not spec.reads_guidance(pipeline_configs(spec, path)):
            guidance = recipe.model.guidance
            yield Finding("info", f"this model is distilled, and does not read model.guidance = {guidance:g}")

    def check_attention(self, model: ModelConfig) -> None:
        if model.attention != "native":
            from fastguard.backbones.pipeline.backbone import refuse_cudnn, set_attention
            from fastguard.backbones.pipeline.skeleton import meta_transformer, pipeline_configs

            spec = self.spec
            if not model.fuse:
                refuse_cudnn(spec, model.attention, "model.fuse = false")
            set_attention(spec, meta_transformer(spec, pipeline_configs(spec, TINY), torch.float32), model.attention)

    def runs_on_cpu(self, model: ModelConfig) -> bool:
        return model.path == TINY

    def skeleton(self, model: ModelConfig, lora: LoraConfig, recompute: Recompute) -> Skeleton:
        from fastguard.backbones.pipeline.skeleton import pipeline_skeleton

        return pipeline_skeleton(self.spec, model, lora, recompute)

    def text_encoders(self, model: ModelConfig, max_tokens: int, encoders: Encoders) -> Sequence[TextEncoder]:
        from fastguard.backbones.pipeline.skeleton import meta_text_encoders

        return meta_text_encoders(self.spec, model, max_tokens, encoders)
