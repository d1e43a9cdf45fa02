"""The model families by name."""

from __future__ import annotations

from importlib import import_module

from fastguard.backbones.base import Family
from fastguard.errors import UserError

FAMILIES = {
    "digits": "fastguard.demo.family:Digits",
    "flux": "fastguard.backbones.flux:Flux",
    "flux2": "fastguard.backbones.flux2:Flux2Dev",
    "flux2_klein": "fastguard.backbones.flux2:Flux2Klein",
    "kontext": "fastguard.backbones.kontext:Kontext",
    "qwen_image": "fastguard.backbones.qwen_image:QwenImage",
    "sd3": "fastguard.backbones.sd3:SD3",
}
"""model.kind -> where its family lives; the module is imported when the family is asked for. `config.ModelKind` lists
the same names, for the type checker and the command line."""


def family_of(kind: str) -> Family:
    """The family of this model.kind. Raises UserError, with the known ones, if there is none."""
    if kind not in FAMILIES:
        raise UserError(f"model.kind = {kind!r} is no model family; expected one of {', '.join(sorted(FAMILIES))}")
    module, _, name = FAMILIES[kind].partition(":")
    return getattr(import_module(module), name)()
