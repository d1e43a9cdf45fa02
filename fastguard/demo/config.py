"""Settings of the demo; under each field: its unit, its scope and its effect. The rest is recipes/digits.toml."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastguard.config import ObjectiveConfig, Recipe, objective_config
from fastguard.errors import UserError
from fastguard.loss.objectives import OBJECTIVES
from fastguard.recipe import find_recipe, load_recipe

GUARDED_RECIPE = load_recipe(find_recipe("digits"))
PLAIN_RECIPE = load_recipe(find_recipe("digits_plain"))
GUARDED, PLAIN = GUARDED_RECIPE.objective.name, PLAIN_RECIPE.objective.name
"""The two objectives that are compared, by name."""
TITLES = {name: OBJECTIVES[name].title for name in (PLAIN, GUARDED)}


@dataclass(frozen=True)
class PretrainConfig:
    """Rectified-flow pretraining of the demo's digit model; its hash names the cached weights."""

    steps: int = 2000
    """optimizer updates"""
    batch_size: int = 64
    """images per update"""
    learning_rate: float = 3e-3
    """peak AdamW learning rate, after the warm-up and before the cosine decay"""
    warmup_steps: int = 50
    """updates with a linearly growing learning rate"""
    ema_decay: float = 0.995
    """decay per update of the averaged weights that are kept"""
    min_time: float = 0.1
    """flow time below which the loss weight 1 / t^2 stops growing"""
    seed: int = 0
    """seed of the initial weights, the batches and the noise"""


@dataclass(frozen=True)
class ClassifierConfig:
    """The demo's two judges; its hash names their cached weights."""

    proxy_images_per_class: int = 3
    """training images per digit of the proxy reward; few, so that it can be fooled"""
    proxy_steps: int = 300
    """optimizer updates of the proxy"""
    gold_steps: int = 600
    """optimizer updates of the gold classifier (batch 64)"""
    seed: int = 0
    """seed of the initial weights, the batches and the augmentation"""


@dataclass(frozen=True)
class DemoConfig:
    """Everything `fastguard demo` compares."""

    seeds: int = 3
    """runs per objective"""
    eval_samples: int = 400
    """images per evaluation (ODE sampling, the same initial noise every time)"""
    target_proxy: float = 11.0
    """mean proxy reward (logits) at which a run stops before its last iteration"""
    plain: ObjectiveConfig = PLAIN_RECIPE.objective
    """Flow-GRPO, whose clip range is on the plain ratio"""
    guarded: ObjectiveConfig = GUARDED_RECIPE.objective
    """GRPO-Guard, whose clip range is on the normalized ratio; not comparable with the other by its value"""
    train: Recipe = GUARDED_RECIPE
    """what both objectives share; its seed and objective are replaced in each run"""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """settings of the pretrained model"""
    classifiers: ClassifierConfig = field(default_factory=ClassifierConfig)
    """settings of the proxy and gold classifiers"""
    smoke: bool = False
    """marks the report as a smoke run whose numbers mean nothing"""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        if self.seeds > 1000:
            raise UserError(f"seeds must be at most 1000, got {self.seeds}")
        if self.eval_samples % self.train.prompts.per_epoch:
            raise UserError(
                f"eval_samples must be a multiple of train.prompts.per_epoch = {self.train.prompts.per_epoch}, "
                f"got {self.eval_samples}"
            )

    def run(self, objective: str, seed: int) -> Recipe:
        """The recipe of one run: each objective with its own clip range and published reweighting."""
        chosen = self.plain if objective == PLAIN else self.guarded
        return replace(self.train, run=replace(self.train.run, seed=seed), objective=chosen)

    def probe(self, objective: str, seed: int) -> Recipe:
        """One rollout and its updates with uniform steps and (in effect) no clipping, where the ratio moves freely."""
        recipe = self.run(objective, seed)
        return replace(
            recipe,
            run=replace(recipe.run, epochs=1),
            sampler=replace(recipe.sampler, shift=1.0),
            objective=objective_config(objective, clip_range=1e3, reweight=recipe.objective.reweight),
        )


def quick_demo() -> DemoConfig:
    """A smoke setting: every stage runs, in seconds, and the numbers mean nothing."""
    train = GUARDED_RECIPE
    return DemoConfig(
        smoke=True,
        seeds=1,
        eval_samples=60,
        train=replace(
            train,
            run=replace(train.run, epochs=2),
            sampler=replace(train.sampler, group_size=4, batch_size=40),
            update=replace(train.update, inner_epochs=1),
        ),
        pretrain=PretrainConfig(steps=150, warmup_steps=10, ema_decay=0.95),
        classifiers=ClassifierConfig(gold_steps=120, proxy_steps=100),
    )
