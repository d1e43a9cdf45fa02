"""Output that cannot be written, and text that acts on a terminal."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from helpers import TESTS

from fastguard import cli
from fastguard.commands import doctor
from fastguard.train.checkpoint import verify
from fastguard.train.run_folder import checkpoint_of
from fastguard.utils.rows import read_rows
from fastguard.utils.terminal import Unfailing, printable, say, unfailing_output

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
TIMEOUT_S = 300

Command = Sequence[str]
Ending = Callable[[Command, Path], int]
"""starts a command whose output fails, waits for its end, and returns its exit code"""


def wait_for_epoch(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not read_rows(folder / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < deadline, "the run does not get on"  # noqa: PT018
        time.sleep(0.05)


def closed_terminal(command: Command, folder: Path) -> int:
    """SIGHUP, and a terminal that answers every write with EIO."""
    ours, theirs = pty.openpty()

    def own_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=own_terminal
    )
    os.close(theirs)
    wait_for_epoch(process, folder)
    os.close(ours)
    return process.wait(TIMEOUT_S)


def in_shell(redirection: str) -> Ending:
    def run(command: Command, folder: Path) -> int:
        shell = ["bash", "-c", f'set -o pipefail; "$@" {redirection}', "bash", *command]
        return subprocess.run(shell, capture_output=True, timeout=TIMEOUT_S, check=False).returncode

    return run


ENDINGS: dict[str, Ending] = {
    "closed terminal": closed_terminal,
    "both | head": in_shell("2>&1 | head -1"),
    "stdout | head": in_shell("| head -1"),
    "stderr | head": in_shell("2>&1 >/dev/null | head -1"),
    "stdout full": in_shell(">/dev/full"),
    "both full": in_shell(">/dev/full 2>&1"),
    "both closed": in_shell(">&- 2>&- <&-"),
}


@needs_full
@pytest.mark.parametrize("ending", ["closed terminal", "both | head", "both full", "both closed"])
def test_no_failing_output_ends_a_run(tmp_path: Path, ending: str) -> None:
    """Nor leaves anything of it in a file that got the number of a closed stream."""
    epochs = 60 if ending == "closed terminal" else 3
    toy = [sys.executable, str(TESTS / "helpers/toy_run.py"), str(tmp_path), str(epochs), "--slow", "0.02"]
    assert ENDINGS[ending](toy, tmp_path) == 0
    newest = checkpoint_of(tmp_path, "newest")
    verify(newest)
    assert (newest.name == f"epoch_{epochs:06d}") == (ending != "closed terminal")  # which asks to save and stop
    assert [row["epoch"] for row in read_rows(tmp_path / "metrics.jsonl")] == list(range(int(newest.name[-6:])))


@needs_full
@pytest.mark.slow
def test_no_failing_output_ends_a_run_of_the_command_line(tmp_path: Path, counted: Callable[[str], None]) -> None:
    saved = 0
    for name, end in ENDINGS.items():
        folder = tmp_path / name.replace(" ", "_")
        train = [sys.executable, "-m", "fastguard.cli", "train", "flux_tiny", "--run.dir", str(folder)]
        epochs = "12" if name == "closed terminal" else "2"
        assert end([*train, "--run.epochs", epochs], folder) == 0, name
        newest = checkpoint_of(folder, "newest")
        verify(newest)
        assert newest.name > "epoch_000000"
        saved += 1
    counted(
        f"{saved} of {len(ENDINGS)} ways for output to fail during `fastguard train` ended with a checkpoint, code 0"
    )


@needs_full
def test_a_command_whose_result_is_its_output_says_that_it_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(sys, "stderr", said)
        assert cli.main(["doctor"]) == 2
        monkeypatch.undo()
        with suppress(OSError):
            full.flush()
    assert said.getvalue().endswith("fastguard: cannot write to stdout: No space left on device\n")


def test_a_reader_that_has_gone_had_what_it_wanted() -> None:
    lines = "with unfailing_output() as out: print('a line\\n' * 100_000)"
    program = f"import sys; from fastguard.utils.terminal import *\n{lines}\nsys.exit(out.lost is not None)"
    assert in_shell("| head -1")([sys.executable, "-c", program], Path()) == 0


def test_a_stream_that_recovers_is_written_again() -> None:
    class Full(io.StringIO):
        full = True

        def write(self, text: str) -> int:
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(text)

    inside = Full()
    stream = Unfailing(inside)
    print("lost", file=stream)
    stream.writelines(["lost ", "too\n"])
    inside.full = False
    print("written", file=stream)
    assert inside.getvalue() == "written\n"
    assert stream.lost is not None


@needs_full
def test_what_the_caller_has_not_yet_written_does_not_fail_either(monkeypatch: pytest.MonkeyPatch) -> None:
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        print("still in the buffer")
        with unfailing_output() as stdout:
            print("a line")
        monkeypatch.undo()
        full.flush()
    assert stdout.lost is not None
    assert stdout.lost.errno == errno.ENOSPC


def test_streams_that_the_caller_has_closed_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, closed)
    assert cli.main(["doctor"]) == 2  # its result is lost


def test_without_stderr_nothing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    say("a line")
    assert capsys.readouterr().out == ""


def test_a_stream_without_its_buffer_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO()))
    with unfailing_output() as stdout:
        stdout.detach()
        print("lost")
    assert stdout.lost is not None


def test_streams_are_put_back() -> None:
    before = sys.stdout, sys.stderr, sys.stdout.errors
    with unfailing_output() as stdout:
        assert sys.stdout is stdout
        print("half a character of a path: \udcff")
    assert (sys.stdout, sys.stderr, sys.stdout.errors) == before
    assert stdout.lost is None


ACTING = "\x1b]0;title\x07 \x1b[2J \r \x9b31m \x7f \u202e \u2028 \ud800 \u200b"


def test_what_acts_on_a_terminal_is_shown_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"reward said: {ACTING}\n\tÄ 漢字 🙂")
    said = capsys.readouterr().err
    assert said == (
        r"reward said: \x1b]0;title\x07 \x1b[2J \r \x9b31m \x7f \u202e \u2028 \ud800 \u200b" + "\n\tÄ 漢字 🙂\n"
    )
    assert printable(printable(ACTING)) == printable(ACTING)


@pytest.mark.parametrize("line", ['"%s" = 1', '[run]\nseed = "%s"', '[["%s"]]'])
def test_keys_and_values_of_a_recipe_are_shown_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(line % r"\u001b[31m\u009bred")
    assert cli.main(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert r"\x1b[31m\x9bred" in said
    assert not {"\x1b", "\x9b"} & set(said)


def test_findings_of_doctor_are_shown_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check() -> Iterator[doctor.Finding]:
        yield doctor.Finding("ok", ACTING)

    monkeypatch.setattr(doctor, "machine_checks", lambda recipe: [(f"reward {ACTING}", check)])
    assert doctor.examine(None) == 0
    said = capsys.readouterr().out
    assert said.count(printable(ACTING)) == 2
    assert printable(said) == said


def test_an_unexpected_error_is_shown_escaped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(recipe: None) -> int:
        raise RuntimeError(ACTING)

    monkeypatch.setattr(doctor, "examine", fail)
    assert cli.main(["doctor"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert said.endswith(f"RuntimeError: {printable(ACTING)}\n\n")
    assert printable(said) == said
