"""The page of a run says what its files say, also when the run is young, cut short or odd."""

# ruff: noqa: RUF001 (the page has minus signs and dashes)
from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastguard.config import (
    LoraConfig,
    ModelConfig,
    MonitorConfig,
    PromptsConfig,
    Recipe,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    ScoringConfig,
    UpdateConfig,
    advantages_config,
    objective_config,
)
from fastguard.recipe import as_dict
from fastguard.report.data import TrainingRun, read_run
from fastguard.report.pictures import GRID_WIDTH
from fastguard.report.run import write_run_report
from fastguard.report.words import as_number, clip_advice, summary
from fastguard.train.metrics import EpochLog, RatioLog, RewardLog, UpdateLog
from fastguard.train.monitor import EvaluationLog
from fastguard.utils.grids import save_grid

RECIPE = Recipe(
    run=RunConfig(epochs=4),
    prompts=PromptsConfig(per_epoch=4),
    sampler=SamplerConfig(num_steps=6, sde_steps=3, group_size=6),
    objective=objective_config(clip_range=2e-6),
    rewards=(RewardConfig("jpeg_compressibility"),),
    monitor=MonitorConfig(every=2, gold=(RewardConfig("clipscore", name="gold judge"),)),
)


def ratio(bias: float = 0.0, std: float = 0.0, kl: float | None = None) -> RatioLog:
    return RatioLog(bias, std, 0.05, 0.15, kl)


def epoch_log(epoch: int, **changes: Any) -> EpochLog:
    log = EpochLog(
        epoch=epoch,
        reward_mean=-4.0 + epoch,
        reward_std=0.5,
        rewards={"jpeg_compressibility": RewardLog(-4.0 + epoch, 0.5)},
        zero_spread_share=0.25,
        dropped_groups=1,
        updates=(UpdateLog(ratio(), 0.3, False), UpdateLog(ratio(1e-7, 2e-6), 0.1, epoch == 1)),
        steps=(0, 1, 2),
        per_step=(ratio(1e-7, 1e-6), ratio(-1e-7, 2e-6), ratio(0.0, 3e-6)),
        clip_fraction_positive=0.05,
        clip_fraction_negative=0.15,
        clip_range_for_30_percent=1e-6,
        clip_range_for_10_percent=4e-6,
        seconds={"rollout": 3.0, "update": 1.0},
        images_per_s=6.0,
        peak_memory_gib=None,
    )
    return replace(log, **changes)


def evaluation(epoch: int, proxy: float, gold: float, warning: str = "") -> EvaluationLog:
    return EvaluationLog(epoch, proxy, gold, {"jpeg_compressibility": proxy, "gold judge": gold}, 0.0, warning)


EVALUATIONS = [evaluation(0, 1.0, 5.0), evaluation(2, 2.0, 7.5), evaluation(4, 3.0, 6.0, "the reward is being hacked")]


def write_rows(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))


def run_folder(
    path: Path, epochs: list[EpochLog], evaluations: list[EvaluationLog] | None = None, recipe: Recipe = RECIPE
) -> Path:
    path.mkdir(exist_ok=True)
    (path / "recipe.json").write_text(json.dumps(as_dict(recipe)))
    write_rows(path / "metrics.jsonl", epochs)
    write_rows(path / "evaluations.jsonl", evaluations or [])
    return path


def page_of(run: Path) -> str:
    """The page without its pictures' data."""
    return re.sub(r"base64,[^\"]*", "", write_run_report(run).read_text())


