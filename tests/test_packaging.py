"""The package as users get it: layout, wheel, imports, and who imports whom."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import ROOT, script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import fastguard
from fastguard import extras
from fastguard.extras import DISTRIBUTION, MODULES, MissingExtraError

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = "https://github.example/group/project"
"""where the distributions of these tests were built, as far as they know"""
NO_NUMPY = {"PYTHONWARNINGS": "ignore:Failed to initialize NumPy:UserWarning"}
"""torch itself warns when it is imported where numpy is not installed"""


def run(code: str, cwd: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def requirements(extra: str) -> dict[str, Requirement]:
    """What an extra brings beyond the core, with the extras that it names, by name."""
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    found = {}
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == DISTRIBUTION:
            for named in requirement.extras:
                found.update(requirements(named))
        elif requirement.name not in core:
            found[requirement.name] = requirement
    return found


def beyond_the_core() -> list[str]:
    """Every module that is installed here and that neither torch nor triton brings."""
    brought, waiting = {DISTRIBUTION, "fastguard", "setuptools"}, ["torch", "triton"]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name not in brought:
            brought.add(name)
            needed = map(Requirement, metadata.requires(name) or [])
            waiting += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    provided = metadata.packages_distributions().items()
    return [module for module, names in provided if not brought & {canonicalize_name(name) for name in names}]


def run_bare(code: str, cwd: Path, *without: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the code where these modules, or all that torch and triton do not bring, cannot be imported."""
    block = "import json, sys; sys.modules.update(dict.fromkeys(json.loads(sys.argv.pop(1))))\n"
    return run(block + code, cwd, json.dumps(without or beyond_the_core()), **environment)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it, as a release builds them."""
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    server, _, repository = REPOSITORY.rpartition("/group/")
    environment = {"GITHUB_SERVER_URL": server, "GITHUB_REPOSITORY": f"group/{repository}", "GITHUB_REF_NAME": "v9"}
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (path,) = distributions.glob(f"fastguard_rl-{fastguard.__version__}-*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    parts = ("__init__.py", "py.typed", "kernels/transition.py", "report/page.html")
    assert {f"fastguard/{part}" for part in parts} <= set(names)
    recipes = {f"fastguard/recipes/{name}" for name in ("flux_lora.toml", "prompts.txt", "accelerate/fsdp2.yaml")}
    assert recipes <= set(names)
    assert {name.split("/")[0] for name in names} == {"fastguard", f"fastguard_rl-{fastguard.__version__}.dist-info"}


def test_pypi_takes_the_distributions_and_its_page_has_absolute_links(distributions: Path, wheel: Path) -> None:
    files = [str(path) for path in distributions.iterdir()]
    assert len(files) == 2
    check = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    info = zipfile.Path(wheel) / f"fastguard_rl-{fastguard.__version__}.dist-info"
    told = metadata.PathDistribution(info).metadata  # type: ignore[arg-type]
    assert (told["Name"], told["Version"]) == (DISTRIBUTION, fastguard.__version__)
    addresses = dict(text.split(", ") for text in told.get_all("Project-URL") or [])
    assert {"Repository": REPOSITORY, "Changelog": f"{REPOSITORY}/blob/v9/CHANGELOG.md"}.items() <= addresses.items()
    page = told.get_payload()  # type: ignore[attr-defined]
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert links
    assert all(link.startswith("https://") for link in links)
    ours = [link.removeprefix(f"{REPOSITORY}/").split("/", 2) for link in links if link.startswith(REPOSITORY)]
    assert len(ours) > 10
    for kind, tag, path in ours:
        assert (kind, tag) == ("raw" if path.endswith(".png") else "blob", "v9")
        assert (ROOT / path.partition("#")[0]).exists(), path


def test_links_stay_as_they_are_where_the_repository_is_not_known() -> None:
    setup = script("setup.py")
    text = "[a](docs/a.md#b) ![c](c.png) [d](https://e.f) [g](#h)"
    assert setup.description(text, None, "main") == text
    assert setup.addresses(None, "main") == {}
    assert setup.description(text, "https://x", "v1") == (
        "[a](https://x/blob/v1/docs/a.md#b) ![c](https://x/raw/v1/c.png) [d](https://e.f) [g](#h)"
    )


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


def test_the_core_works_with_torch_alone_and_each_other_part_says_what_to_install(tmp_path: Path) -> None:
    """Neither numpy nor triton's interpreter is there, and no package of an extra."""
    code = """
import pkgutil
import torch
import fastguard as fg
from fastguard.extras import MissingExtraError
from fastguard.ops.gelu import bias_gelu_fwd

x = torch.randn(2, 8)
step = fg.flow_sde(torch.tensor([0.9, 0.5]), torch.tensor([0.8, 0.4]), 0.7)
out = fg.sde_step(x, 2 * x, step, seeds=torch.arange(2))
velocity = (2 * x).requires_grad_()
fg.guard_loss(velocity, 2 * x, out.noise, torch.ones(2), step, clip_range=1.0).loss.backward()
assert velocity.grad.abs().sum() > 0
assert fg.transition_moments(velocity, 2 * x, out.noise, step).drift.tolist() == [0, 0]
assert bias_gelu_fwd(x[None], None, None, "torch").shape == (1, 2, 8)

failed = {}
def note(name):
    failed[name] = sys.exc_info()[1]
for module in pkgutil.walk_packages(fg.__path__, "fastguard.", onerror=note):
    try:
        __import__(module.name)
    except ImportError as error:
        note(module.name)
others = {name: repr(error) for name, error in failed.items() if not isinstance(error, MissingExtraError)}
print(json.dumps([sorted(failed), others, str(failed["fastguard.train"])]))
try:
    fg.fuse(torch.nn.Linear(1, 1))
except ImportError as error:
    print(error)
"""
    done = run_bare(code, tmp_path)
    assert done.returncode == 0, done.stderr
    report, fuse = done.stdout.splitlines()
    failed, others, train = json.loads(report)
    parts = ("backbones", "blocks", "cli", "commands", "config", "demo", "memory", "prompts", "recipe", "report")
    assert {f"fastguard.{part}" for part in (*parts, "rewards", "train")} <= set(failed)
    # The parts share utils.
    assert not [name for name in others if not name.startswith("fastguard.utils.")], others
    assert not [name for name in failed if name.startswith("fastguard.integrations")]
    assert train.startswith("this needs the extra 'train' of fastguard; not installed: diffusers, peft, accelerate, ")
    assert train.endswith(". Run pip install 'fastguard-rl[train]'")
    assert fuse == (
        "this needs the extra 'blocks' of fastguard; not installed: diffusers, peft. "
        "Run pip install 'fastguard-rl[blocks]'"
    )


