"""Write the kernel of Hugging Face's hub: `make hub` makes build/hub, a repository as their package `kernels` loads it.

A variant is a copy of the modules that hub/kernel.py imports, which itself becomes their `__init__.py`. Their imports
are made relative, since the hub gives each build a name of its own: several builds, and an installed fastguard, can be
loaded at once. Operators are registered under that name (`NAMESPACE` in fastguard/ops/registry.py).
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "fastguard"
BACKENDS = {"torch-cuda": "cuda", "torch-cpu": "cpu"}
"""the variants, and the backend of torch that each is for; their files are the same"""
ALLOWED = {*sys.stdlib_module_names, "torch", "triton"}
"""what a kernel of the hub may import"""


def build(target: Path) -> None:
    """Write the repository into a folder. Raises ValueError where a file would need more than the variant has."""
    files = sources()
    for variant, backend in BACKENDS.items():
        folder = target / "build" / variant
        shutil.rmtree(folder, ignore_errors=True)  # a module that is no longer needed would stay
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        (folder / "metadata.json").write_text(json.dumps(metadata(files, backend), indent=2) + "\n", encoding="utf-8")
    for document in (ROOT / "hub" / "README.md", ROOT / "LICENSE"):
        shutil.copy(document, target)


def sources() -> dict[str, str]:
    """The files of a variant, by their paths in it."""
    # An operator finds its kernel by name, so no import says which are needed.
    waiting = ["__init__.py", *(f"kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py"))]
    files: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        if name in files:
            continue
        text = source_of(name).read_text(encoding="utf-8")
        if name == "kernels/__init__.py":
            # Its code guards the top-level folder of a checkout.
            text = f'"""{ast.get_docstring(ast.parse(text))}"""\n'
        files[name] = relative(name, text)
        check(name, files[name])
        waiting.extend(imported(name, text))
    return dict(sorted(files.items()))


def source_of(name: str) -> Path:
    """Where a file of the variant comes from."""
    if name == "__init__.py":
        return ROOT / "hub" / "kernel.py"
    return ROOT / name if name.startswith("kernels/") else ROOT / PACKAGE / name


def imported(name: str, text: str) -> set[str]:
    """The files of the variant that a source's imports run: modules, and the packages around them."""
    files: set[str] = set()
    for node in own_imports(ast.parse(text)):
        modules = [f"{node.module}.{alias.name}" for alias in node.names]  # some are functions, without a file
        found = [files_of(node.module or ""), *map(files_of, modules)]
        if not any(found):
            raise ValueError(f"{name}, line {node.lineno}: {node.module} is no module below {PACKAGE}; import from one")
        files.update(*found)
    return files


def own_imports(tree: ast.Module) -> list[ast.ImportFrom]:
    """Every `from fastguard... import`, also those inside functions."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [node for node in nodes if (node.module or "").partition(".")[0] == PACKAGE]


def files_of(module: str) -> set[str]:
    """`fastguard.loss.api`: its file and that of fastguard.loss, by their paths in the variant."""
    parts = module.split(".")[1:]
    packages = ["/".join([*parts[:depth], "__init__.py"]) for depth in range(1, len(parts) + 1)]
    return {name for name in ("/".join(parts) + ".py", *packages) if source_of(name).is_file()}


def relative(name: str, text: str) -> str:
    """A source with imports relative to its place in the variant."""
    lines = text.splitlines(keepends=True)
    root = "." * (name.count("/") + 1)
    for node in own_imports(ast.parse(text)):
        place = root + str(node.module).removeprefix(PACKAGE).removeprefix(".")
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f"from {node.module} import", f"from {place} import", 1)
    return "".join(lines)


def check(name: str, text: str) -> None:
    """Raise ValueError where a file imports what the hub does not allow, or names the package outside its prose."""
    nodes: list[Any] = [*ast.walk(ast.parse(text))]
    prose = {node.value for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [str(node.module)]
        for module in modules:
            if module.partition(".")[0] not in ALLOWED:
                raise ValueError(
                    f"{name}, line {node.lineno}: it imports {module}; a kernel of the hub may import the standard "
                    "library, torch and triton, and `from fastguard.x import y` of itself"
                )
        words = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
        if node not in prose and any(PACKAGE in word for word in words):
            raise ValueError(
                f"{name}, line {node.lineno}: it names {PACKAGE}, which the hub does not have; "
                "derive the name from `__name__`, as fastguard/ops/registry.py does"
            )


def metadata(files: dict[str, str], backend: str) -> dict[str, Any]:
    """What `kernels` asks of a variant. The id is the name that it is loaded by: equal files have equal ids."""
    (version,) = re.findall(r'^__version__ = "(\d+)\.', (ROOT / PACKAGE / "__init__.py").read_text("utf-8"), re.M)
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in files.items()}
    build_id = hashlib.sha256(b"".join(name.encode() + digest for name, digest in digests.items())).hexdigest()[:10]
    return {
        "id": f"_{PACKAGE}_{backend}_{build_id}",
        "name": PACKAGE,
        "version": int(version),  # the hub counts incompatible versions
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(digest).decode() for name, digest in digests.items()},
        },
    }


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub"
    build(target)
    print(f"wrote {target}: {', '.join(BACKENDS)}")