def titles(page: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", page)


def in_memory(epochs: list[EpochLog], recipe: Recipe = RECIPE) -> TrainingRun:
    return TrainingRun(Path("none"), recipe, epochs, [], [], 0)


@pytest.mark.parametrize("name", ["group", "running"])
def test_flat_groups_are_no_trouble_to_an_estimator_that_learns_from_them(tmp_path: Path, name: str) -> None:
    recipe = replace(RECIPE, advantages=advantages_config(name))
    logs = [replace(epoch_log(i), zero_spread_share=0.5) for i in range(4)]
    points = "\n".join(summary(read_run(run_folder(tmp_path / "run", logs, recipe=recipe))))
    assert "all equal: 50% on average, 50% in the last epoch" in points
    assert ("they teach nothing" in points) == (name == "group")


def test_a_finished_run_in_words_and_pictures(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "flight", [epoch_log(i) for i in range(4)], EVALUATIONS)
    for epoch in (2, 4):
        (run / "checkpoints" / f"epoch_{epoch:06d}" / "diffusers").mkdir(parents=True)
    (run / "skipped.jsonl").write_text(json.dumps({"message": "epoch 1: not finite <b>"}) + "\n")
    points = "\n".join(summary(read_run(run)))
    assert "4 of 4 epochs done, as planned." in points
    assert "Reward: −4 ± 0.5 in the first rollout, −1 ± 0.5 in that of epoch 3" in points
    assert "up by 3, 6.0 of the first standard deviations" in points
    assert (
        f"Best gold score: 7.5 at epoch 2 (epoch 0: 5, epoch 4: 6); checkpoint {run}/checkpoints/epoch_000002."
        in points
    )
    assert "warned of reward hacking 1 time, first at epoch 4" in points
    assert "Skipped updates (not finite): 1 of 8. Groups dropped because a reward failed: 4 of 16." in points
    assert "all equal: 25% on average, 25% in the last epoch." in points
    assert "6 images per second" in points
    assert "there was no GPU" in points
    assert f'pipe.load_lora_weights("{run}/checkpoints/epoch_000004/diffusers")' in points

    page = page_of(run)
    assert 'class="notice"' not in page
    assert "Epoch 4: the reward is being hacked" in page
    assert "epoch 1: not finite &lt;b&gt;" in page
    assert "every ratio is exactly 1, ratio − 1 exactly 0" in page
    assert titles(page) == [
        "jpeg_compressibility",
        "Gold score",
        "Proxy",
        "Gold against proxy",
        "Ratio − 1 per denoising step: mean over the last pass of an epoch",
        "Ratio − 1 per denoising step: standard deviation over the last pass of an epoch",
        "Transitions that were clipped, by the sign of their advantage",
        "Clip ranges, as measured",
        "Gradient norm, before it is scaled down",
        "Seconds by phase",
    ]
    assert not list(run.glob("*.part"))
    assert set(p.name for p in run.iterdir()) >= {"report", "report.html"}


def test_pictures_that_only_some_runs_have(tmp_path: Path) -> None:
    recipe = replace(RECIPE, rewards=(RewardConfig("jpeg_compressibility"), RewardConfig("ocr", weight=2.0)))
    both = {"jpeg_compressibility": RewardLog(1.0, 0.1), "ocr": RewardLog(0.5, 0.1)}
    logs = [
        epoch_log(i, rewards=both, peak_memory_gib=20.0 + i, updates=(UpdateLog(ratio(kl=0.01), 0.3, False),))
        for i in range(2)
    ]
    run = run_folder(tmp_path / "run", logs, recipe=recipe)
    found = titles(page_of(run))
    assert found[:3] == ["Weighted sum of the rewards", "jpeg_compressibility", "ocr"]
    assert {"KL to the model before training (gaussian)", "Peak memory"} <= set(found)
    points = "\n".join(summary(read_run(run)))
    assert "Peak memory: 21.0 GiB" in points
    assert "Reward ocr: 0.5" in points
    assert "No gold score was measured yet." in points


def test_rewards_are_shown_as_they_are_however_they_are_compared(tmp_path: Path) -> None:
    recipe = replace(RECIPE, scoring=ScoringConfig(normalize_each=True))
    run = run_folder(tmp_path / "run", [epoch_log(i) for i in range(2)], recipe=recipe)
    first, last = (epoch_log(i).reward_mean for i in range(2))
    assert f"Reward: {as_number(first)} ± " in "\n".join(summary(read_run(run)))
    page = page_of(run)
    assert "in units of their spread in the group (scoring.normalize_each)" in page
    assert as_number(last) in page


@pytest.mark.parametrize(
    ("name", "compared"),
    [
        ("awm", "the one that sampled the rollout"),
        ("diffusion_nft", "an average of the policies so far, which sampled the rollout"),
        ("dgpo", "the model before training"),
    ],
)
def test_what_the_ratio_of_an_objective_of_final_latents_compares(tmp_path: Path, name: str, compared: str) -> None:
    recipe = replace(RECIPE, objective=objective_config(name))
    page = page_of(run_folder(tmp_path / "run", [epoch_log(i) for i in range(2)], recipe=recipe))
    assert f"The ratio compares the policy with {compared}." in page
    assert ("every ratio" in page) == (name == "awm")
    assert "Ratio − 1 per draw: mean over the last pass of an epoch" in titles(page)


def test_no_epoch_one_epoch_and_lines_cut_short(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", [])
    page = page_of(run)
    assert "No epoch of this run has been finished yet." in page
    assert "no checkpoint was saved" in page
    assert titles(page) == []

    write_rows(run / "metrics.jsonl", [epoch_log(0)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 1, "reward_mean": -3.')  # killed while it wrote
    page = page_of(run)
    assert "An unfinished run: 1 of 4 epochs done." in page
    assert "in the only rollout" in page

    (run / "metrics.jsonl").unlink()
    (run / "evaluations.jsonl").unlink()
    assert "No epoch of this run" in page_of(run)


def test_rows_of_another_version_are_counted_and_a_repeated_epoch_counts_once(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", [epoch_log(1, reward_mean=9.0), epoch_log(0), epoch_log(1)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "loss": 1.0}\n[1]\n')
    found = read_run(run)
    assert [log.epoch for log in found.epochs] == [0, 1]
    assert found.epochs[1] == epoch_log(1)
    assert found.unread == 2
    assert "2 rows of its files could not be read" in page_of(run)


def test_windows_that_move_and_values_that_are_not_finite(tmp_path: Path) -> None:
    nothing = RatioLog(math.nan, math.nan, 0.0, 0.0, None)
    logs = [
        epoch_log(0, steps=(0, 1), per_step=(ratio(1e-7, 1e-6), ratio(-1e-7, 2e-6))),
        epoch_log(1, steps=(3, 4), per_step=(nothing, nothing), reward_mean=math.nan, reward_std=math.nan,
                  updates=(UpdateLog(nothing, math.nan, True),), clip_range_for_10_percent=None,
                  clip_range_for_30_percent=None, images_per_s=math.inf),
        epoch_log(2, steps=(2, 3), per_step=(ratio(1e-7, 1e-6), nothing)),
    ]  # fmt: skip
    run = run_folder(tmp_path / "run", logs, [evaluation(0, math.nan, math.nan), evaluation(2, 1.0, 2.0)])
    points = "\n".join(summary(read_run(run)))
    assert "Best gold score: 2 at epoch 2 (epoch 0: –, epoch 2: 2); its checkpoint is not there." in points
    assert "nan" not in page_of(run)
    write_rows(run / "metrics.jsonl", logs[:2])
    assert "the change is unknown" in page_of(run)


def test_a_ratio_that_is_not_1_at_the_first_update_is_pointed_out(tmp_path: Path) -> None:
    logs = [epoch_log(0, updates=(UpdateLog(ratio(1e-8, 3e-7), 0.1, False),))]
    page = page_of(run_folder(tmp_path / "run", logs))
    assert "up to 3e-07 there: rollout and update round differently" in page
    assert "exactly 0" not in page


@pytest.mark.parametrize(
    ("used", "verdict"),
    [(2e-6, "no change is needed"), (1e-5, "clips less than 10%: try 2e-06"), (1e-7, "clips more than 30%: try 2e-06")],
)
def test_clip_advice_compares_what_was_used_with_what_was_measured(used: float, verdict: str) -> None:
    recipe = replace(RECIPE, objective=objective_config(clip_range=used))
    advice = " ".join(clip_advice(in_memory([epoch_log(i) for i in range(8)], recipe)))
    assert f"objective.clip_range = {used:g} was used" in advice
    assert "5.0% of the transitions with a positive advantage and 15% of those with a negative one" in advice
    assert "over epochs 3 to 7" in advice
    assert "1e-06 would have clipped 30% of all transitions and 4e-06 10%" in advice
    assert verdict in advice


def test_clip_advice_where_the_ratio_hardly_moves() -> None:
    never = {"clip_range_for_30_percent": None, "clip_range_for_10_percent": None}
    assert "No clip range would have clipped 10%" in " ".join(clip_advice(in_memory([epoch_log(0, **never)])))
    some = " ".join(clip_advice(in_memory([epoch_log(0, clip_range_for_30_percent=None)])))
    assert "4e-06 would have clipped 10%" in some
    assert "None would have clipped 30%" in some
    assert "no change is needed" in some


def test_clip_advice_is_for_objectives_and_updates_that_clip(tmp_path: Path) -> None:
    masked = replace(RECIPE, objective=objective_config("flow_dppo"))
    (advice,) = clip_advice(in_memory([epoch_log(0)], masked))
    assert "kl_threshold = 1e-05 left 5.0%" in advice
    assert "Clip ranges, as measured" not in titles(
        page_of(run_folder(tmp_path / "masked", [epoch_log(0)], recipe=masked))
    )

    on_policy = replace(RECIPE, update=UpdateConfig(minibatches=1))
    assert clip_advice(in_memory([epoch_log(0)], on_policy)) == []
    assert "the clip range has no effect" in page_of(run_folder(tmp_path / "one", [epoch_log(0)], recipe=on_policy))


def test_image_grids_are_spread_over_the_run_scaled_down_and_passed_over_if_damaged(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", [epoch_log(i) for i in range(20)], EVALUATIONS)
    small = save_grid(run / "images" / "epoch_000000.png", np.zeros((1, 2, 8, 8), np.uint8))
    for epoch in range(1, 20):
        shutil.copy(small, run / "images" / f"epoch_{epoch:06d}.png")
    (run / "images" / "epoch_000000.png").write_bytes(small.read_bytes()[:40])
    save_grid(run / "images" / "evaluation_000000.png", np.zeros((2, 2, 800, 800), np.uint8))
    shutil.copy(run / "images" / "epoch_000001.png", run / "images" / "evaluation_000002.png")
    (run / "images" / "evaluation_000004.png").write_bytes(b"")
    found = [title for title in titles(page_of(run)) if title.startswith(("Rollout", "Epoch"))]
    assert found == [
        "Rollout of epoch 4, mean reward 0",
        "Rollout of epoch 8, mean reward 4",
        "Rollout of epoch 11, mean reward 7",
        "Rollout of epoch 15, mean reward 11",
        "Rollout of epoch 19, mean reward 15",
        "Epoch 0: gold 5, proxy 1",
        "Epoch 2: gold 7.5, proxy 2 (the best)",
    ]
    from PIL import Image

    assert Image.open(run / "report" / "evaluation_000000.png").size == (GRID_WIDTH, GRID_WIDTH)


def test_settings_are_those_that_differ_and_the_important_ones(tmp_path: Path) -> None:
    recipe = replace(
        RECIPE, model=ModelConfig(path="a" * 200), lora=LoraConfig(rank=8), update=UpdateConfig(weight_decay=0.5)
    )
    page = page_of(run_folder(tmp_path / "run", [epoch_log(0)], recipe=recipe))
    rows = dict(re.findall(r'<tr><th scope="row">([\w.: ]+)</th><td>(.*?</td><td>.*?)</td></tr>', page))
    assert rows["lora.rank"] == "8</td><td>default: 64"
    assert rows["update.weight_decay"] == "0.5</td><td>default: 0.0001"
    assert rows["objective.clip_range"] == "2e-06</td><td>"
    assert rows["monitor.gold: gold judge"].startswith("clipscore, weight 1")
    assert rows["images per epoch"].startswith("24 = 4 prompts x 6")
    assert "update.eps" not in rows
    assert "overflow-wrap: anywhere" in page  # a name of 200 letters does not widen the page


@pytest.mark.parametrize("content", [None, "{", '{"rewards": []}'])
def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.json") as caught:
        write_run_report(tmp_path)
    if content is None:
        assert "give the run.dir of a recipe" in str(caught.value)
    assert not (tmp_path / "report.html").exists()
