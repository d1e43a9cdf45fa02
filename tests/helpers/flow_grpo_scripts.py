"""The scripts of flow_grpo, from their files: their functions, their loss lines, and whole runs on tiny models.

Nothing of them is kept here. What is heavy or far away is replaced when a script is loaded: wandb collects what is
logged, the pipeline is tiny and random, and the data are three prompts.
"""

from __future__ import annotations

import ast
import importlib.machinery
import os
import sys
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers.tiny_pipelines import make_tiny_wan

SD3_SAMPLER = "flow_grpo/diffusers_patch/sd3_sde_with_logprob.py"
WAN_SAMPLER = "flow_grpo/diffusers_patch/wan_pipeline_with_logprob.py"


def checkout() -> Path | None:
    """The checkout in the folder that FASTGUARD_PEERS names."""
    folders = [Path(os.environ.get("FASTGUARD_PEERS", ""), name) for name in ("flow_grpo_full", "flow_grpo")]
    return next((path for path in folders if (path / SD3_SAMPLER).is_file() and (path / "scripts").is_dir()), None)


class Config(dict[str, Any]):
    """What these scripts use of ml_collections.ConfigDict."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to_dict(self) -> dict[str, Any]:
        return self


class Done(Exception):
    """A run has made its optimizer steps."""


def sampler(root: Path, path: str, dtype: torch.dtype) -> Callable[..., Any]:
    """The `sde_step_with_logprob` of a file, in its float32 or, for the same inputs, in float64."""
    tree = ast.parse((root / path).read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if getattr(node, "name", "") == "sde_step_with_logprob")
    casts = [node for node in ast.walk(function) if isinstance(node, ast.Attribute) and node.attr == "float"]
    assert len(casts) >= 3
    if dtype == torch.float64:
        for cast in casts:
            cast.attr = "double"
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names: dict[str, Any] = {}
    exec(compile(ast.Module([*imports, function], []), path, "exec"), names)
    return names["sde_step_with_logprob"]


def loss_block(source: str) -> tuple[list[ast.stmt], int, int]:
    """The statements after the model's call: how many precede the loss lines, and how many follow from their start.

    The loss lines go from the clamp of the advantages to where the loss is logged.
    """
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        texts = [ast.unparse(statement) for statement in body]
        first = [i for i, text in enumerate(texts) if text.startswith("advantages = torch.clamp(")]
        last = [i for i, text in enumerate(texts) if text.startswith("info['loss'].append")]
        if first and last:
            return body, first[0], last[0]
    raise ValueError("the script has no loss lines that go from the clamped advantages to info['loss']")


def run_loss_lines(root: Path, script: str, names: dict[str, Any]) -> dict[str, Any]:
    """Execute the loss lines of a script over these names."""
    body, first, last = loss_block((root / "scripts" / script).read_text(encoding="utf-8"))
    names = {"torch": torch, "info": defaultdict(list), "print": lambda *_: None, **names}
    exec(compile(ast.Module(body[first : last + 1], []), script, "exec"), names)
    return names


def adapted(source: str, blocks: dict[str, str], *, rollout: bool = True, more: str = "") -> str:
    """A script after the changes of the page: its blocks are put where the page says.

    Args:
        blocks: the code of the page by title.
        rollout: whether the rollout needs means.
        more: further arguments of `grpo_loss`.
    """
    lines = source.splitlines()

    def indent(line: str, text: str) -> list[str]:
        width = len(line) - len(line.lstrip())
        return [" " * width + part for part in text.splitlines()]

    body, first, last = loss_block(source)
    start, end = body[first].lineno - 1, body[last].end_lineno
    last_argument = "    config,\n"
    assert blocks["update"].count(last_argument) == 1
    update = blocks["update"].replace(last_argument, f"{last_argument}    {more},\n" if more else last_argument)
    lines[start:end] = indent(lines[start], update)
    if rollout:
        (entry,) = (i for i, line in enumerate(lines) if line.strip().startswith('"log_probs": log_probs,'))
        lines[entry + 1 : entry + 1] = indent(lines[entry], blocks["sample"])
        # The last such line above is that of the rollout; evaluation stands before it.
        place = max(i for i, line in enumerate(lines[:entry]) if line.strip() == "with torch.no_grad():")
        assert "pipeline_with_logprob(" in lines[place + 1]
        (line,) = (text for text in blocks["rollout"].splitlines() if text.startswith("with "))
        lines[place : place + 1] = indent(lines[place], line)
    return "\n".join([blocks["import"], *lines])


@contextmanager
def importable(root: Path) -> Iterator[types.ModuleType]:
    """The package flow_grpo, and stand-ins for wandb, imageio and ml_collections; yields that for wandb."""

    def module(name: str, **names: Any) -> types.ModuleType:
        made = types.ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(made).update(names)
        return made

    def ignore(*_: Any, **__: Any) -> None:
        pass

    wandb = module("wandb", init=ignore, log=ignore, Image=ignore, Video=ignore)
    flags = module("ml_collections.config_flags", DEFINE_config_file=ignore)
    before = dict(sys.modules)
    sys.modules |= {
        "wandb": wandb,
        "imageio": module("imageio"),
        "ml_collections": module("ml_collections", config_flags=flags, ConfigDict=Config),
        "ml_collections.config_flags": flags,
    }
    sys.path.insert(0, str(root))
    try:
        yield wandb
    finally:
        sys.path.remove(str(root))
        for name in list(sys.modules):
            if name.split(".")[0] in ("flow_grpo", "wandb", "imageio", "ml_collections"):
                del sys.modules[name]
                if name in before:
                    sys.modules[name] = before[name]


def brightness(images: Tensor, *_: Any, **__: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A smooth reward, so that two runs stay as near to each other as their gradients."""
    return {"avg": images.double().flatten(1).mean(1)}, {}


