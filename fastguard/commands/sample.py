"""`fastguard sample`: images by a run's trained weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastguard.backbones import family_of
from fastguard.commands import RecipeFields
from fastguard.config import LARGEST_INT, MOST_AT_ONCE, MOST_STEPS, Recipe
from fastguard.errors import UserError
from fastguard.utils.files import writing
from fastguard.utils.sealed import clear_scratch, scratch


@dataclass(frozen=True)
class Sample:
    """Draw prompts with a run's trained weights, deterministically (ODE)."""

    recipe: RecipeFields
    prompt: tuple[str, ...] = ()
    """texts to draw; none draws the first prompts of the recipe"""
    checkpoint: str = "newest"
    """"newest" or "best" of run.dir, the path of a checkpoint, or "none" for the model before training"""
    images: int = 4
    """images per prompt"""
    steps: int = 28
    """denoising steps"""
    seed: int = 0
    """seed of the initial noise"""
    out: Path | None = None
    """folder for the PNG files; none means run.dir/samples"""

    def __call__(self) -> int:
        return sample_recipe(
            self.recipe,
            self.prompt,
            self.checkpoint,
            images=self.images,
            steps=self.steps,
            seed=self.seed,
            out=self.out or self.recipe.run.dir / "samples",
        )


def sample_recipe(
    recipe: Recipe, texts: Sequence[str], checkpoint: str, *, images: int, steps: int, seed: int, out: Path
) -> int:
    """Write `images` PNG files per prompt, and grid.png with a row for each, to `out`.

    Noise depends on the seed, the prompt's place and the image's: checkpoints can be compared image by image.

    Args:
        texts: prompts; none draws the first four of the recipe.
        checkpoint: as in `run.checkpoint_of`, or "none" for the model before training.
        steps: denoising steps, all deterministic.
    """
    from accelerate import Accelerator

    from fastguard.rewards.images import to_pil
    from fastguard.train.build import Prompts, gather_prompts, load_backbone, with_model
    from fastguard.train.rollout import ode_schedule, rollout, sample_seeds
    from fastguard.utils.grids import save_images
    from fastguard.utils.sharding import copy_all_into, trained_parameters

    for name, value, least, most in (
        ("images", images, 1, MOST_AT_ONCE),
        ("steps", steps, 1, MOST_STEPS),
        ("seed", seed, 0, LARGEST_INT),
    ):
        if not least <= value <= most:
            raise UserError(f"{name} must lie in [{least}, {most}], got {value}")
    own = [family_of(recipe.model.kind).prompt(text) for text in texts]
    recipe = with_model(recipe)
    prompts = Prompts(own, len(own), 0) if own else gather_prompts(recipe)
    count = len(own) or min(4, prompts.trained)
    weights = None if checkpoint == "none" else _trained_weights(recipe, checkpoint)
    accelerator = Accelerator()
    backbone = load_backbone(recipe, prompts, accelerator, recompute="none")
    if weights is not None:
        try:
            copy_all_into(trained_parameters(backbone.policy), weights)
        except UserError as error:
            raise UserError(f"the checkpoint does not fit this recipe: {error}") from None
    schedule = ode_schedule(recipe.sampler, backbone.sigmas, steps)
    prompt_indices = torch.arange(count, device="cpu").repeat_interleave(images)
    members = torch.arange(images, device="cpu").repeat(count)
    seeds = sample_seeds(seed, 0, prompt_indices, members, steps)
    backbone.load_prompts(range(count))
    drawn = []
    for part in torch.arange(len(prompt_indices), device="cpu").split(recipe.sampler.batch_size):
        on_device = prompt_indices[part].to(accelerator.device)
        rolled = rollout(backbone.policy, on_device, seeds[part], backbone.latent_shape, schedule, backbone.dtype)
        drawn.append(backbone.decode(rolled.latents))
    everything = torch.cat(drawn)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        clear_scratch(out)
        with scratch(out) as aside:  # a full disk leaves no half image, and no mixture with earlier ones
            for i, image in enumerate(to_pil(everything)):
                image.save(aside / f"prompt{i // images:03d}_{i % images:02d}.png")
            save_images(aside / "grid.png", everything, columns=images)
            for file in aside.iterdir():
                os.replace(file, out / file.name)
    print(f"{len(everything)} images of {count} prompts: {out / 'grid.png'}")
    return 0


def _trained_weights(recipe: Recipe, checkpoint: str) -> dict[str, torch.Tensor]:
    from fastguard.train.checkpoint import read_state, read_tensors, require
    from fastguard.train.run_folder import checkpoint_of

    path = checkpoint_of(recipe.run.dir, checkpoint)
    require(path)
    print(f"weights of {path}" + (" (before training)" if read_state(path)["epoch"] == 0 else ""))
    return read_tensors(path, "average") or read_tensors(path, "weights")
