"""Settings as frozen dataclasses; under each field: its unit, its scope and its effect.

Every class checks its own fields when it is built and names the one to change. Objective names and
reweighting are checked by `guard_loss`, which owns them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Objective = Literal["flow_grpo", "grpo_guard"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class SamplerConfig:
    """How images are sampled, in rollouts and in evaluation."""

    num_steps: int = 10
    """denoising steps per image"""
    shift: float = 3.0
    """schedule shift (1 = uniform steps); larger values spend more steps near the noise"""
    noise_level: float = 0.7
    """eta of the flow_sde step; scales the noise that every stochastic step adds"""
    sde_steps: int = 9
    """steps, counted from the noise, that are stochastic and trained; the rest are deterministic (ODE)"""

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, f"num_steps must be at least 1, got {self.num_steps}")
        _require(self.shift > 0, f"shift must be positive, got {self.shift}")
        _require(
            0 <= self.sde_steps <= self.num_steps,
            f"sde_steps must lie in [0, num_steps = {self.num_steps}], got {self.sde_steps}",
        )


@dataclass(frozen=True)
class ObjectiveConfig:
    """What `guard_loss` minimizes."""

    name: Objective = "grpo_guard"
    """objective: plain Flow-GRPO, or GRPO-Guard (RatioNorm and gradient reweighting)"""
    clip_range: float = 2e-6
    """clip range of the ratio around 1; belongs to the objective and to the number of latent elements"""
    adv_clip: float = 5.0
    """advantages are clipped to +- this many group standard deviations"""
    reweight: str = "inverse_dt"
    """factor on each denoising step's loss: "inverse_dt" (GRPO-Guard) or "none" (Flow-GRPO)"""


@dataclass(frozen=True)
class TrainConfig:
    """One reinforcement-learning run."""

    seed: int = 0
    """run seed; rollout noise and minibatch order derive from it and nothing else"""
    iterations: int = 10
    """rollouts, each followed by epochs * minibatches updates"""
    num_prompts: int = 10
    """prompts per rollout, over all processes; every prompt is used in every rollout"""
    group_size: int = 12
    """images per prompt and rollout, over all processes; advantages compare images within it"""
    epochs: int = 2
    """passes over each rollout"""
    minibatches: int = 4
    """optimizer updates per epoch; each takes an equal share of the (image, denoising step) pairs"""
    learning_rate: float = 3e-4
    """AdamW learning rate"""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW moment decay rates"""
    weight_decay: float = 0.0
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradient norm above which the gradient is scaled down"""
    advantage_std: Literal["group", "global"] = "group"
    """rewards are divided by the standard deviation of their group, or of the whole rollout"""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """sampling settings of the rollouts"""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """the objective and its clip range"""

    def __post_init__(self) -> None:
        _require(self.group_size >= 2, f"group_size must be at least 2 to compare images, got {self.group_size}")
        _require(self.sampler.sde_steps >= 1, "sampler.sde_steps must be at least 1: only those steps are trained")
        pairs = self.num_prompts * self.group_size * self.sampler.sde_steps
        _require(
            pairs % self.minibatches == 0,
            f"num_prompts * group_size * sampler.sde_steps = {pairs} (image, step) pairs do not divide into "
            f"minibatches = {self.minibatches}",
        )


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
    clip_flow_grpo: float = 1.6e-3
    """clip range of Flow-GRPO, on the plain ratio"""
    clip_grpo_guard: float = 2.6e-4
    """clip range of GRPO-Guard, on the normalized ratio; not comparable with the other by its value"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(iterations=14))
    """settings that both objectives share; its seed and objective are replaced in each run"""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """settings of the pretrained model"""
    classifiers: ClassifierConfig = field(default_factory=ClassifierConfig)
    """settings of the proxy and gold classifiers"""
    smoke: bool = False
    """marks the report as a smoke run whose numbers mean nothing"""

    def __post_init__(self) -> None:
        _require(self.seeds >= 1, f"seeds must be at least 1, got {self.seeds}")
        _require(
            self.eval_samples % self.train.num_prompts == 0,
            f"eval_samples must be a multiple of train.num_prompts = {self.train.num_prompts}, got {self.eval_samples}",
        )

    def run(self, objective: Objective, seed: int) -> TrainConfig:
        """The settings of one run: each objective with its own clip range and published reweighting."""
        if objective == "flow_grpo":
            chosen = ObjectiveConfig("flow_grpo", clip_range=self.clip_flow_grpo, reweight="none")
        else:
            chosen = ObjectiveConfig("grpo_guard", clip_range=self.clip_grpo_guard, reweight="inverse_dt")
        return replace(self.train, seed=seed, objective=chosen)

    def probe(self, objective: Objective, seed: int) -> TrainConfig:
        """One rollout and its updates with uniform steps and (in effect) no clipping, where the ratio moves freely."""
        run = self.run(objective, seed)
        return replace(
            run,
            iterations=1,
            sampler=replace(run.sampler, shift=1.0),
            objective=replace(run.objective, clip_range=1e3),
        )


def quick_demo() -> DemoConfig:
    """A smoke setting: every stage runs, in seconds, and the numbers mean nothing."""
    return DemoConfig(
        smoke=True,
        seeds=1,
        eval_samples=60,
        train=TrainConfig(iterations=2, group_size=4, epochs=1, minibatches=4),
        pretrain=PretrainConfig(steps=150, warmup_steps=10, ema_decay=0.95),
        classifiers=ClassifierConfig(gold_steps=120, proxy_steps=100),
    )
