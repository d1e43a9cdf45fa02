"""Rows that are odd stop neither a resume nor a report: they are passed over, counted, and kept aside."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.run_folders import MONITOR, in_process, toy

from fastguard.config import Recipe, RewardConfig, ScoringConfig
from fastguard.report.data import TrainingRun, read_run
from fastguard.report.run import write_run_report
from fastguard.utils.rows import keep_rows, odd_rows, read_lines, read_rows

NAMES = ("metrics.jsonl", "evaluations.jsonl", "skipped.jsonl")
ODD = (
    b"null", b"[]", b"7", b'"row"', b'{"epoch": 1', b"{", b"{}", b"\0", b"\xff\xfe{}", b"[" * 100_000,
    b'{"a":' * 50_000, b'{"epoch": ' + b"9" * 5000 + b"}", b'{"epoch": NaN}', b'{"epoch": "1"}', b'{"epoch": null}',
    b'{"epoch": true}', b'{"epoch": -1}', b'{"epoch": 1.0}', b'{"epoch": 1e400}',
)  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: str(odd[:20]))
def test_an_odd_row_is_passed_over_counted_and_kept_aside(tmp_path: Path, odd: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    good = [b'{"epoch": 0, "x": 1e-3}', b'{"epoch": 1, "x": NaN}', b'{"epoch": 2}']
    file.write_bytes(b"\n".join([good[0], odd, b"", *good[1:], odd]))
    assert [row["epoch"] for row in read_rows(file) if row.get("epoch") in (0, 1, 2) and "x" in row] == [0, 1]
    assert keep_rows(file, lambda epoch: epoch < 2) == 2
    assert read_lines(file) == good[:2]  # to the byte
    assert read_lines(odd_rows(file)) == [odd, odd]
    assert keep_rows(file, lambda epoch: epoch < 2) == 0
    assert len(read_lines(odd_rows(file))) == 2


def test_what_is_no_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to("/dev/zero")
    for name in ("folder", "link", "missing"):
        assert read_rows(tmp_path / f"{name}.jsonl") == []


def half(images: Any, prompts: Any, metadata: Any) -> Any:
    """Fails for one prompt, so that skipped.jsonl gets rows."""
    import torch
    from helpers.toys import towards

    return towards(images, prompts, metadata).where(torch.tensor([p == "light" for p in prompts]), torch.nan)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A run of two epochs with rows in each of its files."""
    folder = tmp_path_factory.mktemp("runs") / "rows"
    made = replace(
        toy(folder, run={"images_every": 0}), monitor=MONITOR, scoring=ScoringConfig(1, on_failure="drop_group")
    )
    in_process(made, half)
    assert [len(read_lines(folder / name)) for name in NAMES] == [2, 3, 2]
    return made


