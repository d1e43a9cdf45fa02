"""The demo end to end in its smoke setting, its metrics against known values, and words that follow the numbers."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from helpers.deadline import DEADLINE_S

from fastguard import cli
from fastguard.demo import backbone, cache, config, data, experiment, run, text, workers
from fastguard.demo.analysis import at_crossing, common_proxy, compare, crossing
from fastguard.demo.backbone import Models
from fastguard.demo.config import ClassifierConfig, DemoConfig, PretrainConfig, quick_demo
from fastguard.demo.experiment import DemoRun, Evaluation, Reference, Results
from fastguard.demo.model import GRID, PATCH, DigitPolicy, patchify, unpatchify
from fastguard.demo.page import write_demo_page
from fastguard.train.metrics import EpochLog, RatioLog

CPU = torch.device("cpu")


# --- end to end -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Weights of this file's tests stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTGUARD_CACHE", str(folder))
        (folder / "demo").mkdir()
        yield folder / "demo"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `fastguard demo --quick` wrote."""
    out = tmp_path_factory.mktemp("demo") / "not" / "there" / "yet"
    assert cli.main(["demo", "--quick", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def models(quick: Path) -> Models:
    return backbone.prepare(quick_demo(), CPU)


def test_quick_demo_writes_a_self_contained_report(quick: Path) -> None:
    page = (quick / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 13
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    embedded = {source.removeprefix("data:image/png;base64,") for source in sources}
    assert embedded == {base64.b64encode(f.read_bytes()).decode() for f in quick.glob("*.png")}
    assert "the numbers mean nothing" in page
    assert "Partial report" not in page


def test_quick_demo_writes_every_number(quick: Path) -> None:
    numbers = json.loads((quick / "results.json").read_text())
    assert [(r["objective"], r["seed"]) for r in numbers["runs"]] == [("flow_grpo", 0), ("grpo_guard", 0)]
    for entry in numbers["runs"]:
        assert len(entry["epochs"]) == 2
        assert len(entry["metrics"]) == 3
        assert entry["metrics"][0] == numbers["before"]
        assert entry["metrics"][1] != numbers["before"]
        assert len(entry["probe"]["per_step"]) == 9
        assert min(step["std"] for step in entry["probe"]["per_step"]) > 0
    flow, guard = (entry["epochs"][0]["reward_mean"] for entry in numbers["runs"])
    assert flow == guard  # the first rollout precedes every update: same weights, same noise
    assert numbers["reference"]["gold_accuracy"] > 0.8


def test_weights_are_cached(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("trained again")

    for name in ("fit_gold", "fit_proxy", "pretrain"):
        monkeypatch.setattr(backbone, name, never)
    again = backbone.prepare(quick_demo(), CPU)
    assert again.pretraining_cached
    with pytest.raises(AssertionError, match="trained again"):
        backbone.prepare(replace(quick_demo(), pretrain=PretrainConfig(steps=2)), CPU)


def test_pretraining_learns(models: Models) -> None:
    untrained = replace(models, policy=DigitPolicy(seed=0))
    config = quick_demo()
    before = experiment.look(untrained.policy, untrained, config).metrics
    after = experiment.look(models.policy, models, config).metrics
    assert after.frechet < 0.7 * before.frechet
    assert experiment.look(models.policy, models, config).metrics == after


def test_digits_learn_from_advantages_per_step(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The proxy's logits are negative now and then: vgpo refuses them by name, and takes them rescaled."""
    monkeypatch.setattr(backbone, "DemoConfig", quick_demo)
    monkeypatch.setattr(backbone, "_trained_models", lambda: models)
    options = ["train", "digits", "--run.epochs", "1", "--run.trackers", "--monitor.every", "0"]
    options += ["--advantages.name", "vgpo"]
    assert cli.main([*options, "--run.dir", str(tmp_path / "refused")]) == 1
    error = capsys.readouterr().err
    assert "vgpo takes rewards that are not negative" in error
    assert 'reward function 0 is "proxy"' in error
    assert cli.main([*options, "--run.dir", str(tmp_path / "run"), "--advantages.rescale", "minmax"]) == 0
    assert "images scored per epoch: 1080 = 120 x 9" in capsys.readouterr().out
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["steps"] == list(range(9))
    assert all(update["grad_norm"] > 0 for update in row["updates"])


@pytest.mark.slow  # the next two start workers, too
def test_worker_processes_give_the_same_runs(models: Models, capfd: pytest.CaptureFixture[str]) -> None:
    """And print nothing: not what libraries say when they are imported, either."""
    config = quick_demo()
    capfd.readouterr()
    tasks: list[experiment.Task] = [("flow_grpo", 0), ("grpo_guard", 0)]
    ticks: list[experiment.Task] = []
    runs = list(workers.run_in_workers(config, tasks, 2, lambda task, proxy: ticks.append(task)))
    assert capfd.readouterr() == ("", "")
    assert sorted(ticks) == sorted(tasks * 2)
    here = list(experiment.run_here(config, models, tasks, lambda task, proxy: None))
    for run_here, run_there in zip(here, sorted(runs, key=lambda r: r.objective), strict=True):
        assert run_there.objective == run_here.objective
        # Another number of threads adds in another order.
        there, expected = ([e.metrics.proxy for e in r.evaluations] for r in (run_there, run_here))
        assert there == pytest.approx(expected, abs=1e-2)


def test_a_failing_worker_is_reported(models: Models) -> None:
    with pytest.raises(RuntimeError, match=r"a worker process failed(.|\n)*seed must be at least 0"):
        list(workers.run_in_workers(quick_demo(), [("flow_grpo", -1)], 1, lambda task, proxy: None))


def test_interrupt_leaves_a_partial_report(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_run_then_interrupt(*args: Any) -> Iterator[DemoRun]:
        yield fake_run("flow_grpo", 0, [1.0, 2.0])
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_here", one_run_then_interrupt)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 130
    assert "interrupted when 1 of 2 runs were finished" in (tmp_path / "report.html").read_text(encoding="utf-8")
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("interrupted: 1 of 2 runs were finished")
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 1


def test_interrupt_before_any_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "prepare", interrupt)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path)]) == 130
    assert "before anything was measured" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)], ids=str)
