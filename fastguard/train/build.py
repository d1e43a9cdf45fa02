"""From a recipe to what is trained: prompts, model, backbone. Every process of a launch runs this."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator

from fastguard.backbones import Backbone, family_of
from fastguard.blocks import FuseReport
from fastguard.config import Recipe, Recompute
from fastguard.errors import UserError
from fastguard.prompts import Prompt


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
    family = family_of(recipe.model.kind)
    trained = family.read_prompts(recipe.prompts.file)
    own = recipe.monitor.every and recipe.monitor.file is not None
    evaluated = family.read_prompts(recipe.monitor.file) if own and recipe.monitor.file is not None else trained
    for field, wanted, there in (
        ("prompts.per_epoch", recipe.prompts.per_epoch, len(trained)),
        ("monitor.prompts", recipe.monitor.prompts if recipe.monitor.every else 0, len(evaluated)),
    ):
        if wanted > there:
            raise UserError(f"{field} = {wanted}, but the file holds {there} prompts: set it to at most {there}")
    return Prompts(trained + (evaluated if own else []), len(trained), len(trained) if own else 0)


def with_model(recipe: Recipe) -> Recipe:
    """The recipe with a model that is on this machine; one that can be made here is made."""
    return family_of(recipe.model.kind).prepare(recipe)


def load_backbone(recipe: Recipe, prompts: Prompts, accelerator: Accelerator, recompute: Recompute) -> Backbone:
    """Check the model's files, encode the prompts, free the encoders, then load what is trained."""
    family = family_of(recipe.model.kind)
    family.check_attention(recipe.model)
    with accelerator.main_process_first():
        encoded = family.encode(recipe, prompts.all, accelerator.device)
    backbone = family.load(recipe, encoded, prompts.trained, accelerator.device, recompute)
    if accelerator.is_main_process:
        print_exceptions(backbone.fused)
    return backbone


def print_exceptions(report: FuseReport | None) -> None:
    """Blocks that run unfused, and parts that keep more than they could."""
    if report is not None and (report.left or report.kept):
        print(report)
