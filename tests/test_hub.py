"""The kernel of Hugging Face's hub, as `make hub` builds it: its files, its results, and how their package loads it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import ROOT, script
from helpers.hub import assert_compiles, assert_same_bits, load
from helpers.pages import blocks_of
from operator_calls import calls

import fastguard
from fastguard.ops.add_product import add_product_
from fastguard.ops.spaced_rows import over_spaced_rows

hub = script("hub/build.py")
WITH_KERNELS = pytest.mark.skipif(
    not [*distributions(name="kernels")], reason="Hugging Face's package kernels is not installed"
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("hub") / "build" / "hub"
    hub.build(target)
    return target


@pytest.fixture(scope="module")
def kernel(repository: Path) -> ModuleType:
    return load(repository / "build" / "torch-cuda")


def run(code: str, folder: Path, **environment: str) -> str:
    """Output of a script in a process whose working directory hides no package."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_loss_step_and_moments_have_the_bits_of_the_package(kernel: ModuleType) -> None:
    assert_same_bits(kernel)


def test_kernels_have_the_bits_of_the_package(kernel: ModuleType, kernel_device: str) -> None:
    assert_same_bits(kernel, device=kernel_device, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_every_operator_is_there_and_has_the_bits_of_the_package(
    kernel: ModuleType, backend: str, kernel_device: str
) -> None:
    ours = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(f"{kernel.__name__}::")}
    without = (over_spaced_rows, add_product_)  # which serve layers, and have no kernel of ours
    made = [call for call in calls(torch.float32, kernel_device, backend=backend) if call.op not in without]
    assert ours == {f"{kernel.__name__}::{call.op.name().partition('::')[2]}" for call in made}
    for call in made:
        operator = getattr(getattr(torch.ops, kernel.__name__), call.op.name().partition("::")[2])
        for mine, theirs in zip(replace(call, op=operator)(), call(), strict=True):
            assert torch.equal(mine, theirs), call.name


def test_losses_compile_without_a_graph_break(kernel: ModuleType) -> None:
    assert_compiles(kernel)


def test_the_public_names_are_those_of_the_package_that_need_no_diffusers(kernel: ModuleType) -> None:
    blocks = {"fuse", "fuse_flux", "unfuse", "unfuse_flux"}
    added = {"OBJECTIVES", "Objective", "build_objective", "dequantize_blocks", "dequantize_rows", "ops"}
    functions = {name for name in vars(kernel) if name.endswith("Function")}
    assert len(functions) == 5
    assert set(kernel.__all__) == set(fastguard.__all__) - blocks | added | functions
    for name in kernel.__all__:
        value = getattr(kernel, name)
        assert getattr(value, "__module__", kernel.__name__).startswith(kernel.__name__), name


def test_its_classes_are_its_own(kernel: ModuleType) -> None:
    x = torch.ones(2, 8)
    with pytest.raises(TypeError, match="Transition"):
        kernel.guard_loss(x, x, x, torch.ones(2), fastguard.dance_sde(0.5, 0.4))


def test_the_variants_differ_in_their_metadata_alone(repository: Path) -> None:
    files: dict[str, dict[str, bytes]] = {}
    for variant in sorted((repository / "build").iterdir()):
        paths = [path for path in variant.rglob("*") if path.is_file() and path.suffix != ".pyc"]
        files[variant.name] = {path.relative_to(variant).as_posix(): path.read_bytes() for path in paths}
    assert list(files) == ["torch-cpu", "torch-cuda"]
    told = {name: json.loads(texts.pop("metadata.json")) for name, texts in files.items()}
    assert files["torch-cpu"] == files["torch-cuda"]
    assert "kernels/transition.py" in files["torch-cpu"]
    assert not {name.partition("/")[0] for name in files["torch-cpu"]} & {"blocks", "train", "errors.py"}
    for name, metadata in told.items():
        backend = name.removeprefix("torch-")
        assert metadata["backend"] == {"type": backend}
        assert re.fullmatch(f"_fastguard_{backend}_[0-9a-f]{{10}}", metadata["id"])
        assert set(metadata["digest"]["files"]) == set(files[name])


