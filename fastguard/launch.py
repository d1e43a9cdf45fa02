"""From a recipe to a run: check everything that can be checked, say what follows, then load weights and train.

Every process of a launch runs this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed

from fastguard.backbones import Backbone
from fastguard.config import Recipe, Recompute
from fastguard.flux import FuseReport
from fastguard.memory import MemoryPlan, compare_kept, plan
from fastguard.monitor import Monitor
from fastguard.processes import broadcast
from fastguard.prompts import Prompt, cache_folder, encode_prompts, pipeline_folder, read_prompts
from fastguard.recipe import totals
from fastguard.rewards import RewardPool, build_reward
from fastguard.run import RunFolder
from fastguard.state import for_processes
from fastguard.trainer import train

PATIENCE = timedelta(hours=4)
"""How long processes wait for each other: a first encoding, slow rewards, or a save of 190 GB take longer than NCCL's
ten minutes."""
TINY = "tiny"
"""model.path of the random pipeline that is made on first use."""


def train_recipe(recipe: Recipe, resume: str = "never") -> int:
    """Train as the recipe says, in this process or in all processes of a launch. Returns the exit code."""
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=list(recipe.run.trackers) or None,
        project_dir=recipe.run.dir.absolute(),  # a reward may change the working directory
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    recipe = for_processes(recipe, accelerator.num_processes)
    _check_launch(recipe, accelerator)
    set_seed(recipe.run.seed)
    prompts = gather_prompts(recipe)
    run = RunFolder(recipe, accelerator, resume)
    with accelerator.main_process_first():
        recipe = with_model(recipe)
    recompute: Recompute = broadcast([announce(recipe) if accelerator.is_main_process else "none"], accelerator)[0]
    with ExitStack() as stack:
        rewards = [(config, build_reward(config)) for config in recipe.rewards]
        gold = [(config, build_reward(config)) for config in recipe.monitor.gold if recipe.monitor.every]
        # The same on every process, for adapters begin with random weights; rewards may have drawn or seeded meanwhile.
        set_seed(recipe.run.seed)
        backbone = load_backbone(recipe, prompts, accelerator, recompute)
        stack.enter_context(run.catching_signals())  # until here there is nothing to save
        pool = stack.enter_context(RewardPool(rewards, recipe.scoring, backbone.prompts))
        monitor = None
        if recipe.monitor.every:
            judges = stack.enter_context(RewardPool([*rewards, *gold], recipe.scoring, backbone.prompts))
            monitor = Monitor(recipe, judges, prompts.first_evaluated)
        train(backbone, recipe, pool, run, accelerator, monitor)
    if accelerator.is_main_process:
        ended = "stopped" if run.was_stopped else "finished"
        newest = recipe.run.dir / "checkpoints" / run.checkpoints.all()[0].name
        print(f"{ended}; trained weights: {newest / 'diffusers'}")
        print(f"`fastguard report {recipe.run.dir}` draws the run")
    run.end()
    return 0


def _check_launch(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse what accelerate was told elsewhere and would change what the recipe says."""
    kind = accelerator.distributed_type.value
    for name, works, value in (
        ("distributed_type", kind in ("NO", "MULTI_GPU", "MULTI_CPU") or accelerator.is_fsdp2, kind),
        ("mixed_precision", accelerator.mixed_precision == "no", accelerator.mixed_precision),
        ("gradient_accumulation_steps", accelerator.gradient_accumulation_steps == 1,
         accelerator.gradient_accumulation_steps),
    ):  # fmt: skip
        if not works:
            raise ValueError(
                f"accelerate was configured with {name} = {value}, which would change what the recipe says: launch "
                "with recipes/accelerate/ddp.yaml or fsdp2.yaml (model.dtype and update.micro_batch are in the recipe)"
            )
    launched = "fsdp2" if accelerator.is_fsdp2 else "none"
    if launched != recipe.hardware.sharding:
        raise ValueError(
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
    """Read the prompt files. Raises ValueError if there are fewer prompts than the recipe asks for."""
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
            raise ValueError(f"{field} = {wanted}, but the file holds {there} prompts: set it to at most {there}")
    return Prompts(trained + (evaluated if own else []), len(trained), len(trained) if own else 0)


def with_model(recipe: Recipe) -> Recipe:
    """The recipe with a model that is on this machine: makes the tiny random pipeline if it is asked for."""
    if recipe.model.kind != "flux" or recipe.model.path != TINY:
        return recipe
    from fastguard.backbones.tiny import make_tiny_flux

    folder = make_tiny_flux(cache_folder(recipe.prompts.cache) / "tiny_flux")
    return replace(recipe, model=replace(recipe.model, path=str(folder)))


def announce(recipe: Recipe) -> Recompute:
    """Print what follows from the recipe, before any weight is loaded; returns the level of model.recompute."""
    _print_lines(totals(recipe))
    if recipe.model.kind == "digits":
        _print_lines([("fused blocks", "yes" if recipe.model.fuse else "no")])
        return "none"
    predicted = plan(recipe)
    _print_lines(_blocks(recipe, predicted))
    verdict = "fits" if predicted.fits else "does NOT fit: `fastguard plan` suggests what would"
    peak = f"{predicted.peak / 2**30:.1f} GiB per GPU; {verdict} in {recipe.hardware.memory_gb:g} GB"
    _print_lines([("predicted peak memory", peak)])
    return predicted.recompute


def _blocks(recipe: Recipe, predicted: MemoryPlan) -> Iterator[tuple[str, str]]:
    """How the blocks will run, as (name, value) lines."""
    report = predicted.fused
    yield "fused blocks", "no" if report is None else f"{len(report.fused)} of {len(report.fused) + len(report.left)}"
    yield "recompute", predicted.recompute + (" (auto)" if recipe.model.recompute == "auto" else "")


def _print_lines(lines: Iterable[tuple[str, str]]) -> None:
    for name, value in lines:
        print(f"{name:>24}: {value}")


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
        _print_exceptions(backbone.fused)
    return backbone


def _print_exceptions(report: FuseReport | None) -> None:
    """Blocks that run unfused, and parts that keep more than they could."""
    if report is not None and (report.left or report.kept):
        print(report)


def print_plan(recipe: Recipe, kept: bool = False) -> int:
    """Print what follows from the recipe and its memory by phase; exit code 1 if it does not fit.

    Args:
        kept: print what an update's forward pass keeps for its backward pass instead, by level of model.recompute.
    """
    recipe = with_model(recipe)
    if kept:
        print(compare_kept(recipe))
        return 0
    _print_lines(totals(recipe))
    predicted = plan(recipe)
    _print_lines(_blocks(recipe, predicted))
    _print_exceptions(predicted.fused)
    print(predicted)
    return 0 if predicted.fits else 1
