"""What is particular to FLUX.1-Kontext: prompts with an image each."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from fastguard.backbones import family_of
from fastguard.backbones.kontext.spec import load_image
from fastguard.commands.doctor import examine
from fastguard.errors import UserError
from fastguard.prompts import fingerprint
from fastguard.recipe import find_recipe, load_recipe

EDITS = ROOT / "recipes" / "edits.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the prompts and their images."""
    shutil.copytree(EDITS.parent / "images", tmp_path / "edits" / "images")
    shutil.copy(EDITS, tmp_path / "edits")
    return tmp_path / "edits"


def test_rewards_get_the_whole_path_of_the_image(folder: Path) -> None:
    prompt = family_of("kontext").read_prompts(folder / EDITS.name)[0]
    assert prompt.text == "at night"
    assert prompt.metadata == {"image": str(folder / "images" / "meadow.ppm")}


def test_prompts_are_told_by_the_contents_of_their_images(folder: Path, tmp_path: Path) -> None:
    def mark(where: Path) -> str:
        return fingerprint(family_of("kontext").read_prompts(where / EDITS.name))

    before = mark(folder)
    moved = folder.rename(tmp_path / "moved")
    assert mark(moved) == before
    shutil.copy(moved / "images" / "stripes.ppm", moved / "images" / "meadow.ppm")
    assert mark(moved) != before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a"}, "image = None, which names no file"),
        ({"prompt": "a", "image": 5}, "image = 5, which names no file"),
        ({"prompt": "a", "image": "none.png"}, "image = 'none.png', and there is no .*/none.png"),
    ],
)
def test_a_prompt_without_an_image_is_named(folder: Path, line: dict[str, object], message: str) -> None:
    (folder / EDITS.name).write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message):
        family_of("kontext").read_prompts(folder / EDITS.name)


def test_a_text_alone_is_no_prompt() -> None:
    with pytest.raises(UserError, match="is a text alone, and .* edits an image"):
        family_of("kontext").prompt("at night")


def test_a_damaged_image_is_named_also_by_the_doctor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "images" / "meadow.ppm"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=r"meadow\.ppm is no image that Pillow reads"):
        load_image(file)
    recipe = load_recipe(find_recipe("kontext_tiny"))
    assert examine(replace(recipe, prompts=replace(recipe.prompts, file=folder / EDITS.name))) == 1
    assert "meadow.ppm is no image that Pillow reads" in capsys.readouterr().out


def test_a_photo_is_read_upright(tmp_path: Path) -> None:
    lying = Image.new("RGB", (64, 40))
    exif = lying.getexif()
    exif[0x0112] = 6  # orientation
    lying.save(tmp_path / "photo.jpg", exif=exif)
    assert load_image(tmp_path / "photo.jpg").size == (40, 64)
