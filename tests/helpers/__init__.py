"""What several tests use: toy models, runs as processes, golden cases."""

from pathlib import Path
from typing import Any

from fastguard.loss.objectives import OPTIONS

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent


def own_options(objective: str, **options: Any) -> dict[str, Any]:
    """The objective's name, and the options without those of other objectives."""
    others = {option for options in OPTIONS.values() for option in options} - {*OPTIONS[objective]}
    return {"objective": objective, **{name: value for name, value in options.items() if name not in others}}
