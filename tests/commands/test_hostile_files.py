"""Prompt files and pipelines of others are used, or refused in one line that names the file; no pickle is opened."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from fastguard.backbones.flux import Flux
from fastguard.backbones.flux.spec import PARTS
from fastguard.backbones.folder import pipeline_problems
from fastguard.backbones.pipeline.backbone import load_pipeline
from fastguard.backbones.pipeline.encoding import encode_prompts
from fastguard.commands.train import announce
from fastguard.config import Recipe
from fastguard.errors import UserError
from fastguard.prompts import EncodedPrompts, Prompt, fingerprint, read_prompts
from fastguard.recipe import find_recipe, load_recipe
from fastguard.train.build import gather_prompts, load_backbone
from fastguard.utils.files import fitting, parse_json

CPU = torch.device("cpu")
DEEP = "[" * 5000 + "]" * 5000
DEEP_ENOUGH = "[" * 300 + "]" * 300
"""Python reads it; others stop at it."""


def recipe_for(folder: Path) -> Recipe:
    tiny = load_recipe(find_recipe("flux_tiny"))
    return replace(
        tiny,
        model=replace(tiny.model, path=str(folder)),
        prompts=replace(tiny.prompts, cache=folder.parent / "cache"),
    )


def encode(folder: Path) -> EncodedPrompts:
    return encode_prompts(Flux().spec, [Prompt("a")], str(folder), 16, folder.parent / "cache", torch.float32, CPU)


# --- JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DEEP, "it is nested deeper than 64 levels"),
        (DEEP_ENOUGH, "it is nested deeper than 64 levels"),
        ('{"a": ["\\ud800"]}', r"it holds '\\ud800', half of a character"),
        ('{"\\udfff": 1}', r"it holds '\\udfff', half of a character"),
        ("9" * 5000, "digits"),
        ("{", "Expecting property name"),
    ],
    ids=["deep", "deep enough", "half a character", "half a key", "a long number", "cut"],
)
def test_json_that_others_stop_at_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json_of_every_kind_comes_back() -> None:
    value = {"a": [1, 2.5, None, True, "\U0001f600"], "b": {"c": {}}}
    assert parse_json(json.dumps(value)) == value
    assert parse_json("[" * 64 + "]" * 64)


@pytest.mark.parametrize("text", [f'{{"a": {DEEP}}}', f'{{"a": {DEEP_ENOUGH}}}', '{"a": "\\ud800"}'])
def test_every_json_file_of_a_pipeline_is_named(folder: Path, text: str) -> None:
    named = sorted(folder.rglob("*.json"))
    for file in named:
        file.write_text(text)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(text)
    problems = list(pipeline_problems(folder, PARTS))
    assert len(named) == 10
    for file in (*named, index):
        assert sum(problem.startswith(f"{file} is cut short or no JSON (it ") for problem in problems) == 1
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize("value", [DEEP, DEEP_ENOUGH, '"\\ud800"', '{"\\ud800": 1}'])
def test_metadata_that_cannot_be_written_again_names_its_line(tmp_path: Path, value: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{{"prompt": "b", "more": {value}}}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl, line 2: not JSON: it "):
        read_prompts(file)
    file.write_text(f'{{"prompt": "b", "more": {"[" * 63 + "]" * 63}}}\n')
    assert fingerprint(read_prompts(file))


# --- pickles


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was opened")

    monkeypatch.setattr(torch, "load", opened)


PICKLES = {
    "transformer": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
    "text_encoder": "pytorch_model.bin",
    "text_encoder_2": "pytorch_model.bin",
}


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("part", PICKLES)
def test_a_pickle_is_refused_by_name_and_never_opened(folder: Path, part: str) -> None:
    (safe,) = (folder / part).glob("*.safetensors")
    torch.save(load_file(safe), folder / part / PICKLES[part])
    safe.unlink()
    (problem,) = pipeline_problems(folder, PARTS)
    assert f"{folder / part / PICKLES[part]} is a pickle, which can run code, and is never opened: download" in problem
    recipe = recipe_for(folder)
    with pytest.raises((OSError, ValueError)):  # the loaders do not open it either, without the check
        load_pipeline(Flux().spec, recipe, encode(folder), 1, CPU, "none")


@pytest.mark.usefixtures("unopened")
@pytest.mark.parametrize("part", PICKLES)
def test_an_index_of_safetensors_leads_to_no_pickle(folder: Path, part: str) -> None:
    (safe,) = (folder / part).glob("*.safetensors")
    weights = load_file(safe)
    torch.save(weights, folder / part / PICKLES[part])
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, PICKLES[part])}
    (folder / part / f"{safe.name}.index.json").write_text(json.dumps(index))
    safe.unlink()
    (problem,) = pipeline_problems(folder, PARTS)
    assert f"{folder / part / PICKLES[part]} is a pickle" in problem


# --- memory


def test_a_prompt_file_beyond_memory_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.touch()
    os.truncate(file, 1 << 43)  # 8 TB that take no place
    with pytest.raises(ValueError, match=r"prompts\.txt does not fit into memory"):
        read_prompts(file)


@pytest.mark.parametrize("part", ["transformer", "text_encoder_2"])
def test_weights_beyond_memory_are_named(folder: Path, part: str) -> None:
    (file,) = (folder / part).glob("*.safetensors")
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    last = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    size = 1 << 43
    header["huge"] = {"dtype": "U8", "shape": [size], "data_offsets": [last, last + size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    os.truncate(file, 8 + len(text) + last + size)
    (problem,) = pipeline_problems(folder, PARTS)
    assert problem.startswith(f"{folder / part} does not fit into memory (")
    assert "\n" not in problem


def wrapped() -> None:
    """As diffusers does it: an error of its own on top of the one that matters."""
    try:
        raise MemoryError
    except MemoryError:
        raise OSError("Unable to load weights") from None


def allocate() -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def fill_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1 GiB.")


def map_a_file() -> None:
    raise OSError(12, "Cannot allocate memory")


@pytest.mark.parametrize("run_out", [wrapped, allocate, fill_a_gpu, map_a_file])
def test_memory_that_runs_out_is_one_line(run_out: Callable[[], None]) -> None:
    with (
        pytest.raises(ValueError, match=r"^one\.safetensors does not fit into memory \(.*\): buy some$") as told,
        fitting("one.safetensors", "buy some"),
    ):
        run_out()
    assert "\n" not in str(told.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    with pytest.raises(OSError, match="denied"), fitting("x"):
        raise PermissionError(13, "denied")


def test_weights_that_do_not_fit_name_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxTransformer2DModel
    from transformers import T5EncoderModel

    encoded = encode(folder)
    monkeypatch.setattr(FluxTransformer2DModel, "to", lambda *_: fill_a_gpu())
    told = r"model\.path = '.*/flux': {} does not fit into memory \(CUDA out of memory"
    with pytest.raises(ValueError, match=told.format("the pipeline")):
        load_pipeline(Flux().spec, recipe_for(folder), encoded, 1, CPU, "none")
    shutil.rmtree(folder.parent / "cache")
    monkeypatch.setattr(T5EncoderModel, "to", lambda *_: fill_a_gpu())
    with pytest.raises(ValueError, match=told.format("what encodes the prompts")):
        encode(folder)


# --- random changes

ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 77, 1e308, 0.5, float("nan"), "", "x", "1", "\ud800", "../..", [], {}, [None], {"a": 1}
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to the values inside a JSON value; of long lists, to the first few."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list) else []
    return [found for key in keys for found in ((*path, key), *places(value[key], (*path, key)))]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A JSON file after one change: bytes, length, nesting, a missing key, or a value of another type or size."""
    how = rng.choice(["bytes", "cut", "deep", "missing", "odd", "odd"])
    if how == "bytes":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 4])):
            changed[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(changed)
    if how == "cut":
        return content[: rng.randrange(len(content))]
    value = json.loads(content)
    *path, key = rng.choice(places(value))
    inside = value
    for step in path:
        inside = inside[step]
    if how == "missing":
        del inside[key]
    elif how == "deep":
        inside[key] = json.loads(rng.choice(["[" * 40 + "]" * 40, DEEP_ENOUGH]))
    else:
        inside[key] = rng.choice(ODD)
    return json.dumps(value).encode()


def outcome(use: Callable[[], Any], path: Path) -> str:
    """Whether the file is "used" or "refused"; anything but one line that names it is an error of its own."""
    message = None
    try:
        use()
    except UserError as error:
        message = str(error)
    if message is None:
        return "used"
    assert str(path) in message
    assert "\n" not in message
    return "refused"


def fuzz_prompts(file: Path, count: int, seed: int) -> Counter[str]:
    line = {"prompt": "a sign that says “stop”", "text": "STOP", "more": {"list": [1, [2.5, None]], "so": True}}
    lines = "\n".join(json.dumps({**line, "prompt": f"prompt {i}"}, ensure_ascii=i % 2 == 0) for i in range(4))
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    for _ in range(count):
        path = file.with_suffix(rng.choice([".txt", ".jsonl"]))
        if rng.random() < 0.5:
            path.write_bytes(mutated(json.dumps(line).encode(), rng))
        else:
            changed = bytearray(lines.encode())
            for _ in range(rng.choice([1, 2, 8])):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            path.write_bytes(changed)
        outcomes[outcome(lambda path=path: fingerprint(read_prompts(path)), path)] += 1  # type: ignore[misc]
    return outcomes


def test_changed_prompt_files_are_used_or_refused_by_name(tmp_path: Path) -> None:
    assert fuzz_prompts(tmp_path / "p.x", 200, seed=0).keys() == {"used", "refused"}


@pytest.mark.slow
def test_prompt_files_changed_at_random(tmp_path: Path, counted: Callable[[str], None]) -> None:
    outcomes = fuzz_prompts(tmp_path / "p.x", 5000, seed=1)
    counted(f"5000 prompt files changed at random: {outcomes['used']} used, {outcomes['refused']} refused by name")


def fuzz_pipelines(tiny_flux: Path, tmp_path: Path, count: int, seed: int) -> Counter[str]:
    files = sorted(file.relative_to(tiny_flux) for file in tiny_flux.rglob("*.json"))
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    accelerator = Accelerator(cpu=True)
    for i in range(count):
        folder = tmp_path / f"flux{i}"
        shutil.copytree(tiny_flux, folder)
        file = files[i % len(files)]
        (folder / file).write_bytes(mutated((tiny_flux / file).read_bytes(), rng))
        recipe = recipe_for(folder)

        def start(recipe: Recipe = recipe, planned: bool = file.name == "config.json") -> None:
            if planned:  # the planner reads nothing else
                announce(recipe, recipe.prompts.per_epoch)
            load_backbone(recipe, gather_prompts(recipe), accelerator, "none")

        outcomes[outcome(start, folder)] += 1
        shutil.rmtree(folder)
    return outcomes


def test_changed_pipelines_are_used_or_refused_by_name(tiny_flux: Path, tmp_path: Path) -> None:
    assert fuzz_pipelines(tiny_flux, tmp_path, 4, seed=0).total() == 4


@pytest.mark.slow
def test_pipelines_changed_at_random(tiny_flux: Path, tmp_path: Path, counted: Callable[[str], None]) -> None:
    outcomes = fuzz_pipelines(tiny_flux, tmp_path, 300, seed=1)
    counted(
        f"300 pipelines with JSON changed at random: {outcomes['used']} used, {outcomes['refused']} refused by name"
    )
