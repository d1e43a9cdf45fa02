"""A backbone of two prompts and sixteen numbers, and a run that keeps what it is told: what trainer tests train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from fastguard.config import (
    ModelConfig,
    PromptsConfig,
    Recipe,
    RewardConfig,
    RunConfig,
    SamplerConfig,
    ScoringConfig,
    UpdateConfig,
    objective_config,
)
from fastguard.prompts import Prompt
from fastguard.rewards import RewardPool
from fastguard.schedule import shifted_sigmas
from fastguard.train.metrics import EpochLog
from fastguard.train.monitor import Verdict
from fastguard.train.state import TrainState, build_state
from fastguard.train.trainer import train

SHAPE = (2, 8)
RECIPE = Recipe(
    run=RunConfig(epochs=15, trackers=(), images_every=0),
    model=ModelConfig(),
    prompts=PromptsConfig(per_epoch=2),
    sampler=SamplerConfig(num_steps=5, shift=3.0, sde_steps=4, group_size=16, batch_size=32),
    objective=objective_config("grpo_guard", clip_range=1e-2),
    rewards=(RewardConfig("towards", name="towards"),),
    scoring=ScoringConfig(threads=1),
    update=UpdateConfig(
        inner_epochs=2, minibatches=4, micro_batch=0, learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.0
    ),
)


class ToyPolicy(nn.Module):
    """Denoises towards one learned image per prompt, and keeps a share of the noise so that images differ."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(2, *SHAPE))

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        return (0.7 * latents - self.image[prompt_indices]) / sigma[:, None, None]


class ToyBackbone:
    """Latents (B, 2, 8) become images (B, 1, 2, 8) of 256 grey levels over [-8, 8]."""

    latent_shape = SHAPE
    dtype = torch.float32
    shift = 3.0
    num_trained_prompts = 2
    has_adapters = False

    def __init__(self, policy: nn.Module | None = None) -> None:
        self.policy = policy or ToyPolicy()
        self.prompts: Sequence[Prompt] = [Prompt("light", {"wanted": 1.0}), Prompt("dark", {"wanted": -1.0})]

    def sigmas(self, num_steps: int) -> tuple[float, ...]:
        return shifted_sigmas(num_steps, self.shift)

    def load_prompts(self, prompt_indices: Iterable[int]) -> None:
        """The policy holds both."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents.float().mul(16).add(128).round().clamp(0, 255).to(torch.uint8)[:, None].cpu()

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        yield

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(dict(weights), folder / "toy.safetensors")


def towards(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """The light prompt wants 1, the dark one -1."""
    wanted = torch.tensor([entry["wanted"] for entry in metadata])
    return -((images[:, 0].float() - 128) / 16 - wanted[:, None, None]).square().mean((1, 2))


def brightness(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    """Hardly moves with a pixel, unlike a file's size in bytes."""
    return images.float().mean((1, 2, 3))


class MemoryRecorder:
    """A `recorder.Recorder` that keeps everything in memory."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.messages: list[str] = []
        self.saved: list[int] = []
        self.verdicts: list[Verdict] = []
        self._stop_after, self._epochs = stop_after, 0

    def restore(self, state: TrainState) -> None:
        self.state = state

    def stop_requested(self) -> bool:
        return self._stop_after is not None and self._epochs >= self._stop_after

    def skipped(self, epoch: int, message: str) -> None:
        self.messages.append(message)

    def end_epoch(self, log: EpochLog, images: Tensor, state: TrainState) -> None:
        self._epochs = log.epoch + 1

    def evaluated(self, verdict: Verdict) -> None:
        self.verdicts.append(verdict)

    def save(self, state: TrainState) -> None:
        self.saved.append(state.epoch)

    def way_back(self) -> str:
        return "the way back"


@contextmanager
def pool(
    recipe: Recipe, backbone: Any, reward: Callable[..., Any] = towards, gold: Sequence[Callable[..., Any]] = ()
) -> Iterator[RewardPool]:
    configs = [*recipe.rewards, *(recipe.monitor.gold if gold else ())]
    functions = [reward] * len(recipe.rewards) + list(gold)
    with RewardPool(list(zip(configs, functions, strict=True)), recipe.scoring, backbone.prompts) as opened:
        yield opened


def with_(recipe: Recipe = RECIPE, **sections: dict[str, Any]) -> Recipe:
    """The recipe with some fields changed: with_(sampler={"group_size": 2})."""
    changed = {name: replace(getattr(recipe, name), **fields) for name, fields in sections.items()}
    return replace(recipe, **changed)


def cpu() -> Accelerator:
    return Accelerator(cpu=True)


def run(recipe: Recipe, backbone: Any = None, reward: Any = towards, stop: int | None = None) -> Any:
    """Train; returns (logs, backbone, run)."""
    backbone, where = backbone or ToyBackbone(), MemoryRecorder(stop)
    with pool(recipe, backbone, reward) as rewards:
        logs = train(backbone, recipe, rewards, where, cpu())
    return logs, backbone, where


def state_of(backbone: Any, recipe: Recipe) -> TrainState:
    return build_state(backbone, recipe, cpu(), None)