@pytest.mark.parametrize(
    ("args", "missing", "extra"),
    [
        (("train", "flux_tiny"), ("tyro", "pydantic"), "train"),
        (("--help",), (), "train"),
        (("demo", "--quick"), ("sklearn",), "demo"),
    ],
    ids=["train", "help", "demo"],
)
def test_a_command_without_its_extra_is_one_line(
    args: tuple[str, ...], missing: tuple[str, ...], extra: str, tmp_path: Path
) -> None:
    code = f"sys.argv[1:] = {args!r}; from fastguard.__main__ import main; sys.exit(main())"
    done = run_bare(code, tmp_path, *missing, **NO_NUMPY)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fastguard: this needs the extra '{extra}' of fastguard; not installed: ")
    assert all(name in line for name in missing)
    assert line.endswith(f". Run pip install 'fastguard-rl[{extra}]'")


def test_an_older_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """pip installs the core there, and none of the extras."""
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(
        MissingExtraError, match=r"'train' of fastguard, and so Python 3\.11 or newer; this is .* 3\.10$"
    ):
        extras.need.__wrapped__("train")


def test_extras_bring_the_modules_that_the_package_asks_for() -> None:
    provided = metadata.packages_distributions()
    for extra, modules in MODULES.items():
        brought = set(requirements(extra)) - {"tensorboard"}  # without it, its metrics are all that is missing
        assert {canonicalize_name(provided[module][0]) for module in modules} == brought, extra
    for extra in PROJECT["optional-dependencies"]:
        assert requirements(extra).items() <= requirements("dev").items(), extra
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        named = re.findall(r"pip install[^`\n]*\[([\w,]+)\]", page.read_text(encoding="utf-8"))
        assert {extra for names in named for extra in names.split(",")} <= PROJECT["optional-dependencies"].keys(), page


