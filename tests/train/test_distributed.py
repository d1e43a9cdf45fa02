"""Two CPU processes over gloo, launched by accelerate with the shipped configuration files, against one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import TESTS
from helpers.deadline import DEADLINE_S, deadline
from helpers.forks import FASTGUARD, TOY, Fork
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import TCPStore

from fastguard import cli
from fastguard.recipe import shipped_recipes
from fastguard.train.checkpoint import read_tensors
from fastguard.train.run_folder import checkpoint_of
from fastguard.utils.rows import read_rows


def accelerate(tmp_path: Path, kind: str) -> list[str]:
    """accelerate launch with ddp.yaml or fsdp2.yaml, made to use two CPU processes instead of eight GPUs."""
    config = (shipped_recipes() / "accelerate" / f"{kind}.yaml").read_text()
    for gpu, cpu in (("use_cpu: false", "use_cpu: true"), ("num_processes: 8", "num_processes: 2")):
        assert gpu in config
        config = config.replace(gpu, cpu)
    file = tmp_path / f"{kind}.yaml"
    file.write_text(config)
    options = ["--config_file", str(file), "--main_process_port", "0"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options]


def alone(folder: Path, *options: str) -> None:
    process = Fork(TOY, folder, *options)
    assert process.wait() == 0, process.said()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs in one process: images in four rollout batches of 8, updates of 16 transitions in each."""
    folder = tmp_path_factory.mktemp("one")
    alone(folder / "run", "2", "--out", str(folder / "out"))
    return folder


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with the same two epochs on two processes that accelerate has launched."""

    @cache
    def launch(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        sharded = ["--fsdp_transformer_layer_cls_to_wrap", "Layer"] if kind == "fsdp2" else []
        toy = [str(TESTS / "helpers/toy_run.py"), str(folder / "run"), "2", "--out", str(folder / "out")]
        result = subprocess.run(
            [*accelerate(folder, kind), *sharded, *toy, *FLAGS[kind]],
            capture_output=True, text=True, timeout=DEADLINE_S, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        return folder

    return launch


FLAGS = {"ddp": [], "fsdp2": ["--fsdp2"]}
Two = Callable[..., str]


@pytest.fixture
def two(launched: Callable[[str], Path]) -> Two:
    """The toy run on two forked processes, with the environments that accelerate gave to those that it launched.

    No launcher ends one of them when the other fails: each has to end by itself.
    """

    def run(kind: str, folder: Path, *options: str, code: int = 0) -> str:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        environments = [json.loads((launched(kind) / f"out.{rank}.json").read_text()) for rank in (0, 1)]
        processes = [Fork(TOY, folder, *options, *FLAGS[kind], environment=own | meet) for own in environments]
        codes = [process.wait() for process in processes]
        said = "".join(process.said() for process in processes)
        assert [c == 0 for c in codes] == [code == 0] * 2, said[-3000:]
        return said

    return run


def relative(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_do_what_one_does(launched: Callable[[str], Path], one: Path, kind: str) -> None:
    folder = launched(kind) / "run"
    whole, parts = load_file(one / "out.0"), [load_file(launched(kind) / f"out.{rank}") for rank in (0, 1)]
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


def test_the_updates_of_a_rollout_end_together(tmp_path: Path, two: Two) -> None:
    """On two processes as on one, whose transitions are far in different places."""
    alone(tmp_path / "one", "2", "--stop-at", "0.02")
    two("ddp", tmp_path / "two", "2", "--stop-at", "0.02")
    counts = [[len(row["updates"]) for row in read_rows(tmp_path / name / "metrics.jsonl")] for name in ("one", "two")]
    assert counts[0] == counts[1]
    assert all(1 < count < 8 for count in counts[0])  # the first update is made by the policy of the rollout


@pytest.mark.parametrize("objective", ["tic_grpo", "diffusion_nft", "dgpo"])
def test_objectives_on_two_processes_and_through_a_resume(tmp_path: Path, two: Two, objective: str) -> None:
    """Trajectories are whole on a process, and half of the one group; the average resumes; a resume changes no bit."""
    options = ("--objective", objective, "--per-epoch", "1")
    alone(tmp_path / "one", "2", *options)
    alone(tmp_path / "halves", "1", *options)
    alone(tmp_path / "halves", "2", *options, "--resume", "auto")
    two("ddp", tmp_path / "two", "2", *options)
    one, halves, both = (
        read_tensors(checkpoint_of(tmp_path / name, "newest"), "weights") for name in ("one", "halves", "two")
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, halves[name]), name
        assert relative(tensor, both[name]) < 1e-6, name


def test_advantages_per_step_on_two_processes_and_through_a_resume(tmp_path: Path, two: Two) -> None:
    """Their rewards and their scale are global, and so are the weights of the steps; a resume changes no bit."""
    options = ("--advantages", '{"name": "vgpo", "rescale": "minmax"}', "--reweight", "tempflow")
    alone(tmp_path / "one", "2", *options, "--out", tmp_path / "one_out")
    alone(tmp_path / "halves", "1", *options)
    alone(tmp_path / "halves", "2", *options, "--resume", "auto")
    two("ddp", tmp_path / "two", "2", *options, "--micro-batch", "5", "--out", tmp_path / "two_out")
    whole, parts = load_file(tmp_path / "one_out.0"), [load_file(tmp_path / f"two_out.{rank}") for rank in (0, 1)]
    assert whole["advantages"].shape == (32, 5)
    assert (whole["advantages"][:, 4] == 0).all()  # the last step is not trained
    assert torch.equal(whole["advantages"], torch.cat([part["advantages"] for part in parts]))
    gradients = [name for name in whole if name.startswith("gradient")]
    assert len(gradients) == 3
    for name in gradients:
        assert relative(whole[name], parts[0][name]) < 1e-6, name
    one, halves, both = (
        read_tensors(checkpoint_of(tmp_path / name, "newest"), "weights") for name in ("one", "halves", "two")
    )
    for name, tensor in one.items():
        assert torch.equal(tensor, halves[name]), name
        assert relative(tensor, both[name]) < 1e-6, name


@pytest.mark.parametrize(
    ("objective", "kind"), [("rpg", "ddp"), ("op_grpo", "ddp"), ("op_grpo", "fsdp2"), ("rpg", "fsdp2")]
)
def test_earlier_rollouts_on_two_processes_and_through_resumes(
    tmp_path: Path, two: Two, objective: str, kind: str
) -> None:
    """A window of three: resumed half-way it changes no bit; two processes train on what one trains on.

    And the rollouts of two processes go on as those of one.
    """
    options = ("--objective", objective)
    alone(tmp_path / "one", "4", *options)
    alone(tmp_path / "halves", "2", *options)
    alone(tmp_path / "halves", "4", *options, "--resume", "auto")
    two(kind, tmp_path / "two", "2", *options)
    shutil.copytree(tmp_path / "two", tmp_path / "other")
    alone(tmp_path / "other", "4", *options, "--resume", "auto")
    two(kind, tmp_path / "two", "4", *options, "--resume", "auto")
    newest = {name: checkpoint_of(tmp_path / name, "newest") for name in ("one", "halves", "two", "other")}
    for group in ("weights", "optimizer", "buffer"):
        one, halves, both, other = (read_tensors(path, group) for path in newest.values())
        assert one.keys() == halves.keys() == both.keys() == other.keys()
        assert one
        for name, tensor in one.items():
            assert torch.equal(tensor, halves[name]), name
            if tensor.is_floating_point() and tensor.norm() > 0:
                assert relative(tensor.double(), both[name].double()) < 2e-6, name
                assert relative(tensor.double(), other[name].double()) < 2e-6, name
    counts = [row["earlier_images"] for row in read_rows(tmp_path / "two" / "metrics.jsonl")]
    assert counts == ([0, 32, 64, 64] if objective == "rpg" else [0, 6, 6, 6])
    logs = [read_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for row, of_two in zip(*logs, strict=True):
        norms = [[update["grad_norm"] for update in log["updates"]] for log in (row, of_two)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def _numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    return [x for item in value for x in _numbers(item)] if isinstance(value, list) else [float(value)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, one: Path, two: Two, kind: str) -> None:
    """One epoch on two processes and one on a single one end where two epochs on one end."""
    folder = tmp_path / "run"
    two(kind, folder, "1")
    alone(folder, "2", "--resume", "auto")
    ours, theirs = (read_tensors(checkpoint_of(f, "newest"), "weights") for f in (folder, one / "run"))
    for name, tensor in theirs.items():
        assert relative(tensor, ours[name]) < 1e-6, name


def test_sharded_runs_resume_to_the_bit(tmp_path: Path, launched: Callable[[str], Path], two: Two) -> None:
    two("fsdp2", tmp_path, "1")
    two("fsdp2", tmp_path, "2", "--resume", "auto")
    for group in ("weights", "average", "optimizer"):
        folders = (tmp_path, launched("fsdp2") / "run")
        ours, theirs = (read_tensors(checkpoint_of(folder, "newest"), group) for folder in folders)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_bad_input_on_one_process_ends_all(tmp_path: Path, two: Two) -> None:
    """A reward that fails on the second process only: every process stops, with that message, after saving."""
    said = two("ddp", tmp_path / "run", "2", "--fail-on", "1", code=1)
    assert "failed on purpose" in said
    assert checkpoint_of(tmp_path / "run", "newest").name == "epoch_000000"


def test_a_bad_update_is_skipped_on_all_processes(tmp_path: Path, two: Two) -> None:
    two("ddp", tmp_path / "run", "2", "--poison-on", "1")
    updates = [update["skipped"] for row in read_rows(tmp_path / "run" / "metrics.jsonl") for update in row["updates"]]
    assert updates == [True] + [False] * 15
    (line,) = read_rows(tmp_path / "run" / "skipped.jsonl")
    assert "on process 1" in line["message"]
    assert "on process 0" not in line["message"]


@pytest.mark.parametrize("kind", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_state_that_one_process_finds_ruined_is_saved_by_none(tmp_path: Path, two: Two, kind: str) -> None:
    said = two(kind, tmp_path / "run", "2", "--ruin-on", "1", code=1)
    assert re.search(r"holds NaN or infinity \(.*optimizer: .*\), and was not saved", said)
    assert list((tmp_path / "run" / "checkpoints").glob("epoch_*")) == [tmp_path / "run/checkpoints/epoch_000000"]
    assert f"last good checkpoint: --resume {tmp_path / 'run/checkpoints/epoch_000000'}" in said


SHORT = (
    "--run.epochs", "2", "--run.trackers",
    "--prompts.per-epoch", "2", "--sampler.batch-size", "4", "--objective.kl-weight", "0.01",
    "--update.micro-batch", "20", "--update.inner-epochs", "1", "--update.ema-decay", "0.5", "--update.ema-every", "2",
    "--monitor.every", "1", "--monitor.prompts", "1", "--monitor.num-steps", "2",
    "--model.recompute", "mlp",  # its backward pass computes with weights that were sharded again after the forward
    "--rewards.0.use", "helpers.toys:brightness",  # a reward that jumps would tell one order of sums from another
)  # fmt: skip
FULL = ("--model.train", "full")


@pytest.mark.parametrize(
    ("recipe", "trained", "kind"),
    [
        ("flux_tiny", "full", "fsdp2"),
        pytest.param("flux_tiny", "lora", "ddp", marks=pytest.mark.slow),
        pytest.param("flux_tiny", "lora", "fsdp2", marks=pytest.mark.slow),
        pytest.param("flux_tiny", "full", "ddp", marks=pytest.mark.slow),
        *(
            pytest.param(recipe, "lora", kind, marks=pytest.mark.slow)
            for recipe in ("flux2_tiny", "kontext_tiny", "qwen_image_tiny", "sd35_tiny")
            for kind in ("ddp", "fsdp2")
        ),
    ],
)
def test_two_processes_train_a_model_as_one_does(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, recipe: str, kind: str, trained: str
) -> None:
    """The whole command, adapters and all weights: what diffusers loads is the same, but for the order of sums."""
    options = ("train", recipe, *SHORT, *(FULL if trained == "full" else ()))
    alone = tmp_path_factory.getbasetemp() / f"{recipe}_{trained}"
    environment = {
        **os.environ,
        "FASTGUARD_CACHE": str(tmp_path_factory.getbasetemp() / "models_cache"),
        "OMP_NUM_THREADS": "1",
    }
    if not alone.exists():
        process = Fork(FASTGUARD, *options, "--run.dir", alone, environment=environment)
        assert process.wait() == 0, process.said()
    sharding = ["--hardware.sharding", "fsdp2"] if kind == "fsdp2" else []
    script = [str(TESTS / "helpers/flux_run.py")] if kind == "fsdp2" else ["-m", "fastguard.cli"]
    result = subprocess.run(
        [*accelerate(tmp_path, kind), *script, *options, *sharding, "--run.dir", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    if kind == "ddp":  # FSDP2 has warnings of its own
        assert re.fullmatch(r"(encoding prompts: \d+\n)?(epoch \d+ of \d+: .*\n)+", result.stderr), result.stderr
    ours, theirs = (checkpoint_of(folder, "newest") for folder in (tmp_path / "run", alone))
    for file in (theirs / "diffusers").glob("*.safetensors"):
        expected, exported = load_file(file), load_file(ours / "diffusers" / file.name)
        assert exported.keys() == expected.keys()
        assert all(relative(t, exported[n]) < 1e-3 for n, t in expected.items() if t.norm() > 0)
    rows = [read_rows(folder / "metrics.jsonl") for folder in (tmp_path / "run", alone)]
    assert [row["reward_mean"] for row in rows[0]] == pytest.approx([row["reward_mean"] for row in rows[1]], abs=2e-3)
    assert rows[0][0]["reward_mean"] == rows[1][0]["reward_mean"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_saves(tmp_path: Path, number: signal.Signals) -> None:
    """As a scheduler does it; the launcher, too, gets the signal and forwards it, SIGUSR1 when it is told to."""
    command = [
        *accelerate(tmp_path, "ddp"),
        str(TESTS / "helpers/toy_run.py"),
        str(tmp_path / "run"),
        "50",
        "--slow",
        "0.2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PET_SIGNALS_TO_HANDLE"] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # as docs/training.md has it
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with deadline(process):
        while len(read_rows(tmp_path / "run" / "metrics.jsonl")) < 2:
            assert process.poll() is None, "the run has ended"
            time.sleep(0.05)
        os.killpg(process.pid, number)
        process.wait()
    done = len(read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert checkpoint_of(tmp_path / "run", "newest").name == f"epoch_{done:06d}"
    assert done < 50


def test_what_accelerate_was_told_elsewhere_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, value, message in (
        ("ACCELERATE_MIXED_PRECISION", "bf16", "mixed_precision = bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps = 4"),
    ):
        AcceleratorState._reset_state(reset_partial_state=True)
        with monkeypatch.context() as told:
            told.setenv(variable, value)
            assert cli.main(["train", "flux_tiny", "--run.dir", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
