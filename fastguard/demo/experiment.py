"""The demo's experiment: the models it starts from, one evaluation, one run.

Nothing here knows about processes, files or pages.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from fastguard.config import DemoConfig, Objective, TrainConfig
from fastguard.demo.cache import load_or_train
from fastguard.demo.data import (
    NUM_CLASSES,
    Digits,
    GoldClassifier,
    Metrics,
    ProxyClassifier,
    class_diversity,
    evaluate,
    fit_gold,
    fit_proxy,
    frechet_distance,
    load_images,
)
from fastguard.demo.model import LATENT_SHAPE, DigitPolicy, pretrain, unpatchify
from fastguard.sampler import Policy, rollout, sample_seeds
from fastguard.trainer import IterationLog, OnIteration, train

OBJECTIVES: tuple[Objective, ...] = ("flow_grpo", "grpo_guard")
EVALUATION_EPOCH = 1_000_000
"""Seeds of the evaluation's noise; no training run counts this far."""
GRID_ROWS = 4


@dataclass(frozen=True)
class Models:
    """What every run starts from."""

    digits: Digits
    policy: DigitPolicy
    proxy: ProxyClassifier
    gold: GoldClassifier
    real_features: Tensor
    pretraining_cached: bool


@dataclass(frozen=True)
class Evaluation:
    """One look at a policy."""

    metrics: Metrics
    tiles: np.ndarray
    """uint8 (4, 10, 64, 64), 4 images per class; the same noise in every evaluation; 255 is paper white"""


@dataclass(frozen=True)
class Run:
    """One finished training run."""

    objective: Objective
    seed: int
    logs: list[IterationLog]
    evaluations: list[Evaluation]
    """entry i is after i iterations; entry 0 is the pretrained model"""
    probe: IterationLog
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
    runs: list[Run]
    seconds: dict[str, float]
    """wall time by stage"""


def prepare(config: DemoConfig, device: torch.device) -> Models:
    """Load the data and the three networks, from the cache or by training them."""
    digits = load_images(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.classifiers.seed)
        proxy, gold = ProxyClassifier().to(device), GoldClassifier().to(device)
    policy = DigitPolicy(config.pretrain.seed).to(device)
    load_or_train(proxy, "proxy", config.classifiers, lambda: fit_proxy(proxy, digits, config.classifiers))
    load_or_train(gold, "gold", config.classifiers, lambda: fit_gold(gold, digits, config.classifiers))
    cached = load_or_train(policy, "policy", config.pretrain, lambda: pretrain(policy, digits, config.pretrain))
    with torch.no_grad():
        real_features = gold.features(digits.images)
    return Models(digits, policy, proxy, gold, real_features, cached)


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
    per_class = config.eval_samples // NUM_CLASSES
    classes = torch.arange(NUM_CLASSES).repeat_interleave(per_class)
    members = torch.arange(per_class).repeat(NUM_CLASSES)
    sampler = dataclasses.replace(config.train.sampler, sde_steps=0)
    seeds = sample_seeds(0, EVALUATION_EPOCH, classes, members, sampler.num_steps)
    classes = classes.to(models.digits.images.device)
    images = unpatchify(rollout(policy, classes, seeds, LATENT_SHAPE, sampler).latents)
    metrics = evaluate(images, classes, models.proxy, models.gold, models.real_features)
    return Evaluation(metrics, ink_tiles(images.unflatten(0, (NUM_CLASSES, per_class))))


def ink_tiles(images: Tensor) -> np.ndarray:
    """The first images of each class, (10, n, 1, 64, 64) in [-1, 1], as uint8 tiles (4, 10, 64, 64), dark on white."""
    ink = images[:, :GRID_ROWS, 0].transpose(0, 1).add(1).div(2).clamp(0, 1)
    return (255 * (1 - ink)).round().byte().cpu().numpy()


def run_one(config: DemoConfig, models: Models, objective: Objective, seed: int, tick: Callable[[float], None]) -> Run:
    """One probe of the ratio and one training run, both from the pretrained weights; `tick` gets the proxy reward."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    evaluations = [look(models.policy, models, config)]

    def on_iteration(log: IterationLog, policy: nn.Module) -> bool:
        evaluations.append(look(policy, models, config))
        proxy = evaluations[-1].metrics.proxy
        tick(proxy)
        return proxy >= config.target_proxy

    def start(settings: TrainConfig, callback: OnIteration) -> list[IterationLog]:
        policy = copy.deepcopy(models.policy)
        return train(policy, unpatchify, models.proxy.score, LATENT_SHAPE, settings, callback, accelerator)

    probe = start(config.probe(objective, seed), lambda log, policy: False)
    logs = start(config.run(objective, seed), on_iteration)
    return Run(objective, seed, logs, evaluations, probe[0])
