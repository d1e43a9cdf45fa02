"""What damages a run's folder is named, and costs no more than the epochs since the checkpoint before it."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import TESTS
from helpers.deadline import deadline
from helpers.run_folders import MONITOR, assert_same_end, in_process, newest, toy
from helpers.toys import ToyPolicy
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastguard.commands.sample import _trained_weights
from fastguard.config import Recipe
from fastguard.train.checkpoint import (
    MANIFEST_BYTES,
    CheckpointError,
    CheckpointFolder,
    _seal,
    checkpoints_in,
    read_state,
    read_tensors,
    require,
    verify,
)
from fastguard.train.optim import AdamW
from fastguard.train.run_folder import RunFolder
from fastguard.utils.files import write_text
from fastguard.utils.rows import read_rows

Counted = Callable[[str], None]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run with the checkpoints of its three epochs, and an average."""
    folder = tmp_path_factory.mktemp("runs") / "saved"
    recipe = toy(folder, run={"epochs": 3, "keep_last": 3}, update={"ema_decay": 0.5, "ema_every": 2})
    in_process(recipe)
    return recipe


@pytest.fixture
def copy(saved: Recipe, tmp_path: Path) -> Recipe:
    shutil.copytree(saved.run.dir, tmp_path / "run")
    return replace(saved, run=replace(saved.run, dir=tmp_path / "run"))


def seal(path: Path) -> None:
    """A manifest that fits what is there, as whoever crafts a checkpoint would write."""
    (path / "manifest.json").unlink(missing_ok=True)
    _seal(path)


# Damaged files of checkpoints.


