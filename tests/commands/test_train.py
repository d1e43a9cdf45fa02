"""`fastguard train` from end to end, as a user calls it, on the tiny Flux pipeline and on the digits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.deadline import DEADLINE_S
from helpers.forks import FASTGUARD, Fork
from PIL import Image

from fastguard import cli
from fastguard.advantages import ESTIMATORS
from fastguard.demo.config import quick_demo
from fastguard.loss.objectives import OBJECTIVES
from fastguard.train.checkpoint import read_tensors
from fastguard.train.run_folder import checkpoint_of
from fastguard.utils.rows import read_rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


# As many updates as the recipe's, on half the transitions each.
SHORTER = ("--update.inner-epochs", "1", "--update.minibatches", "4", "--update.learning-rate", "2e-2")


def fastguard(cache: Path, *args: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "fastguard.cli", *args],
        capture_output=True, timeout=DEADLINE_S, check=False, cwd=ROOT,
        env={**os.environ, "FASTGUARD_CACHE": str(cache)},
    )  # fmt: skip
    said = (result.stdout + result.stderr).decode()  # not as text, which turns carriage returns into line ends
    assert result.returncode == 0, said[-3000:]
    return said


def forked(cache: Path, *args: str, folder: Path) -> None:
    """The same without the seconds of a start."""
    process = Fork(FASTGUARD, *args, environment={**os.environ, "FASTGUARD_CACHE": str(cache)}, folder=folder)
    assert process.wait() == 0, process.said()[-3000:]


Here = Callable[..., str]


@pytest.fixture
def here(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """A command in this process, which spares the seconds of its imports; returns what it printed.

    Digits are pretrained for a moment, and are hardly digits: what is tested is their training.
    """
    monkeypatch.setenv("FASTGUARD_CACHE", str(cache))
    monkeypatch.setattr("fastguard.demo.backbone.DemoConfig", quick_demo)

    def run(*args: str) -> str:
        capsys.readouterr()
        code = cli.main(args)
        said = "".join(capsys.readouterr())
        assert code == 0, said
        return said

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, str]:
    """A finished run of recipes/flux_tiny.toml, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, fastguard(cache, "train", "recipes/flux_tiny.toml", "--run.dir", str(folder), *SHORTER)


def test_it_says_what_follows_before_any_weight_is_loaded(tiny: tuple[Path, str]) -> None:
    said = tiny[1]
    for line in (
        "images per epoch: 32",
        "updates per epoch: 4",
        "trained steps: steps 0 to 4 of 6",
        "fused blocks: 3 of 3",
        "recompute: none (auto)",
        "GiB per GPU; fits",
    ):
        assert line in said
    assert said.index("images per epoch") < said.index("encoding prompts") < said.index("epoch 1 of 12")


def test_a_file_or_pipe_gets_a_line_an_epoch_and_no_control_characters(tiny: tuple[Path, str]) -> None:
    folder, said = tiny
    assert not set(said) & {"\r", "\x1b", "\b"}
    rows = read_rows(folder / "metrics.jsonl")[:12]
    lines = re.findall(r"^epoch (\d+) of 12: reward (\S+), \d+\.\d s$", said, re.MULTILINE)
    assert lines == [(str(row["epoch"] + 1), f"{row['reward_mean']:.4g}") for row in rows]


def test_the_reward_rises_over_its_own_noise(tiny: tuple[Path, str]) -> None:
    """Standard errors of the epoch means, from the spread of the 32 images of an epoch."""
    rows = read_rows(tiny[0] / "metrics.jsonl")
    first, last = rows[0], rows[-1]
    error = (first["reward_std"] ** 2 / 32 + last["reward_std"] ** 2 / 32) ** 0.5
    assert last["reward_mean"] - first["reward_mean"] > 5 * error
    # And on the evaluation's fixed prompts and noise, in an independent setting of the codec.
    evaluations = read_rows(tiny[0] / "evaluations.jsonl")
    assert [row["epoch"] for row in evaluations] == [0, 6, 12]
    assert evaluations[-1]["gold"] > evaluations[0]["gold"]


