"""Recipes damaged at random, in their bytes, values and structure: each is read, or refused with a name; none hangs."""

from __future__ import annotations

import copy
import datetime
import io
import json
import random
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from helpers.deadline import deadline
from helpers.tiny_pipelines import make_tiny_flux
from test_recipe import numbers

from fastguard.backbones.flux.spec import PARTS as FLUX
from fastguard.backbones.folder import pipeline_problems
from fastguard.cli import parse_command
from fastguard.config import Recipe, RewardConfig
from fastguard.errors import UserError
from fastguard.memory import passes, plan
from fastguard.recipe import as_dict, find_recipe, load_recipe, parse_recipe, shipped_names, totals
from fastguard.report.data import read_run
from fastguard.utils.terminal import say

FIELDS = [
    (section, field.name)
    for section, kind in get_type_hints(Recipe).items()
    for field in fields(kind if is_dataclass(kind) else RewardConfig)
]


def nested(depth: int) -> Any:
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


DEEP = "deeper than whoever writes it can go"
"""stands for 5,000 arrays in each other"""
ODD_NUMBERS: list[Any] = [
    0, 1, -1, 7, 255, 65_536, 999_999, 2**31 - 1, 2**31, 2**63, -(10**30), 10**400, 10**4000,
    0.0, -0.0, 5e-324, 1e-45, 1e-30, 1e-7, 0.3, 0.999999999, 1e30, 1e38, 1e308, -1e308, float("nan"), float("inf"),
]  # fmt: skip
ODD = [
    *ODD_NUMBERS, True, False, "", "auto", "none", "1", "nan", "\x00", "\x1b[31mred", "\u202ereversed", "\ufeff",
    "caf\u00e9", "\U0001f600", "/dev/null", "..", "a" * 100_000, [], [[]], [0, 0], [0.9, 0.9, 0.9], ["x"] * 3, {},
    {"": 0}, {"a": {"b": 1}}, nested(50), nested(150), DEEP, datetime.date(2000, 1, 1), datetime.datetime(2000, 1, 1),
]  # fmt: skip
"""Values that no field, or only some field, means."""
LINES = [
    "[run]", "[[run]]", "[rewards]", "[[monitor.gold]]", "[run.dir]", "epochs = 1", "run.epochs = 1", "a = [1, [2",
    '"""', "= 1", "{}", "x = {y = {z = 1}", "t = 2000-01-01T00:00:00Z", "u = '\u202e\u0300\U000e0001'", "\ufeff",
    "[" * 3000, "a = " + "[" * 3000 + "]" * 3000, "[" + ".".join("a" * 3000) + "]", "a." * 3000 + "b = 1",
    "n = " + "9" * 5000, "n = 0x" + "f" * 5000, "n = 1e999999", "'" + "k" * 50_000 + "' = 1",
]  # fmt: skip


def mutated_bytes(rng: random.Random, text: str) -> bytes:
    """A file with bytes flipped, deleted and inserted, cut, its lines doubled and moved, or with other newlines."""
    data = bytearray(text.encode())
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        lines = bytes(data).split(b"\n")
        match rng.randrange(9):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.choice((1, 3, 50))]
            case 2:
                data[at:at] = rng.choice(
                    (b"\x00", b"\xff", b"\xed\xa0\x80", b"\r", b'"', b"'", b"[", b"=", b"#", b"\n")
                )
            case 3:
                del data[at:]
            case 4:
                data = bytearray(b"\n".join([*lines, rng.choice(lines)]))
            case 5:
                rng.shuffle(lines)
                data = bytearray(b"\n".join(lines))
            case 6:
                lines.insert(rng.randrange(len(lines) + 1), rng.choice(LINES).encode())
                data = bytearray(b"\n".join(lines))
            case 7:
                data = bytearray(bytes(data).replace(b"\n", b"\r\n" if rng.random() < 0.5 else b"\r"))
            case 8:
                data[:0] = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"\x00"))
    return bytes(data)


