"""The doctor says what is wrong and what to do, and one failing check never hides the others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.tiny_pipelines import make_tiny_flux

import fastguard.memory
from fastguard.blocks import compiled
from fastguard.commands import doctor
from fastguard.commands.doctor import Finding, checkpoint_bytes, examine
from fastguard.config import (
    Encoders,
    HardwareConfig,
    LoraConfig,
    ModelConfig,
    MonitorConfig,
    PromptsConfig,
    Recipe,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    UpdateConfig,
    objective_config,
)

SEEN: list[tuple[tuple[int, ...], list[str], list[dict[str, Any]]]] = []


def remember(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    SEEN.append((tuple(images.shape), list(prompts), list(metadata)))
    assert not torch.equal(images[0], images[1])
    return [1.0, 2.0]


def not_finite(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    return [1.0, float("nan")]


def one_too_few(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    return [1.0]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe in which every check passes; its memory plan is made up."""
    monkeypatch.setattr(fastguard.memory, "plan", lambda recipe: SimpleNamespace(fits=True, peak=2**30))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {i}", "text": str(i)}) + "\n" for i in range(4)))
    return Recipe(
        run=RunConfig(dir=tmp_path / "runs" / "one", trackers=()),
        model=ModelConfig(path="tiny", dtype="float32", height=64, width=48),
        lora=LoraConfig(rank=8, alpha=16),
        prompts=PromptsConfig(file=prompts, per_epoch=4, cache=tmp_path / "cache"),
        sampler=SamplerConfig(group_size=6),
        rewards=(RewardConfig(f"{__name__}:remember", name="mine"),),
    )


def lines(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """name -> "level text" of each of its lines."""
    found: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.split("\n\n")[0].splitlines():
        name, _, text = line[6:].partition(": ")
        found.setdefault(name, []).append(f"{line[:4].strip()} {text}")
    return found


def one(check: Callable[..., Iterator[Finding]], *args: Any) -> Finding:
    (finding,) = check(*args)
    return finding


def test_a_healthy_recipe_passes_and_its_reward_gets_what_a_run_gives(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    SEEN.clear()
    assert examine(recipe) == 0
    found = lines(capsys)
    levels = {line.split(" ")[0] for name, texts in found.items() if name != "gpu" for line in texts}
    assert levels == {"ok", "info"}
    assert found["prompts"] == ["ok 4 prompts, 4 per epoch"]
    assert found["memory"] == ["ok predicted peak 1.0 GiB of 80 GB per GPU"]
    assert found["reward mine"][0].startswith("ok scored two random images 1 and 2 in ")
    assert SEEN == [((2, 3, 64, 48), ["prompt 0", "prompt 1"], [{"text": "0"}, {"text": "1"}])]
    assert not recipe.run.dir.exists()  # looking changes nothing


def test_without_a_recipe_only_the_machine_is_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path / "cache"))
    assert examine(None) == 0
    found = lines(capsys)
    assert list(found) == ["python", "packages", "optional", "gpu", "kernels", "cache"]
    assert f"torch {metadata.version('torch')}" in found["packages"][0]
    assert str(tmp_path / "cache") in found["cache"][0]