def test_metrics_are_complete(tiny: tuple[Path, str]) -> None:
    row = read_rows(tiny[0] / "metrics.jsonl")[3]
    assert len(row["updates"]) == 4
    assert len(row["per_step"]) == len(row["steps"]) == 5
    assert row["updates"][0]["ratio"]["bias"] == 0  # on-policy
    assert all(update["ratio"]["std"] > 0 for update in row["updates"][1:])
    assert all(update["grad_norm"] > 0 for update in row["updates"])
    assert set(row["seconds"]) == {"rollout", "decode", "rewards", "reference", "update"}
    assert row["images_per_s"] > 0
    assert row["peak_memory_gib"] is None  # no GPU here
    assert 0 < row["clip_range_for_30_percent"] < row["clip_range_for_10_percent"]
    assert list((tiny[0] / "fastguard").glob("events.out.tfevents.*"))
    grid = Image.open(tiny[0] / "images" / "epoch_000004.png")
    assert grid.size == (4 * 64 + 3 * 6, 4 * 64 + 3 * 6)


def test_samples_of_a_checkpoint_are_those_of_plain_diffusers(
    tiny: tuple[Path, str], here: Here, tmp_path: Path
) -> None:
    said = here(
        "sample", "flux_tiny", "--run.dir", str(tiny[0]), "--checkpoint", "best", "--prompt", "a cat", "a dog",
        "--images", "2", "--steps", "4", "--out", str(tmp_path / "best"),
    )  # fmt: skip
    assert "4 images of 2 prompts" in said
    here(
        "sample", "flux_tiny", "--run.dir", str(tiny[0]), "--checkpoint", "none", "--prompt", "a cat", "a dog",
        "--images", "2", "--steps", "4", "--out", str(tmp_path / "none"),
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "best").iterdir()}
    assert names == {"grid.png", *(f"prompt{p:03d}_{i:02d}.png" for p in (0, 1) for i in (0, 1))}
    one, other = ((tmp_path / kind / "prompt000_00.png").read_bytes() for kind in ("best", "none"))
    assert one != other
    assert checkpoint_of(tiny[0], "best").name in said


def test_report_plan_and_doctor_answer(tiny: tuple[Path, str], here: Here) -> None:
    here("report", str(tiny[0]))
    assert "<html" in (tiny[0] / "report.html").read_text()
    planned = here("plan", "flux_tiny", "--model.recompute", "mlp")
    assert all(words in planned for words in ("fused blocks: 3 of 3", "recompute: mlp\n", "Peak"))
    assert "fused blocks, recompute = pointwise" in here("plan", "flux_tiny", "--kept")
    assert "FAIL" not in here("doctor", "flux_tiny")


