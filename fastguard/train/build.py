"""From a recipe to what is trained: prompts, model, backbone. Every process of a launch runs this."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator

from fastguard.backbones import Backbone
from fastguard.blocks import FuseReport
from fastguard.config import Recipe, Recompute
from fastguard.errors import UserError
from fastguard.prompts import Prompt, cache_folder, encode_prompts, pipeline_folder, read_prompts

TINY = "tiny"
"""model.path of the random pipeline that is made on first use."""


def check_launch(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse what accelerate was told elsewhere and would change what the recipe says."""
    kind = accelerator.distributed_type.value
    for name, works, value in (
        ("distributed_type", kind in ("NO", "MULTI_GPU", "MULTI_CPU") or accelerator.is_fsdp2, kind),
        ("mixed_precision", accelerator.mixed_precision == "no", accelerator.mixed_precision),
        ("gradient_accumulation_steps", accelerator.gradient_accumulation_steps == 1,
         accelerator.gradient_accumulation_steps),
    ):  # fmt: skip
        if not works:
            raise UserError(
                f"accelerate was configured with {name} = {value}, which would change what the recipe says: launch "
                "with recipes/accelerate/ddp.yaml or fsdp2.yaml (model.dtype and update.micro_batch are in the recipe)"
            )
    launched = "fsdp2" if accelerator.is_fsdp2 else "none"
    if launched != recipe.hardware.sharding:
        raise UserError(
            f'hardware.sharding = "{recipe.hardware.sharding}", but this was launched with "{launched}": use '
            "`accelerate launch --config_file recipes/accelerate/fsdp2.yaml` (or ddp.yaml), or change the field"
        )


@dataclass(frozen=True)
class Prompts:
    """The prompts of a run: those that are trained on, then those of the evaluation if they have their own file."""

    all: list[Prompt]
    trained: int
    """the first so many are trained on"""
    first_evaluated: int
    """index of the evaluation's first prompt"""


def gather_prompts(recipe: Recipe) -> Prompts:
    """Read the prompt files. Raises UserError if there are fewer prompts than the recipe asks for."""
    if recipe.model.kind == "digits":
        trained = [Prompt(str(digit), {"digit": digit}) for digit in range(10)]
    else:
        trained = read_prompts(recipe.prompts.file)
    own = recipe.monitor.every and recipe.monitor.file is not None
    evaluated = read_prompts(recipe.monitor.file) if own and recipe.monitor.file is not None else trained
    for field, wanted, there in (
        ("prompts.per_epoch", recipe.prompts.per_epoch, len(trained)),
        ("monitor.prompts", recipe.monitor.prompts if recipe.monitor.every else 0, len(evaluated)),
    ):
        if wanted > there:
            raise UserError(f"{field} = {wanted}, but the file holds {there} prompts: set it to at most {there}")
    return Prompts(trained + (evaluated if own else []), len(trained), len(trained) if own else 0)


def with_model(recipe: Recipe) -> Recipe:
    """The recipe with a model that is on this machine: makes the tiny random pipeline if it is asked for."""
    if recipe.model.kind != "flux" or recipe.model.path != TINY:
        return recipe
    from fastguard.backbones.tiny import make_tiny_flux

    folder = make_tiny_flux(cache_folder(recipe.prompts.cache) / "tiny_flux")
    return replace(recipe, model=replace(recipe.model, path=str(folder)))


def load_backbone(recipe: Recipe, prompts: Prompts, accelerator: Accelerator, recompute: Recompute) -> Backbone:
    """Check the pipeline's files, encode the prompts, free the encoders, then load what is trained."""
    if recipe.model.kind == "digits":
        from fastguard.demo.backbone import DigitBackbone

        return DigitBackbone.load(accelerator.device, recipe.model.fuse)
    from fastguard.backbones.flux import FluxBackbone
    from fastguard.backbones.folder import check_pipeline

    dtype = getattr(torch, recipe.model.dtype)
    with accelerator.main_process_first():
        check_pipeline(pipeline_folder(recipe.model.path))
        encoded = encode_prompts(
            prompts.all, recipe.model.path, recipe.prompts.max_tokens, recipe.prompts.cache, dtype, accelerator.device
        )
    backbone = FluxBackbone.load(recipe, encoded, prompts.trained, accelerator.device, recompute)
    if accelerator.is_main_process:
        print_exceptions(backbone.fused)
    return backbone


def print_exceptions(report: FuseReport | None) -> None:
    """Blocks that run unfused, and parts that keep more than they could."""
    if report is not None and (report.left or report.kept):
        print(report)
