"""Earlier rollouts in memory and in checkpoints: the bits, the bytes, and what no longer fits."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.epochs import Epochs, recipe_of
from helpers.run_folders import MONITOR, assert_same_end, in_process, newest, toy
from helpers.toys import SHAPE, ToyBackbone, ToyPolicy
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastguard import cli
from fastguard.commands.train import announce
from fastguard.config import ModelConfig, Recipe, RewardConfig, objective_config
from fastguard.memory import plan
from fastguard.memory.phases import buffer_bytes
from fastguard.recipe import parse_recipe
from fastguard.train import checkpoint
from fastguard.train.buffer import Buffer, as_tensors, buffer_of, is_of
from fastguard.train.checkpoint import CheckpointError, read_tensors, verify
from fastguard.train.run_folder import RunFolder
from fastguard.train.state import build_state


class TwoProcesses:
    """As much of an accelerator as one process of two needs to read a buffer."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, process: int) -> None:
        self.process_index = process


class RoundedPolicy(ToyPolicy):
    """In the dtype of the latents, as models are."""

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        return super().forward(latents, sigma, prompt_indices).to(latents.dtype)


def filled(recipe: Recipe, epochs: int = 3) -> Epochs:
    """A bf16 toy with some rollouts behind it."""
    sampled = Epochs(recipe, RoundedPolicy().bfloat16())
    sampled.state.backbone.dtype = torch.bfloat16  # type: ignore[misc]
    for _ in range(epochs):
        sampled.remember(sampled.sample())
    return sampled


def assert_same(one: Buffer, other: Buffer) -> None:
    for ours, theirs in zip(one.rollouts, other.rollouts, strict=True):
        assert ours.epoch == theirs.epoch
        assert torch.equal(ours.values, theirs.values)
        for batch, expected in zip(ours.transitions, theirs.transitions, strict=True):
            tensors, wanted = as_tensors(batch), as_tensors(expected)
            assert tensors.keys() == wanted.keys()
            for name, tensor in tensors.items():
                assert tensor.dtype == wanted[name].dtype
                assert torch.equal(tensor, wanted[name]), name


