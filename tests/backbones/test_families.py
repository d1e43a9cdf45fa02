"""The table of model families, and what one file and one row make of a new one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from fastguard.backbones import FAMILIES, Family, family_of
from fastguard.commands.doctor import examine
from fastguard.commands.plan import print_plan
from fastguard.commands.sample import sample_recipe
from fastguard.commands.train import train_recipe
from fastguard.config import (
    LoraConfig,
    ModelConfig,
    ModelKind,
    MonitorConfig,
    PromptsConfig,
    Recipe,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    ScoringConfig,
    UpdateConfig,
    objective_config,
)
from fastguard.memory import compare_kept, plan
from fastguard.memory.live import allocated
from fastguard.memory.phases import LIBRARY_BYTES
from fastguard.prompts import ENCODE_BATCH
from fastguard.recipe import find_recipe, load_recipe, overridden, unread_values
from fastguard.report.data import TrainingRun
from fastguard.report.words import summary
from fastguard.train.build import gather_prompts
from fastguard.utils.rows import read_rows

KIND = "shades"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A run of the family in tests/helpers/shades.py; it is known by its row."""
    monkeypatch.setitem(FAMILIES, KIND, "helpers.shades:Shades")
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "prompts.txt").write_text("a light picture\na dark picture\n")
    return Recipe(
        run=RunConfig(dir=tmp_path / "run", epochs=6, trackers=(), images_every=0),
        model=ModelConfig(kind=KIND),  # type: ignore[arg-type]
        prompts=PromptsConfig(file=tmp_path / "prompts.txt", per_epoch=2),
        sampler=SamplerConfig(num_steps=5, sde_steps=4, group_size=16, batch_size=32),
        objective=objective_config("grpo_guard", clip_range=1e-2),
        rewards=(RewardConfig("helpers.planned_shades:towards", name="towards"),),
        scoring=ScoringConfig(threads=1),
        update=UpdateConfig(inner_epochs=2, minibatches=4, micro_batch=0, learning_rate=2e-2, weight_decay=0.0),
    )


def test_the_table_and_the_type_have_the_same_names() -> None:
    assert set(FAMILIES) == set(get_args(ModelKind))
    for kind in FAMILIES:
        assert isinstance(family_of(kind), Family)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model\.kind = 'sd9' is no model family; expected one of digits, flux"):
        family_of("sd9")


def test_what_a_family_does_not_read_is_a_field() -> None:
    """A name that is misspelled, or gone, would never be refused."""
    for kind in FAMILIES:
        for path in family_of(kind).unread:
            section, _, name = path.partition(".")
            known = [f.name for f in fields(getattr(load_recipe(find_recipe("digits")), section))]
            assert not name or name in known, path


def test_the_digits_draw_no_other_prompts() -> None:
    digits = load_recipe(find_recipe("digits"))
    changed = replace(digits, monitor=replace(digits.monitor, file=Path("other.txt")))
    with pytest.raises(ValueError, match=r"monitor\.file = other\.txt: set, but not read: .* draws the ten digits"):
        overridden(digits, changed)


def test_a_new_family_reads_prompts_and_says_what_it_does_not_read(recipe: Recipe) -> None:
    assert [prompt.text for prompt in gather_prompts(recipe).all] == ["a light picture", "a dark picture"]
    assert unread_values(recipe) == {}
    changed = replace(recipe, lora=LoraConfig(rank=3))
    assert unread_values(changed) == {"lora.rank": 'model.kind = "shades" trains every weight'}


def test_a_new_family_passes_the_doctor(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(recipe) == 0
    said = capsys.readouterr().out
    for line in (
        "ok  model: there is nothing to look for",
        "ok  attention: model.attention = native",
        "ok  processes: hardware.processes = 1, and no GPU here",  # a warning for a model that needs one
        "ok  disk: checkpoints of two shades take a few KB",
        "ok  memory: two shades takes a few KB",
        "ok  reward towards: scored two random images",
    ):
        assert line in said


def test_a_new_family_says_why_it_is_not_planned(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r'model\.kind = "shades" takes a few KB: there is nothing to plan'):
        print_plan(recipe)


def test_a_new_family_is_trained_and_sampled(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_recipe(recipe) == 0
    rewards = [row["reward_mean"] for row in read_rows(recipe.run.dir / "metrics.jsonl")]
    assert len(rewards) == 6
    assert rewards[-1] > rewards[0]
    assert (recipe.run.dir / "checkpoints" / "epoch_000006" / "diffusers" / "shades.safetensors").is_file()

    texts = ["something dark", "something light", "something else that is dark"]
    for checkpoint in ("newest", "none"):
        assert sample_recipe(recipe, texts, checkpoint, images=1, steps=5, seed=0, out=tmp_path / checkpoint) == 0
    trained, before = (
        [float(np.asarray(Image.open(tmp_path / name / f"prompt{i:03d}_00.png")).mean()) for i in range(3)]
        for name in ("newest", "none")
    )
    assert trained[0] < before[0]  # its own prompts, by what it has learned
    assert trained[1] > before[1]
    assert trained[2] < before[2]

    folder = recipe.run.dir / "checkpoints" / "epoch_000006" / "diffusers"
    run = TrainingRun(recipe.run.dir, recipe, [], [], [], 0)
    assert summary(run)[-1] == (
        f'Newest trained weights: {folder}; load them with load_file("{folder}/shades.safetensors").'
    )


def test_a_new_family_is_planned_by_its_skeleton(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number follows from the file: two blocks of 8 x 8 with biases, and an image layer of 2 x 8, in float32."""
    monkeypatch.setitem(FAMILIES, KIND, "helpers.planned_shades:PlannedShades")
    recipe = replace(recipe, model=replace(recipe.model, dtype="float32", train="full", fuse=False))
    planned = plan(recipe)
    weights = 2 * (allocated(8 * 8 * 4) + allocated(8 * 4)) + allocated(8 * 2 * 4)
    decoder = allocated(3 * 5 * 4) + allocated(5 * 4)
    assert planned.phase("encode").weights == allocated(7 * 4 * 4)
    tokens = recipe.prompts.max_tokens
    activations = allocated(ENCODE_BATCH * tokens * 4 * 4)
    assert planned.phase("encode").activations == activations + LIBRARY_BYTES
    assert planned.phase("update").weights == weights + decoder
    assert planned.phase("update").optimizer == 8 * (2 * (8 * 8 + 8) + 8 * 2)  # two moments
    table, micro_batch = 2 * (tokens * 3 + 2) * 4, allocated(recipe.micro_batch * 2 * 8 * 4)
    assert planned.phase("update").trajectories == table + 3 * micro_batch  # sampler.store = "cpu" holds the rest
    assert planned.recompute == "none"
    assert "units a shade block" in compare_kept(recipe)


def test_prompts_of_an_evaluation_come_after_those_of_training(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("a dark night\n")
    gold = RewardConfig("helpers.planned_shades:towards", name="gold")
    monitor = MonitorConfig(every=1, file=tmp_path / "other.txt", prompts=1, gold=(gold,))
    prompts = gather_prompts(replace(recipe, monitor=monitor))
    assert [prompt.text for prompt in prompts.all][prompts.first_evaluated :] == ["a dark night"]


@pytest.mark.long
def test_reading_a_recipe_imports_no_models() -> None:
    """`fastguard train RECIPE --help` would take seconds longer."""
    code = (
        "import sys; from fastguard.recipe import find_recipe, load_recipe; "
        "[load_recipe(find_recipe(name)) for name in ('digits', 'flux_lora')]; "
        "assert not {'diffusers', 'transformers', 'peft', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=ROOT)