def test_imports_become_relative_wherever_they_are() -> None:
    source = (
        "from fastguard.ops.registry import operator\nfrom fastguard import ops\nimport torch\n\n\ndef run():\n"
        '    """As in `from fastguard.sde import cps`."""\n    from fastguard.kernels import common\n'
    )
    made = hub.relative("loss/objectives/one.py", source)
    assert "from ...ops.registry import operator\nfrom ... import ops\nimport torch\n" in made
    assert "    from ...kernels import common\n" in made
    assert "from .sde import cps" in hub.relative("step.py", "from fastguard.sde import cps\n")
    assert hub.imported("step.py", source) == {
        "ops/__init__.py", "ops/registry.py", "kernels/__init__.py", "kernels/common.py",
    }  # fmt: skip
    hub.check("loss/objectives/one.py", made)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import fastguard.sde\n", "one.py, line 1: it imports fastguard.sde"),
        ("x = 1\nimport numpy as np\n", "one.py, line 2: it imports numpy"),
        ("def f():\n    from diffusers.utils import logging\n", "line 2: it imports diffusers.utils"),
        ("name = f'fastguard.kernels.{1}'\n", "line 1: it names fastguard"),
        ("import torch\ntorch.ops.fastguard.guard_loss\n", "line 2: it names fastguard"),
    ],
)
def test_what_the_hub_does_not_have_stops_the_build(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        hub.check("one.py", hub.relative("one.py", source))


def test_an_import_from_no_module_stops_the_build() -> None:
    with pytest.raises(ValueError, match="one.py, line 1: fastguard is no module below fastguard"):
        hub.imported("one.py", "from fastguard import guard_loss\n")


def test_a_build_is_told_apart_by_its_files_and_leaves_no_old_ones(tmp_path: Path) -> None:
    files: dict[str, str] = hub.sources()
    assert hub.metadata(files, "cpu") == hub.metadata(dict(files), "cpu")
    changed = {**files, "sde.py": files["sde.py"] + "\n"}
    assert hub.metadata(changed, "cpu")["id"] != hub.metadata(files, "cpu")["id"]
    old = tmp_path / "build" / "torch-cpu" / "old.py"
    old.parent.mkdir(parents=True)
    old.touch()
    hub.build(tmp_path)
    assert not old.exists()
    assert (old.parent / "__init__.py").exists()
    assert (tmp_path / "README.md").read_text(encoding="utf-8").startswith("---\nlibrary_name: kernels\n")


@pytest.mark.long
def test_it_imports_torch_alone(repository: Path) -> None:
    code = (
        "import sys; sys.modules.update(fastguard=None, diffusers=None, transformers=None)\n"
        "import torch; before = set(sys.modules); from pathlib import Path; import importlib.util\n"
        f"path = Path({str(repository / 'build' / 'torch-cpu' / '__init__.py')!r})\n"
        "spec = importlib.util.spec_from_file_location('one', path)\n"
        "one = sys.modules['one'] = importlib.util.module_from_spec(spec); spec.loader.exec_module(one)\n"
        "x = torch.ones(2, 8); print(one.guard_loss(x, x, x, torch.ones(2), one.dance_sde(0.5, 0.4)).loss.item())\n"
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    loss, modules = run(code, repository).splitlines()
    assert float(loss) == pytest.approx(-10)  # - advantage / |dt|
    assert modules == "['one']"


@pytest.mark.long
@WITH_KERNELS
def test_their_package_loads_it(repository: Path) -> None:
    code = (
        "from pathlib import Path; import torch; from kernels import get_local_kernel, get_loaded_kernels\n"
        "from kernels._rust import Digest; from helpers.hub import assert_compiles, assert_same_bits\n"
        "repository = Path('build/hub'); kernel = get_local_kernel(repository)\n"
        "told = get_loaded_kernels()[0].metadata; variant = Path(kernel.__file__).parent\n"
        "told.digest.validate(Digest.hash_variant(told.digest.algorithm, variant))\n"
        "assert_same_bits(kernel); assert_compiles(kernel)\n"
        "other = get_local_kernel(next(p for p in variant.parent.iterdir() if p != variant))\n"
        "assert_same_bits(other); print(kernel.__name__ == told.id, variant.name, hasattr(torch.ops, told.id))"
    )
    variant = "torch-cpu" if torch.version.cuda is None else "torch-cuda"
    assert run(code, repository.parent.parent) == f"True {variant} True\n"


@pytest.mark.long
@WITH_KERNELS
@pytest.mark.parametrize("page", ["docs/hub.md", "hub/README.md"])
def test_the_code_of_a_page_runs(page: str, repository: Path) -> None:
    (code,) = [block.code for block in blocks_of(ROOT / page) if block.language == "python"]
    printed = run(code + "\nprint(velocity.grad.abs().sum().item() > 0)", repository.parent.parent)
    assert printed == "True\n"


def test_the_card_names_all_that_is_public(kernel: ModuleType) -> None:
    named = set(re.findall(r"`(\w+)`", (ROOT / "hub" / "README.md").read_text(encoding="utf-8")))
    assert set(kernel.__all__) <= named
