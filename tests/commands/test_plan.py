"""`fastguard plan` as a user calls it: as text, as data, and with an exit code, on the tiny Flux pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import ROOT

from fastguard import cli
from fastguard.config import HardwareConfig
from fastguard.errors import UserError
from fastguard.memory import hours, plan, propose, run_flops
from fastguard.recipe import find_recipe, load_recipe

GIB = 2**30
Said = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def tight() -> tuple[str, ...]:
    """Options with which the update does not fit, and would with the level "mlp"."""
    options = ("--sampler.decode-batch", "1", "--model.recompute")
    enough: Any = cli.parse_command(["plan", "flux_tiny", *options, "mlp"])
    return (*options, "none", "--hardware.memory-gb", str((plan(enough.recipe).peak + 1) / 1e9))


@pytest.fixture
def said(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Said:
    """Exit code and stdout of `fastguard plan flux_tiny`."""
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))

    def run(*options: str) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(["plan", "flux_tiny", *options])
        return code, capsys.readouterr().out

    return run


def test_a_plan_that_fits_is_said_and_written(said: Said) -> None:
    code, text = said()
    assert code == 0
    data = json.loads(said("--json")[1])
    assert said("--json")[0] == 0
    recipe = load_recipe(find_recipe("flux_tiny"))
    predicted, flops = plan(recipe), run_flops(recipe)
    assert data["recipe"] == "flux_tiny"
    assert data["totals"] == {
        "epochs": 12, "gpus": 1, "images_per_epoch": 32, "images_per_gpu": 32, "updates_per_epoch": 4,
        "transitions_per_update_and_gpu": 80, "micro_batch": 40, "images": 384, "updates": 48,
    }  # fmt: skip
    assert data["blocks"] == {"fused": 3, "unfused": {}}
    assert (data["fits"], data["proposal"], data["recompute"]) == (True, None, predicted.recompute)
    assert data["notes"] == list(predicted.notes)
    for phase, planned in zip(data["phases"], predicted.phases, strict=True):
        parts = {name.removesuffix("_gib"): value for name, value in phase.items() if name != "name"}
        assert phase["name"] == planned.name
        assert parts == {name: getattr(planned, name) / GIB for name in parts}
        assert parts.keys() >= {"weights", "gradients", "optimizer", "activations", "trajectories", "host", "peak"}
    assert data["peak_gib"] == predicted.peak / GIB
    assert data["limit_gib"] == 80e9 // 1 / GIB
    assert data["flops"]["epoch"]["total"] == flops.epoch.total
    assert data["flops"]["epoch"]["update"] == flops.epoch.update
    assert (data["flops"]["parity"], data["flops"]["run"]) == (flops.parity, flops.total)
    assert data["hours"] == {
        "epoch": hours(flops.epoch.total, 989, 0.4), "run": hours(flops.total, 989, 0.4),
        "assumed_utilisation": 0.4, "tflops": 989,
    }  # fmt: skip
    assert f"{data['hours']['run']:.3g} for 12 epochs, at an assumed utilisation of 40% of 989 TFLOP/s" in text
    gflop = {name: f"{count / 1e9:.1f}" for name, count in data["flops"]["epoch"].items()}
    assert f"GFLOP per epoch and GPU: rollout {gflop['rollout']}, decode {gflop['decode']}" in text
    for note in (*data["notes"], *data["assumptions"]):
        assert f"- {note}" in text


def test_a_plan_that_does_not_fit_ends_with_what_would(said: Said, tight: tuple[str, ...]) -> None:
    code, text = said(*tight)
    assert code == 1
    code, written = said(*tight, "--json")
    assert code == 1
    data = json.loads(written)
    found = data["proposal"]
    assert not data["fits"]
    assert (found["fits"], found["changes"], found["toml"]) == (
        True,
        {"model.recompute": "mlp"},
        '[model]\nrecompute = "mlp"',
    )
    assert found["peak_gib"] < data["limit_gib"] < data["peak_gib"]
    options = found["options"].split()
    code, _ = said(*tight, *options)
    assert code == 0
    assert found["options"] in text
    changed: Any = cli.parse_command(["plan", "flux_tiny", *tight, *options])
    assert found["hours"]["epoch"] == hours(run_flops(changed.recipe).epoch.total, 989, 0.4)
    assert f"{found['hours']['run']:.3g} for 12 epochs" in text.partition("Fits with")[2]
    asked: Any = cli.parse_command(["plan", "flux_tiny", *tight])
    for tried, planned in zip(found["tried"], propose(asked.recipe).tried, strict=True):
        assert (tried["field"], tried["value"], tried["fits"]) == (planned.field, planned.value, planned.fits)
        assert tried["peak_gib"] == max(tried["peaks_gib"].values()) == planned.peak / GIB
        assert re.search(rf"^[+ ] {re.escape(planned.change)} .*\d", text, re.MULTILINE)
    assert len(text.splitlines()) < 60
    assert max(map(len, text.splitlines())) <= 120


def test_the_hours_follow_the_utilisation_and_the_gpu(said: Said) -> None:
    at_40 = json.loads(said("--json")[1])["hours"]
    slower = json.loads(said("--json", "--utilisation", "0.2", "--hardware.tflops", "494.5")[1])["hours"]
    assert slower["epoch"] == pytest.approx(4 * at_40["epoch"])
    assert (slower["assumed_utilisation"], slower["tflops"]) == (0.2, 494.5)
    assert "20% of 494.5 TFLOP/s" in said("--utilisation", "0.2", "--hardware.tflops", "494.5")[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--utilisation", "0"), "--utilisation must lie in (0, 1], got 0.0"),
        (("--utilisation", "1.5"), "--utilisation must lie in (0, 1], got 1.5"),
        (("--utilisation", "nan"), "--utilisation must lie in (0, 1], got nan"),
        (("--json", "--kept"), "--kept prints tables alone: leave out --json"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    said: Said, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert cli.main(["plan", "flux_tiny", *options]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize("tflops", [0.0, -1.0, 2e6])
def test_the_peak_of_a_gpu_is_positive(tflops: float) -> None:
    with pytest.raises(UserError, match="tflops must be "):
        HardwareConfig(tflops=tflops)


def test_the_page_names_every_field_of_the_data(said: Said, tight: tuple[str, ...]) -> None:
    page = (Path(ROOT) / "docs" / "plan.md").read_text(encoding="utf-8")

    def names(value: Any) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(names, value)) if value else set()
        return set(value).union(*map(names, value.values())) if isinstance(value, dict) else set()

    data = json.loads(said(*tight, "--json")[1])
    free = {*data["proposal"]["changes"], *data["blocks"]["unfused"], *data["proposal"]["tried"][0]["peaks_gib"]}
    missing = {name for name in names(data) - free if f"`{name}`" not in page}
    assert not missing
