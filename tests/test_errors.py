"""Users' errors are one line and their exit code; anything else is a bug, which shows its traceback."""

from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest
import torch

from fastguard import cli
from fastguard.commands import doctor
from fastguard.errors import FileError, NotFiniteError, UserError
from fastguard.rewards import RewardError
from fastguard.train.checkpoint import CheckpointError
from fastguard.utils.files import read_text, writing
from fastguard.utils.sealed import DamagedError


def said_by(capsys: pytest.CaptureFixture[str], *args: str, code: int) -> str:
    assert cli.main(args) == code
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plan", "nothing"), "there is no recipe nothing; "),
        (("plan", "a" * 300), "there is no recipe aaa"),
        (("plan", "flux_tiny", "--model.path", "a//b"), 'model.path = "a//b" is neither a local folder nor'),
        (("plan", "--kept"), "options come after the recipe: fastguard plan RECIPE --kept"),
        (("report", "/nowhere"), "/nowhere is not the folder of a run"),
        (("report", "a" * 300), "cannot read or write: [Errno 36]"),
        (("train", "flux_tiny", "--run.dir", "/dev/null/run"), "cannot read or write: [Errno 20] /dev/null"),
        (("train", "flux_tiny", "--prompts.file", "a" * 300), "there is no prompt file aaa"),
        (("train", "flux_tiny", "--prompts.file", "/dev"), "there is no prompt file /dev"),
        (("sample", "flux_tiny", "--images", "0"), "images must lie in [1, "),
        (("reward-server", "jpeg_compressibility", "--port", "70000"), "port must lie in [0, 65535], got 70000"),
        (("demo", "--seeds", "0"), "seeds must be at least 1, got 0"),
    ],
)
def test_a_bad_setting_is_one_line(args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = said_by(capsys, *args, code=2)
    assert said.startswith("fastguard: ")
    assert message in said
    assert said.count("\n") == 1


def test_every_problem_of_a_recipe_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[lora]\nrank = 0\n[run]\nepoch = 3\n")
    said = said_by(capsys, "train", str(file), code=2)
    assert said == (
        f"fastguard: {file}:\n  run.epoch: there is no such field; did you mean epochs?\n"
        "  lora: rank must be at least 1, got 0\n"
    )


@pytest.mark.parametrize("bug", [ValueError, OSError, FloatingPointError, RuntimeError])
def test_a_bug_shows_its_traceback(
    bug: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What torch, the system or we raise by mistake is not taken for a mistake of the user's."""

    def fail(recipe: None) -> None:
        raise bug("a bug")

    monkeypatch.setattr(doctor, "machine_checks", fail)
    said = said_by(capsys, "doctor", code=1)
    assert said.startswith("Traceback (most recent call last):")
    assert said.rstrip().endswith(f"{bug.__name__}: a bug")


def test_a_mistake_inside_torch_shows_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "machine_checks", lambda recipe: torch.optim.SGD([]))  # a ValueError of torch's
    said = said_by(capsys, "doctor", code=1)
    assert "torch/optim" in said
    assert said.rstrip().endswith("ValueError: optimizer got an empty parameter list")


@pytest.mark.parametrize(
    ("error", "code"),
    [(UserError, 2), (FileError, 2), (DamagedError, 2), (CheckpointError, 2), (RewardError, 1), (NotFiniteError, 1)],
)
def test_users_errors_have_their_exit_codes(
    error: type[UserError], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(recipe: None) -> int:
        raise error("what to change")

    monkeypatch.setattr(doctor, "examine", fail)
    said = said_by(capsys, "doctor", code=code)
    assert said.removeprefix("fastguard: ").removeprefix("cannot read or write: ") == "what to change\n"


def test_a_files_error_keeps_its_number(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^cannot read or write: \[Errno 21\] /.*: Is a directory$") as caught:
        read_text(tmp_path)
    with pytest.raises(OSError, match="the disk is full") as full, writing(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [error.value.errno for error in (caught, full)] == [errno.EISDIR, errno.ENOSPC]  # type: ignore[attr-defined]
    with pytest.raises(FileError) as again, writing(tmp_path / "outer"):
        raise full.value
    assert again.value is full.value
    assert str(pickle.loads(pickle.dumps(full.value))) == str(full.value)