def train(
    root: Path,
    folder: Path,
    script: str,
    n_steps: int,
    change: Callable[[str], str] = lambda source: source,
    **options: Any,
) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Run a script's `main` on a tiny model until it has made `n_steps` optimizer steps.

    Args:
        change: applied to the script's source.
        options: fields of the config, with dots written as `__`.

    Returns:
        what it logged per optimizer step, and by how much each trained weight moved.
    """
    from fastguard.backbones.flux import Flux
    from fastguard.backbones.sd3 import SD3

    (folder / "train.txt").write_text("a cat\na dog\na red bus\n")
    (folder / "test.txt").write_text("a cat\n")
    logged: list[dict[str, float]] = []
    trained: dict[str, Tensor] = {}
    initial: dict[str, Tensor] = {}
    with importable(root) as wandb:
        names: dict[str, Any] = {"__name__": script}
        exec(compile(change((root / "scripts" / script).read_text(encoding="utf-8")), script, "exec"), names)
        config: dict[str, Any] = {}
        exec((root / "config" / "base.py").read_text(encoding="utf-8"), config)
        config = config["get_config"]()
        settings = {
            "run_project": "test", "dataset": str(folder), "logdir": str(folder), "save_dir": str(folder),
            "resolution": 64, "mixed_precision": "no", "prompt_fn": "general_ocr", "rationorm": False,
            "reward_fn": {}, "sample__num_steps": 4, "sample__train_batch_size": 4,
            "sample__num_image_per_prompt": 4, "sample__num_batches_per_epoch": 2, "sample__sde_window_range": (0, 3),
            "sample__sde_type": "sde", "train__batch_size": 4, "train__timestep_fraction": 0.99,
            "train__learning_rate": 1e-3, "frames": 5, "height": 32, "width": 32, "sample__sample_time_per_prompt": 1,
            "sample__kl_reward": 0.0, **options,
        }  # fmt: skip
        for name, value in settings.items():
            *parts, field = name.split("__")
            place = config
            for part in parts:
                place = place[part]
            place[field] = value

        def log(values: dict[str, Any], step: int | None = None) -> None:
            if "policy_loss" in values:
                logged.append({name: float(torch.as_tensor(value).detach()) for name, value in values.items()})
                if len(logged) == n_steps:
                    raise Done

        class Accelerator(names["Accelerator"]):  # type: ignore[misc]
            def __init__(self, log_with: str = "", **options: Any) -> None:
                super().__init__(**options)

            def log(self, values: dict[str, Any], step: int | None = None) -> None:
                log(values, step)

        names["Accelerator"] = Accelerator
        wandb.log = log  # type: ignore[attr-defined]
        names["flow_grpo"].rewards.multi_score = lambda *_: brightness
        names["FLAGS"] = types.SimpleNamespace(config=config)
        loader = names["DataLoader"]
        names["DataLoader"] = lambda *args, num_workers, **kwargs: loader(*args, **kwargs)  # no processes
        makers = {
            "StableDiffusion3Pipeline": SD3().spec.tiny,
            "FluxPipeline": Flux().spec.tiny,
            "WanPipeline": make_tiny_wan,
        }
        pipeline = next(name for name in reversed(makers) if name in names)  # the Wan script imports that of SD3 too

        def from_pretrained(*_: Any, **__: Any) -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return makers[pipeline]()

        names[pipeline] = types.SimpleNamespace(from_pretrained=from_pretrained)
        wrap = names["get_peft_model"]

        def with_lora(model: Any, settings: Any) -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(1)
                adapter = wrap(model, settings)
            adapter.__dict__["module"] = adapter  # as under DDP, which one process does not get
            trained.update({name: weight for name, weight in adapter.named_parameters() if weight.requires_grad})
            initial.update({name: weight.detach().clone() for name, weight in trained.items()})
            return adapter

        names["get_peft_model"] = with_lora
        try:
            names["main"](None)
        except Done:
            return logged, {name: weight.detach() - initial[name] for name, weight in trained.items()}
    raise AssertionError("the script ended before its steps")