def _flip(file: Path, place: float, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


def _replace_by(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.rename(file.with_name("elsewhere"))
        make(file)

    return damage


def _socket(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.open(".", os.O_RDONLY)
        os.chdir(file.parent)  # a socket's path has at most 107 bytes
        try:
            one.bind(file.name)
        finally:
            os.fchdir(here)
            os.close(here)


def _others(file: Path) -> None:
    own = next(path for path in file.parents if path.name == "epoch_000003")
    shutil.copy(own.with_name("epoch_000002") / file.relative_to(own), file)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "a byte less": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a byte more": lambda file: file.write_bytes(file.read_bytes() + b"x"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "gone": lambda file: file.unlink(),
    "a folder": _replace_by(lambda file: file.mkdir()),
    "a fifo": _replace_by(os.mkfifo),
    "a socket": _replace_by(_socket),
    "a link to itself": _replace_by(lambda file: file.symlink_to(file)),
    "a link to the same bytes": _replace_by(lambda file: file.symlink_to("elsewhere")),
    "a link to nothing": _replace_by(lambda file: file.symlink_to("nowhere")),
    "a link to /dev/zero": _replace_by(lambda file: file.symlink_to("/dev/zero")),
    "the file of the checkpoint before": _others,
} | {
    f"bit {bit} flipped at {place:.2f}": lambda file, place=place, bit=bit: _flip(file, place, bit)  # type: ignore[misc]
    for place, bit in ((0.0, 0), (1.0, 7), (0.13, 3), (0.31, 5), (0.5, 1), (0.71, 6), (0.9, 2))
}


def damaged_checkpoints(saved: Recipe, tmp_path: Path) -> Iterator[tuple[str, str, Path]]:
    """(what was done, to which file, the run's folder): each damage of each file of the newest checkpoint."""
    files = sorted(file.relative_to(newest(saved.run.dir)) for file in newest(saved.run.dir).rglob("*.*"))
    assert len(files) == 7
    for name in files:
        for what, damage in DAMAGES.items():
            folder = tmp_path / f"{str(name).replace('/', '_')}, {what}"
            for path in checkpoints_in(saved.run.dir / "checkpoints")[:2]:
                shutil.copytree(path, folder / "checkpoints" / path.name)
            file = folder / "checkpoints" / "epoch_000003" / name
            before = file.read_bytes()
            damage(file)
            if not file.is_file() or file.is_symlink() or file.read_bytes() != before:  # generators are alike
                yield what, str(name), folder


def refused(name: str, folder: Path) -> None:
    """The damaged checkpoint is named with its file, and the one before it taken."""
    bad, before = folder / "checkpoints" / "epoch_000003", folder / "checkpoints" / "epoch_000002"
    with pytest.raises(CheckpointError) as caught:
        require(bad)
    assert "\n" not in str(caught.value)
    assert str(bad) in str(caught.value)
    assert name in str(caught.value) or name == "manifest.json"
    assert str(caught.value).endswith(f"the newest good one before it is {before}")
    assert CheckpointFolder(folder / "checkpoints", Accelerator(cpu=True)).newest_good() == before


def test_a_sample_of_damages_is_named_and_the_checkpoint_before_is_used(saved: Recipe, tmp_path: Path) -> None:
    with deadline():
        every = list(damaged_checkpoints(saved, tmp_path))
        for _, name, folder in random.Random(0).sample(every, 16):
            refused(name, folder)


@pytest.mark.slow
def test_every_damage_is_named_and_the_checkpoint_before_is_used(
    saved: Recipe, tmp_path: Path, counted: Counted
) -> None:
    named, failed = 0, []
    with deadline():
        for what, name, folder in damaged_checkpoints(saved, tmp_path):
            try:
                refused(name, folder)
                named += 1
            except Exception as error:
                failed.append(f"{name}, {what}: {type(error).__name__}: {error}")
    counted(f"{named} of {named + len(failed)} damaged checkpoints were named, and the one before was used")
    assert not failed
    assert named > 130


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_run_goes_on_from_links_to_checkpoints_on_another_disk(tmp_path: Path, resume: str) -> None:
    """And keeps the best of them."""
    recipe = toy(tmp_path / "run", run={"epochs": 4, "keep_last": 1})
    recipe = replace(recipe, monitor=replace(MONITOR, every=3))
    in_process(recipe)
    folder = recipe.run.dir / "checkpoints"
    (tmp_path / "disk").mkdir()
    for path in checkpoints_in(folder):
        path.rename(tmp_path / "disk" / path.name)
        path.symlink_to(tmp_path / "disk" / path.name)
    longer = replace(recipe, run=replace(recipe.run, epochs=5))
    in_process(longer, resume="auto" if resume == "auto" else str(folder / "epoch_000004"))
    assert [path.name for path in checkpoints_in(folder)] == ["epoch_000005", "epoch_000003"]


def test_a_resume_says_which_checkpoint_it_passes_over(copy: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    DAMAGES["a fifo"](newest(copy.run.dir) / "weights-0000.safetensors")
    with deadline():
        in_process(replace(copy, run=replace(copy.run, epochs=4)), resume="auto")
    said = capfd.readouterr()
    assert re.search(r"epoch_000003: 'weights-0000.safetensors' is no plain file\. Trying the one before", said.err)
    assert "epoch_000002 after 2 epochs" in said.out
    assert newest(copy.run.dir).name == "epoch_000004"
    assert (copy.run.dir / "checkpoints" / "aside_epoch_000003").is_dir()


@pytest.mark.parametrize("make", [os.mkfifo, *(lambda f, t=t: f.symlink_to(t) for t in ("/dev/zero", "nowhere", "."))])
def test_files_that_the_manifest_does_not_list_are_not_opened(copy: Recipe, make: Callable[[Path], Any]) -> None:
    path = newest(copy.run.dir)
    make(path / "weights-0001.safetensors")
    (path / "notes.txt").write_text("mine")
    with deadline():
        verify(path)
        assert read_tensors(path, "weights").keys() == {"image"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", ["manifest.json", "optimizer-0000.safetensors"])
def test_a_file_that_the_system_refuses_is_named(
    copy: Recipe, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, open_ = newest(copy.run.dir), io.open

    def refuse(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file) == str(bad / name):
            raise OSError(number, os.strerror(number), str(file))
        return open_(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(CheckpointError, match=rf"epoch_000003: '{name}' cannot be read: {os.strerror(number)}"):
        verify(bad)
    refused(name, copy.run.dir)


FINE = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "manifest",
    [
        "", "null", "{}", "[]", "7", '"files"', "[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "\ud800",
        " " * (MANIFEST_BYTES + 1), '{"trainer.json": {"bytes": 1, "sha256"',
        {"trainer.json": None}, {"trainer.json": [1, "x"]}, {"trainer.json": {"bytes": 1}},
        {"trainer.json": FINE | {"bytes": "1"}}, {"trainer.json": FINE | {"bytes": -1}},
        {"trainer.json": FINE | {"bytes": True}}, {"trainer.json": FINE | {"bytes": 1e400}},
        {"trainer.json": FINE | {"bytes": 10**4000}}, {"trainer.json": FINE | {"sha256": 5}},
        {"trainer.json": FINE | {"sha256": [["0"]]}}, {"trainer.json": FINE | {"sha256": ""}},
        {"../../etc/passwd": FINE}, {"/etc/passwd": FINE}, {"a/../../b": FINE}, {"": FINE}, {".": FINE}, {"a//b": FINE},
        {"a\0b": FINE}, {"\x1b[2J": FINE}, {"x" * 10_000: FINE}, {"diffusers": FINE}, {"rng.json/x": FINE},
    ],
    ids=lambda manifest: str(manifest)[:40].strip(),
)  # fmt: skip
def test_an_absurd_manifest_is_named(copy: Recipe, manifest: Any) -> None:
    file = newest(copy.run.dir) / "manifest.json"
    if isinstance(manifest, dict):
        manifest = json.dumps(json.loads(file.read_text()) | manifest)
    file.write_bytes(manifest.encode("utf-8", "surrogatepass"))
    with deadline():
        refused("manifest.json", copy.run.dir)


def test_a_listed_file_behind_a_linked_folder_is_refused(copy: Recipe) -> None:
    path = newest(copy.run.dir)
    shutil.move(path / "diffusers", copy.run.dir / "elsewhere")
    (path / "diffusers").symlink_to(copy.run.dir / "elsewhere")
    with pytest.raises(CheckpointError, match="'diffusers' is no plain folder"):
        verify(path)


# Checkpoints that are whole, and say what this version cannot read.


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 2}, "has format 2, written by a later version of fastguard; this one reads 1"),
        ({"format": "1"}, "is not as it was written: format"),
        ({"format": None}, "is not as it was written: format"),
        ({"epoch": "x"}, "is not as it was written: epoch"),
        ({"epoch": -1}, "is not as it was written: epoch"),
        ({"baselines": {"x": 1.0}}, "is not as it was written: baselines"),
        ({"baselines": {"1": None}}, "is not as it was written: baselines"),
        ({"epoch": 10**30}, "is not as it was written: epoch"),
        ({"updates": 1.5}, "is not as it was written: updates"),
        ({"bad_in_a_row": None}, "is not as it was written: bad_in_a_row"),
        ({"recipe": []}, "is not as it was written: recipe"),
        ({"monitor": {}}, "is not as it was written: monitor.history"),
        ({"monitor": {"history": [{"epoch": 0}], "best": None, "best_scores": None, "falling": 0}}, "history.0"),
        ({"monitor": [1]}, "is not as it was written: monitor"),
        ({"earlier_best": [[]]}, "is not as it was written: earlier_best.0"),
        (["epoch"], "is not as it was written: epoch: Field required"),
        (["recipe"], "is not as it was written: recipe: Field required"),
        ("null", "is not as it was written: Input should be an object"),
        ("[" * 100_000, "is not as it was written: Invalid JSON: recursion limit"),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
@pytest.mark.parametrize("resume", ["auto", "path"])
def test_a_crafted_trainer_json_is_one_line_that_names_it(
    copy: Recipe, changed: Any, message: str, resume: str
) -> None:
    """Also with "auto": what a later version wrote is not damaged, and not to be passed over."""
    file = newest(copy.run.dir) / "trainer.json"
    content = json.loads(file.read_text())
    if isinstance(changed, list):
        content = {key: value for key, value in content.items() if key not in changed}
    file.write_text(
        changed
        if isinstance(changed, str)
        else json.dumps(content | dict(changed if isinstance(changed, dict) else {}))
    )
    seal(file.parent)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        in_process(copy, resume="auto" if resume == "auto" else str(file.parent))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["null", "[]", "[{}]", '[{"torch": "x"}]', '[{"torch": [1], "cuda": null}]', "[" * 100_000]
)
def test_crafted_generators_are_one_line_that_names_them(copy: Recipe, content: str) -> None:
    file = newest(copy.run.dir) / "rng.json"
    file.write_text(content)
    seal(file.parent)
    if content == "[]":  # a run of no process: this one keeps its own
        in_process(copy, resume="auto")
        return
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))} is not as it was written") as caught:
        in_process(copy, resume="auto")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"x" * 100, (1 << 40).to_bytes(8, "little") + b"{}", b"\2\0\0\0\0\0\0\0{}"])
