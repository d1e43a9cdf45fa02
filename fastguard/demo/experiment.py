"""The demo's experiment: the models it starts from, one evaluation, one run.

Nothing here knows about processes, files or pages.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastguard.config import MonitorConfig, Recipe
from fastguard.demo.backbone import DigitBackbone, Judge, Models
from fastguard.demo.config import DemoConfig
from fastguard.demo.data import (
    NUM_CLASSES,
    Metrics,
    class_diversity,
    evaluate,
    frechet_distance,
)
from fastguard.demo.model import LATENT_SHAPE, unpatchify
from fastguard.rewards import RewardPool
from fastguard.train.metrics import EpochLog
from fastguard.train.monitor import Verdict
from fastguard.train.rollout import Policy, evaluation_images, ode_schedule, rollout
from fastguard.train.state import TrainState
from fastguard.train.trainer import train

GRID_ROWS = 4
Task = tuple[str, int]
"""the objective and the seed of a run"""
Tick = Callable[[Task, float], None]
"""called after each iteration with the run and its proxy reward"""


@dataclass(frozen=True)
class Evaluation:
    """One look at a policy."""

    metrics: Metrics
    tiles: np.ndarray
    """uint8 (4, 10, 64, 64), 4 images per class; the same noise in every evaluation; 255 is paper white"""


@dataclass(frozen=True)
class DemoRun:
    """One finished training run."""

    objective: str
    seed: int
    logs: list[EpochLog]
    evaluations: list[Evaluation]
    """entry i is after i iterations; entry 0 is the pretrained model"""
    probe: EpochLog
    """ratio statistics of one separate rollout's updates with uniform steps and without clipping"""


@dataclass(frozen=True)
class Reference:
    """Numbers of the real data and the judges, for scale."""

    gold_accuracy: float
    """of the gold classifier on the 1,000 real images that it has not seen"""
    proxy_accuracy: float
    """of the proxy on the same images (it has seen 30 of them)"""
    frechet: float
    """between two halves of those images"""
    diversity: float
    """as in `Metrics`"""
    tiles: np.ndarray
    """as in `Evaluation`"""


@dataclass(frozen=True)
class Results:
    """Everything the report shows."""

    config: DemoConfig
    reference: Reference
    before: Evaluation
    runs: list[DemoRun]
    seconds: dict[str, float]
    """wall time by stage"""


def measure_reference(models: Models) -> Reference:
    """Judge the real images as the samples are judged."""
    images, labels = models.digits.images, models.digits.labels
    half = len(images) // 2
    some = torch.stack([images[labels == c][:GRID_ROWS] for c in range(NUM_CLASSES)])
    with torch.no_grad():
        return Reference(
            gold_accuracy=(models.gold(images).argmax(1) == labels).float().mean().item(),
            proxy_accuracy=(models.proxy(images).argmax(1) == labels).float().mean().item(),
            frechet=frechet_distance(models.real_features[:half], models.real_features[half:]),
            diversity=class_diversity(images, labels),
            tiles=ink_tiles(some),
        )


def look(policy: Policy, models: Models, config: DemoConfig) -> Evaluation:
    """Sample and judge: the same classes and initial noise whenever it is called."""
    per_class, sampler = config.eval_samples // NUM_CLASSES, config.train.sampler
    classes, seeds = evaluation_images(NUM_CLASSES, per_class, sampler.num_steps)
    classes = classes.to(models.digits.images.device)
    schedule = ode_schedule(sampler, DigitBackbone.sigmas, sampler.num_steps)
    images = unpatchify(rollout(policy, classes, seeds, LATENT_SHAPE, schedule).latents)
    metrics = evaluate(images, classes, models.proxy, models.gold, models.real_features)
    return Evaluation(metrics, ink_tiles(images.unflatten(0, (NUM_CLASSES, per_class))))


def ink_tiles(images: Tensor) -> np.ndarray:
    """The first images of each class, (10, n, 1, 64, 64) in [-1, 1], as uint8 tiles (4, 10, 64, 64), dark on white."""
    ink = images[:, :GRID_ROWS, 0].transpose(0, 1).add(1).div(2).clamp(0, 1)
    return (255 * (1 - ink)).round().byte().cpu().numpy()


class Watch:
    """A `state.Run` that keeps nothing on the disk: it looks at the policy after every epoch."""

    def __init__(self, after_epoch: Callable[[nn.Module], bool]) -> None:
        self._after_epoch, self._stop = after_epoch, False

    def restore(self, state: TrainState) -> None:
        """Every run starts from the pretrained model."""

    def stop_requested(self) -> bool:
        return self._stop

    def skipped(self, epoch: int, message: str) -> None:
        warnings.warn(message, stacklevel=2)

    def end_epoch(self, log: EpochLog, images: Tensor, state: TrainState) -> None:
        self._stop = self._after_epoch(state.policy)

    def evaluated(self, verdict: Verdict) -> None:
        """The demo has no monitor: it looks for itself."""

    def save(self, state: TrainState) -> None:
        """A run takes seconds."""

    def way_back(self) -> str:
        return "The demo keeps no checkpoints"


def run_here(config: DemoConfig, models: Models, tasks: list[Task], tick: Tick) -> Generator[DemoRun, None, None]:
    """One run after another, in this process."""
    for objective, seed in tasks:

        def tick_task(proxy: float, task: Task = (objective, seed)) -> None:
            tick(task, proxy)

        yield run_one(config, models, objective, seed, tick_task)


def run_one(config: DemoConfig, models: Models, objective: str, seed: int, tick: Callable[[float], None]) -> DemoRun:
    """One probe of the ratio and one training run, both from the pretrained weights; `tick` gets the proxy reward."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    evaluations = [look(models.policy, models, config)]

    def after_epoch(policy: nn.Module) -> bool:
        evaluations.append(look(policy, models, config))
        proxy = evaluations[-1].metrics.proxy
        tick(proxy)
        return proxy >= config.target_proxy

    def start(recipe: Recipe, watch: Watch) -> list[EpochLog]:
        recipe = dataclasses.replace(recipe, monitor=MonitorConfig())
        backbone = DigitBackbone(copy.deepcopy(models.policy), recipe.model.fuse)
        rewards = [(recipe.rewards[0], Judge("proxy", models))]
        with RewardPool(rewards, recipe.scoring, backbone.prompts) as pool:
            return train(backbone, recipe, pool, watch, accelerator)

    probe = start(config.probe(objective, seed), Watch(lambda policy: False))
    logs = start(config.run(objective, seed), Watch(after_epoch))
    return DemoRun(objective, seed, logs, evaluations, probe[0])