@pytest.mark.parametrize(("name", "options"), [("rpg", {"window": 3}), ("op_grpo", {"window": 3, "replayed": 0.3})])
def test_a_buffer_is_written_as_it_was_drawn_and_read_back_to_the_bit(
    tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    recipe = recipe_of(name, **options)
    epochs = filled(recipe)
    state = epochs.state
    assert [rollout.epoch for rollout in state.buffer.rollouts] == [2, 1]
    tensors = dict(state.buffer.tensors(recipe, state.accelerator))
    save_file(tensors, tmp_path / "buffer.safetensors")
    loaded = load_file(tmp_path / "buffer.safetensors")
    drawn = [tensor for key, tensor in loaded.items() if key.endswith(("latents", "velocity", "noise"))]
    assert {tensor.dtype for tensor in drawn} == {torch.bfloat16}
    assert_same(buffer_of(loaded, recipe, SHAPE, 2, state.epoch, state.accelerator), state.buffer)


def test_two_processes_share_the_rollouts_of_one() -> None:
    """Whole rollouts: each gets its own images. The best images: each has them all."""
    for name in ("rpg", "op_grpo"):
        recipe = recipe_of(name, window=2)
        epochs = filled(recipe)
        whole = epochs.state.buffer.rollouts[0]
        tensors = dict(epochs.state.buffer.tensors(recipe, epochs.state.accelerator))
        halved = replace(recipe, hardware=replace(recipe.hardware, processes=2))
        parts = []
        for process in (0, 1):
            own = {key: tensor for key, tensor in tensors.items() if is_of(key, halved, process)}
            assert (len(own) < len(tensors)) == (name == "rpg")
            two: Any = TwoProcesses(process)
            parts.append(buffer_of(own, halved, SHAPE, 2, epochs.state.epoch, two).rollouts[0])
        if name == "rpg":
            assert torch.equal(torch.cat([part.values for part in parts]), whole.values)
            batches = [batch for part in parts for batch in part.transitions]
            assert len(batches) == 4
            for ours, theirs in zip(batches, whole.transitions, strict=True):
                assert torch.equal(ours.noise, theirs.noise)
        else:
            for part in parts:
                assert_same(Buffer((part,)), Buffer((whole,)))


OBJECTIVES = {
    "rpg": objective_config("rpg", window=3, kl_weight=0.1),
    "op_grpo": objective_config("op_grpo", window=3, keep=1.0, clip_range=1e-2),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_that_resumes_with_earlier_rollouts_changes_no_bit(tmp_path: Path, name: str) -> None:
    update = {"ema_decay": 0.5}
    recipes = [
        replace(toy(tmp_path / part, update=update), objective=OBJECTIVES[name], monitor=MONITOR)
        for part in ("whole", "parts")
    ]
    whole, parts = (replace(recipe, run=replace(recipe.run, epochs=5)) for recipe in recipes)
    in_process(whole)
    in_process(replace(parts, run=replace(parts.run, epochs=2)))
    in_process(parts, resume="auto")
    assert_same_end(parts.run.dir, whole.run.dir)
    ours, theirs = (read_tensors(newest(recipe.run.dir), "buffer") for recipe in (parts, whole))
    assert {key.split(".")[0] for key in theirs} == {"3", "4"}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_objectives_of_one_rollout_keep_none(tmp_path: Path) -> None:
    in_process(toy(tmp_path / "run"))
    assert not list(newest(tmp_path / "run").glob("buffer*"))


def test_a_damaged_buffer_is_named(tmp_path: Path) -> None:
    in_process(replace(toy(tmp_path / "run"), objective=OBJECTIVES["rpg"]))
    file = newest(tmp_path / "run") / "buffer-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'buffer-0000.safetensors' is corrupted"):
        verify(file.parent)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    "change",
    ["missing", "narrow", "short", "renamed", "impossible", "odd", "later", "prompt", "step", "dtype", "fewer", "cut"],
)
def test_a_buffer_that_was_not_written_so_is_refused(tmp_path: Path, name: str, change: str) -> None:
    """With a manifest that fits, as if somebody had forged it."""
    recipe = replace(toy(tmp_path / "run"), objective=OBJECTIVES[name])
    in_process(recipe)
    path = newest(tmp_path / "run")
    tensors = read_tensors(path, "buffer")
    if change == "missing":
        del tensors["1.0.noise"]
    elif change == "narrow":
        tensors["1.0.velocity"] = tensors["1.0.velocity"][..., :1].contiguous()
    elif change == "short":
        tensors["1.values"] = tensors["1.values"][..., :-1].contiguous()
    elif change == "renamed":
        tensors["one.values"] = tensors.pop("1.values")
    elif change == "impossible":
        tensors["1.0.step_std"] = -tensors["1.0.step_std"]
    elif change == "odd":
        tensors["x"] = tensors["1.values"].clone()
    elif change == "later":
        tensors |= {key.replace("1.", "99.", 1): x.clone() for key, x in tensors.items() if key.startswith("1.")}
    elif change == "prompt":
        tensors["1.0.prompt_indices"] = tensors["1.0.prompt_indices"] + 7
    elif change == "step":
        tensors["1.0.denoising_step"] = tensors["1.0.denoising_step"] - 9
    elif change == "dtype":
        tensors["1.0.noise"] = tensors["1.0.noise"].double()
    elif change == "fewer":
        tensors["1.0.sample"] = tensors["1.0.sample"][:-1].contiguous()
    elif name == "rpg":
        del tensors["1.0.ref_velocity"]
    else:
        tensors["1.values"] = tensors["1.values"].repeat(2, 1)
    save_file(tensors, path / "buffer-0000.safetensors")
    (path / "manifest.json").unlink()
    checkpoint._seal(path)
    accelerator = Accelerator(cpu=True)
    state = build_state(ToyBackbone(), recipe, accelerator, None)
    with pytest.raises(CheckpointError, match="its earlier rollouts are not as they were written"):
        RunFolder(recipe, accelerator, "auto").restore(state)


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, 2),
        ({"sampler": {"store": "device"}, "update": {"learning_rate": 1e-3}}, 2),
        ({"objective": OBJECTIVES["rpg"], "window": 2}, 1),
        ({"rewards": (RewardConfig("towards", weight=2.0),)}, 0),
        ({"sampler": {"sde_steps": 2}}, 0),
        ({"objective": OBJECTIVES["op_grpo"]}, 0),
        ({"objective": objective_config("grpo_guard")}, None),
    ],
    ids=str,
)
def test_rollouts_that_no_longer_fit_are_not_gone_on_with(
    tmp_path: Path, changed: dict[str, Any], kept: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(toy(tmp_path / "run", run={"epochs": 3}), objective=OBJECTIVES["rpg"])
    in_process(recipe)
    capfd.readouterr()
    window = changed.pop("window", None)
    for section, values in changed.items():
        value = replace(getattr(recipe, section), **values) if isinstance(values, dict) else values
        recipe = replace(recipe, **{section: value})
    if window is not None:
        recipe = replace(recipe, objective=replace(recipe.objective, window=window))
    accelerator = Accelerator(cpu=True)
    state = build_state(ToyBackbone(), recipe, accelerator, None)
    RunFolder(recipe, accelerator, "auto").restore(state)
    assert len(state.buffer) == (kept or 0)
    assert ("earlier rollouts are not trained on again" in capfd.readouterr().out) == (kept == 0)


def test_a_run_whose_prompts_do_not_come_again_in_time_is_warned() -> None:
    recipe = replace(recipe_of("op_grpo", window=3), model=ModelConfig(kind="digits"))
    for prompts, warned in ((4, False), (5, True)):  # two rollouts of two prompts
        said = io.StringIO()
        with redirect_stdout(said):
            announce(recipe, prompts)
        assert ("comes again after about 2.5 epochs, and objective.window = 3 keeps 2" in said.getvalue()) == warned


@pytest.mark.parametrize(
    ("name", "options"), [("rpg", ("--objective.window", "3")), ("op_grpo", ("--objective.clip-range", "1e-4"))]
)
def test_the_planner_counts_what_a_run_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str,
    options: tuple[str, str],
) -> None:  # fmt: skip
    """On the tiny pipeline, whose prompts come again every epoch; the command says what it keeps."""
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    arguments = (
        "train", "flux_tiny", "--run.dir", str(tmp_path / "run"), "--run.epochs", "4", "--run.trackers",
        "--prompts.file", str(tmp_path / "prompts.txt"), "--prompts.per-epoch", "2", "--monitor.prompts", "2",
        "--sampler.group-size", "4",
        "--sampler.batch-size", "4", "--sampler.num-steps", "4", "--sampler.sde-steps", "3",
        "--update.inner-epochs", "1", "--update.micro-batch", "0", "--objective.kl-weight", "0.01",
        "--objective.name", name, *options,
    )  # fmt: skip
    code = cli.main(arguments)
    said = "".join(capsys.readouterr())
    assert code == 0, said
    assert "earlier rollouts: " + ("2 kept, whole" if name == "rpg" else "3 kept: the best 1 of 4") in said
    assert "few images are replayed" not in said
    recipe = parse_recipe(json.loads((tmp_path / "run" / "recipe.json").read_text()), "recipe.json")
    fields = ("latents", "velocity", "noise", "ref_velocity")
    tensors = read_tensors(newest(tmp_path / "run"), "buffer")
    measured = sum(tensor.nbytes for key, tensor in tensors.items() if key.endswith(fields))
    assert buffer_bytes(recipe) == measured
    without = replace(recipe, objective=replace(recipe.objective, window=1))
    grown = plan(recipe).phase("rollout").host - plan(without).phase("rollout").host
    assert measured <= grown < 2 * measured  # pinned memory comes in powers of two
    assert any("objective.window" in note for note in plan(recipe).notes)
    logs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [log["earlier_images"] for log in logs] == ([0, 8, 16, 16] if name == "rpg" else [0, 2, 2, 2])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_another_factor_of_the_steps_drops_the_buffer(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stored transitions have the factors of their schedule, or none."""
    recipe = replace(toy(tmp_path / "run"), objective=OBJECTIVES[name])
    in_process(recipe)
    capsys.readouterr()
    weighted = replace(recipe, objective=replace(recipe.objective, reweight="tempflow"))
    weighted = replace(weighted, prompts=replace(recipe.prompts, encoders="cpu"))
    in_process(replace(weighted, run=replace(weighted.run, epochs=weighted.run.epochs + 1)), resume="auto")
    said = capsys.readouterr().out
    assert "earlier rollouts are not trained on again, since they do not fit: objective.reweight" in said
    assert "prompts.encoders: device -> cpu" in said
