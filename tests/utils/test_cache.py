"""The cache: damage is noticed, what a kill left is removed, full disks are named, and equal runs write equal files."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from helpers.deadline import DEADLINE_S
from helpers.tiny_pipelines import make_tiny_flux
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastguard import prompts as prompts_module
from fastguard.backbones.flux import Flux
from fastguard.backbones.flux.spec import FluxSpec
from fastguard.backbones.folder import pipeline_folder
from fastguard.backbones.pipeline.encoding import encode_prompts
from fastguard.commands.sample import sample_recipe
from fastguard.demo import cache as demo_cache
from fastguard.demo.config import ClassifierConfig
from fastguard.prompts import EncodedPrompts, Prompt
from fastguard.recipe import find_recipe, load_recipe
from fastguard.utils import sealed
from fastguard.utils.sealed import DamagedError, clear_scratch, is_whole, load_sealed, save_sealed, scratch

TENSORS = {"embeds": torch.linspace(-1, 1, 24).view(4, 6).bfloat16(), "pooled": torch.arange(3.0)}


@pytest.fixture
def encode(tiny_flux: Path, tmp_path: Path) -> Callable[..., EncodedPrompts]:
    def encoded(*texts: str) -> EncodedPrompts:
        prompts = [Prompt(text) for text in texts]
        return encode_prompts(
            Flux().spec, prompts, str(tiny_flux), 16, tmp_path / "c", torch.float32, torch.device("cpu")
        )

    return encoded


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor) for name, tensor in theirs.items()
    )


# --- damage


def test_a_sealed_file_is_safetensors_and_comes_back(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_sealed(TENSORS, file)
    assert same(load_sealed(file), TENSORS)
    assert same(load_file(file), TENSORS)  # for any other tool
    assert os.listdir(tmp_path) == [file.name]


def damaged_and_used(file: Path, places: Iterator[tuple[int, int]]) -> tuple[int, int]:
    """(flips, flips after which the file passes for whole); the file is then as it was."""
    good = file.read_bytes()
    flips = used = 0
    for place, bit in places:
        content = bytearray(good)
        content[place] ^= 1 << bit
        file.write_bytes(content)
        flips += 1
        used += is_whole(file)
    file.write_bytes(good)
    return flips, used


def test_a_flipped_bit_of_any_byte_is_noticed(tmp_path: Path) -> None:
    file, rng = tmp_path / "one.safetensors", random.Random(0)
    save_sealed(TENSORS, file)
    size = file.stat().st_size
    assert damaged_and_used(file, ((place, rng.randrange(8)) for place in range(size))) == (size, 0)
    assert is_whole(file)


@pytest.mark.slow
def test_every_flipped_bit_is_noticed(tmp_path: Path, counted: Callable[[str], None]) -> None:
    file = tmp_path / "one.safetensors"
    save_sealed(TENSORS, file)
    size = file.stat().st_size
    flips, used = damaged_and_used(file, ((place, bit) for place in range(size) for bit in range(8)))
    assert (flips, used) == (8 * size, 0)
    counted(f"{flips - used} of {flips} flipped bits (each one of a small sealed file) were noticed")


@pytest.mark.parametrize("how", ["cut", "longer", "empty", "zeros", "no seal", "swapped"])
def test_other_damage_is_noticed(tmp_path: Path, how: str) -> None:
    file = tmp_path / "one.safetensors"
    save_sealed(TENSORS, file)
    good = file.read_bytes()
    half = len(good) - 20
    contents = {
        "cut": good[:-1],
        "longer": good + b"\0",
        "empty": b"",
        "zeros": bytes(len(good)),  # of a file that was renamed before it was on the disk
        "swapped": good[:half] + good[half:][::-1],
    }
    if how == "no seal":
        save_file(TENSORS, file)
    else:
        file.write_bytes(contents[how])
    with pytest.raises(DamagedError, match=r"one\.safetensors is damaged"):
        load_sealed(file)


def test_a_whole_file_in_anothers_place_is_noticed(tmp_path: Path) -> None:
    one = tmp_path / "a" / "one.safetensors"
    others = tmp_path / "a" / "other.safetensors", tmp_path / "b" / "one.safetensors"
    for other in others:
        other.parent.mkdir(exist_ok=True)
    save_sealed(TENSORS, one)
    assert is_whole(one)
    for other in others:
        shutil.copy(one, other)
        assert not is_whole(other)


def test_an_entry_in_anothers_place_is_encoded_anew(encode: Callable[..., EncodedPrompts]) -> None:
    encoded = encode("a cat", "a dog")
    before = encoded.load([0, 1])
    shutil.copy(encoded.files[1], encoded.files[0])
    after = encode("a cat", "a dog").load([0, 1])
    assert same(after, before)


def test_the_cache_may_be_moved(encode: Callable[..., EncodedPrompts], tmp_path: Path) -> None:
    file = encode("a").files[0]
    moved = tmp_path / "moved"
    (tmp_path / "c").rename(moved)
    assert is_whole(moved / file.relative_to(tmp_path / "c"))


def test_a_folder_in_the_place_of_an_entry_is_named(encode: Callable[..., EncodedPrompts]) -> None:
    file = encode("a").files[0]
    file.unlink()
    file.mkdir()
    with pytest.raises(OSError, match=rf"{file}: Is a directory"):
        encode("a")


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def flipped_entries(encode: Callable[..., EncodedPrompts], count: int, seed: int) -> tuple[int, int]:
    """(flips of one bit in an entry of the cache, those that changed what was loaded after the next start)."""
    rng = random.Random(seed)
    encoded = encode("a cat", "a dog")
    before = encoded.load([0, 1])
    file = encoded.files[0]
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little")
    used = 0
    for i in range(count):
        flip(file, rng.randrange(8 + header if i % 2 else size))
        after = encode("a cat", "a dog").load([0, 1])
        used += not same(after, before)
        assert is_whole(file)  # it was replaced
    return count, used


def test_a_damaged_entry_is_encoded_anew_and_told(
    encode: Callable[..., EncodedPrompts], capsys: pytest.CaptureFixture[str]
) -> None:
    assert flipped_entries(encode, 2, seed=0) == (2, 0)
    told = [line for line in capsys.readouterr().err.splitlines() if "encoded anew" in line]
    assert len(told) == 2
    assert "1 of 2 cached prompts are damaged, or of an earlier version, and are encoded anew: /" in told[0]


@pytest.mark.slow
def test_no_flipped_bit_of_an_entry_is_used(
    encode: Callable[..., EncodedPrompts], counted: Callable[[str], None]
) -> None:
    flips, used = flipped_entries(encode, 300, seed=1)
    assert used == 0
    counted(f"{used} of {flips} cached prompts with a flipped bit were used")


def test_entries_of_earlier_versions_are_encoded_anew(encode: Callable[..., EncodedPrompts]) -> None:
    """They have no digest, and the same name."""
    encoded = encode("a")
    before = encoded.load([0])
    save_file({"embeds": before["embeds"][0] + 1, "pooled": before["pooled"][0]}, encoded.files[0])
    assert torch.equal(encode("a").load([0])["embeds"], before["embeds"])


@pytest.mark.parametrize("how", ["flipped", "removed", "replaced"])
def test_damage_after_the_start_is_one_line(encode: Callable[..., EncodedPrompts], how: str) -> None:
    encoded = encode("a")
    file = encoded.files[0]
    if how == "flipped":
        flip(file, file.stat().st_size - 1)
    elif how == "removed":
        file.unlink()
    else:
        file.unlink()
        file.mkdir()
    with pytest.raises(ValueError, match=r"safetensors was damaged or removed after the start .*--resume auto") as told:
        encoded.load([0])
    assert "\n" not in str(told.value)


def test_two_processes_may_write_an_entry_at_once(
    tiny_flux: Path, encode: Callable[..., EncodedPrompts], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finds nothing either, and is done first."""
    real = prompts_module._encode

    def after_another(*args: Any) -> None:
        monkeypatch.setattr(prompts_module, "_encode", real)
        encode("a")
        real(*args)

    monkeypatch.setattr(prompts_module, "_encode", after_another)
    encoded = encode("a")
    assert is_whole(encoded.files[0])
    assert os.listdir(encoded.files[0].parent) == [encoded.files[0].name]


