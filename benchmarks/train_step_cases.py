"""What bench_train_step.py measures: settings of the training step, and what each has to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import program

from fastguard.config import (
    HardwareConfig,
    ModelConfig,
    PromptsConfig,
    Recipe,
    Recompute,
    RewardConfig,
    SamplerConfig,
    UpdateConfig,
    objective_config,
)

MEMORY_GB = 80.0
CLIP_RANGE = {512: 2e-6, 1024: 1e-6}
"""of the recipes; the first log-ratio has to be within `update.parity` of it"""


@dataclass(frozen=True)
class Case:
    """One setting. The rollout batch equals the micro-batch, as parity asks for."""

    train: Literal["lora", "full"]
    size: int
    """pixels, squared"""
    fuse: bool
    recompute: Recompute
    micro_batch: int
    compile: bool = False
    peak_goal_gib: float | None = None
    mfu_goal: float | None = None

    @property
    def name(self) -> str:
        blocks, compiled = "" if self.fuse else "unfused-", "-compiled" if self.compile else ""
        return f"{self.train}-{self.size}-{blocks}{self.recompute}{compiled}"

    @property
    def times_rollout(self) -> bool:
        """A rollout recomputes nothing: it is timed once for all levels."""
        return self.recompute == ("none" if self.train == "lora" else "block")

    def recipe(self, dry: bool) -> Recipe:
        """One update of 5 trained steps of the 6 of each of 2 or 3 images. `dry`: the tiny pipeline, an eighth wide."""
        size = self.size // 8 if dry else self.size
        model = ModelConfig(
            path="tiny" if dry else ModelConfig.path,
            dtype="float32" if dry else "bfloat16",
            height=size,
            width=size,
            train=self.train,
            fuse=self.fuse,
            recompute=self.recompute,
        )
        return Recipe(
            model=model,
            prompts=PromptsConfig(per_epoch=1, max_tokens=32 if dry else 128),
            sampler=SamplerConfig(
                num_steps=6,
                noise_level=0.9,
                sde_steps=5,
                group_size=max(2, self.micro_batch),
                batch_size=self.micro_batch,
                decode_batch=1,
                store="cpu",
            ),
            objective=objective_config(clip_range=0.5),  # of ratios that should be 1
            rewards=(RewardConfig("jpeg_compressibility"),),  # a recipe needs one; nothing is scored here
            update=UpdateConfig(
                minibatches=1,
                micro_batch=self.micro_batch,
                optimizer="adamw" if self.train == "lora" else "adamw8bit",
                learning_rate=0.0,
            ),
            hardware=HardwareConfig(memory_gb=MEMORY_GB),
        )

    def settings(self, dry: bool) -> dict[str, Any]:
        """What a number of this case needs beside it."""
        recipe = self.recipe(dry)
        return {
            "train": self.train,
            "size": recipe.model.height,
            "fuse": self.fuse,
            "recompute": self.recompute,
            "compile": self.compile,
            "micro_batch": self.micro_batch,
            "optimizer": recipe.update.optimizer,
            "dtype": recipe.model.dtype,
            "images": recipe.images_per_epoch,
            "sampling_steps": recipe.sampler.num_steps,
            "transitions_per_update": recipe.transitions_per_update,
            "text_tokens": recipe.prompts.max_tokens,
        }


CASES = {
    case.name: case
    for case in (  # first what a goal or a comparison hangs on, should time run out
        Case("lora", 1024, True, "none", 1, mfu_goal=0.45),
        Case("lora", 1024, False, "none", 1),
        Case("lora", 1024, True, "pointwise", 1),
        Case("full", 512, True, "block", 2, peak_goal_gib=78.0),
        Case("lora", 512, True, "block", 3, peak_goal_gib=30.0),
        Case("lora", 1024, True, "block", 1, peak_goal_gib=30.0),
        Case("lora", 1024, True, "mlp", 1),
        Case("lora", 1024, False, "block", 1),
        Case("lora", 512, False, "none", 3),
        Case("lora", 512, True, "none", 3),
        Case("lora", 512, True, "pointwise", 3),
        Case("lora", 512, True, "mlp", 3),
        Case("lora", 512, False, "block", 3),
        Case("full", 512, False, "block", 2),
        Case("full", 512, True, "pointwise", 1),
        Case("full", 512, True, "mlp", 2),
        Case("full", 1024, True, "block", 1),
        Case("full", 1024, False, "block", 1),
        Case("lora", 1024, False, "none", 1, compile=True),
        Case("lora", 1024, True, "none", 1, compile=True),
        Case("lora", 512, False, "none", 3, compile=True),
        Case("lora", 512, True, "none", 3, compile=True),
        Case("full", 512, False, "block", 2, compile=True),
        Case("full", 512, True, "block", 2, compile=True),
        Case("full", 1024, True, "block", 1, compile=True),
    )
}
DRY_CASES = ("full-512-block",)
"""the one with most branches; --cases walks any other"""


def chosen_cases(patterns: Sequence[str] | None, dry: bool) -> list[Case]:
    """Cases whose names match one of the patterns. Raises ValueError for a pattern that matches none."""
    names = program.chosen(CASES, patterns or (DRY_CASES if dry else ("*",)), "--cases")
    return [CASES[name] for name in names]