def test_tensors_that_are_none_are_named(copy: Recipe, content: bytes) -> None:
    path = newest(copy.run.dir)
    (path / "optimizer-0000.safetensors").write_bytes(content)
    seal(path)
    if content.endswith(b"{}") and content[0] == 2:  # a file of no tensors: does not fit, but can be read
        verify(path)
        return
    refused("optimizer-0000.safetensors", copy.run.dir)


# Weights that are not finite.


def poison(path: Path, group: str, value: float) -> None:
    """What an earlier version saved without a word."""
    file = path / f"{group}-0000.safetensors"
    tensors = load_file(file)
    next(t for name, t in sorted(tensors.items()) if "step" not in name).view(-1)[0] = value
    save_file(tensors, file)
    seal(path)


@pytest.mark.parametrize("group", ["weights", "average", "optimizer"])
@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_checkpoint_that_is_not_finite_is_refused_and_an_earlier_one_named(
    copy: Recipe, tmp_path: Path, group: str, value: float, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy.run.dir / "checkpoints"
    for epoch in (2, 3):
        poison(folder / f"epoch_{epoch:06d}", group, value)
    with pytest.raises(CheckpointError, match=rf"'{group}-0000\.safetensors' holds NaN or infinity \(image") as caught:
        in_process(copy, resume=str(folder / "epoch_000003"))
    assert str(caught.value).endswith(f"the newest good one before it is {folder / 'epoch_000001'}")
    assert "batch" not in str(caught.value)
    again = replace(copy, run=replace(copy.run, dir=tmp_path / "again"))
    shutil.copytree(copy.run.dir, again.run.dir)
    in_process(again, resume="auto")
    said = capfd.readouterr()
    assert said.err.count("holds NaN or infinity") == 2
    assert "epoch_000001 after 1 epochs" in said.out
    verify(newest(again.run.dir))
    assert len(read_rows(again.run.dir / "metrics.jsonl")) == 3


def test_sampling_from_weights_that_are_not_finite_is_refused(copy: Recipe) -> None:
    poison(newest(copy.run.dir), "average", torch.inf)
    with pytest.raises(
        CheckpointError, match=r"holds NaN or infinity \(image\); the newest good one before it is .*2$"
    ):
        _trained_weights(copy, "newest")


def test_a_folder_of_checkpoints_that_are_not_finite_says_so(copy: Recipe) -> None:
    for path in checkpoints_in(copy.run.dir / "checkpoints"):
        poison(path, "weights", torch.nan)
    with pytest.raises(CheckpointError, match="holds NaN or infinity .*there is no good one before it$"):
        require(newest(copy.run.dir))
    with pytest.raises(ValueError, match="none of the 3 checkpoints in .* is good"):
        in_process(copy, resume="auto")


@pytest.mark.parametrize(("group", "value"), [("weights", torch.nan), ("weights", torch.inf), ("optimizer", torch.inf)])
def test_a_state_that_is_not_finite_is_not_saved(
    tmp_path: Path, group: str, value: float, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The third epoch's only update ruins it: no rollout is drawn with it, and the checkpoints before it stay."""
    recipe = toy(tmp_path, run={"epochs": 5, "keep_last": 1}, update={"minibatches": 1, "inner_epochs": 1})
    updates, step = itertools.count(1), AdamW.step

    def ruin(self: AdamW) -> None:
        step(self)
        if next(updates) == 3:
            ((parameter, inner),) = self._optimizers.items()
            tensor = parameter.data if group == "weights" else inner.state[parameter]["exp_avg_sq"]
            tensor.view(-1)[0] = value

    monkeypatch.setattr(AdamW, "step", ruin)
    name = "image" if group == "weights" else "image.exp_avg_sq"
    message = (
        rf"epoch 2: after 3 updates this state holds NaN or infinity \({group}: {name}\), and was not saved\. Lower "
    )
    with pytest.raises(FloatingPointError, match=message) as caught:
        in_process(recipe)
    good = tmp_path / "checkpoints" / "epoch_000002"
    assert "Lower update.learning_rate or update.max_grad_norm" in str(caught.value)
    assert str(caught.value).endswith(f"To go on from the last good checkpoint: --resume {good}")
    assert "\n" not in str(caught.value)
    assert checkpoints_in(good.parent) == [good]
    verify(good)
    assert "epoch 3 of 5" not in capfd.readouterr().err


def test_a_state_that_a_reward_ruins_is_not_saved(tmp_path: Path) -> None:
    """Whoever asks for the save: here a reward that fails."""
    policy = ToyPolicy()

    def ruin(*batch: Any) -> Tensor:
        policy.image.data[0] = torch.nan
        raise OSError("failed on purpose")

    with pytest.raises(FloatingPointError, match=r"weights: image.*There is no good checkpoint to go on from"):
        in_process(toy(tmp_path), ruin, policy=policy)
    assert checkpoints_in(tmp_path / "checkpoints") == []


class Failing(ToyPolicy):
    """Its updates are NaN from pass `first` of the training mode on, for `number` of them."""

    def __init__(self, first: int, number: int) -> None:
        super().__init__()
        self.bad, self.passes = range(first, first + number), itertools.count(1)

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        velocity = super().forward(latents, sigma, prompt_indices)
        if torch.is_grad_enabled() and len(latents) > 1 and next(self.passes) in self.bad:
            return velocity * torch.nan
        return velocity


def skipping(folder: Path, minibatches: int = 1) -> Recipe:
    return toy(
        folder, run={"epochs": 6, "keep_last": 1}, sampler={"group_size": 2, "batch_size": 4},
        update={"minibatches": minibatches, "inner_epochs": 1, "parity": 0.0, "max_bad_updates": 3},
    )  # fmt: skip


def test_nothing_is_pruned_while_updates_are_skipped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FloatingPointError, match=r"3 updates in a row.*last good checkpoint: --resume .*epoch_000002$"):
        in_process(skipping(tmp_path), policy=Failing(3, 100))
    names = [path.name for path in checkpoints_in(tmp_path / "checkpoints")]
    assert names == ["epoch_000004", "epoch_000003", "epoch_000002"]
    assert [read_state(p)["bad_in_a_row"] for p in checkpoints_in(tmp_path / "checkpoints")] == [2, 1, 0]
    in_process(skipping(tmp_path), resume="auto")
    said = capfd.readouterr().out
    assert re.search(r"its last 2 updates were skipped .*last good checkpoint: --resume .*epoch_000002\n", said)


def test_pruning_goes_on_after_a_good_update(tmp_path: Path) -> None:
    in_process(skipping(tmp_path), policy=Failing(3, 2))
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == ["epoch_000006"]


@pytest.mark.parametrize(("first_bad", "kept"), [(3, ["epoch_000002"]), (4, ["epoch_000002", "epoch_000001"])])
def test_an_update_that_is_skipped_within_an_epoch_keeps_checkpoints_if_it_is_the_last(
    tmp_path: Path, first_bad: int, kept: list[str]
) -> None:
    recipe = skipping(tmp_path, minibatches=2)
    in_process(replace(recipe, run=replace(recipe.run, epochs=2)), policy=Failing(first_bad, 1))
    assert [path.name for path in checkpoints_in(tmp_path / "checkpoints")] == kept


# Links at names that a run writes to.


@pytest.mark.parametrize("target", ["precious", "nowhere"])
def test_a_linked_lock_is_refused_and_its_target_left_alone(tmp_path: Path, target: str) -> None:
    (tmp_path / "precious").write_text("data")
    recipe = toy(tmp_path / "run")
    recipe.run.dir.mkdir()
    (recipe.run.dir / ".lock").symlink_to(tmp_path / target)
    with pytest.raises(OSError, match=r"/\.lock: a symbolic link, which is not followed here\. Remove it"):
        RunFolder(recipe, Accelerator(cpu=True))
    assert (tmp_path / "precious").read_text() == "data"
    assert not (tmp_path / "nowhere").exists()


def test_a_lock_keeps_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("data")
    RunFolder(toy(tmp_path), Accelerator(cpu=True))._lock.close()
    assert (tmp_path / ".lock").read_text() == "data"


@pytest.mark.parametrize("left", ["file", "link", "dangling link"])
def test_what_lies_beside_a_text_is_not_written_through(tmp_path: Path, left: str) -> None:
    """A killed run leaves a part of a file, and others may leave a link."""
    precious, aside, text = tmp_path / "precious", tmp_path / "recipe.json.part", tmp_path / "recipe.json"
    precious.write_text("data")
    if left == "file":
        aside.write_text("half of a very long text")
    else:
        aside.symlink_to(precious if left == "link" else tmp_path / "nowhere")
    text.symlink_to(precious)
    write_text(text, "whole")
    assert text.read_text() == "whole"
    assert precious.read_text() == "data"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "recipe.json"]