def mutated_values(rng: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    """A few fields, there or not, with odd values; or a number that is there scaled."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        section, name = rng.choice(FIELDS)
        table = content.setdefault(section, {})
        table = rng.choice(table) if isinstance(table, list) and table else table
        if not isinstance(table, dict):
            continue
        before = table.get(name)
        number = isinstance(before, int | float) and rng.random() < 0.5
        table[name] = before * rng.choice((0, -1, 2, 10, 1000, 10**6)) if number else rng.choice(ODD)
    return content


def mutated_structure(rng: random.Random, content: dict[str, Any]) -> dict[str, Any]:
    """Sections and fields renamed, moved, removed, doubled, wrapped into arrays and tables, or put into each other."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 2))):
        place = content
        inside = [value for value in place.values() if isinstance(value, dict) and value]
        if inside and rng.random() < 0.5:
            place = rng.choice(inside)
        if not place:
            continue
        key = rng.choice(sorted(place))
        match rng.randrange(7):
            case 0:
                place[key + rng.choice(("s", "_", " ", "\x1b[31m", "\x00", "\u00e9", ""))] = place.pop(key)
            case 1:
                place[key] = [place[key]]
            case 2:
                place[key] = {rng.choice(("a", key, "0")): place[key]}
            case 3:
                del place[key]
            case 4:
                place[key] = [copy.deepcopy(place[key]) for _ in range(rng.choice((2, 2000)))]
            case 5:
                content[rng.choice(sorted(get_type_hints(Recipe)))] = place[key]
            case 6:
                place |= {f"unknown_{i}": i for i in range(rng.choice((1, 2000)))}
    return content


def as_toml(content: dict[str, Any]) -> str:
    """Inline values, a line for each field of a section."""
    lines = []
    for section, value in content.items():
        if isinstance(value, dict) and value:
            lines += [f"[{json.dumps(section)}]", *(f"{json.dumps(k)} = {_literal(v)}" for k, v in value.items())]
        else:
            lines.insert(0, f"{json.dumps(section)} = {_literal(value)}")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        return hex(value) if value > 2**64 else str(value)
    return value.isoformat() if isinstance(value, datetime.date) else repr(value)


def recipes(rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """(name of the file, content): of the shipped recipes as TOML, and as a run's recipe.json, level by level."""
    shipped = [find_recipe(name).read_text() for name in shipped_names()]
    for i in range(count):
        text, run = rng.choice(shipped), i % 2 == 1
        content = tomllib.loads(text)
        if run:
            content = as_dict(parse_recipe(content, "shipped"))
        if i % 3 == 0:
            data = mutated_bytes(rng, json.dumps(content, indent=0) if run else text)
        else:
            changed = (mutated_values if i % 3 == 1 else mutated_structure)(rng, content)
            written = json.dumps(changed, default=str) if run else as_toml(changed)
            data = written.replace(f'"{DEEP}"', "[" * 5000 + "]" * 5000).encode()
        yield "recipe.json" if run else "recipe.toml", data


def assert_told(error: ValueError, *names: str) -> None:
    """As a terminal shows it: a message of a page at most, that names one of these or a field."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    say(f"fastguard: {error}", stream)
    stream.seek(0)
    text = stream.read()
    assert any(name in text for name in (*names, *(f"{section}.{name}" for section, name in FIELDS))), text
    assert len(text) < 10_000
    assert not {"\0", "\x1b", "\u202e"} & set(text)


def read(file: Path) -> Recipe | None:
    """None for one that was refused with a name."""
    try:
        recipe = load_recipe(file) if file.suffix == ".toml" else read_run(file.parent).recipe
        totals(recipe)
        return recipe
    except UserError as error:
        assert_told(error, str(file))
        return None


@pytest.mark.parametrize(("count", "planned"), [(150, 1), pytest.param(3000, 60, marks=pytest.mark.slow)])
def test_a_mutated_recipe_is_read_or_refused_with_a_name(
    tmp_path: Path, counted: Callable[[str], None], count: int, planned: int
) -> None:
    seen: Counter[str] = Counter()
    for name, data in recipes(random.Random(count), count):
        (tmp_path / name).write_bytes(data)
        with deadline(data):
            recipe = read(tmp_path / name)
            if recipe is not None and recipe.model.kind == "flux" and seen["planned"] < planned:
                seen["planned"] += 1
                try:
                    plan(replace(recipe, model=replace(recipe.model, path="tiny")))
                except UserError as error:
                    assert_told(error)
        seen["refused" if recipe is None else "accepted"] += 1
    assert min(seen["refused"], seen["accepted"]) > count / 20
    assert seen["planned"] == planned
    counted(
        f"{count:,} recipes mutated at random: {seen['accepted']} accepted ({planned} of them planned), "
        f"{seen['refused']} refused with the file's or field's name, 0 tracebacks, 0 hangs"
    )


def refusal(command: list[str], capsys: pytest.CaptureFixture[str]) -> str | None:
    """Letters and digits of the message, which may stand in a box whose lines break anywhere."""
    try:
        parse_command(command)
        return None
    except UserError as error:
        told = str(error)
    except SystemExit:
        told = capsys.readouterr().err
    return "".join(filter(str.isalnum, told))


@pytest.mark.parametrize("count", [8, pytest.param(300, marks=pytest.mark.slow)])
def test_an_odd_override_is_taken_or_refused_with_a_name(
    capsys: pytest.CaptureFixture[str], counted: Callable[[str], None], count: int
) -> None:
    rng, accepted = random.Random(count), 0
    for _ in range(count):
        (section, name), value = rng.choice(numbers((int, float))), str(rng.choice(ODD_NUMBERS))
        option = f"--{section}.{name.replace('_', '-')}"
        with deadline((option, value)):
            told = refusal(["plan", "flux_tiny", option, value, *(["0.9"] if name == "betas" else [])], capsys)
        accepted += told is None
        assert told is None or name.replace("_", "") in told, (option, value, told)
    counted(
        f"{count} odd values on the command line: {accepted} taken, {count - accepted} refused with the field's name"
    )


PARTS = {
    **dict.fromkeys(("transformer", "vae", "text_encoder", "text_encoder_2"), "config.json"),
    "scheduler": "scheduler_config.json",
}
ODD_SETTINGS = [0, -1, 7, 1.5, 10**6, 10**9, 2**63, 10**30, "8", "", None, True, [], [10**9], [1] * 1000, {}]


def mutated_settings(rng: random.Random, text: str) -> str:
    """A part's settings with one or two odd values, or without one."""
    values = json.loads(text)
    for key in rng.sample(sorted(key for key in values if not key.startswith("_")), rng.choice((1, 1, 2))):
        if rng.random() < 0.1:
            del values[key]
        elif isinstance(values[key], list) and values[key] and rng.random() < 0.5:
            values[key][rng.randrange(len(values[key]))] = rng.choice(ODD_SETTINGS)
        else:
            values[key] = rng.choice(ODD_SETTINGS)
    return json.dumps(values)


@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_mutated_settings_of_a_pipeline_are_planned_or_refused_with_the_file(
    tmp_path: Path, counted: Callable[[str], None], count: int
) -> None:
    rng, planned, checked = random.Random(count), 0, 0
    folder = make_tiny_flux(tmp_path / "pipeline")
    recipe = load_recipe(find_recipe("flux_tiny"))
    recipe = replace(recipe, model=replace(recipe.model, path=str(folder)))
    for _ in range(count):
        part = rng.choice(sorted(PARTS))
        file = folder / part / PARTS[part]
        whole = file.read_text()
        file.write_text(mutated_settings(rng, whole))
        with deadline(file.read_text()):
            for each in (
                passes.weights_of,
                passes.encode_pass,
                passes.rollout_pass,
                passes.decode_pass,
                passes.update_pass,
            ):
                each.cache_clear()
            try:
                plan(recipe)
                planned += 1
            except UserError as error:
                assert_told(error, str(folder))
            problems = list(pipeline_problems(folder, FLUX))
            checked += not problems
            for problem in problems:
                assert_told(ValueError(problem), str(folder))
        file.write_text(whole)
    counted(
        f"{count} pipelines with settings mutated at random: {planned} planned and {checked} found whole, the others "
        "refused with the file's or folder's name, 0 tracebacks, 0 hangs"
    )