def test_the_floors_that_are_tested_are_those_of_the_metadata() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    extras = PROJECT["optional-dependencies"]
    floors = {"lowest": PROJECT["dependencies"], "blocks": extras["blocks"]}
    floors["trainer"] = [*extras["blocks"], *extras["train"], *extras["lowbit"]]  # the last one that names it counts
    for name, required in floors.items():
        (line,) = re.findall(rf"^\$\(FLOORS\)/{name}/.ready: VERSIONS = (.*)$", makefile, re.MULTILINE)
        tested = {package: Version(version) for package, version in re.findall(r"([\w-]+)==([\d.]+)", line)}
        lowest = {r.name: str(r.specifier).removeprefix(">=") for r in map(Requirement, required) if r.specifier}
        assert tested == {package: Version(version) for package, version in lowest.items()}
    lowest, newest = re.findall(r"^PYTHON_\w+ \?= python([\d.]+)$", makefile, re.MULTILINE)
    assert PROJECT["requires-python"] == f">={lowest}"
    versions = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if ":: 3." in text]
    assert (versions[0], versions[-1]) == (lowest, newest)


def test_a_tag_is_published_by_a_job_that_pypi_trusts() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8"))
    assert workflow[True] == {"push": {"tags": ["v*"]}}  # YAML takes `on` for a truth value
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert publish["needs"] == "build"
    assert publish["environment"]["name"] == "pypi"
    assert (workflow["permissions"], publish["permissions"]) == ({"contents": "read"}, {"id-token": "write"})
    assert "permissions" not in build
    assert publish["steps"][-1]["uses"].startswith("pypa/gh-action-pypi-publish@")
    assert any("fastguard_rl-${GITHUB_REF_NAME#v}.tar.gz" in step.get("run", "") for step in build["steps"])


@pytest.mark.slow
def test_an_environment_of_the_core_holds_torch_and_triton_alone(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    environment = {**{name: value for name, value in os.environ.items() if name != "PYTHONPATH"}, **NO_NUMPY}

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    constraints = str(ROOT / "constraints.txt")
    installed = call(python, "-m", "pip", "install", "--disable-pip-version-check", "-c", constraints, str(wheel))
    assert installed.returncode == 0, installed.stderr
    listed = call(python, "-m", "pip", "list", "--format", "json", "--disable-pip-version-check").stdout
    names = {entry["name"] for entry in json.loads(listed)}
    assert {"torch", "triton", DISTRIBUTION} <= names
    assert not names & {"numpy", *(name for extra in MODULES for name in requirements(extra) if name != "jinja2")}
    code = (
        "import fastguard as fg, torch; x = torch.ones(2, 8); "
        "print(fg.guard_loss(x, x, x, torch.ones(2), fg.dance_sde(0.5, 0.4)).loss.item())"
    )
    worked = call(python, "-c", code)
    assert worked.returncode == 0, worked.stderr
    assert float(worked.stdout) == pytest.approx(-10)
    refused = call(str(tmp_path / "venv/bin/fastguard"), "train", "flux_tiny")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    line = refused.stderr.rpartition("Run ")[2].strip()
    assert line == "pip install 'fastguard-rl[train]'"
    # The version that is installed has the extra: pip needs no newer one.
    plan = call(python, "-m", "pip", "install", "--dry-run", "-c", constraints, f"{DISTRIBUTION}[train]")
    assert plan.returncode == 0, plan.stderr
    assert "diffusers" in plan.stdout.rpartition("Would install")[2]
