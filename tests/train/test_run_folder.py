"""Runs as processes: they resume to the bit, survive signals, kills, damaged checkpoints and full disks."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import TESTS
from helpers.deadline import deadline
from helpers.forks import TOY, Fork
from helpers.run_folders import MONITOR, assert_same_end, in_process, newest, toy
from helpers.toys import ToyBackbone, towards
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastguard.cli import terminations_as_interrupts
from fastguard.config import Recipe, RewardConfig, ScoringConfig, advantages_config
from fastguard.rewards.settings import SETTINGS
from fastguard.train import checkpoint, run_folder
from fastguard.train.checkpoint import CheckpointFolder, read_state, read_tensors, restore_rng, verify
from fastguard.train.run_folder import RunFolder, checkpoint_of
from fastguard.train.state import build_state
from fastguard.utils.rows import read_rows
from fastguard.utils.signals import ENDING, handled_by
from fastguard.utils.terminal import say


def finish(folder: Path, epochs: int, *options: str, code: int = 0) -> str:
    process = start(folder, epochs, *options)
    assert process.wait() == code, process.said()[-2000:]
    return process.said()


def start(folder: Path, epochs: int, *options: str) -> Fork:
    return Fork(TOY, folder, epochs, *options)


def wait_for_epoch(folder: Path, epoch: int) -> None:
    with deadline(folder):
        while len(read_rows(folder / "metrics.jsonl")) < epoch:
            time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    finish(folder, 4)
    return folder


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_cpu"])
def test_two_and_two_epochs_equal_four(tmp_path: Path, optimizer: str) -> None:
    options = ("--optimizer", optimizer, "--dtype", "bfloat16" if optimizer == "adamw_cpu" else "float32")
    finish(tmp_path / "whole", 4, *options)
    finish(tmp_path / "parts", 2, *options)
    said = finish(tmp_path / "parts", 4, "--resume", "auto", *options)
    assert "after 2 epochs" in said
    assert "run.epochs: 2 -> 4" in said
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def test_a_checkpoint_holds_no_pickle_and_a_run_folder_says_everything(undisturbed: Path) -> None:
    files = {path.name for path in newest(undisturbed).rglob("*") if path.is_file()}
    assert {path.rsplit(".", 1)[1] for path in files} == {"json", "safetensors"}
    assert {"trainer.json", "rng.json", "manifest.json", "toy.safetensors"} <= files
    assert len(list((undisturbed / "checkpoints").glob("epoch_*"))) <= 3  # keep_last = 2, and the best
    state = read_state(newest(undisturbed))
    assert (state["epoch"], state["updates"], state["prompts_used"]) == (4, 32, 8)
    assert state["monitor"]["best"]["epoch"] == 4
    assert checkpoint_of(undisturbed, "best") == newest(undisturbed)
    rows = read_rows(undisturbed / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["per_step"][0]["kl"] is not None
    assert {p.name for p in (undisturbed / "images").glob("*.png")} >= {"epoch_000002.png", "evaluation_000004.png"}
    # The export holds the averaged weights.
    exported = load_file(newest(undisturbed) / "diffusers" / "toy.safetensors")
    average = read_tensors(newest(undisturbed), "average")
    assert all(torch.equal(exported[name], average[name]) for name in average)
    assert not torch.equal(average["image.weight"], read_tensors(newest(undisturbed), "weights")["image.weight"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_exits_0_and_the_run_goes_on(tmp_path: Path, undisturbed: Path, number: int) -> None:
    folder = tmp_path / "run"
    process = start(folder, 4, "--slow", "0.15")  # eight batches an epoch, so that the signal falls inside one
    wait_for_epoch(folder, 1)
    process.send_signal(number)
    process.send_signal(number)  # a launcher forwards what the scheduler has sent to everyone
    assert process.wait() == 0, process.said()
    assert '"stopped": true' in process.said()
    assert read_state(newest(folder))["epoch"] < 4
    finish(folder, 4, "--resume", "auto")
    assert_same_end(folder, undisturbed)


@pytest.mark.parametrize("number", ENDING)
def test_every_signal_that_asks_to_end_is_heard_unless_it_is_ignored(tmp_path: Path, number: signal.Signals) -> None:
    """As SIGHUP is under nohup, and SIGINT in a shell's background job."""
    run = RunFolder(toy(tmp_path), Accelerator(cpu=True))
    with handled_by(signal.SIG_IGN, [number]), run.catching_signals():
        signal.raise_signal(number)
        assert not run.was_stopped
    with run.catching_signals():
        signal.raise_signal(number)
        assert run.was_stopped


