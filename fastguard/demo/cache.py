"""A cache of trained weights, keyed by the settings that produced them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastguard.prompts import cache_folder
from fastguard.utils.files import writing
from fastguard.utils.sealed import DamagedError, clear_scratch, load_sealed, save_sealed
from fastguard.utils.terminal import say

ANOTHER_CACHE = "start again, or set FASTGUARD_CACHE to another folder"
RECIPE = 1
"""Raise it when the code that trains cached weights changes what they become."""


def cache_path(name: str, settings: Any) -> Path:
    """The file for `name` trained with the dataclass `settings`; any changed field gives another file."""
    content = json.dumps([RECIPE, dataclasses.asdict(settings)], sort_keys=True)
    return cache_folder() / "demo" / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"


def load_or_train(module: nn.Module, name: str, settings: Any, fit: Callable[[], None]) -> bool:
    """Load `module`'s weights from the cache, or run `fit` and store them. Returns True if they were cached.

    The file appears by an atomic rename, so an interrupted run leaves no half-written weights. A file that is damaged,
    or holds other weights, is trained anew and replaced.
    """
    path = cache_path(name, settings)
    with writing(path.parent, then=ANOTHER_CACHE):  # before the work, so that a bad folder shows at once
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_scratch(path.parent)
    if path.is_file():
        weights = _weights(path)
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        if {key: value.shape for key, value in weights.items()} == shapes:
            module.load_state_dict(weights)
            return True
        say(f"{path} is damaged, or of an earlier version, and is trained anew")
    fit()
    with writing(path, then=ANOTHER_CACHE):
        save_sealed({key: value.contiguous().cpu() for key, value in module.state_dict().items()}, path)
    return False


def _weights(path: Path) -> dict[str, Tensor]:
    """Those of a file of the cache; none if it cannot be used."""
    try:
        return load_sealed(path)
    except (OSError, MemoryError, DamagedError):
        return {}
