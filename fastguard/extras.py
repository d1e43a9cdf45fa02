"""What parts of the package need beyond torch and triton, and the line that installs it.

`import fastguard` works without. A part that needs more calls `need` before it imports anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

from fastguard.errors import UserError

DISTRIBUTION = "fastguard-rl"
"""The name on PyPI, where `fastguard` is another project."""
PYTHON = (3, 11)
"""The oldest Python of the extras; diffusers needs it."""
_BLOCKS = ("diffusers", "peft")
_TRAIN = (
    *_BLOCKS, "accelerate", "jinja2", "matplotlib", "numpy", "packaging", "PIL", "pydantic", "requests", "safetensors",
    "scipy", "tqdm", "transformers", "tyro", "urllib3",
)  # fmt: skip
MODULES = {"blocks": _BLOCKS, "train": _TRAIN, "demo": (*_TRAIN, "sklearn")}
"""What each extra of pyproject.toml brings, by the names that are imported."""


class MissingExtraError(ImportError, UserError):
    """A part of the package whose extra is not installed; the message has the line to run."""


@cache
def need(extra: str) -> None:
    """Raise MissingExtraError unless the modules of an extra are installed. Imports none of them."""
    if sys.version_info < PYTHON:
        here, needed = (".".join(map(str, version)) for version in (sys.version_info[:2], PYTHON))
        raise MissingExtraError(
            f"this needs the extra {extra!r} of fastguard, and so Python {needed} or newer; this is Python {here}"
        )
    missing = [name for name in MODULES[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"this needs the extra {extra!r} of fastguard; not installed: {', '.join(missing)}. "
            f"Run pip install '{DISTRIBUTION}[{extra}]'"
        )


@contextmanager
def importing(library: str, setting: str, instead: str) -> Iterator[None]:
    """Inside, an import of a library of [lowbit] that fails becomes a UserError: what to install, or what to set.

    Args:
        setting: what needs it, as in a recipe.
        instead: other values of that field, which do not.
    """
    try:
        yield
    except ImportError:
        raise UserError(
            f"{setting} needs {library}: pip install '{DISTRIBUTION}[lowbit]', or choose {instead}"
        ) from None
