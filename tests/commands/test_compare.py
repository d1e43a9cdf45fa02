"""`fastguard compare`: arms and their mistakes, runs that resume, numbers that are those of the runs' files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from helpers import ROOT, TESTS, script
from helpers.deadline import deadline
from helpers.run_folders import assert_same_end, toy
from helpers.toy_train import fail, toy_recipe, train_toy
from scipy import stats

from fastguard import cli
from fastguard.compare import run as comparison
from fastguard.compare.arms import Arm, build_arms
from fastguard.compare.page import write_comparison
from fastguard.compare.processes import Ended, cost_of, run_all
from fastguard.compare.results import FinishedRun, Results
from fastguard.compare.text import FIRST_UPDATE, SAME_INSIDE
from fastguard.config import Recipe
from fastguard.errors import UserError
from fastguard.loss.objectives import OBJECTIVES
from fastguard.recipe import arms_beside, find_recipe, load_recipe
from fastguard.train.checkpoint import checkpoints_in
from fastguard.train.monitor import EvaluationLog
from fastguard.train.run_folder import checkpoint_of
from fastguard.utils.rows import read_rows

DIGITS = load_recipe(find_recipe("digits"))


def arms_file(folder: Path, text: str) -> Path:
    file = folder / "arms.toml"
    file.write_text(text)
    return file


ARMS = """
[grpo_guard]
[less]
objective = { name = "grpo_guard", clip_range = 1e-3 }
[flow_grpo]
objective.clip_range = 1e-3
update.minibatches = 2
"""


# --- arms -----------------------------------------------------------------------------------------------------------


def test_an_arm_is_a_table_of_fields(tmp_path: Path) -> None:
    plain, less, flow = build_arms(toy_recipe(), (), arms_file(tmp_path, ARMS))
    assert plain.recipe == toy_recipe()  # its own objective keeps its options
    assert (less.name, less.recipe.objective.name, less.recipe.objective.limit) == ("less", "grpo_guard", 1e-3)
    assert (flow.recipe.objective.name, flow.recipe.objective.limit) == ("flow_grpo", 1e-3)
    assert flow.recipe.update == replace(toy_recipe().update, minibatches=2)


def test_names_choose_tables_and_objectives(tmp_path: Path) -> None:
    chosen = build_arms(toy_recipe(), ("less", "spo", "grpo_guard"), arms_file(tmp_path, ARMS))
    assert [arm.name for arm in chosen] == ["less", "spo", "grpo_guard"]
    assert chosen[1].recipe.objective.limit == OBJECTIVES["spo"]().limit
    assert [arm.recipe.objective.name for arm in build_arms(toy_recipe(), ("dro",), None)] == ["dro"]


def test_paths_of_an_arm_are_relative_to_its_file(tmp_path: Path) -> None:
    recipe = toy_recipe()
    recipe = replace(recipe, monitor=replace(recipe.monitor, file=Path("evaluated.txt")))
    (arm,) = build_arms(recipe, (), arms_file(tmp_path, '[grpo_guard]\nprompts.file = "mine.txt"'))
    assert arm.recipe.prompts.file == tmp_path / "mine.txt"


@pytest.mark.parametrize(
    "line",
    ["sampler.shift = 1.0", "sampler.decode_tiled = true", 'prompts.file = "mine.txt"', "prompts.max_tokens = 7",
     'prompts.encoders = "cpu"'],
)  # fmt: skip
def test_what_evaluations_depend_on_is_the_same_for_all_arms(tmp_path: Path, line: str) -> None:
    field = line.split(" ")[0]
    with pytest.raises(UserError, match=f"evaluations depend on {field}, so it is the same for all arms"):
        build_arms(toy_recipe(), (), arms_file(tmp_path, f"[grpo_guard]\n{line}"))


def test_the_digits_have_an_arm_for_each_objective() -> None:
    file = arms_beside(find_recipe("digits"))
    assert file is not None
    arms = build_arms(DIGITS, (), file)
    assert {arm.recipe.objective.name for arm in arms} == set(OBJECTIVES)
    lines = file.read_text().splitlines()
    for arm in arms:  # why each is as it is stands beside it
        (start,) = [i for i, line in enumerate(lines) if line == f"[{arm.name}]"]
        assert "#" in "".join(lines[start : [*lines, ""].index("", start)]), arm.name


def test_all_arms_have_the_same_seeds(tmp_path: Path) -> None:
    recipe = replace(toy_recipe(), run=replace(toy_recipe().run, seed=5))
    for arm in build_arms(recipe, (), arms_file(tmp_path, ARMS)):
        runs = [arm.run(tmp_path, i).run for i in range(2)]
        assert [(run.seed, run.dir) for run in runs] == [
            (5, tmp_path / arm.name / "seed_5"),
            (6, tmp_path / arm.name / "seed_6"),
        ]


@pytest.mark.parametrize(
    ("args", "text", "message"),
    [
        (
            ["--objectives", "spoo"],
            None,
            r"there is no arm spoo: expected a table of .*digits_arms.toml \(grpo_guard, ",
        ),
        (["--objectives", "spo", "spo"], None, "--objectives names spo twice"),
        ([], "[spo]\nobjective.epsilonn = 1.0", "arm spo: objective.epsilonn: .*epsilon"),
        ([], "[spo]\nobjective.epsilon = -1.0", "arm spo: objective: epsilon must be positive"),
        ([], '[spo]\nobjective.epsilon = "a"', "arm spo: objective.epsilon: "),
        ([], "[mine]\nupdate.minibatches = 5", "arm mine: objective.name must be one of grpo_guard, .*, got 'mine'"),
        ([], "[spo]\nupdate.minibatchez = 5", "arm spo: update.minibatchez: there is no such field; did you mean"),
        ([], "[spo]\nupdate.minibatches = 7", "arm spo: .*1080 transitions of a rollout batch do not divide"),
        ([], "[spo]\nupdate.stop_at = 0.5", "arm spo: update.stop_at = 0.5: set, but not read"),
        ([], "[spo]\nrun.epochs = 5", r"arm spo: \[run\] is the same for all arms"),
        ([], "[spo]\n[grpo_guard.objective]\nname = 3", "arm grpo_guard: objective"),
        ([], "spo = 3", "spo = 3: expected a table for each arm"),
        ([], '["../spo"]', "letters, digits, _ and - only"),
        ([], "[spo", "is not valid TOML"),
        (["--monitor.every", "0"], None, "monitor.every = 0: proxy, gold and diversity come from the monitor"),
        (["--monitor.every", "50"], None, "monitor.every = 50 is more than run.epochs = 14"),
        (["--seeds", "0"], None, r"--seeds must lie in \[1, 1000\], got 0"),
        (["--workers", "0"], None, r"--workers must be 1 on a GPU and lie in \[1, 256\] elsewhere, got 0"),
    ],
)
def test_mistakes_end_in_a_line_before_anything_is_trained(
    args: list[str], text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if text is None else ["--arms", str(arms_file(tmp_path, text))]
    assert cli.main(["compare", "digits", *given, *args, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    (line,) = said.strip().splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_without_a_file_of_arms_the_objectives_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["compare", "flux_tiny", "--out", str(tmp_path / "out")]) == 2
    assert f"--objectives A B ..., of {', '.join(OBJECTIVES)}" in capsys.readouterr().err


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms of the toy with three seeds."""
    folder = tmp_path_factory.mktemp("compare")
    arms = build_arms(toy_recipe(), (), arms_file(folder, ARMS))
    assert comparison.compare(arms, 3, folder / "out", train_toy, workers=2) == 0
    return folder / "out"