def test_a_run_goes_on(tiny: tuple[Path, str], here: Here, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "flux_tiny", "--run.dir", str(tiny[0]), *SHORTER]) == 2
    said = capsys.readouterr().err
    assert "holds a run (epoch_000012): go on with --resume auto" in said
    said = here("train", "flux_tiny", "--run.dir", str(tiny[0]), "--run.epochs", "13", "--resume", "auto", *SHORTER)
    assert "after 12 epochs" in said
    assert [row["epoch"] for row in read_rows(tiny[0] / "metrics.jsonl")] == list(range(13))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_train_with_ratios_of_1_and_through_a_resume(
    backend: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rollout and micro-batch are of one size, so that each first log-ratio is exactly 0. A resume changes no bit.

    aot_eager runs the graphs without the machine code that inductor makes of them, which takes a minute on a CPU.
    """
    from fastguard.backbones.pipeline import backbone
    from fastguard.blocks import compiled

    monkeypatch.delenv(compiled.CACHE, raising=False)
    if backend != "inductor":
        monkeypatch.setattr(compiled, "start_compiler", lambda *_: None)
        monkeypatch.setattr(backbone, "compile_blocks", partial(compiled.compile_blocks, backend=backend))
    options = (
        "--model.compile", "blocks", "--prompts.per-epoch", "2", "--sampler.batch-size", "8", "--update.micro-batch",
        "8", "--update.inner-epochs", "1", "--update.minibatches", "1", "--monitor.every", "0", "--run.trackers",
    )  # fmt: skip
    for name, epochs, resume in (("whole", 2, "never"), ("halves", 1, "never"), ("halves", 2, "auto")):
        here(
            "train", "flux_tiny", "--run.dir", str(tmp_path / name), "--run.epochs", str(epochs), "--resume", resume,
            *options,
        )  # fmt: skip
    rows = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves")]
    ratios = [row["updates"][0]["ratio"] for row in (*rows[0], *rows[1])]
    assert len(ratios) == 4
    assert all(ratio["bias"] == ratio["std"] == 0 for ratio in ratios)
    assert rows[0][1]["updates"][0]["grad_norm"] == rows[1][1]["updates"][0]["grad_norm"] > 0
    whole, halves = (read_tensors(checkpoint_of(tmp_path / name, "newest"), "weights") for name in ("whole", "halves"))
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("how", ["int8", "nf4", pytest.param("float8", marks=pytest.mark.slow)])
def test_quantized_weights_train_through_a_resume_and_are_sampled(how: str, here: Here, tmp_path: Path) -> None:
    """A resume changes no bit, and checkpoints hold the adapters alone."""
    options = (
        "--model.quantize", how, "--prompts.per-epoch", "2", "--sampler.batch-size", "8", "--update.micro-batch", "8",
        "--update.inner-epochs", "1", "--update.minibatches", "1", "--monitor.every", "0", "--run.trackers",
    )  # fmt: skip
    for name, epochs, resume in (("whole", 2, "never"), ("halves", 1, "never"), ("halves", 2, "auto")):
        here(
            "train", "flux_tiny", "--run.dir", str(tmp_path / name), "--run.epochs", str(epochs), "--resume", resume,
            *options,
        )  # fmt: skip
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert all(row["updates"][0]["ratio"]["bias"] == row["updates"][0]["ratio"]["std"] == 0 for row in rows)
    whole, halves = (read_tensors(checkpoint_of(tmp_path / name, "newest"), "weights") for name in ("whole", "halves"))
    assert all("lora_" in name and torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    said = here(
        "sample", "flux_tiny", "--run.dir", str(tmp_path / "whole"), "--model.quantize", how, "--prompt", "a cat",
        "--images", "2", "--steps", "2",
    )  # fmt: skip
    assert "2 images of 1 prompts" in said
    told = here("doctor", "flux_tiny", "--model.quantize", how, "--run.dir", str(tmp_path / "none"))
    assert re.search(rf"ok  quantize: {how}, made by (torchao|bitsandbytes) ", told)


def test_ones_own_reward_from_the_working_directory(cache: Path, tmp_path: Path) -> None:
    """The tutorial's way: a Python file beside the recipe, prompts with metadata, three lines of TOML."""
    (tmp_path / "my_reward.py").write_text(
        "import os, tempfile\n"
        "def blue(images, prompts, metadata):\n"
        "    os.chdir(tempfile.gettempdir())\n"  # as careless ones do: the run's own files are where they were
        "    assert all(p.startswith('a ') for p in prompts) and all(m['shade'] for m in metadata)\n"
        "    return images[:, 2].float().mean((1, 2)) - images[:, :2].float().mean((1, 2, 3))\n"
    )
    lines = [json.dumps({"prompt": f"a thing {i}", "shade": "blue"}) for i in range(4)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    recipe = (ROOT / "recipes" / "flux_tiny.toml").read_text()
    recipe = recipe.replace('file = "prompts.txt"', 'file = "mine.jsonl"')
    recipe = recipe.replace('[[rewards]]\nuse = "jpeg_compressibility"', '[[rewards]]\nuse = "my_reward:blue"')
    recipe = recipe.replace("learning_rate = 1e-2", "learning_rate = 1e-2\nema_decay = 0.5\nema_every = 2")
    (tmp_path / "mine.toml").write_text(recipe)
    forked(cache, "train", "mine.toml", "--run.dir", "run", "--run.epochs", "3", *SHORTER, folder=tmp_path)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert set(rows[0]["rewards"]) == {"my_reward:blue"}
    assert rows[-1]["reward_mean"] > rows[0]["reward_mean"]


def test_a_reward_that_changes_the_process_while_it_is_built_changes_nothing(
    tiny: tuple[Path, str], cache: Path, tmp_path: Path
) -> None:
    """The same weights to begin with, and the same updates of them."""
    (tmp_path / "hostile.py").write_text(
        "import os, random, signal, tempfile, numpy, torch\n"
        "from fastguard.rewards.jpeg import JpegCompressibility\n"
        "class Hostile(JpegCompressibility):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        os.chdir(tempfile.gettempdir())\n"
        "        torch.manual_seed(7), random.seed(7), numpy.random.seed(7)\n"
        "        torch.set_default_dtype(torch.float64), torch.set_default_device('meta')\n"
        "        torch.set_grad_enabled(False), torch.use_deterministic_algorithms(True)\n"
        "        signal.signal(signal.SIGTERM, signal.SIG_DFL)\n"
    )
    recipe = (ROOT / "recipes" / "flux_tiny.toml").read_text()
    recipe = recipe.replace('file = "prompts.txt"', f'file = "{ROOT / "recipes" / "prompts.txt"}"')
    hostile = '[[rewards]]\nuse = "hostile:Hostile"\nname = "jpeg_compressibility"'
    recipe = recipe.replace('[[rewards]]\nuse = "jpeg_compressibility"', hostile)
    (tmp_path / "mine.toml").write_text(recipe)
    forked(cache, "train", "mine.toml", "--run.dir", "run", "--run.epochs", "1", *SHORTER, folder=tmp_path)
    rows = [read_rows(folder / "metrics.jsonl")[0] for folder in (tmp_path / "run", tiny[0])]
    for row in rows:
        del row["seconds"], row["images_per_s"]
    assert rows[0] == rows[1]


VGPO = (
    "train",
    "flux_tiny",
    "--run.epochs",
    "1",
    "--run.trackers",
    "--monitor.every",
    "0",
    "--advantages.name",
    "vgpo",
)


def test_advantages_per_step_train_and_their_cost_is_said(
    tmp_path: Path, here: Here, capsys: pytest.CaptureFixture[str]
) -> None:
    """JPEG sizes are negative here, which vgpo refuses until they are rescaled."""
    options = ("--run.dir", str(tmp_path / "run"), "--advantages.rescale", "minmax", "--objective.reweight", "tempflow")
    said = here(*VGPO, *options)
    assert "images scored per epoch: 160 = 32 x 5: advantages.name = vgpo decodes and scores one" in said
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert len(row["updates"]) == 4
    assert all(update["grad_norm"] > 0 for update in row["updates"])
    assert cli.main([*VGPO, "--run.dir", str(tmp_path / "refused")]) == 1
    error = capsys.readouterr().err
    assert "advantages: vgpo takes rewards that are not negative; reward function 0 gave -" in error
    assert '(reward function 0 is "jpeg_compressibility", prompt ' in error


def test_mistakes_end_in_one_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        (["train", "flux_tiny", "--run.trackers", "wandb"], "pip install wandb"),
        (["train", "nowhere.toml"], "there is no recipe nowhere.toml"),
        (["train", "flux_tiny", "--prompts.file", "none.txt"], "no prompt file none.txt"),
        (["train", "flux_tiny", "--hardware.sharding", "fsdp2"], "launched with"),
    ):
        assert cli.main(args) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


# One rollout of four images, and two updates.
SHORTEST = (
    "--run.epochs", "1", "--run.trackers", "--monitor.every", "0", "--prompts.per-epoch", "2",
    "--sampler.group-size", "2", "--sampler.batch-size", "4", "--sampler.num-steps", "4", "--sampler.sde-steps", "3",
    "--update.minibatches", "2", "--update.inner-epochs", "1",
)  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["digits", "flux_tiny"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(here: Here, tmp_path: Path, recipe: str, name: str) -> None:
    own = ("--sampler.shift", "3") if recipe == "digits" else ()
    here("train", recipe, "--objective.name", name, "--run.dir", str(tmp_path), *SHORTEST, *own)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert len(row["updates"]) == 2
    assert all(update["grad_norm"] > 0 for update in row["updates"])
    assert not any(update["skipped"] for update in row["updates"])


BOUNDED = {"bnpo": ("--advantages.low", "-100", "--advantages.high", "100"), "vgpo": ("--advantages.rescale", "minmax")}
"""The rewards of both recipes may be negative."""


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["digits", "flux_tiny"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_trains(here: Here, tmp_path: Path, recipe: str, name: str) -> None:
    own = ("--sampler.shift", "3") if recipe == "digits" else ()
    own += BOUNDED.get(name, ())
    here("train", recipe, "--advantages.name", name, "--run.dir", str(tmp_path), *SHORTEST, *own)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert len(row["updates"]) == 2
    assert not any(update["skipped"] for update in row["updates"])
    assert any(update["grad_norm"] > 0 for update in row["updates"])


def test_it_says_what_an_objective_of_final_latents_costs(here: Here, tmp_path: Path) -> None:
    said = here("train", "digits", "--objective.name", "dgpo", "--run.dir", str(tmp_path), *SHORTEST)
    for line in (
        "trained draws: 4 flow times and noises of an image a pass; images are sampled in 4 steps without noise",
        "after a rollout: 1 forward pass a transition without gradients, for the velocities of the model before",
        "first pass of an update: 1 forward pass a transition without gradients, before its forward and backward pass",
    ):
        assert line in said
