"""Make a reward from its config: a built-in by name, a function or class of the user's, or a server."""

from __future__ import annotations

import inspect
import os
import re
import sys
from functools import partial
from importlib import import_module
from typing import Any

from fastguard.config import RewardConfig
from fastguard.errors import UserError
from fastguard.rewards.base import Reward
from fastguard.rewards.settings import keep_settings

BUILT_IN = {
    "aesthetic": "fastguard.rewards.clip:AestheticScore",
    "clipscore": "fastguard.rewards.clip:ClipScore",
    "hpsv2": "fastguard.rewards.clip:HpsV2",
    "jpeg_compressibility": "fastguard.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "fastguard.rewards.jpeg:JpegIncompressibility",
    "ocr": "fastguard.rewards.ocr:OcrReward",
    "pickscore": "fastguard.rewards.clip:PickScore",
}
"""Where each built-in lives; its module, and what that imports, waits until the reward is built."""


def build_reward(config: RewardConfig) -> Reward:
    """Make the reward that `config.use` names, with `config.options` as its keyword arguments.

    A class is built with the options; a function gets them with every call. The working directory can be imported
    from, as with `python -m`. Build rewards in the main thread, after the process has chosen its GPU. Settings of the
    process (torch's default dtype, the working directory, ...) are afterwards what they were.

    Raises UserError for an unknown name, a module or attribute that is not there, and options that do not fit.
    """
    put_back = keep_settings()
    try:
        return _build(config)
    finally:
        put_back()


def _build(config: RewardConfig) -> Reward:
    target, options = _target(config), config.options
    if isinstance(target, type | _Client):
        _check_options(config, target, call_arguments=0)
        try:
            reward = target(**options)
        except ValueError as error:
            raise UserError(f'reward "{config.label}": {error}') from error
        if not callable(reward):
            raise UserError(f"rewards.use = {config.use!r}: objects of this class cannot be called; add __call__")
        return reward
    if not callable(target):
        raise UserError(f"rewards.use = {config.use!r} is {type(target).__name__}, expected a function or a class")
    _check_options(config, target, call_arguments=3)
    return partial(target, **options) if options else target


class _Client(partial):
    """RemoteReward that has its address and waits for its options; a user's own reward may be a partial as well."""


def _target(config: RewardConfig) -> Any:
    """The class, function or client that `use` names."""
    use = config.use
    if re.match(r"https?://", use):
        from fastguard.rewards.remote import RemoteReward

        return _Client(RemoteReward, use)
    if use in BUILT_IN:
        return _import(use, BUILT_IN[use])
    if not re.fullmatch(r"\w[\w.]*:\w+", use):
        raise UserError(
            f"rewards.use = {use!r} is no reward; expected one of {', '.join(BUILT_IN)}, or module:function, "
            "module:Class, or the http(s):// address of a reward server"
        )
    if not {"", os.getcwd()} & set(sys.path):  # the fastguard script's sys.path begins with its own folder
        sys.path.insert(0, os.getcwd())
    return _import(use, use)


def _import(use: str, where: str) -> Any:
    module_name, _, attribute = where.partition(":")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(
                f"rewards.use = {use!r}: there is no module {error.name!r} in {os.getcwd()} or among the installed "
                "packages; change rewards.use, or the folder that the command starts in"
            ) from error
        raise UserError(f"rewards.use = {use!r}: its module needs {error.name!r}, which is not installed") from error
    except ImportError as error:
        raise UserError(f"rewards.use = {use!r}: importing {module_name} failed: {error}") from error
    if not hasattr(module, attribute):
        raise UserError(f"rewards.use = {use!r}: module {module_name} ({module.__file__}) has no {attribute!r}")
    return getattr(module, attribute)


def _check_options(config: RewardConfig, target: Any, call_arguments: int) -> None:
    """Bind the options now: a function would otherwise complain at the end of the first rollout."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some extension types have none to show
        return
    try:
        signature.bind(*[None] * call_arguments, **config.options)
    except TypeError as error:
        names = [
            name + (" (required)" if parameter.default is parameter.empty else "")
            for name, parameter in list(signature.parameters.items())[call_arguments:]
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        raise UserError(
            f"rewards.options = {config.options} does not fit rewards.use = {config.use!r}: {error}; "
            f"its options are {', '.join(names) or 'none'}"
            + (", after images, prompts and metadata" if call_arguments else "")
        ) from error