def test_every_number_is_that_of_the_files_of_the_runs(compared: Path) -> None:
    results = json.loads((compared / "results.json").read_text())
    assert [(run["arm"], run["seed"]) for run in results["runs"]] == [
        (arm, seed) for seed in range(3) for arm in ("grpo_guard", "less", "flow_grpo")
    ]
    for run in results["runs"]:
        folder = compared / run["arm"] / f"seed_{run['seed']}"
        assert run["evaluations"] == read_rows(folder / "evaluations.jsonl")
        assert [row["epoch"] for row in run["evaluations"]] == [0, 1, 2, 3]
        assert all(row["diversity"] > 0 for row in run["evaluations"])
        for row, epoch in zip(read_rows(folder / "metrics.jsonl"), run["epochs"], strict=True):
            assert epoch == {name: row[name] for name in epoch}
        began, cost = read_rows(folder / "processes.jsonl")
        assert began["began"] > 0
        assert (run["peak_bytes"], run["wall_s"]) == (cost["peak_bytes"], cost["seconds"])
        assert cost["peak_bytes"] > 50 * 2**20
        recipe = json.loads((folder / "recipe.json").read_text())
        assert recipe["run"]["seed"] == run["seed"]
    less = next(row for row in results["rows"] if row["arm"] == "less")
    epochs = [epoch for run in results["runs"] if run["arm"] == "less" for epoch in run["epochs"]]
    assert less["clip_fraction"]["positive"] == pytest.approx(fmean(e["clip_fraction_positive"] for e in epochs))
    assert less["seconds"]["update"] == pytest.approx(fmean(e["seconds"]["update"] for e in epochs))
    assert results["failures"] == []


