"""The README and the pages of docs/: their code as it stands, their figures against their sources, their paths."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT, script
from helpers.flux_models import make_transformer
from helpers.forks import FASTGUARD, Fork
from helpers.pages import blocks_of

from fastguard.recipe import shipped_names
from fastguard.rewards.remote import RemoteReward

README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [README, *(DOCS / f"{name}.md" for name in ("loss", "blocks", "objectives", "advantages"))]
TEXT = README.read_text(encoding="utf-8")
EXAMPLES: set[str] = set()
"""files that only a page has"""


def names_of_a_trainer() -> dict[str, Any]:
    """What the pages take for granted."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    sigmas = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.0])
    weight = torch.zeros(16, requires_grad=True)
    return {
        "sigma": sigmas[1].expand(4),
        "sigma_next": sigmas[2].expand(4),
        "sigmas": sigmas,
        "device": "cpu",
        "latents": randn(4, 8, 16),
        "old_velocity": randn(4, 8, 16),
        "noise": randn(4, 8, 16),
        "seeds": torch.arange(4),
        "advantages": randn(4),
        "rewards": randn(4),
        "prompt_indices": torch.tensor([0, 0, 1, 1]),
        "step_rewards": randn(4, 3).abs(),
        "model": lambda latents, sigma, *_: latents * 0.1 + weight,
        "prev_sample": randn(4, 8, 16),
        "prev_sample_mean": randn(4, 8, 16).requires_grad_(),
        "old_prev_sample_mean": randn(4, 8, 16),
        "ref_velocity": randn(4, 8, 16),
        "transformer": make_transformer(),
        "weight": weight,
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_python_of_a_page_runs_in_one_session(page: Path) -> None:
    names = names_of_a_trainer()
    if page.stem == "objectives":
        exec("import fastguard as fg\nstep = fg.flow_sde(sigma, sigma_next)\nvelocity = model(latents, sigma)", names)
    codes = [block.code for block in blocks_of(page) if block.language == "python"]
    assert codes
    for code in codes:
        exec(compile(code, str(page), "exec"), names)
    if page.stem in ("README", "loss"):
        assert names["weight"].grad.abs().sum() > 0
        assert names["result"].loss.requires_grad
    if page.stem in ("README", "blocks"):
        assert len(names["report"].fused) == 4


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTGUARD_CACHE", str(tmp_path / "cache"))
    lines = [line for block in blocks_of(README) if block.language == "bash" for line in block.code.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    installing = [command for command in commands if command[0] == "pip"]  # tests/test_packaging.py builds and installs
    commands = [command for command in commands if command not in installing]
    assert len(installing) == 3
    assert sum(command[0] == "fastguard" for command in commands) == len(commands) - 2
    for program, *arguments in commands:
        if program == "fastguard":
            fewer = ["--run.epochs", "1"] if arguments[0] == "train" else []  # a minute less
            process = Fork(FASTGUARD, *arguments, *fewer, folder=tmp_path)
            assert process.wait() == 0, f"fastguard {' '.join(arguments)}\n{process.said()}"
            continue
        # What make would do takes minutes; the two are run by people and by CI.
        command = ["make", "--dry-run", "--directory", str(ROOT), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs" / "flux_tiny" / "checkpoints" / "epoch_000001").is_dir()
    assert (tmp_path / "runs" / "flux_tiny" / "report.html").is_file()


def test_the_figures_of_the_readme_are_those_of_their_sources() -> None:
    measured = (DOCS / "benchmarks.md").read_text(encoding="utf-8")

    def cells(start: str, pattern: str) -> list[str]:
        lines = [line.split("|")[2:-1] for line in measured.splitlines() if line.startswith(f"| {start}")]
        found = [[match[1] for cell in line if (match := re.search(pattern, cell))] for line in lines]
        return [line for line in found if line][-1]  # of the machine that was measured last

    fused, naive = cells("log-ratio at D = 65,536", r"^ ([\d.e-]+),")
    assert f"naive {naive} | {fused} |" in TEXT
    kept = cells("4x4096x64 fp32 | both", r"([\d.]+ (?:MiB|B)) kept")
    per_element = float(kept[0].removesuffix(" MiB")) * 2**20 / (4 * 4096 * 64)
    per_sample = float(kept[2].removesuffix(" B")) / 4
    assert f"naive {per_element:g} bytes an element | {per_sample:g} bytes a sample |" in TEXT
    times = [float(us.replace(",", "")) for us in cells("4x4096x64 fp32", r"([\d,.]+) us \(")]
    eager, compiled, ours = (f"{time:,.0f}" for time in times)
    assert f"naive {eager} us, compiled {compiled} us | {ours} us |" in TEXT
    memory = script("docs/memory.py")
    rows = {(row["recipe"], row["level"]): row for row in json.loads(memory.TABLE.read_text())}
    unfused, pointwise = (rows["flux_lora_1024", level] for level in ("unfused", "pointwise"))
    assert pointwise["flops"] == unfused["flops"]
    saved = [f"{row['saved_for_backward'] / 2**30:.1f} GiB" for row in (unfused, pointwise)]
    assert f"diffusers {saved[0]} | {saved[1]}, no extra matmul |" in TEXT
    mlp = rows["flux_lora_1024", "mlp"]
    peaks = [f"{memory.peak_gib(row):.1f} GiB" for row in (unfused, mlp)]
    assert f"diffusers {peaks[0]} | {peaks[1]}, with {mlp['flops'] / unfused['flops']:.2f} times the FLOPs |" in TEXT


def test_the_readme_is_short_and_its_links_and_paths_are_there() -> None:
    assert len(TEXT.splitlines()) <= 160
    for page in (README, *DOCS.rglob("*.md")):
        prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)#\s]+)", prose):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
    (tree,) = re.findall(r"```\n(fastguard/\n.*?)```", TEXT, re.DOTALL)
    above: list[str] = []
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.match(r"\s*(\S+(?: {1,2}\S+[./]\S*)*)", line)
        assert names
        for name in names[1].split():
            path = ROOT.joinpath(*above[:depth], name)
            assert path.exists(), path
        above[depth:] = [names[1].split()[0]]


def test_the_docs_name_files_that_are_there() -> None:
    for page in (*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md"):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:tests|fastguard|kernels|recipes|docs|examples)/[\w./]*)`", text):
            known = (ROOT / name).exists() or "NAME" in name or name in EXAMPLES
            assert known, f"{page.name}: {name}"
    page = (DOCS / "robustness.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:tests/)?(\w+\.py)`", page))
    assert len(named) > 10
    there = {path.name for path in (ROOT / "tests").rglob("*.py")}
    assert named <= there, named - there


def test_the_docs_state_how_long_a_remote_call_may_take() -> None:
    longest_s = RemoteReward("http://that-machine:8000").longest_s
    assert f"({longest_s:g} s by default" in (DOCS / "rewards.md").read_text(encoding="utf-8")
    assert f"({longest_s:g} s unless" in (RemoteReward.__doc__ or "")


def test_the_docs_list_every_recipe() -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for name in shipped_names():
        assert f"`{name}`" in text
