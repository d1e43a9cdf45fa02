"""The benchmarks' own code: their figures that need no clock, their files, and the README that they write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_transition

    return bench_transition


def test_the_log_ratio_is_exact_where_the_textbook_s_is_not(bench: ModuleType) -> None:
    errors = bench.exactness()
    assert errors["fused"] <= 2e-11
    assert errors["textbook"] > 1e-8
    assert errors["size of the log-ratio"] < 1e-4


def test_memory_of_forward_and_backward(bench: ModuleType) -> None:
    """64 bytes a sample at most are kept; the textbook keeps the size of the latents."""
    inputs = bench.textbook.make_inputs((4, 1024, 64), bench.torch.float32)
    latents_bytes = inputs.latents.nbytes
    kept = {name: bench.textbook.kept_bytes(bench.LOSSES[name], inputs) for name in ("fused", "textbook")}
    assert 0 < kept["fused"] <= 64 * 4
    assert kept["textbook"] >= latents_bytes
    peak = bench.peak_bytes(lambda: bench.both(bench.LOSSES["fused"], inputs))
    assert latents_bytes <= peak < 1.1 * latents_bytes  # the gradient, and next to nothing else


def test_the_gpu_suite_walks_its_path_and_refuses_without_a_gpu() -> None:
    suite = [sys.executable, "benchmarks/gpu_suite.py"]
    dry = subprocess.run([*suite, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert dry.returncode == 0, dry.stderr
    for row in ("copy", "loss forward", "loss backward", "sde_step", "fused forward + backward", "textbook forward"):
        assert row in dry.stdout
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(suite, cwd=ROOT, capture_output=True, text=True, check=False, env=hidden)
    assert refused.returncode == 1
    assert "needs a CUDA device" in refused.stderr


def test_results_are_appended_and_the_readme_is_made_from_them(bench, tmp_path, monkeypatch) -> None:
    import plot
    import results

    row = {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0, "times_fused": 4.0, "bytes_kept_for_backward": 5}
    numbers = {
        "dtype": "torch.float32",
        "forward_backward": {"2x3": {name: row for name in ("textbook", "compiled", "fused")}},
        "log_ratio_error": {"fused": 1e-12, "textbook": 1e-7, "size of the log-ratio": 1e-6},
    }
    env = results.environment()
    path = results.save("loss", {**env, "time": "2026-01-01T00:00:00"}, {"older": True}, tmp_path / "results")
    assert env["commit"] in path.name
    later = {**env, "time": "2026-01-01T00:00:01"}
    for _ in range(2):  # a run saved twice stays one run
        assert results.save("loss", later, numbers, tmp_path / "results") == path
    content = json.loads(path.read_text())
    assert [run["environment"]["time"][-1] for run in content["loss"]] == ["0", "1"]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    monkeypatch.setattr(plot, "README", readme)
    monkeypatch.setattr(plot, "PLOTS", tmp_path / "plots")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "load", lambda: [content])
    plot.main()
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 2x3 | 2.00 ms | 2.00 ms | 2.00 ms | 4.0, 4.0 | 5 B to 5 B |" in text
    assert "not yet measured" in text
    assert len(list((tmp_path / "plots").glob("*.png"))) == 1