def test_every_arm_starts_from_the_same_weights_and_noise(compared: Path) -> None:
    runs = json.loads((compared / "results.json").read_text())["runs"]
    for seed in range(3):
        same = [run for run in runs if run["seed"] == seed]
        assert len({run["evaluations"][0]["proxy"] for run in same}) == 1
        assert len({run["epochs"][0]["reward_mean"] for run in same}) == 1
    assert len({run["epochs"][0]["reward_mean"] for run in runs}) == 3  # one for each seed


def test_intervals_are_paired(compared: Path) -> None:
    """By scipy, from the files of the runs."""
    results = json.loads((compared / "results.json").read_text())
    gold = {
        arm: [read_rows(compared / arm / f"seed_{seed}" / "evaluations.jsonl")[-1]["gold"] for seed in range(3)]
        for arm in ("grpo_guard", "flow_grpo")
    }
    differences = [b - a for a, b in zip(*gold.values(), strict=True)]
    (row,) = [row for row in results["rows"] if row["arm"] == "flow_grpo"]
    found = row["final"]["gold"]["difference"]
    low, high = stats.t.interval(0.95, 2, loc=fmean(differences), scale=stats.sem(differences))
    assert (found["mean"] - found["half_width"], found["mean"] + found["half_width"]) == pytest.approx((low, high))
    assert stats.ttest_rel(gold["flow_grpo"], gold["grpo_guard"]).confidence_interval() == pytest.approx((low, high))
    assert row["final"]["gold"]["mean"]["mean"] == pytest.approx(fmean(gold["flow_grpo"]))


def test_the_page_holds_the_sentences_and_every_picture(compared: Path) -> None:
    page = (compared / "report.html").read_text(encoding="utf-8")
    words = re.sub(r"base64,[^\"]*", "", page).replace("&#39;", "'")
    for sentence in (
        FIRST_UPDATE,
        SAME_INSIDE,
        "the highest proxy that all its runs reached",
        "± half the 95% t-inter",
    ):
        assert sentence in words
    assert "In these runs the standard deviation of the ratio of a denoising step was at most" in words
    assert "Partial report" not in words
    assert not re.search(r"\bnan\b|\binf\b", words)
    assert len(re.findall("<figure>", page)) == len(list(compared.glob("*.png"))) == 9
    for arm in ("grpo_guard", "less", "flow_grpo"):
        assert f'<th scope="row">{arm}</th>' in words
    assert "update.minibatches: 4 -&gt; 2" in words