def test_a_resume_says_how_many_rows_were_odd(
    tmp_path: Path, recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(recipe.run.dir, folder)
    for name in NAMES:
        (folder / name).write_bytes(b"null\n" + (folder / name).read_bytes() + b'{"epoch": 1, "rew')
    in_process(replace(recipe, run=replace(recipe.run, dir=folder, epochs=3)), half, resume="auto")
    said = capfd.readouterr().out
    for name, epochs in zip(NAMES, ([0, 1, 2], [0, 1, 2, 3], [0, 1, 2]), strict=True):
        stem = name.removesuffix(".jsonl")
        assert f"odd rows of {name} (half a line, say): 2, moved to {stem}_odd.jsonl" in said
        assert [row["epoch"] for row in read_rows(folder / name)] == epochs
        assert read_lines(folder / f"{stem}_odd.jsonl") == [b"null", b'{"epoch": 1, "rew']
    assert read_run(folder).unread == 0


def test_odd_rows_of_evaluations_that_begin_anew_stay_with_the_earlier_ones(tmp_path: Path, recipe: Recipe) -> None:
    folder = tmp_path / "run"
    shutil.copytree(recipe.run.dir, folder)
    with (folder / "evaluations.jsonl").open("ab") as file:
        file.write(b"null\nhalf a li")
    changed = replace(
        recipe, run=replace(recipe.run, dir=folder, epochs=3), monitor=replace(MONITOR, gold=(RewardConfig("h"),))
    )
    in_process(changed, half, resume="auto")
    earlier = read_lines(folder / "evaluations_until_000002.jsonl")
    assert earlier == [*read_lines(recipe.run.dir / "evaluations.jsonl"), b"null", b"half a li"]


# Mutations.

VALUES = (
    None, True, -1, 0, 10**400, 1e308, -1e308, 5e-324, float("nan"), float("inf"), "", "x", "\ud800", "\x1b[2J",
    "é\u2028", [], [[]], [None], {}, {"": None}, {"x": {"mean": 1.0, "std": "y"}}, list(range(2000)),
)  # fmt: skip


def mutated_value(row: Any, rng: random.Random) -> Any:
    """The row with one value, at any depth, changed, removed or doubled."""
    row = json.loads(json.dumps(row))
    holder, places = row, []
    while isinstance(holder, dict | list) and holder:
        key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
        places.append((holder, key))
        holder = holder[key]
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.append(holder[key])
    elif kind == 2 and isinstance(holder[key], int | float):
        holder[key] *= rng.choice([-1, 0, 1e30, 1e300, 10**6])
    else:
        holder[key] = rng.choice(VALUES)
    return row


def mutated_lines(lines: list[bytes], rng: random.Random) -> list[bytes]:
    lines = list(lines)
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0:
            lines[i] = lines[i][: rng.randrange(len(lines[i]) + 1)]
        elif kind == 1 and lines[i]:
            content = bytearray(lines[i])
            content[rng.randrange(len(content))] = rng.randrange(256)
            lines[i] = bytes(content)
        elif kind == 2:
            lines.insert(i, rng.choice(ODD))
        elif kind == 3:
            lines.insert(i, lines[rng.randrange(len(lines))])
        else:
            try:
                lines[i] = json.dumps(mutated_value(json.loads(lines[i]), rng)).encode()
            except (ValueError, RecursionError):  # mutated before
                continue
    return lines


def runs_with_mutated_rows(recipe: Recipe, out: Path, number: int) -> Iterator[Path]:
    folder = out / "run"
    shutil.copytree(recipe.run.dir, folder)
    for seed in range(number):
        rng = random.Random(seed)
        for odd in folder.glob("*_odd.jsonl"):
            odd.unlink()
        for name in NAMES:
            lines = read_lines(recipe.run.dir / name)
            (folder / name).write_bytes(b"\n".join(mutated_lines(lines, rng)))
        yield folder


def check(folder: Path) -> TrainingRun:
    """Report on a run, and read it as a resume does: nothing is raised, and no line is lost."""
    found = read_run(folder)
    page = write_run_report(folder).read_text(encoding="utf-8")
    assert ("could not be read" in page) == (found.unread > 0)
    for name in NAMES:
        before = read_lines(folder / name)
        moved = keep_rows(folder / name, lambda epoch: True)
        kept, aside = read_lines(folder / name), read_lines(odd_rows(folder / name))
        assert sorted(kept + aside) == sorted(before)
        assert len(aside) == moved
    return found


def test_some_mutated_rows_stop_neither_report_nor_resume(tmp_path: Path, recipe: Recipe) -> None:
    assert sum(check(folder).unread for folder in runs_with_mutated_rows(recipe, tmp_path, 2)) > 2


@pytest.mark.slow
def test_mutated_rows_stop_neither_report_nor_resume(
    tmp_path: Path, recipe: Recipe, counted: Callable[[str], None]
) -> None:
    number, failed = 300, []
    for seed, folder in enumerate(runs_with_mutated_rows(recipe, tmp_path, number)):
        try:
            check(folder)
        except Exception as error:
            failed.append(f"{seed}: {type(error).__name__}: {error}")
    counted(f"{number} runs with rows mutated at random: {len(failed)} tracebacks of report or resume")
    assert not failed


def test_mutations_change_values_at_every_depth(recipe: Recipe) -> None:
    (row, *_) = read_rows(recipe.run.dir / "metrics.jsonl")
    changed = [mutated_value(row, random.Random(seed)) for seed in range(200)]
    assert {name for new in changed for name in row if new.get(name) != row[name]} >= {"updates", "rewards", "epoch"}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("metrics.jsonl", {"reward_mean": "x"}), ("metrics.jsonl", {"dropped_groups": 10**400}),
        ("metrics.jsonl", {"reward_mean": 1e300}), ("metrics.jsonl", {"epoch": 10**30}),
        ("metrics.jsonl", {"steps": [0, 1, 2, 3, 4]}), ("metrics.jsonl", {"clip_range_for_30_percent": -1.0}),
        ("metrics.jsonl", {"rewards": {"\ud800": {"mean": 0.0, "std": 0.0}}}), ("evaluations.jsonl", {"gold": None}),
        ("evaluations.jsonl", {"epoch": -1}), ("evaluations.jsonl", {"warning": "\ud800"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_row_that_no_run_writes_is_left_out_of_the_report(
    tmp_path: Path, recipe: Recipe, name: str, changed: dict[str, Any]
) -> None:
    shutil.copytree(recipe.run.dir, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / name)
    (tmp_path / "run" / name).write_text("".join(json.dumps(row) + "\n" for row in [rows[0] | changed, *rows[1:]]))
    assert read_run(tmp_path / "run").unread == 1


def test_half_a_character_in_a_message_does_not_stop_a_report(tmp_path: Path, recipe: Recipe) -> None:
    shutil.copytree(recipe.run.dir, tmp_path / "run")
    (tmp_path / "run" / "skipped.jsonl").write_text(json.dumps({"epoch": 0, "message": "half \ud800"}))
    assert read_run(tmp_path / "run").skipped == ["half \\ud800"]


def test_a_row_of_a_later_version_with_more_fields_is_read(tmp_path: Path, recipe: Recipe) -> None:
    shutil.copytree(recipe.run.dir, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    rows = [row | {"new": 1} for row in read_rows(file)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_run(tmp_path / "run")
    assert found.unread == 0
    assert json.loads(json.dumps(dataclasses.asdict(found.epochs[0]))) | {"new": 1} == rows[0]