def test_images_are_not_written_through_links(tmp_path: Path) -> None:
    recipe = toy(tmp_path / "run", run={"images_every": 1, "epochs": 1})
    (recipe.run.dir / "images").mkdir(parents=True)
    (tmp_path / "precious").write_text("data")
    (recipe.run.dir / "images" / "epoch_000000.png").symlink_to(tmp_path / "precious")
    in_process(recipe)
    assert (tmp_path / "precious").read_text() == "data"
    assert (recipe.run.dir / "images" / "epoch_000000.png").read_bytes().startswith(b"\x89PNG")


def test_links_in_place_of_what_a_killed_save_left_are_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "data").write_text("data")
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for name in (".part-epoch_000001", ".drop-epoch_000001"):
        (folder / name).symlink_to(tmp_path / "precious")
    (folder / ".part-epoch_000002").write_text("a file")
    in_process(toy(tmp_path / "run"))
    assert (tmp_path / "precious" / "data").read_text() == "data"
    assert sorted(p.name for p in folder.iterdir()) == ["epoch_000001", "epoch_000002"]


# Kills.


def kill_at_operations(tmp_path: Path, first: int, step: int) -> int:
    """Kill a run of two epochs at every `step`-th operation on files, resume each, and compare the ends."""
    driver = [sys.executable, str(TESTS / "helpers/killed_runs.py"), str(tmp_path), "2", str(first), str(step)]
    subprocess.run(driver, check=True, timeout=3600, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folders = [path for path in sorted(tmp_path.glob("operation_*")) if path.is_dir()]
    for folder in folders:
        assert_same_end(folder, tmp_path / "undisturbed")
    return len(folders) - 1  # the last one was not killed


def test_kills_at_some_file_operations_lose_nothing(tmp_path: Path) -> None:
    assert kill_at_operations(tmp_path, 17, 40) > 3


@pytest.mark.slow
def test_kills_at_every_file_operation_lose_nothing(tmp_path: Path, counted: Counted) -> None:
    kills = kill_at_operations(tmp_path, 1, 1)
    assert kills > 100
    counted(f"{kills} of {kills} kills, one at each operation on files of a run, lost nothing")