def test_finished_runs_are_not_repeated_and_others_of_their_folder_refused(compared: Path, tmp_path: Path) -> None:
    arms = build_arms(toy_recipe(), (), arms_file(tmp_path, ARMS))
    before = (compared / "results.json").read_text()

    def never(recipe: Recipe, resume: str) -> int:
        raise AssertionError("trained again")

    assert comparison.compare(arms, 3, compared, never, workers=1) == 0
    assert json.loads((compared / "results.json").read_text())["rows"] == json.loads(before)["rows"]
    others = build_arms(toy_recipe(), ("less",), arms_file(tmp_path, ARMS.replace("1e-3 }", "2e-3 }")))
    with pytest.raises(UserError, match=r"less/seed_0 holds a run of other settings \(objective.clip_range: 0.001 -> "):
        comparison.compare(others, 3, compared, never)
    (compared / "flow_grpo" / "seed_0" / "compared.json").rename(tmp_path / "kept")
    with pytest.raises(UserError, match="holds a run that `fastguard compare` did not start"):
        comparison.compare(arms, 3, compared, never)
    (tmp_path / "kept").rename(compared / "flow_grpo" / "seed_0" / "compared.json")


def test_a_killed_run_is_told_and_resumes(
    compared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOY_KILLED", str(tmp_path / "killed"))
    arms = build_arms(toy_recipe(), ("grpo_guard", "less"), arms_file(tmp_path, ARMS))
    out = tmp_path / "out"
    assert comparison.compare(arms, 1, out, train_toy, workers=1) == 1
    assert "1 of 2 runs: grpo_guard, seed 0: not finished, killed by signal 9" in capsys.readouterr().err
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "grpo_guard, seed 0, did not finish: killed by signal 9" in page
    untouched = (out / "less" / "seed_0" / "metrics.jsonl").stat().st_mtime_ns
    assert comparison.compare(arms, 1, out, train_toy, workers=1) == 0
    assert "after 1 epochs" in (out / "grpo_guard" / "seed_0" / "train.log").read_text()
    assert cost_of(out / "grpo_guard" / "seed_0") is None  # the killed process wrote nothing down
    assert cost_of(out / "less" / "seed_0") is not None
    assert (out / "less" / "seed_0" / "metrics.jsonl").stat().st_mtime_ns == untouched
    for arm in arms:
        assert_same_end(out / arm.name / "seed_0", compared / arm.name / "seed_0")
    assert "did not finish" not in (out / "report.html").read_text(encoding="utf-8")


def test_an_interrupt_leaves_a_page_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = build_arms(toy_recipe(), ("grpo_guard", "less"), arms_file(tmp_path, ARMS))

    def one_then_interrupt(*args: Any) -> Iterator[Ended]:
        yield next(run_all(*args))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparison, "run_all", one_then_interrupt)
        assert comparison.compare(arms, 2, tmp_path / "out", train_toy, workers=1) == 130
    assert "interrupted: 1 of 4 runs are finished" in capsys.readouterr().out
    assert "Partial report: 1 of 4 runs are finished" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert comparison.compare(arms, 2, tmp_path / "out", train_toy, workers=1) == 0
    assert "1 of 4 runs are finished already" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 4


