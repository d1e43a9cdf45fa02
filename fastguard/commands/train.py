"""`fastguard train`: check everything that can be checked, say what follows, then load weights and train.

Every process of a launch runs this.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import torch

from fastguard.backbones import family_of
from fastguard.commands import RecipeFields
from fastguard.commands.plan import blocks, print_lines
from fastguard.config import Recipe, Recompute
from fastguard.recipe import totals

PATIENCE = timedelta(hours=4)
"""How long processes wait for each other: a first encoding, slow rewards, or a save of 190 GB take longer than NCCL's
ten minutes."""


@dataclass(frozen=True)
class Train:
    """Train as a recipe says.

    On several GPUs: accelerate launch --config_file ... -m fastguard.cli train RECIPE.
    """

    recipe: RecipeFields
    resume: str = "never"
    """"auto" goes on from the newest good checkpoint in run.dir, a path from that checkpoint; "never" begins anew"""

    def __call__(self) -> int:
        return train_recipe(self.recipe, self.resume)


def train_recipe(recipe: Recipe, resume: str = "never") -> int:
    """Train as the recipe says, in this process or in all processes of a launch. Returns the exit code."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    from fastguard.blocks.compiled import start_compiler
    from fastguard.prompts import cache_folder
    from fastguard.rewards import RewardPool, build_reward
    from fastguard.train.build import check_launch, gather_prompts, load_backbone, with_model
    from fastguard.train.monitor import Monitor
    from fastguard.train.run_folder import RunFolder
    from fastguard.train.state import for_processes
    from fastguard.train.trainer import train
    from fastguard.utils.processes import broadcast

    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=list(recipe.run.trackers) or None,
        project_dir=recipe.run.dir.absolute(),  # a reward may change the working directory
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    recipe = for_processes(recipe, accelerator.num_processes)
    check_launch(recipe, accelerator)
    set_seed(recipe.run.seed)
    prompts = gather_prompts(recipe)
    if recipe.model.compile == "blocks":
        start_compiler(cache_folder(recipe.prompts.cache), accelerator.device)
    run = RunFolder(recipe, accelerator, resume)
    with accelerator.main_process_first():
        recipe = with_model(recipe)
    recompute: Recompute = broadcast(
        [announce(recipe, prompts.trained) if accelerator.is_main_process else "none"], accelerator
    )[0]
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


def announce(recipe: Recipe, prompts: int) -> Recompute:
    """Print what follows from the recipe, before any weight is loaded; returns the level of model.recompute.

    Args:
        prompts: how many there are to train on.
    """
    print_lines(totals(recipe))
    if recipe.best_images and recipe.prompts.per_epoch * (recipe.objective.rollouts - 1) < prompts:
        print_lines([("warning", few_replayed(recipe, prompts))])
    if family_of(recipe.model.kind).footprint is not None:
        print_lines([("fused blocks", "yes" if recipe.model.fuse else "no")])
        return "none" if recipe.model.recompute == "auto" else recipe.model.recompute
    from fastguard.memory import plan

    predicted = plan(recipe)
    print_lines(blocks(recipe, predicted))
    verdict = "fits" if predicted.fits else "does NOT fit: `fastguard plan` suggests what would"
    peak = f"{predicted.peak / 2**30:.1f} GiB per GPU; {verdict} in {recipe.hardware.memory_gb:g} GB"
    print_lines([("predicted peak memory", peak)])
    return predicted.recompute


def few_replayed(recipe: Recipe, prompts: int) -> str:
    """Why most prompts have no earlier images when they come again, in words."""
    return (
        f"a prompt comes again after about {prompts / recipe.prompts.per_epoch:.1f} epochs, and objective.window = "
        f"{recipe.objective.rollouts} keeps {recipe.objective.rollouts - 1} rollouts, so few images are replayed: "
        "raise prompts.per_epoch or objective.window, or take fewer prompts"
    )
