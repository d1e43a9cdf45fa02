"""Two CPU processes over gloo, launched by accelerate with the shipped configuration files, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastguard.checkpoint import read_tensors
from fastguard.recipe import shipped_recipes
from fastguard.run import checkpoint_of, read_rows

TESTS = Path(__file__).parent


def launch(tmp_path: Path, kind: str, folder: Path, *options: str, code: int = 0) -> str:
    """accelerate launch with ddp.yaml or fsdp2.yaml, made to use two CPU processes instead of eight GPUs."""
    config = (shipped_recipes() / "accelerate" / f"{kind}.yaml").read_text()
    for gpu, cpu in (
        ("use_cpu: false", "use_cpu: true"),
        ("num_processes: 8", "num_processes: 2"),
        ("FluxTransformerBlock,FluxSingleTransformerBlock", "Layer"),
    ):
        assert gpu in config or kind == "ddp"
        config = config.replace(gpu, cpu)
    file = tmp_path / f"{kind}.yaml"
    file.write_text(config)
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port"]
    sharded = ["--fsdp2"] if kind == "fsdp2" else []
    result = subprocess.run(
        [*accelerate, "0", str(TESTS / "toy_run.py"), str(folder), *options, *sharded],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (result.returncode == 0) == (code == 0), result.stderr[-3000:]
    return result.stdout + result.stderr


def alone(folder: Path, *options: str) -> None:
    subprocess.run([sys.executable, str(TESTS / "toy_run.py"), str(folder), *options], check=True, capture_output=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs in one process: images in four rollout batches of 8, updates of 16 transitions in each."""
    folder = tmp_path_factory.mktemp("one")
    alone(folder / "run", "2", "--out", str(folder / "out"))
    return folder


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_do_what_one_does(tmp_path: Path, one: Path, kind: str) -> None:
    folder = tmp_path / "run"
    launch(tmp_path, kind, folder, "2", "--out", str(tmp_path / "out"))
    whole, parts = load_file(one / "out.0"), [load_file(tmp_path / f"out.{rank}") for rank in (0, 1)]
    for name in ("latents", "noise", "advantages"):  # bitwise at the same rollout batch per process
        assert torch.equal(whole[name], torch.cat([part[name] for part in parts])), name
    compared = [name for name in whole if name.startswith(("gradient", "weights"))]
    assert len(compared) == 6
    for name in compared:
        assert torch.equal(parts[0][name], parts[1][name]), name
        assert relative(whole[name], parts[0][name]) < 1e-6, name
    # Statistics, the KL to the model before training and evaluations are global: the logs agree too.
    for file, keys in (("metrics.jsonl", ("reward_mean", "per_step")), ("evaluations.jsonl", ("gold", "proxy"))):
        for ours, theirs in zip(read_rows(folder / file), read_rows(one / "run" / file), strict=True):
            for key in keys:
                flat_ours, flat_theirs = (json.dumps(row[key]) for row in (ours, theirs))
                numbers = [torch.tensor(list(_numbers(json.loads(flat)))) for flat in (flat_ours, flat_theirs)]
                assert torch.allclose(numbers[0], numbers[1], rtol=1e-4, atol=1e-8), key
    for group in ("weights", "average", "optimizer"):
        ours = read_tensors(checkpoint_of(folder, "newest"), group)
        theirs = read_tensors(checkpoint_of(one / "run", "newest"), group)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].shape == tensor.shape
            assert relative(tensor.double(), ours[name].double()) < 1e-5, f"{group} {name}"


def _numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in _numbers(item)] if isinstance(value, list) else [float(value)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, one: Path, kind: str) -> None:
    """One epoch on two processes and one on a single one end where two epochs on one end."""
    folder = tmp_path / "run"
    launch(tmp_path, kind, folder, "1")
    alone(folder, "2", "--resume", "auto")
    ours, theirs = (read_tensors(checkpoint_of(f, "newest"), "weights") for f in (folder, one / "run"))
    for name, tensor in theirs.items():
        assert relative(tensor, ours[name]) < 1e-6, name


def test_sharded_runs_resume_to_the_bit(tmp_path: Path) -> None:
    launch(tmp_path, "fsdp2", tmp_path / "whole", "2")
    launch(tmp_path, "fsdp2", tmp_path / "parts", "1")
    launch(tmp_path, "fsdp2", tmp_path / "parts", "2", "--resume", "auto")
    for group in ("weights", "average", "optimizer"):
        ours, theirs = (read_tensors(checkpoint_of(tmp_path / name, "newest"), group) for name in ("parts", "whole"))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_bad_input_on_one_process_ends_all(tmp_path: Path) -> None:
    """A reward that fails on the second process only: every process stops, with that message, after saving."""
    said = launch(tmp_path, "ddp", tmp_path / "run", "2", "--fail-on", "1", code=1)
    assert "failed on purpose" in said
    assert checkpoint_of(tmp_path / "run", "newest").name == "epoch_000000"


def test_a_bad_update_is_skipped_on_all_processes(tmp_path: Path) -> None:
    launch(tmp_path, "ddp", tmp_path / "run", "2", "--poison-on", "1")
    updates = [update["skipped"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") for update in row["updates"]]
    assert updates == [True] + [False] * 15
    (line,) = read_rows(tmp_path / "run" / "skipped.jsonl")
    assert "on process 1" in line["message"]
    assert "on process 0" not in line["message"]