def test_checks_that_fail_or_break_leave_the_others_their_say(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(recipe: Recipe) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(fastguard.memory, "plan", broken)
    recipe = replace(
        recipe,
        prompts=replace(recipe.prompts, file=tmp_path / "nowhere.txt"),
        rewards=(
            RewardConfig("no_such_reward"),
            RewardConfig(f"{__name__}:not_finite", name="gap"),
            RewardConfig(f"{__name__}:one_too_few", name="few"),
            RewardConfig(f"{__name__}:remember", name="mine"),
        ),
    )
    assert examine(recipe) == 1
    found = lines(capsys)
    assert "nowhere.txt; set prompts.file" in found["prompts"][0]
    assert "FAIL rewards.use = 'no_such_reward' is no reward" in found["reward no_such_reward"][0]
    assert "scores that are not finite" in found["reward gap"][0]
    assert "expected 2 scores" in found["reward few"][0]
    assert found["memory"] == ["FAIL RuntimeError: two lines"]
    assert found["reward mine"][0].startswith("ok")
    failed = [name for name, texts in found.items() if any(text.startswith("FAIL") for text in texts)]
    assert failed == ["prompts", "reward no_such_reward", "reward gap", "reward few", "memory"]


def test_gold_rewards_get_the_prompts_of_the_monitor(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "held_out.txt"
    file.write_text("held out\n")
    gold = RewardConfig(f"{__name__}:remember", name="gold")
    recipe = replace(recipe, monitor=MonitorConfig(every=1, file=file, prompts=1, gold=(gold,)))
    SEEN.clear()
    assert examine(recipe) == 0
    assert [prompts for _, prompts, _ in SEEN] == [["prompt 0", "prompt 1"], ["held out", "held out"]]


def test_a_plan_that_does_not_fit_fails_with_what_would(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastguard.memory, "plan", lambda recipe: SimpleNamespace(fits=False, peak=100 * 2**30))
    monkeypatch.setattr(fastguard.memory, "propose", lambda recipe: SimpleNamespace(summary="--a.b 1 would fit"))
    finding = one(doctor._memory, recipe)
    assert finding == Finding("FAIL", "predicted peak 100.0 GiB of 80 GB per GPU does not fit: --a.b 1 would fit")


def test_kernels_that_are_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert one(doctor._kernels).level == "ok"
    true_step = doctor.sde_step

    def off(*args: Any, **options: Any) -> Any:
        step = true_step(*args, **options)
        return step._replace(latents=step.latents * 1.001)

    monkeypatch.setattr(doctor, "sde_step", off)
    assert "sde_step of the" in one(doctor._kernels).text
    assert one(doctor._kernels).level == "FAIL"
    monkeypatch.undo()
    true_loss = doctor.guard_loss
    monkeypatch.setattr(doctor, "guard_loss", lambda *a, **k: true_loss(*a, **{**k, "reweight": "none"}))
    assert one(doctor._kernels).text.startswith("the loss of the")


def test_packages_are_held_against_the_requirements(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=99", "never-heard-of>=1", "numpy", 'wandb>=1; extra == "more"']
    monkeypatch.setattr(metadata, "requires", lambda name: wanted)
    found = list(doctor._packages())
    failed = [finding.text for finding in found if finding.level == "FAIL"]
    assert len(failed) == 2
    assert f"torch is {metadata.version('torch')}, needed is torch>=99" in failed[0]
    assert "never-heard-of is not installed: pip install 'never-heard-of>=1'" in failed[1]
    assert "diffusers" in found[-1].text
    assert "torch " not in found[-1].text


def test_a_pipeline_on_disk_is_complete_or_its_gaps_are_named(recipe: Recipe, tmp_path: Path) -> None:
    """tests/backbones/test_folder.py has every kind of gap; here are several at once."""
    folder = make_tiny_flux(tmp_path / "flux")

    def look(path: Path | str) -> list[str]:
        model = replace(recipe.model, path=str(path))
        return [f"{f.level} {f.text}" for f in doctor._model(replace(recipe, model=model))]

    assert look(folder) == [f"ok {folder} holds all parts of a pipeline"]
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    shutil.rmtree(folder / "tokenizer_2")
    (folder / "text_encoder" / "model.safetensors").unlink()
    found = look(folder)
    assert len(found) == 3
    assert f"FAIL {weights} is cut short or damaged" in found[0]
    assert f"no weights (*.safetensors) in {folder}/text_encoder:" in found[1]
    assert f"there is no {folder}/tokenizer_2/tokenizer_config.json" in found[2]
    assert all(line.startswith("FAIL") for line in found)

    assert look("/no/such/folder")[0].startswith("FAIL model.path = '/no/such/folder'")


def test_a_hub_name_is_looked_for_in_the_local_cache_only(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    folder = make_tiny_flux(tmp_path / "snapshot")
    there = True

    def download(name: str, local_files_only: bool) -> str:
        assert local_files_only
        if not there:
            raise LocalEntryNotFoundError("not there")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    recipe = replace(recipe, model=replace(recipe.model, path="someone/flux"))
    assert one(doctor._model, recipe).level == "ok"
    shutil.rmtree(folder / "vae")
    assert f"lacks parts (there is no {folder}/vae/config.json:" in one(doctor._model, recipe).text
    there = False
    finding = one(doctor._model, recipe)
    assert finding.level == "warn"
    assert "hf auth login" in finding.text


def test_the_run_folder_is_free_and_can_be_written(recipe: Recipe, tmp_path: Path) -> None:
    (recipe.run.dir / "checkpoints" / "epoch_000005").mkdir(parents=True)
    found = list(doctor._run_folder(recipe))
    assert found[0].level == "warn"
    assert "holds a run (epoch_000005): go on with --resume auto" in found[0].text
    file = tmp_path / "file"
    file.write_text("")
    recipe = replace(recipe, run=replace(recipe.run, dir=file))
    assert one(doctor._run_folder, recipe).text.endswith("is a file; choose another --run.dir")
    recipe = replace(recipe, run=replace(recipe.run, dir=file / "below"))
    assert "change run.dir" in one(doctor._run_folder, recipe).text


def test_disk_space_is_for_all_checkpoints_that_are_kept(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    one_checkpoint = checkpoint_bytes(recipe)
    assert one_checkpoint % 16 == 0  # float32 weights twice, two float32 states
    parameters = one_checkpoint // 16
    with_average = replace(recipe, update=UpdateConfig(ema_decay=0.9))
    assert checkpoint_bytes(with_average) == 20 * parameters
    full = replace(recipe, model=replace(recipe.model, train="full", dtype="bfloat16"), lora=LoraConfig())
    assert checkpoint_bytes(full) > 5 * one_checkpoint
    assert checkpoint_bytes(full) % 16 == 0  # bfloat16 twice, float32 master and two states

    transition = 3 * (8 * 6) * 16 * 4  # tensors, tokens, channels, bytes
    for name, processes, images in (("rpg", 1, 4 * 6), ("rpg", 2, 4 * 6), ("op_grpo", 2, 4)):
        options = {} if name == "rpg" else {"keep": 1.0, "replayed": 1 / 6}  # the best one of each prompt
        earlier = replace(recipe, objective=objective_config(name, window=2, **options))
        earlier = replace(earlier, hardware=HardwareConfig(processes=processes))
        assert checkpoint_bytes(earlier) - one_checkpoint == images * 5 * transition

    def disk(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    disk(3 * one_checkpoint)
    assert one(doctor._disk, recipe).level == "ok"
    disk(3 * one_checkpoint - 1)
    assert one(doctor._disk, recipe).level == "FAIL"
    disk(3 * one_checkpoint)
    gold = RewardConfig("jpeg_compressibility", name="gold")
    assert one(doctor._disk, replace(recipe, monitor=MonitorConfig(every=1, gold=(gold,)))).level == "FAIL"


def test_optimizer_and_trackers_need_their_packages(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {"torchao", "torchao.optim", "wandb", "tensorboard", "tensorboardX"}
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in missing else object())
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    recipe = replace(
        recipe,
        update=UpdateConfig(optimizer="adamw8bit"),
        run=replace(recipe.run, trackers=("tensorboard", "wandb")),
    )
    optimizer, trackers = (dict(doctor.recipe_checks(recipe))[name] for name in ("optimizer", "trackers"))
    (finding,) = doctor._findings(optimizer)
    assert finding.level == "FAIL"
    assert "pip install 'fastguard-rl[lowbit]'" in finding.text
    assert [(f.level, f.text.split(" ")[0]) for f in trackers()] == [("warn", "tensorboard"), ("FAIL", "wandb")]


def test_text_encoders_in_8_bits_need_their_package(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(encoders: Encoders) -> list[str]:
        changed = replace(recipe, prompts=replace(recipe.prompts, encoders=encoders))
        return [f"{f.level} {f.text}" for f in doctor._findings(dict(doctor.recipe_checks(changed))["encoders"])]

    pytest.importorskip("torchao", reason="torchao is not installed")
    assert [checked("device"), checked("int8"), checked("cpu")] == [[], ["ok int8"], []]
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    (finding,) = checked("int8")
    assert finding.startswith("FAIL prompts.encoders = \"int8\" needs torchao: pip install 'fastguard-rl[lowbit]'")


@pytest.mark.parametrize(
    ("gpus", "processes", "level"), [(8, 8, "ok"), (8, 2, "ok"), (8, 16, "warn"), (8, 12, "FAIL"), (0, 1, "ok")]
)
def test_processes_against_gpus(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, gpus: int, processes: int, level: str
) -> None:
    properties = SimpleNamespace(total_memory=85e9)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    sampler = SamplerConfig(group_size=24, batch_size=2)
    recipe = replace(recipe, sampler=sampler, hardware=HardwareConfig(processes=processes))
    assert one(doctor._processes, recipe).level == level
    if gpus:
        properties.total_memory = 48e9
        assert "a GPU here has 48 GB" in list(doctor._processes(recipe))[-1].text


def test_the_compiler_is_tried_where_blocks_are_compiled(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is kept in the cache, unless the environment names a folder."""
    assert "compile" not in dict(doctor.recipe_checks(recipe))
    recipe = replace(recipe, model=replace(recipe.model, compile="blocks"))
    monkeypatch.delenv(compiled.CACHE, raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = one(dict(doctor.recipe_checks(recipe))["compile"])
    assert (found.level, found.text) == (
        "ok",
        f"torch.compile works on cpu; {tmp_path / 'cache' / 'inductor'} keeps compiled code",
    )
    monkeypatch.setenv(compiled.CACHE, str(tmp_path / "chosen"))
    assert f"{tmp_path / 'chosen'} keeps" in one(doctor._compile, recipe).text

    def broken(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no g++\nin this long text")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    (finding,) = doctor._findings(lambda: doctor._compile(recipe))
    assert finding.level == "FAIL"
    assert finding.text.startswith('model.compile = "blocks": torch.compile fails for a small function on cpu')
    assert '(RuntimeError: no g++); set model.compile = "none"' in finding.text


def test_an_attention_backend_that_is_not_there_fails(recipe: Recipe) -> None:
    assert one(doctor._attention, recipe).level == "ok"
    recipe = replace(recipe, model=replace(recipe.model, attention="no_such_backend"))
    (finding,) = doctor._findings(lambda: doctor._attention(recipe))
    assert finding.level == "FAIL"
    assert "no_such_backend" in finding.text