# --- the tiny pipeline


def test_a_whole_tiny_pipeline_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_tiny_flux(tmp_path / "tiny")
    monkeypatch.delattr(FluxSpec, "tiny")
    assert make_tiny_flux(made) == made


def fill(folder: Path, how: str, whole: Path) -> None:
    if how == "empty":
        folder.mkdir()
        return
    shutil.copytree(whole, folder)
    if how == "half":
        (folder / "model_index.json").unlink()
    elif how == "without a digest":
        (folder / "sha256").unlink()
    elif how == "flipped":
        flip(folder / "vae" / "diffusion_pytorch_model.safetensors", -1)
    elif how == "another file":
        (folder / "vae" / "model.py").write_text("")


@pytest.mark.parametrize("how", ["empty", "half", "without a digest", "flipped", "another file"])
def test_a_tiny_pipeline_that_is_not_whole_is_made_anew(
    tiny_flux: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "tiny_flux"
    fill(made, how, tiny_flux)
    make_tiny_flux(made)
    assert {p.relative_to(made): p.read_bytes() for p in made.rglob("*") if p.is_file()} == {
        p.relative_to(tiny_flux): p.read_bytes() for p in tiny_flux.rglob("*") if p.is_file()
    }
    assert os.listdir(tmp_path) == ["tiny_flux"]
    assert ("tiny_flux is damaged, or of an earlier version, and is made anew" in capsys.readouterr().err) == (
        how != "empty"
    )


def test_another_process_may_make_the_tiny_pipeline_meanwhile(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = tmp_path / "tiny_flux", FluxSpec.tiny

    def meanwhile(spec: Any) -> Any:
        shutil.copytree(tiny_flux, made)
        return real(spec)

    monkeypatch.setattr(FluxSpec, "tiny", meanwhile)
    make_tiny_flux(made)
    assert sealed.is_sealed_folder(made)
    assert os.listdir(tmp_path) == ["tiny_flux"]


def test_another_process_may_replace_the_tiny_pipeline_meanwhile(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real, theirs = tmp_path / "tiny_flux", os.rename, tmp_path / "theirs"
    fill(made, "flipped", tiny_flux)
    shutil.copytree(tiny_flux, theirs)

    def meanwhile(source: Path, target: Path) -> None:
        real(source, target)
        if source == made:
            real(theirs, made)

    monkeypatch.setattr(os, "rename", meanwhile)
    make_tiny_flux(made)
    assert sealed.is_sealed_folder(made)
    assert os.listdir(tmp_path) == ["tiny_flux"]


def test_what_another_process_has_just_moved_away_is_no_error(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = tmp_path / "tiny_flux", os.rename
    fill(made, "flipped", tiny_flux)

    def moved(source: Path, target: Path) -> None:
        if source == made and made.exists():
            shutil.rmtree(made)
        real(source, target)

    monkeypatch.setattr(os, "rename", moved)
    make_tiny_flux(made)
    assert sealed.is_sealed_folder(made)


def test_somebodys_work_is_not_replaced_by_the_tiny_pipeline(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "tiny_flux"
    fill(made, "flipped", tiny_flux)
    (made / "my_lora").mkdir()
    (made / "my_lora" / "weights").write_text("months")
    with pytest.raises(ValueError, match="tiny_flux is the place of the tiny pipeline, but holds my_lora: move that"):
        make_tiny_flux(made)
    assert (made / "my_lora" / "weights").read_text() == "months"
    assert "made anew" not in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["tiny_flux"]


# --- weights of the demo


def test_damaged_weights_of_the_demo_are_trained_again_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path))
    module, settings, trained = torch.nn.Linear(2, 2), ClassifierConfig(), []
    assert not demo_cache.load_or_train(module, "linear", settings, lambda: None)
    before = module.weight.detach().clone()
    flip(demo_cache.cache_path("linear", settings), -1)
    assert not demo_cache.load_or_train(module, "linear", settings, lambda: trained.append(1))
    assert "is damaged, or of an earlier version, and is trained anew" in capsys.readouterr().err
    assert trained == [1]
    assert torch.equal(module.weight, before)
    assert demo_cache.load_or_train(module, "linear", settings, lambda: trained.append(2))


# --- what a kill leaves


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from fastguard.utils.sealed import scratch\n"
        "with scratch(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('half'); print(folder, flush=True); time.sleep(300)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        with scratch(tmp_path) as ours:
            clear_scratch(tmp_path)
            assert (theirs / "half").exists()
            assert ours.exists()
            process.send_signal(signal.SIGKILL)
            process.wait()
            clear_scratch(tmp_path)
            assert not theirs.exists()
            assert ours.exists()
        assert not list(tmp_path.iterdir())
    finally:
        process.kill()
        process.wait()


def test_every_start_clears_what_a_kill_left(
    encode: Callable[..., EncodedPrompts], tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path))
    settings = ClassifierConfig()
    starts = {
        encode("a").files[0].parent: lambda: encode("a"),
        tiny_flux.parent: lambda: make_tiny_flux(tiny_flux),
        tmp_path / "demo": lambda: demo_cache.load_or_train(torch.nn.Linear(1, 1), "one", settings, lambda: None),
    }
    for where, start in starts.items():
        where.mkdir(exist_ok=True)
        left = where / f"{sealed._SCRATCH}left"
        left.mkdir()
        (left / "half").write_text("half")
        start()
        assert not left.exists()


def test_a_fifo_among_what_is_left_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"{sealed._SCRATCH}fifo")
    code = "import pathlib, sys; from fastguard.utils import sealed; sealed.clear_scratch(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=DEADLINE_S)


def test_a_temporary_folder_that_goes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = sealed.tempfile.mkdtemp, []

    def gone(**options: Any) -> str:
        made.append(real(**options))
        if len(made) == 1:
            os.rmdir(made[0])
        return made[-1]

    monkeypatch.setattr(sealed.tempfile, "mkdtemp", gone)
    with scratch(tmp_path) as folder:
        assert str(folder) == made[1]
        assert folder.is_dir()


# --- full disks


@contextmanager
def little_room() -> Iterator[None]:
    """Inside, files may have 2,000 bytes: what is larger fails as on a full disk, with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def no_room() -> Iterator[None]:
    with little_room():
        yield


TOLD = r"the file is larger than files may be here\. Raise the limit \(ulimit -f\), and start again, or"


@pytest.mark.usefixtures("no_room")
def test_no_room_for_entries(encode: Callable[..., EncodedPrompts], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"/c/prompts/.*\.safetensors: {TOLD} choose another prompts\.cache"):
        encode("a")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.usefixtures("no_room")
def test_no_room_for_the_tiny_pipeline(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=rf"tiny_flux: {TOLD} choose another prompts\.cache"):
        make_tiny_flux(tmp_path / "tiny_flux")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_room")
def test_no_room_for_the_demos_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=rf"big-.*\.safetensors: {TOLD} set FASTGUARD_CACHE"):
        demo_cache.load_or_train(torch.nn.Linear(100, 100), "big", ClassifierConfig(), lambda: None)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_no_room_for_images_leaves_the_earlier_ones(tiny_flux: Path, tmp_path: Path) -> None:
    tiny = load_recipe(find_recipe("flux_tiny"))
    recipe = replace(
        tiny, model=replace(tiny.model, path=str(tiny_flux)), prompts=replace(tiny.prompts, cache=tmp_path / "c")
    )

    def draw(seed: int) -> dict[str, bytes]:
        sample_recipe(recipe, ("a",), "none", images=2, steps=1, seed=seed, out=tmp_path / "out")
        return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    before = draw(0)
    assert before.keys() == {"prompt000_00.png", "prompt000_01.png", "grid.png"}
    with little_room(), pytest.raises(OSError, match=r"/out: the file is larger than files may be here"):
        draw(1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert draw(1) != before


@pytest.mark.parametrize("what", ["entries", "tiny", "demo"])
def test_a_folder_that_cannot_be_made_is_named(
    encode: Callable[..., EncodedPrompts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def full(self: Path, *args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path / "c"))
    monkeypatch.setattr(Path, "mkdir", full)
    starts: dict[str, Callable[[], Any]] = {
        "entries": lambda: encode("a"),
        "tiny": lambda: make_tiny_flux(tmp_path / "c" / "tiny_flux"),
        "demo": lambda: demo_cache.load_or_train(torch.nn.Linear(1, 1), "one", ClassifierConfig(), lambda: None),
    }
    with pytest.raises(OSError, match=rf"{tmp_path}/c[/\w]*: the disk is full\. Make room, and start again, or"):
        starts[what]()


def test_no_room_for_a_download_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DiffusionPipeline

    def full(*_: Any, use_safetensors: bool) -> str:
        assert use_safetensors
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiffusionPipeline, "download", full)
    with pytest.raises(OSError, match=r"some/flux: the disk is full: it was not downloaded to .*, or set HF_HOME"):
        pipeline_folder("some/flux")


# --- equal runs


EXPORT = """
import sys, torch
sys.path.insert(0, "tests")
from pathlib import Path
from types import SimpleNamespace
from helpers.flux_models import ONE_OF_EACH, make_transformer
from fastguard.backbones.pipeline.backbone import PipelineBackbone
from fastguard.utils.sharding import trained_parameters
transformer = make_transformer("lora", **ONE_OF_EACH)
backbone = object.__new__(PipelineBackbone)
backbone._transformer, backbone._recipe = transformer, SimpleNamespace(model=SimpleNamespace(train="lora"))
weights = {f"transformer.{name}": p.detach() for name, p in trained_parameters(transformer).items()}
backbone.export(Path(sys.argv[1]), weights)
"""


@pytest.mark.slow
def test_an_exported_lora_is_the_same_file_whatever_the_hash_seed(tmp_path: Path) -> None:
    """Sets, and safetensors' own map of several entries, come in an order of chance."""
    seeds = ("1", "2", "3")
    for seed in seeds:
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path / seed)], cwd=ROOT, env=env, check=True, timeout=300)
    assert len({(tmp_path / seed / "pytorch_lora_weights.safetensors").read_bytes() for seed in seeds}) == 1
