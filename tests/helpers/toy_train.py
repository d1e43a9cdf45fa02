"""What trains the toy in the place of `commands.train.train_recipe`, in a process of its own."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastguard.config import Recipe
from fastguard.utils.rows import read_rows
from helpers import ROOT
from helpers.run_folders import MONITOR, in_process, toy
from helpers.toys import towards


def toy_recipe() -> Recipe:
    """Of three epochs, in less than a second; the prompts are read and not used."""
    prompts, update = {"file": ROOT / "recipes" / "prompts.txt"}, {"ema_decay": 0.5, "ema_every": 2}
    return replace(toy("unused", run={"epochs": 3}, prompts=prompts, update=update), monitor=MONITOR)


def train_toy(recipe: Recipe, resume: str) -> int:
    """With TOY_KILLED=FILE in the environment, the first run to score after its second epoch makes FILE and dies."""
    killed = os.environ.get("TOY_KILLED")

    def scored(*batch: Any) -> Tensor:
        done = len(read_rows(recipe.run.dir / "metrics.jsonl"))
        if killed is not None and not Path(killed).exists() and done == 2:
            Path(killed).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return towards(*batch)

    in_process(recipe, scored, resume)
    return 0


def train_slowly(recipe: Recipe, resume: str) -> int:
    """An epoch takes a second, so that a test can hit the run at work."""

    def scored(*batch: Any) -> Tensor:
        time.sleep(0.5)
        return towards(*batch)

    in_process(recipe, scored, resume)
    return 0


def fail(recipe: Recipe, resume: str) -> int:
    """A run with seed 1 fails, others train."""
    if recipe.run.seed == 1:
        raise RuntimeError("failed on purpose")
    return train_toy(recipe, resume)
