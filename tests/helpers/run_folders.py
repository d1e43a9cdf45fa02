"""Toy runs with a run folder in this process, and what their folders hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from fastguard.config import MonitorConfig, Recipe, RewardConfig
from fastguard.train.checkpoint import read_state, read_tensors
from fastguard.train.monitor import Monitor
from fastguard.train.run_folder import RunFolder, checkpoint_of
from fastguard.train.trainer import train
from fastguard.utils.rows import read_rows
from helpers.toys import RECIPE, ToyBackbone, pool, towards

GROUPS = ("weights", "average", "optimizer")
MONITOR = MonitorConfig(every=1, prompts=2, images_per_prompt=3, num_steps=4, gold=(RewardConfig("g"),))


def in_process(
    recipe: Recipe, reward: Callable[..., Any] = towards, resume: str = "never", policy: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Train the toy in this process; returns the rows of its metrics without times."""
    accelerator = Accelerator(cpu=True, log_with=list(recipe.run.trackers) or None, project_dir=recipe.run.dir)
    set_seed(recipe.run.seed)
    backbone = ToyBackbone(policy)
    run = RunFolder(recipe, accelerator, resume)
    gold = [towards] * len(recipe.monitor.gold)
    with (
        run.catching_signals(),
        pool(recipe, backbone, reward) as rewards,
        pool(recipe, backbone, reward, gold) as all_,
    ):
        monitor = Monitor(recipe, all_, 0) if recipe.monitor.every else None
        train(backbone, recipe, rewards, run, accelerator, monitor)
    run._lock.close()  # which a process does by its end
    rows = read_rows(run.path / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows]


def toy(folder: str | Path, **sections: dict[str, Any]) -> Recipe:
    """The toy's recipe for a folder, with other values of some fields."""
    recipe = replace(RECIPE, run=replace(RECIPE.run, dir=Path(folder), epochs=2, save_every=1))
    return replace(recipe, **{name: replace(getattr(recipe, name), **values) for name, values in sections.items()})


def newest(folder: Path) -> Path:
    return checkpoint_of(folder, "newest")


def assert_same_end(one: Path, other: Path) -> None:
    """Bitwise: weights, average, optimizer, generators, monitor; and the metrics, but for times."""
    one_end, other_end = newest(one), newest(other)
    assert one_end.name == other_end.name
    for group in GROUPS:
        tensors, expected = read_tensors(one_end, group), read_tensors(other_end, group)
        assert tensors.keys() == expected.keys()
        assert expected
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), f"{group} {name}"
    assert json.loads((one_end / "rng.json").read_text()) == json.loads((other_end / "rng.json").read_text())
    states = [read_state(path) for path in (one_end, other_end)]
    for state in states:
        state["recipe"]["run"].pop("dir")
    assert states[0] == states[1]
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        rows = [[{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in read_rows(f / name)]
                for f in (one, other)]  # fmt: skip
        assert rows[0] == rows[1]
