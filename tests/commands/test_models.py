"""Every command on every family of pipelines, at toy size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastguard import cli
from fastguard.train.checkpoint import read_tensors
from fastguard.train.run_folder import checkpoint_of
from fastguard.utils.rows import read_rows

RECIPES = ["flux2_tiny", "kontext_tiny", "qwen_image_tiny", "sd35_tiny"]
"""flux_tiny is that of tests/commands/test_train.py"""
SHORT = (
    "--run.trackers", "--run.images-every", "0", "--monitor.every", "0", "--prompts.per-epoch", "2",
    "--sampler.num-steps", "3", "--sampler.sde-steps", "2", "--sampler.group-size", "4", "--sampler.batch-size", "4",
    "--update.inner-epochs", "1", "--update.minibatches", "1", "--update.micro-batch", "4",
    "--objective.kl-weight", "0.01",  # to the model before training, by switched-off adapters
)  # fmt: skip
Here = Callable[..., str]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """A command in this process, which spares the seconds of its imports; returns what it printed."""
    monkeypatch.setenv("FASTGUARD_CACHE", str(cache))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*args: str) -> str:
        capsys.readouterr()
        code = cli.main(args)
        said = "".join(capsys.readouterr())
        assert code == 0, said
        return said

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_is_examined_planned_trained_resumed_and_sampled(here: Here, recipe: str, tmp_path: Path) -> None:
    assert "FAIL" not in here("doctor", recipe)
    assert "fits in" in here("plan", recipe)

    def trained(folder: Path, epochs: int, *options: str) -> dict[str, torch.Tensor]:
        here("train", recipe, "--run.dir", str(folder), "--run.epochs", str(epochs), *SHORT, *options)
        return read_tensors(checkpoint_of(folder, "newest"), "weights")

    whole = trained(tmp_path / "whole", 2)
    trained(tmp_path / "parts", 1)
    resumed = trained(tmp_path / "parts", 2, "--resume", "auto")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1]
    assert all(update["ratio"]["bias"] == 0 for row in rows for update in row["updates"])  # the first, on-policy

    where = ("--run.dir", str(tmp_path / "whole"))
    for checkpoint in ("newest", "none"):
        out = tmp_path / checkpoint
        here("sample", recipe, *where, "--checkpoint", checkpoint, "--images", "1", "--steps", "2", "--out", str(out))
    newest, before = (Image.open(tmp_path / name / "prompt000_00.png") for name in ("newest", "none"))
    assert newest.size == (64, 64)
    assert newest.tobytes() != before.tobytes()
    assert (
        "load them with pipe.load_lora_weights"
        in here("report", str(tmp_path / "whole")) + (tmp_path / "whole" / "report.html").read_text()
    )


@pytest.mark.parametrize("how", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_frozen_weights_in_8_and_4_bits_train(here: Here, recipe: str, how: str, tmp_path: Path) -> None:
    here(
        "train", recipe, "--run.dir", str(tmp_path / "run"), "--run.epochs", "1", *SHORT, "--model.quantize", how,
        "--model.recompute", "block",
    )  # fmt: skip
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["updates"][0]["ratio"]["bias"] == 0
    assert row["updates"][0]["grad_norm"] > 0
