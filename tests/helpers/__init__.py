"""What several tests use: toy models, runs as processes, golden cases."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from fastguard.loss.objectives import OPTIONS

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent


def script(path: str) -> ModuleType:
    """A program of the repository that is in no package, such as docs/memory.py, as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_options(objective: str, **options: Any) -> dict[str, Any]:
    """The objective's name, and the options without those of other objectives."""
    others = {option for options in OPTIONS.values() for option in options} - {*OPTIONS[objective]}
    return {"objective": objective, **{name: value for name, value in options.items() if name not in others}}