HITTABLE = """
import sys
from pathlib import Path
from helpers.toy_train import toy_recipe, train_slowly
from fastguard.cli import terminations_as_interrupts
from fastguard.compare.arms import build_arms
from fastguard.compare.run import compare
if __name__ == "__main__":
    recipe = toy_recipe()
    with terminations_as_interrupts():
        sys.exit(compare(build_arms(recipe, ("grpo_guard",), None), 1, Path(sys.argv[1]), train_slowly))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_runs_save_when_the_comparison_ends(number: int, tmp_path: Path) -> None:
    """However it ends: by a signal that it can see, or by one that it cannot."""
    (tmp_path / "hittable.py").write_text(HITTABLE)
    out = tmp_path / "out"
    folder = out / "grpo_guard" / "seed_0"
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    with deadline("a comparison that is hit"):
        process = subprocess.Popen([sys.executable, str(tmp_path / "hittable.py"), str(out)], env=environment)
        while not read_rows(folder / "metrics.jsonl"):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait() == (130 if number == signal.SIGTERM else -number)
        while len(read_rows(folder / "processes.jsonl")) < 2:  # its run ends by itself
            time.sleep(0.05)
    assert "SIGTERM: saving at the next safe point" in (folder / "train.log").read_text()
    done = read_rows(folder / "metrics.jsonl")[-1]["epoch"] + 1
    assert checkpoint_of(folder, "newest").name == f"epoch_{done:06d}"
    assert (out / "report.html").exists() == (number == signal.SIGTERM)
    (arm,) = build_arms(toy_recipe(), ("grpo_guard",), None)
    assert comparison.compare([arm], 1, out, train_toy, workers=1) == 0
    assert f"after {done} epochs" in (folder / "train.log").read_text()


def test_a_signal_while_the_first_run_starts_is_not_lost(tmp_path: Path) -> None:
    """The start waits for the imports of the server that runs are forked from."""
    (tmp_path / "hittable.py").write_text(HITTABLE)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    with deadline("a comparison that is hit early"):
        process = subprocess.Popen([sys.executable, str(tmp_path / "hittable.py"), str(out)], env=environment)
        while not (out / "grpo_guard" / "seed_0" / "compared.json").is_file():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 130
    saved = checkpoints_in(out / "grpo_guard" / "seed_0" / "checkpoints")
    assert "epoch_000003" not in [path.name for path in saved]  # it was not trained to its end


@pytest.mark.parametrize("content", ["[]", "null", "3", "{"])
def test_a_damaged_note_of_a_run_is_named(compared: Path, tmp_path: Path, content: str) -> None:
    folder = tmp_path / "out"
    shutil.copytree(compared / "grpo_guard", folder / "grpo_guard")
    (folder / "grpo_guard" / "seed_0" / "compared.json").write_text(content)
    arms = build_arms(toy_recipe(), ("grpo_guard",), None)
    with pytest.raises(UserError, match="compared.json is damaged"):
        comparison.compare(arms, 1, folder, train_toy)


def test_a_run_that_fails_ends_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = build_arms(toy_recipe(), ("grpo_guard", "less"), arms_file(tmp_path, ARMS))
    assert comparison.compare(arms, 2, tmp_path / "out", fail, workers=2) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(failure["arm"], failure["seed"]) for failure in results["failures"]] == [("grpo_guard", 1), ("less", 1)]
    said = "exit code 1: RuntimeError: failed on purpose"
    assert all(failure["said"] == said for failure in results["failures"])
    assert [run["seed"] for run in results["runs"]] == [0, 0]


def test_a_single_seed_has_no_interval(tmp_path: Path) -> None:
    arms = build_arms(toy_recipe(), ("grpo_guard", "less"), arms_file(tmp_path, ARMS))
    assert comparison.compare(arms, 1, tmp_path / "out", train_toy, workers=2) == 0
    page = re.sub(r"base64,[^\"]*", "", (tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert "a single seed has no interval" in page
    assert "a single seed says nothing about reliability" in page
    assert not re.search(r"\bnan\b", page)
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows[1]["final"]["gold"]["difference"]["half_width"] is None


def test_the_command_trains_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user calls it, on the tiny Flux."""
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path / "cache"))
    args = ["compare", "flux_tiny", "--objectives", "grpo_guard", "spo", "--seeds", "1", "--out", str(tmp_path / "out")]
    assert cli.main([*args, "--run.epochs", "2", "--monitor.every", "1", "--update.inner-epochs", "1"]) == 0
    for arm in ("grpo_guard", "spo"):
        recipe = json.loads((tmp_path / "out" / arm / "seed_0" / "recipe.json").read_text())
        assert (recipe["objective"]["name"], recipe["update"]["inner_epochs"]) == (arm, 1)
        assert [row["epoch"] for row in read_rows(tmp_path / "out" / arm / "seed_0" / "evaluations.jsonl")] == [0, 1, 2]
    assert "<h1>2 arms of " in (tmp_path / "out" / "report.html").read_text()


# --- equal proxy ----------------------------------------------------------------------------------------------------


def made(arm: str, seed: int, proxies: list[float], golds: list[float]) -> FinishedRun:
    evaluations = [
        EvaluationLog(2 * i, proxy, gold, {}, 0.0, diversity=0.1 * gold)
        for i, (proxy, gold) in enumerate(zip(proxies, golds, strict=True))
    ]
    (log,) = toy_logs()
    return FinishedRun(arm, seed, evaluations, [log], None, None)


