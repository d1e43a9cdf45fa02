"""Commands print their own lines and nothing of the libraries they use; matplotlib is imported only to draw plots."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EPOCH = r"epoch 1 of 1: reward \S+, \S+ s\n"
TINY = ("flux_tiny", "--run.dir", "tiny")
COMMANDS = {
    ("doctor",): "",
    ("plan", "flux_tiny"): "",
    ("train", *TINY, "--run.epochs", "1"): rf"encoding prompts: 48\n{EPOCH}",
    ("sample", *TINY, "--images", "1", "--steps", "1"): "",
    ("report", "tiny"): "",
    ("reward-server", "nothing"): r"fastguard: rewards\.use = 'nothing'.*\n",
}
"""Commands, and what each says on stderr."""
PROGRAM = f"""
import os, sys
from fastguard import cli
for i, args in enumerate({list(COMMANDS)}):
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{{i}}.{{name}}", os.O_CREAT | os.O_WRONLY), number)
    assert cli.main(args) == (2 if args[0] == "reward-server" else 0)
    assert args[0] in ("report", "reward-server") or "matplotlib" not in sys.modules, args
assert "matplotlib" in sys.modules
"""
"""All in one process, which imports the libraries once. The demo's workers are in tests/demo."""


def test_stderr_holds_only_what_commands_say(tmp_path: Path) -> None:
    environment = {**os.environ, "FASTGUARD_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    # Set by tests before this one, and by conftest.py: the interpreter of kernels takes minutes.
    for variable in ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TRITON_INTERPRET"):
        environment.pop(variable, None)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, timeout=600, check=False
    )
    said = [(tmp_path / f"{i}.err").read_text() for i in range(len(COMMANDS)) if (tmp_path / f"{i}.err").exists()]
    assert result.returncode == 0, said[-1:]
    assert not result.stdout + result.stderr
    for (command, expected), stderr in zip(COMMANDS.items(), said, strict=True):
        assert re.fullmatch(expected, stderr), (command, stderr)
    assert (tmp_path / "4.out").read_text() == "tiny/report.html\n"
    shown = "".join((tmp_path / f"{i}.out").read_text() for i in range(len(COMMANDS)))
    assert not re.search(r"(?i)warning|deprecat|unable|\[W", shown)
