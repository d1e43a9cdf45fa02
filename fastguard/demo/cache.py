"""A cache of trained weights, keyed by the settings that produced them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fastguard.files import writing
from fastguard.prompts import cache_folder

RECIPE = 1
"""Raise it when the code that trains cached weights changes what they become."""


def cache_path(name: str, settings: Any) -> Path:
    """The file for `name` trained with the dataclass `settings`; any changed field gives another file."""
    content = json.dumps([RECIPE, dataclasses.asdict(settings)], sort_keys=True)
    return cache_folder() / f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}.safetensors"


def load_or_train(module: nn.Module, name: str, settings: Any, fit: Callable[[], None]) -> bool:
    """Load `module`'s weights from the cache, or run `fit` and store them. Returns True if they were cached.

    The file appears by an atomic rename, so an interrupted run leaves no half-written weights. A file that
    cannot be read, or holds other weights, is trained anew and replaced.
    """
    path = cache_path(name, settings)
    path.parent.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad folder shows at once
    if path.exists():
        try:
            weights = load_file(path)
        except SafetensorError:
            weights = {}
        shapes = {key: value.shape for key, value in module.state_dict().items()}
        if {key: value.shape for key, value in weights.items()} == shapes:
            module.load_state_dict(weights)
            return True
    fit()
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        file = Path(scratch) / path.name
        save_file({k: v.contiguous().cpu() for k, v in module.state_dict().items()}, file)
        file.replace(path)
    return False