def toy_logs() -> list[Any]:
    from helpers.toys import MemoryRecorder, ToyBackbone, pool

    from fastguard.train.trainer import train

    recipe = toy("unused", run={"epochs": 1})
    backbone = ToyBackbone()
    with pool(recipe, backbone) as rewards:
        return train(backbone, recipe, rewards, MemoryRecorder())


Made = Callable[..., Results]


@pytest.fixture
def results() -> Made:
    def build(*runs: FinishedRun, failures: dict[tuple[str, int], str] | None = None) -> Results:
        names = list(dict.fromkeys([run.arm for run in runs] + [arm for arm, _ in failures or {}]))
        seeds = sorted({run.seed for run in runs})
        arms = [Arm(name, toy_recipe()) for name in names]
        return Results("the toy", arms, seeds, list(runs), failures or {}, 1)

    return build


def test_gold_at_equal_proxy_is_interpolated(results: Made, tmp_path: Path) -> None:
    """a rises to 5, b to 3: the level is 3, which a reaches half way from 1 to 5."""
    found = results(made("a", 0, [1.0, 5.0], [10.0, 20.0]), made("b", 0, [1.0, 2.0, 3.0], [10.0, 10.0, 11.0]))
    assert found.levels == {0: 3.0}
    a, b = found.rows
    assert a.equal["gold"].mean.mean == 15.0
    assert a.equal["epochs"].mean.mean == 1.0
    assert b.equal["epochs"].mean.mean == 4.0
    difference = b.equal["gold"].difference
    assert difference is not None
    assert difference.mean == 11.0 - 15.0
    assert a.equal["gold"].difference is None
    assert found.slowest == ["b"]
    assert "set by b, whose runs rose least" in write_comparison(found, tmp_path).read_text(encoding="utf-8")


def test_a_run_that_never_rises_is_left_out_at_equal_proxy(results: Made, tmp_path: Path) -> None:
    found = results(
        made("a", 0, [1.0, 5.0], [10.0, 20.0]),
        made("b", 0, [1.0, 3.0], [10.0, 11.0]),
        made("fallen", 0, [1.0, 0.5], [10.0, 9.0]),
    )
    assert found.levels == {0: 3.0}
    assert found.rows[2].equal == {}
    assert found.rows[2].final["gold"].mean.mean == 9.0
    assert '<th scope="row">fallen</th><td>0</td>' in write_comparison(found, tmp_path).read_text(encoding="utf-8")


def test_a_seed_has_a_level_once_all_its_runs_are_done_or_failed(results: Made) -> None:
    first = made("a", 0, [1.0, 5.0], [10.0, 20.0])
    other = made("b", 1, [1.0, 3.0], [10.0, 11.0])
    assert results(first, other).levels == {}
    assert results(first, failures={("b", 0): "no memory"}).levels == {0: 5.0}


# --- documents ------------------------------------------------------------------------------------------------------


def test_make_compare_is_the_documented_command() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (command,) = re.findall(r"^compare: \$\(READY\)\n\t\$\(BIN\)/(fastguard compare .*)$", makefile, re.MULTILINE)
    assert command in (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    assert "| `compare` |" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert command.startswith("fastguard compare digits --seeds 5 ")


def test_the_table_of_the_page_is_that_of_its_file() -> None:
    docs = script("docs/compare.py")
    page = docs.PAGE.read_text(encoding="utf-8")
    assert f"{docs.BEGIN}{docs.markdown(json.loads(docs.KEPT.read_text()))}\n{docs.END}" in page
    for sentence in (FIRST_UPDATE, SAME_INSIDE):
        assert sentence in " ".join(page.split())


def test_a_comparison_becomes_a_table(compared: Path) -> None:
    docs = script("docs/compare.py")
    content = docs.without_runs(json.loads((compared / "results.json").read_text()))
    caption, _, table = docs.markdown(content).partition("\n\n")
    lines = table.split("\n")
    assert "3 seeds, 3 epochs" in caption
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("`")[1] for line in lines[2:]] == ["grpo_guard", "less", "flow_grpo"]
    gold = content["rows"][2]["equal"]["gold"]
    assert f"| {gold['mean']['mean']:.2f} |" in lines[4]
    assert f"± {gold['difference']['half_width']:.2f} |" in lines[4]