@pytest.mark.parametrize("number", ENDING)
def test_every_such_signal_ends_other_commands_as_ctrl_c_does(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), terminations_as_interrupts():
        signal.raise_signal(number)
    with handled_by(signal.SIG_IGN, [number]), terminations_as_interrupts():
        signal.raise_signal(number)


def kill_and_compare(folder: Path, reference: Path, epochs: int, kills: int, seed: int) -> None:
    """Kill a run at random moments of its life, resume it each time, and compare the end."""
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(folder, epochs, "--resume", "auto")
        before = len(read_rows(folder / "metrics.jsonl"))
        wait_for_epoch(folder, min(before + 1, epochs))
        time.sleep(rng.uniform(0, 0.3))  # about five epochs, most of it inside saves
        process.send_signal(signal.SIGKILL)
        process.wait()
        whole = list((folder / "checkpoints").glob("epoch_*"))
        for path in whole:
            verify(path)
    finish(folder, epochs, "--resume", "auto")
    assert_same_end(folder, reference)


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path, counted: Callable[[str], None]) -> None:
    """At moments of the clock; tests/train/test_damage.py kills at operations on files."""
    finish(tmp_path / "long", 150)
    kill_and_compare(tmp_path / "run", tmp_path / "long", 150, kills=20, seed=1)
    counted("20 of 20 kills at random moments lost nothing")


def test_a_damaged_checkpoint_costs_its_epoch_and_nothing_else(tmp_path: Path, undisturbed: Path) -> None:
    """tests/train/test_damage.py damages every file in every way."""
    shutil.copytree(undisturbed, tmp_path / "run")
    file = newest(tmp_path / "run") / "optimizer-0000.safetensors"
    content = bytearray(file.read_bytes())
    content[-50] ^= 1
    file.write_bytes(content)
    said = finish(tmp_path / "run", 4, "--resume", "auto")
    assert (
        "epoch_000004: 'optimizer-0000.safetensors' is corrupted (its SHA-256 differs). Trying the one before" in said
    )
    assert_same_end(tmp_path / "run", undisturbed)


def test_going_back_sets_the_later_checkpoints_aside(tmp_path: Path, undisturbed: Path) -> None:
    """Else they would pass for the newest, and each new save would be pruned as the oldest."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    finish(folder, 6, "--resume", str(folder / "checkpoints" / "epoch_000003"))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["aside_epoch_000004", "epoch_000005", "epoch_000006"]
    assert [row["epoch"] for row in read_rows(folder / "metrics.jsonl")] == list(range(6))
    branch = finish(tmp_path / "branch", 3, "--resume", str(undisturbed / "checkpoints" / "epoch_000003"))
    assert "after 3 epochs" in branch  # nothing left to do, and a checkpoint of its own
    assert newest(tmp_path / "branch").name == "epoch_000003"
    said = finish(folder, 6, "--resume", str(undisturbed / "checkpoints" / "epoch_000003"), code=1)
    assert "holds another run" in said


def test_a_run_folder_is_not_overwritten_by_mistake(undisturbed: Path) -> None:
    assert "go on with --resume auto, or choose another" in finish(undisturbed, 4, code=1)
    assert "does not fit this recipe: its optimizer state is of another kind" in finish(
        undisturbed, 5, "--resume", "auto", "--optimizer", "adamw_cpu", "--dtype", "bfloat16", code=1
    )


def test_a_reward_that_changes_the_process_leaves_the_run_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative folders, torch's defaults and the global generators: the run reads none of them when it needs them."""
    monkeypatch.chdir(tmp_path)
    expected = in_process(toy("kind"))
    before = [get() for get, _ in SETTINGS]

    def hostile(images: Tensor, *rest: Any) -> Tensor:
        scores = towards(images, *rest)
        os.chdir("/")
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        for seed in (torch.manual_seed, random.seed):
            seed(0)
        return scores

    assert in_process(toy("hostile"), hostile) == expected
    assert [get() for get, _ in SETTINGS] == before
    assert json.loads((tmp_path / "hostile" / "recipe.json").read_text())["run"]["dir"] == "hostile"  # as it was said