def test_workers_end_with_the_demo_however_it_ends(quick: Path, tmp_path: Path, number: signal.Signals) -> None:
    """kill, timeout and docker stop leave a partial report; and not even a killed demo leaves its workers behind."""
    script = Path(sys.executable).parent / "fastguard"
    command = [script, "demo", "--quick", "--seeds", "8", "--workers", "2", "--out", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        started: list[psutil.Process] = []
        while len(started) < 2:
            assert demo.poll() is None, "the demo ended before its workers started"
            children = psutil.Process(demo.pid).children()
            started = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
            time.sleep(0.05)
        demo.send_signal(number)
        code = demo.wait(timeout=DEADLINE_S)
    _, alive = psutil.wait_procs(started, timeout=DEADLINE_S)
    for process in alive:
        process.kill()
    assert not alive
    assert code == (130 if number == signal.SIGTERM else -signal.SIGKILL)
    assert (tmp_path / "report.html").exists() == (number == signal.SIGTERM)


def test_nothing_stale_stands_beside_a_new_report(tmp_path: Path) -> None:
    ours, theirs = ("report.html", "results.json", "samples_equal_proxy_flow_grpo.png"), ("photo.png", "notes.txt")
    for name in (*ours, *theirs):
        (tmp_path / name).write_text("old")
    run.write_partial(None, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(("report.html", *theirs))
    assert "before anything was measured" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_interrupt_while_starting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "quick_demo", interrupt)
    assert cli.main(["demo", "--quick"]) == 130
    assert capsys.readouterr().err == "fastguard: interrupted\n"


def test_command_line_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--quick", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "fastguard: seeds must be at least 1, got 0\n"
    assert cli.main(["demo", "--quick", "--workers", "0", "--out", str(tmp_path)]) == 2
    assert "workers" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith(
        f"fastguard: cannot read or write: [Errno 17] {tmp_path / 'file'}: File exists"
    )


# --- cache ----------------------------------------------------------------------------------------------------------


def test_every_setting_names_another_file() -> None:
    paths = {cache.cache_path("policy", PretrainConfig(seed=seed, steps=steps)) for seed in (0, 1) for steps in (1, 2)}
    assert len(paths) == 4
    assert cache.cache_path("policy", PretrainConfig()) == cache.cache_path("policy", PretrainConfig())


def test_unreadable_and_interrupted_weights_are_trained_again(cache_folder: Path) -> None:
    settings = ClassifierConfig(seed=77)
    path = cache.cache_path("linear", settings)
    path.write_bytes(b"half a file")
    module = torch.nn.Linear(2, 2)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.load_or_train(module, "linear", settings, interrupt)
    assert not cache.load_or_train(module, "linear", settings, lambda: torch.nn.init.constant_(module.weight, 3.0))
    other = torch.nn.Linear(2, 2)
    assert cache.load_or_train(other, "linear", settings, interrupt)
    assert (other.weight == 3).all()
    assert [p.name for p in cache_folder.iterdir() if "linear" in p.name] == [path.name]


def test_other_weights_in_the_cache_are_trained_again(cache_folder: Path) -> None:
    """As after an upgrade that renames a parameter: nobody should have to delete a file by hand."""
    settings = ClassifierConfig(seed=79)
    cache.load_or_train(torch.nn.Linear(3, 2), "linear", settings, lambda: None)
    module = torch.nn.Linear(2, 2)
    start = module.weight.detach().clone()
    assert not cache.load_or_train(module, "linear", settings, lambda: None)
    assert torch.equal(module.weight, start)
    assert cache.load_or_train(torch.nn.Linear(2, 2), "linear", settings, lambda: None)


def test_interrupted_save_leaves_no_file(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(file: Path, content: bytes) -> None:
        with file.open("wb") as out:
            out.write(content[:4])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    before = set(cache_folder.iterdir())
    with pytest.raises(KeyboardInterrupt):
        cache.load_or_train(torch.nn.Linear(2, 2), "linear", ClassifierConfig(seed=78), lambda: None)
    assert set(cache_folder.iterdir()) == before


# --- model, data and metrics ----------------------------------------------------------------------------------------


def test_patches_are_a_row_major_grid() -> None:
    images = torch.arange(2 * 64 * 64.0).reshape(2, 1, 64, 64)
    tokens = patchify(images)
    assert tokens.shape == (2, 16, 256)
    row, column = 2, 1
    patch = images[1, 0, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    assert torch.equal(tokens[1, row * GRID + column], patch.flatten())
    assert torch.equal(unpatchify(tokens), images)


def test_velocity_leads_to_the_predicted_image() -> None:
    policy = DigitPolicy(seed=0)
    x, sigma, classes = torch.randn(2, 16, 256), torch.tensor([0.8, 0.02]), torch.tensor([3, 4])
    with torch.no_grad():
        velocity, image = policy(x, sigma, classes), policy.predict_image(x, sigma, classes)
        other_prompt = policy.predict_image(x, sigma, classes + 1)
    assert torch.allclose(x[0] - 0.8 * velocity[0], image[0], atol=1e-5)
    assert torch.allclose(x[1] - 0.05 * velocity[1], image[1], atol=1e-5)
    assert not torch.allclose(image, other_prompt)


def test_digits_are_split_without_overlap() -> None:
    digits = data.load_images(CPU)
    assert digits.images.shape == (1000, 1, 64, 64)
    assert digits.gold_images.shape == (797, 1, 64, 64)
    assert (digits.images.min().item(), digits.images.max().item()) == (-1.0, 1.0)
    whole = torch.cat([digits.images, digits.gold_images]).flatten(1)
    assert len(whole.unique(dim=0)) == len(whole)
    assert torch.bincount(torch.cat([digits.labels, digits.gold_labels])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


def test_frechet_distance_of_known_gaussians() -> None:
    a = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert data.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-6)
    assert data.frechet_distance(a, a + torch.tensor([3.0, 0.0, 4.0])) == pytest.approx(25.0)
    # Scaling by 2 about the mean: trace of C + 4 C - 2 (2 C) = trace(C).
    scaled = a.mean(0) + 2 * (a - a.mean(0))
    assert data.frechet_distance(a, scaled) == pytest.approx(np.trace(np.cov(a.numpy(), rowvar=False)), rel=1e-6)


def test_diversity_is_the_mean_distance_within_classes() -> None:
    levels = torch.tensor([0.0, 0.5, 0.1, 0.1, 0.4])
    images = levels[:, None, None, None].expand(-1, 1, 64, 64)
    # On 8x8 pixels a difference d of level is a distance 8 d: class 0 has 4, class 1 has (0, 2.4, 2.4).
    expected = (4.0 + 1.6) / 2
    assert data.class_diversity(images, torch.tensor([0, 0, 1, 1, 1])) == pytest.approx(expected, rel=1e-5)


# --- analysis -------------------------------------------------------------------------------------------------------


def metrics(proxy: float, frechet: float = 5.0, accuracy: float = 0.9, diversity: float = 2.0) -> data.Metrics:
    return data.Metrics(proxy, accuracy, frechet, diversity)


def fake_run(
    objective: Any,
    seed: int,
    proxies: list[float],
    frechets: list[float] | None = None,
    bias: tuple[float, float] = (-1e-6, -1e-5),
    clip: tuple[float, float] = (0.1, 0.1),
) -> DemoRun:
    """A finished run with the given course."""
    log = EpochLog(
        epoch=0,
        reward_mean=0.0,
        reward_std=1.0,
        rewards={},
        zero_spread_share=0.0,
        dropped_groups=0,
        updates=(),
        steps=(0, 1),
        per_step=tuple(RatioLog(b, std, *clip, None) for b, std in zip(bias, (1e-4, 4e-4), strict=True)),
        clip_fraction_positive=clip[0],
        clip_fraction_negative=clip[1],
        clip_range_for_30_percent=None,
        clip_range_for_10_percent=None,
        seconds={},
        images_per_s=1.0,
        peak_memory_gib=None,
    )
    tiles = np.zeros((4, 10, 64, 64), np.uint8)
    frechets = frechets or [5.0] * len(proxies)
    looks = [Evaluation(metrics(p, f), tiles) for p, f in zip(proxies, frechets, strict=True)]
    return DemoRun(objective, seed, [log] * (len(proxies) - 1), looks, log)


def fake_results(runs: list[DemoRun], seeds: int = 3) -> Results:
    tiles = np.zeros((4, 10, 64, 64), np.uint8)
    return Results(
        DemoConfig(seeds=seeds),
        Reference(0.98, 0.8, 3.0, 3.2, tiles),
        Evaluation(metrics(1.0), tiles),
        runs,
        {"training runs": 1.0},
    )


def three_pairs(guard_frechet: float, **guard: Any) -> list[DemoRun]:
    """Both objectives reach proxy 3; Flow-GRPO after 2 iterations with Frechet distance about 20."""
    runs = []
    for seed, jitter in enumerate((-0.1, 0.0, 0.1)):
        runs.append(
            fake_run("flow_grpo", seed, [1.0, 2.0, 3.0], [5.0, 10.0, 20.0 + jitter], (-1e-4, -2e-2), (0.0, 0.1))
        )
        runs.append(fake_run("grpo_guard", seed, [1.0, 3.0], [5.0, guard_frechet + 3 * jitter], **guard))
    return runs


def test_crossing_interpolates_and_takes_the_first() -> None:
    run = fake_run("flow_grpo", 0, [1.0, 2.0, 4.0, 3.0, 5.0], [0.0, 10.0, 20.0, 30.0, 40.0])
    assert crossing(run, 3.5) == pytest.approx(1.75)
    assert at_crossing(run, "frechet", 3.5) == pytest.approx(17.5)
    assert crossing(run, 5.0) == 4.0


def test_common_proxy_is_the_highest_that_all_reached() -> None:
    runs = [fake_run("flow_grpo", 0, [1.0, 4.0, 3.0]), fake_run("grpo_guard", 0, [1.0, 6.0])]
    assert common_proxy(runs) == 4.0
    assert common_proxy([*runs, fake_run("grpo_guard", 1, [1.0, 0.5])]) is None
    assert common_proxy([]) is None


def test_comparison_is_paired_and_signed() -> None:
    pairs = [(fake_run("flow_grpo", s, [1.0, 2.0, 3.0]), fake_run("grpo_guard", s, [1.0, 3.0])) for s in range(3)]
    c = compare(pairs, "iterations", 3.0)
    assert (c.plain.mean, c.guarded.mean, c.difference.mean) == (2.0, 1.0, -1.0)


# --- words follow the numbers ---------------------------------------------------------------------------------------


def words(results: Results) -> str:
    sections = [
        text.short_text(results), text.ratio_text(results.runs), text.clip_text(results), text.training_text(results),
        text.equal_proxy_text(results), text.limits_text(results),
    ]  # fmt: skip
    return "\n".join(line for section in sections for line in section)


@pytest.mark.parametrize(
    ("guard_frechet", "expected"),
    [
        (20.0, "shows no reliable difference in Fréchet distance"),
        (8.0, "has the lower Fréchet distance at equal proxy for GRPO-Guard"),
        (40.0, "has the lower Fréchet distance at equal proxy for Flow-GRPO"),
    ],
)
def test_frechet_verdict(guard_frechet: float, expected: str) -> None:
    said = words(fake_results(three_pairs(guard_frechet)))
    assert expected in said
    difference = f"{guard_frechet - 20:+.1f}".replace("-", "\N{MINUS SIGN}")
    assert f"Fréchet distance: difference {difference}, 95% interval" in said
    verdicts = ("no reliable difference in Fr", "lower Fréchet distance at equal proxy for")
    assert sum(said.count(verdict) for verdict in verdicts) == 1


def test_speed_names_the_faster_objective() -> None:
    runs = three_pairs(20.0)
    assert "GRPO-Guard gets there in 2.0 times fewer iterations" in words(fake_results(runs))
    swap = {"flow_grpo": "grpo_guard", "grpo_guard": "flow_grpo"}
    swapped = [replace(run, objective=swap[run.objective]) for run in runs]
    assert "Flow-GRPO gets there in 2.0 times fewer iterations" in words(fake_results(swapped))


def test_shift_is_only_claimed_where_it_is() -> None:
    assert "The left shift is there" in words(fake_results(three_pairs(20.0)))
    level = words(fake_results(three_pairs(20.0, bias=(-1e-4, -2e-2))))
    assert "The left shift is there" not in level
    assert "No clear left shift" in level


def test_clip_sentences_follow_the_shares() -> None:
    said = words(fake_results(three_pairs(20.0, clip=(0.10, 0.12))))
    assert "Flow-GRPO clipped 0.0% of the transitions with a positive advantage and 10.0%" in said
    assert "positive ones never" in said
    assert "GRPO-Guard clipped 10.0% of the transitions with a positive advantage and 12.0%" in said
    assert "about equally often" in said
    assert "Flow-GRPO is held less tightly here" in said
    assert "negative ones 5 times less often" in words(fake_results(three_pairs(20.0, clip=(0.10, 0.02))))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(-0.0183, "\N{MINUS SIGN}0.018"), (8.04e-6, "8.0 \N{MULTIPLICATION SIGN} 10⁻⁶"), (0.0, "0")],
)
def test_small_numbers_are_readable(value: float, expected: str) -> None:
    assert text._small(value) == expected


def test_over_optimization_is_counted() -> None:
    assert "In 6 of 6 finished runs" in words(fake_results(three_pairs(20.0)))
    mild = words(fake_results(three_pairs(6.0)))
    assert "In 3 of 6 finished runs" in mild


def test_one_seed_claims_no_reliability(tmp_path: Path) -> None:
    said = words(fake_results(three_pairs(8.0)[:2], seeds=1))
    assert "single seed, which says nothing about reliability" in said
    assert "shows no reliable difference" in said
    assert "nan" not in said


def test_pages_of_unfinished_comparisons(tmp_path: Path) -> None:
    for runs in ([], three_pairs(20.0)[:1], three_pairs(20.0)[:3], [fake_run("flow_grpo", 0, [1.0, 0.5])]):
        page = write_demo_page(fake_results(list(runs)), tmp_path, partial=True).read_text(encoding="utf-8")
        assert f"interrupted when {len(runs)} of 6 runs were finished" in page
        assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()
