"""Code of a Markdown page, applied to a copy of the package and run as it stands.

A block with a title is a file of that name: new, or with `diff` a change to one that is there. A block without one is a
Python script, or shell commands. Files below fastguard/ and kernels/ belong to the package, others to the folder in
which the scripts run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

RUN = {"python": [sys.executable], "bash": ["bash", "-e"]}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    title: str
    """name of a file, or empty"""
    code: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page that name a language, in order."""
    found = re.findall(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', page.read_text(encoding="utf-8"), re.S | re.M)
    return [Block(*parts) for parts in found]


def changed(text: str, diff: str) -> str:
    """A text after a change, written as lines of context, of - and of +. Raises ValueError if it does not fit."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    if text.count(old) != 1:
        raise ValueError(f"this occurs {text.count(old)} times in the file, expected once:\n{old}")
    return text.replace(old, new)


def run_page(page: Path, folder: Path) -> list[Block]:
    """Apply and run the blocks of a page in order; returns them. Raises AssertionError with the output of a failure."""
    package, work = folder / "package" / "fastguard", folder / "work"
    for source, target in (("fastguard", package), ("kernels", package / "kernels"), ("recipes", package / "recipes")):
        shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
    work.mkdir()
    paths = os.pathsep.join([str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": paths, "PATH": path, "FASTGUARD_CACHE": str(folder / "cache")}
    blocks = blocks_of(page)
    for number, block in enumerate(blocks):
        if block.title:
            inside = re.sub(r"^fastguard/", "", block.title)
            file = package / inside if block.title.startswith(("fastguard/", "kernels/")) else work / block.title
            code = changed(file.read_text(), block.code) if block.language == "diff" else block.code
            assert file.exists() == (block.language == "diff"), f"{block.title} is not what its block says"
            file.write_text(code)
        elif block.language in RUN:
            script = work / f"block_{number}"
            script.write_text(block.code)
            done = subprocess.run(
                [*RUN[block.language], str(script)], cwd=work, env=environment, capture_output=True, text=True,
                timeout=300, check=False,
            )  # fmt: skip
            assert done.returncode == 0, f"{page.name}, block {number}:\n{block.code}\n{done.stdout}{done.stderr}"
    return blocks