def test_a_run_keeps_its_folder_when_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = RunFolder(toy("run"), Accelerator(cpu=True))
    monkeypatch.chdir("/")
    run.skipped(3, "a message")
    assert read_rows(tmp_path / "run" / "skipped.jsonl") == [{"epoch": 3, "message": "a message"}]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two epochs with a monitor, for tests that resume copies of them."""
    recipe = replace(toy(tmp_path_factory.mktemp("runs") / "watched"), monitor=MONITOR)
    in_process(recipe)
    return recipe


def go_on(watched: Recipe, folder: Path, policy: nn.Module | None = None, **sections: dict[str, Any]) -> None:
    """Two more epochs of a copy in `folder`, with other values of some fields."""
    if not folder.exists():
        shutil.copytree(watched.run.dir, folder)
    recipe = replace(watched, run=replace(watched.run, dir=folder, epochs=4))
    in_process(
        replace(recipe, **{name: replace(getattr(recipe, name), **values) for name, values in sections.items()}),
        resume="auto",
        policy=policy,
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"monitor": {"prompts": 1}},
        {"monitor": {"images_per_prompt": 2}},
        {"monitor": {"num_steps": 3}},
        {"monitor": {"gold": (RewardConfig("g", weight=0.5),)}},
        {"monitor": {"gold": (RewardConfig("g"), RewardConfig("h"))}},
        {"sampler": {"shift": 2.0}},
        {"sampler": {"decode_tiled": True}},
        {"prompts": {"encoders": "cpu"}},
    ],
    ids=str,
)
def test_a_resume_with_other_evaluations_begins_their_best_anew(
    tmp_path: Path, watched: Recipe, changed: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    go_on(watched, folder, **changed)
    said = capfd.readouterr().out
    ((section, values),) = changed.items()
    assert re.search(rf"the best score begins anew, .*: {section}\.{next(iter(values))}", said)
    assert "earlier evaluations are in evaluations_until_000002.jsonl" in said
    (kept,) = read_state(newest(folder))["earlier_best"]
    assert f"the best checkpoint until now is kept: {kept}" in said
    assert (folder / "checkpoints" / kept).is_dir()
    assert [row["epoch"] for row in read_rows(folder / "evaluations_until_000002.jsonl")] == [0, 1, 2]
    assert [row["epoch"] for row in read_rows(folder / "evaluations.jsonl")] == [2, 3, 4]
    assert [row["epoch"] for row in read_state(newest(folder))["monitor"]["history"]] == [2, 3, 4]
    go_on(watched, folder, run={"epochs": 5}, **changed)  # and once more, with nothing new
    assert "begins anew" not in capfd.readouterr().out
    assert [row["epoch"] for row in read_rows(folder / "evaluations.jsonl")] == [2, 3, 4, 5]


def test_output_that_cannot_be_written_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a full disk, or to a reader that has gone."""
    with suppress(OSError), open("/dev/full", "w", buffering=1) as full:  # closing it fails, too
        monkeypatch.setattr(sys, "stderr", full)
        in_process(toy(tmp_path / "run"))
        monkeypatch.undo()
    assert newest(tmp_path / "run").name == "epoch_000002"


