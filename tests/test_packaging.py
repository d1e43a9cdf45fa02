"""The package as users get it: layout, wheel, imports, and who imports whom."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(target), "-q"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = target.glob("fastguard-*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    parts = ("__init__.py", "py.typed", "kernels/transition.py", "report/page.html")
    assert {f"fastguard/{part}" for part in parts} <= set(names)
    recipes = {f"fastguard/recipes/{name}" for name in ("flux_lora.toml", "prompts.txt", "accelerate/fsdp2.yaml")}
    assert recipes <= set(names)
    assert {name.split("/")[0] for name in names} == {"fastguard", f"fastguard-{wheel.name.split('-')[1]}.dist-info"}


def test_the_wheel_works_on_its_own(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import fastguard, torch, fastguard.kernels.transition; print(fastguard.__file__); x = torch.ones(2, 8); "
        "print(fastguard.guard_loss(x, x, x, torch.ones(2), fastguard.dance_sde(0.5, 0.4), backend='triton').loss)"
    )
    result = run(code, tmp_path, PYTHONPATH=str(tmp_path), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert str(tmp_path) in result.stdout
    assert "tensor(-10." in result.stdout  # - advantage / |dt|


def test_the_editable_install_finds_the_kernels_from_anywhere(tmp_path: Path) -> None:
    for folder in (ROOT, tmp_path):
        result = run("import fastguard.kernels as k; print(k.__file__)", folder)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == str(ROOT / "kernels" / "__init__.py")


def test_a_top_level_import_of_kernels_is_refused_and_libraries_do_not_stumble(tmp_path: Path) -> None:
    without = "import sys; sys.path = [entry for entry in sys.path if 'site-packages' not in entry]; "
    refused = run(f"{without}import kernels", ROOT)
    assert refused.returncode == 1
    assert "belongs to Hugging Face's package" in refused.stderr
    assert "pip install -e ." in refused.stderr
    # transformers imports kernels to ask for its version.
    code = (
        "from diffusers import FluxTransformer2DModel; from diffusers.utils import is_kernels_available as ours; "
        "from transformers.utils import is_kernels_available as theirs; import transformers.modeling_utils; "
        "print(ours(), theirs())"
    )
    libraries = run(code, ROOT)
    assert libraries.returncode == 0, libraries.stderr
    assert libraries.stdout == run(code, tmp_path).stdout


def test_the_folder_kernels_stands_aside_for_the_package_of_its_name(tmp_path: Path) -> None:
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("from kernels.part import name\n")
    (package / "part.py").write_text("name = 'theirs'\n")
    code = "import kernels.part; from kernels import name; import fastguard.kernels as ours; print(name, ours.__file__)"
    result = run(code, ROOT, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"theirs {ROOT / 'kernels' / '__init__.py'}\n"


def test_import_has_no_side_effects_and_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; torch_only = set(sys.modules); "
        "import fastguard as fg; new = {n.split('.')[0] for n in set(sys.modules) - torch_only}; print(sorted(new)); "
        "x = torch.ones(2, 8); print(fg.guard_loss(x, x, x, torch.ones(2), fg.dance_sde(0.5, 0.4)).loss.item())"
    )
    result = run(code, ROOT)
    assert result.returncode == 0, result.stderr
    modules, loss = result.stdout.splitlines()
    assert modules == "['fastguard']"
    assert float(loss) == pytest.approx(-10)