def test_a_signal_during_a_message_does_not_end_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python refuses to write to a stream from a handler that interrupted a write to it."""

    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    monkeypatch.setattr(sys, "stderr", Interrupted())
    say("SIGTERM: saving at the next safe point")


def test_a_command_runs_with_stderr_closed() -> None:
    command = ["sh", "-c", f"{sys.executable} -m fastguard.cli report nowhere 2>&-"]
    assert subprocess.run(command, check=False).returncode == 2


def test_what_does_not_change_evaluations_keeps_their_best(
    tmp_path: Path, watched: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    go_on(watched, tmp_path / "run", monitor={"every": 0})
    go_on(watched, tmp_path / "run", monitor={"every": 1, "patience": 1}, run={"epochs": 5})  # on again
    assert "begins anew" not in capfd.readouterr().out
    monitor = read_state(newest(tmp_path / "run"))["monitor"]
    assert [row["epoch"] for row in monitor["history"]] == [0, 1, 2, 4, 5]
    assert [row["epoch"] for row in read_rows(tmp_path / "run" / "evaluations.jsonl")] == [0, 1, 2, 4, 5]


def test_a_resume_says_what_else_changed(
    tmp_path: Path, watched: Recipe, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    go_on(watched, tmp_path / "shorter", run={"epochs": 1})
    assert "run.epochs = 1: all of them are done" in capfd.readouterr().out
    with pytest.raises(ValueError, match=r"epoch_000002 does not fit this recipe: .*lora\.rank: 64 -> 3$"):
        go_on(watched, tmp_path / "other", policy=nn.Linear(2, 3), lora={"rank": 3})
    capfd.readouterr()
    monkeypatch.setattr(ToyBackbone, "num_trained_prompts", 1)
    go_on(watched, tmp_path / "prompts", prompts={"per_epoch": 1}, sampler={"group_size": 32})
    assert "prompts.file holds other prompts than before" in capfd.readouterr().out


def with_running_baselines(folder: Path) -> Recipe:
    recipe = toy(folder, run={"epochs": 4}, update={"ema_decay": 0.5})
    return replace(recipe, monitor=MONITOR, advantages=advantages_config("running", momentum=0.5))


def test_running_baselines_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole, parts = (with_running_baselines(tmp_path / name) for name in ("whole", "parts"))
    in_process(whole)
    in_process(replace(parts, run=replace(parts.run, epochs=2)))
    in_process(parts, resume="auto")
    baselines = read_state(newest(whole.run.dir))["baselines"]
    assert baselines.keys() == {"0", "1"}
    assert read_state(newest(parts.run.dir))["baselines"] == baselines
    assert_same_end(parts.run.dir, whole.run.dir)


@pytest.mark.parametrize(
    "changed",
    [
        {"rewards": (RewardConfig("towards", weight=2.0),)},
        {"scoring": ScoringConfig(1, normalize_each=True)},
        {"advantages": advantages_config("running", momentum=0.6)},
    ],
    ids=str,
)
def test_baselines_of_other_rewards_are_not_gone_on_with(tmp_path: Path, changed: dict[str, Any]) -> None:
    recipe = with_running_baselines(tmp_path / "run")
    in_process(replace(recipe, run=replace(recipe.run, epochs=2)))
    path = newest(recipe.run.dir)
    assert read_state(path)["baselines"]

    def loaded(recipe: Recipe) -> dict[int, float]:
        accelerator = Accelerator(cpu=True)
        state = build_state(ToyBackbone(), recipe, accelerator, None)
        RunFolder(recipe, accelerator, "auto").restore(state)
        return state.baselines

    assert loaded(recipe).keys() == {0, 1}
    assert loaded(replace(recipe, **changed)) == {}


def test_two_processes_cannot_share_a_run_folder(tmp_path: Path) -> None:
    process = start(tmp_path / "run", 50, "--slow", "0.1")
    try:
        wait_for_epoch(tmp_path / "run", 1)
        assert "in use by another process" in finish(tmp_path / "run", 4, "--resume", "auto", code=1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_disk_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert RunFolder(toy(tmp_path), Accelerator(cpu=True)).path == tmp_path
    said = capfd.readouterr().err
    assert f"warning: run.dir = {tmp_path} cannot be locked (No locks available): start no second run there" in said


def save_once(folder: CheckpointFolder, epoch: int) -> Path:
    tensors = {"weights": [("w", torch.ones(3))], "optimizer": []}

    def export(path: Path, weights: dict[str, torch.Tensor]) -> None:
        path.mkdir()
        (path / "w.json").write_text(str(weights["w"].tolist()))

    return folder.save(epoch, {"epoch": epoch}, tensors, [("w", torch.ones(3))], export)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        # What safetensors 0.8 raised on a full tmpfs.
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["os", "safetensors"],
)
def test_a_full_disk_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    folder = CheckpointFolder(tmp_path, Accelerator(cpu=True))
    save_once(folder, 1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="disk is full: the checkpoint was not saved, earlier ones are untouched"):
        save_once(folder, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_000001"]
    verify(tmp_path / "epoch_000001")


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EACCES])
def test_a_checkpoint_that_cannot_be_written_names_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = CheckpointFolder(tmp_path, Accelerator(cpu=True))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(OSError, match=r"epoch_000002: .*: the checkpoint was not saved.*--resume auto") as caught:
        save_once(folder, 2)
    assert caught.value.errno == number


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl", "skipped.jsonl"])
def test_a_full_disk_names_the_file_and_what_to_do(tmp_path: Path, name: str) -> None:
    """/dev/full lets itself be opened, and takes no byte."""
    file = tmp_path / name
    recipe = replace(toy(tmp_path), monitor=MONITOR, scoring=ScoringConfig(1, on_failure="drop_group"))

    def half(images: Tensor, prompts: Sequence[str], metadata: Any) -> Tensor:
        if not file.is_symlink():  # once the run has read what is there
            file.symlink_to("/dev/full")
        return towards(images, prompts, metadata).where(torch.tensor([p == "light" for p in prompts]), torch.nan)

    message = f"{name}: the disk is full. Make room, and go on with --resume auto"
    with pytest.raises(OSError, match=re.escape(str(tmp_path / message))) as caught:
        in_process(recipe, half)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("name", "function"),
    [("recipe.json", "write_text"), ("images/epoch_000000.png", "save_images"),
     ("images/evaluation_000000.png", "save_images")],
)  # fmt: skip
def test_a_full_disk_names_the_file_that_is_written_anew(
    tmp_path: Path, name: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = getattr(run_folder, function)

    def full(file: Path, *rest: Any) -> None:
        if file == tmp_path / name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, *rest)

    monkeypatch.setattr(run_folder, function, full)
    message = f"{name}: the disk is full. Make room, and go on with --resume auto"
    with pytest.raises(OSError, match=re.escape(str(tmp_path / message))):
        in_process(replace(toy(tmp_path, run={"images_every": 1}), monitor=MONITOR))


def test_a_folder_that_tensorboard_cannot_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "fastguard").write_text("in the way")
    with pytest.raises(OSError, match=r"/fastguard: .*\. Mend that, and go on with --resume auto"):
        in_process(toy(tmp_path, run={"trackers": ("tensorboard",)}))


def test_what_a_killed_save_left_is_cleared(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, Accelerator(cpu=True))
    save_once(folder, 3)
    (tmp_path / "epoch_000003").rename(tmp_path / ".old-epoch_000003")  # killed between the two renames of a save
    for left in (".part-epoch_000007", ".drop-epoch_000001"):
        (tmp_path / left).mkdir()
    folder = CheckpointFolder(tmp_path, Accelerator(cpu=True))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_000003"]
    verify(tmp_path / "epoch_000003")
    for epoch in range(1, 6):
        save_once(folder, epoch)
    save_once(folder, 3)  # the same epoch again, as after a resume from an earlier one
    folder.prune(keep=2, best={"epoch_000002"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_000002", "epoch_000004", "epoch_000005"]


def test_any_failure_of_a_save_keeps_the_old_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, Accelerator(cpu=True))
    save_once(folder, 1)

    def export(path: Path, weights: dict[str, torch.Tensor]) -> None:
        raise RuntimeError("cannot export")

    with pytest.raises(RuntimeError, match="cannot export"):
        folder.save(2, {}, {"weights": []}, [], export)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch_000001"]


def test_generators_are_restored(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    folder = CheckpointFolder(tmp_path, accelerator)
    torch.manual_seed(5)
    random.seed(5)
    path = save_once(folder, 1)
    expected = torch.rand(3), random.random()
    torch.rand(100)
    random.random()
    restore_rng(path, accelerator)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]


def test_nothing_is_unpickled() -> None:
    root = TESTS.parent / "fastguard"
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text, path
        assert "pickle.load" not in text, path
        for line in text.splitlines():
            assert "torch.load(" not in line or "weights_only=True" in line, path
