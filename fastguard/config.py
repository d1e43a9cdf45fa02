"""Settings of a training run as frozen dataclasses. The line under each field gives its unit, scope and effect.

Every class checks its own fields when it is built, and `Recipe` checks them against each other. An error names the
field to change. An *epoch* is one rollout and its updates. An *image* is one sample of a prompt. A *transition* is one
denoising step of one image. A *process* is one GPU, or one CPU process.
"""

from __future__ import annotations

from fastguard.extras import need

need("train")

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import tyro
from pydantic import Field

from fastguard.advantages import DEFAULT_ESTIMATOR, ESTIMATOR_OPTIONS, ESTIMATORS, Estimator
from fastguard.errors import UserError
from fastguard.loss.checks import KlType, Reweight
from fastguard.loss.objectives import DEFAULT_OBJECTIVE, OBJECTIVES, OPTIONS, Objective
from fastguard.ops.registry import Recompute
from fastguard.options import Options

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4e38
"""Numbers beyond float32, in which losses are computed; products of smaller ones fit into float64."""
SMALLEST_FLOAT = 1.2e-38
"""Smaller numbers count as 0 in float32, or with few digits."""
MOST_AT_ONCE = 65_536
"""Images of a batch or of a group, processes, and ranks of an adapter."""
MOST_PROMPTS = 1_000_000
MOST_STEPS = 1000
"""Denoising steps."""
MOST_IMAGES = 1_000_000
"""Of a rollout, or of an evaluation: its transitions take terabytes of memory, at a megabyte an image."""
MOST_DRAWS = 100_000_000
"""Of noise in a rollout or an evaluation: a process may hold the seeds of all of them, in 8 bytes each."""
MOST_UPDATES = 100_000
"""Of an epoch, which writes a few hundred bytes about each of them into one line of metrics.jsonl."""

StepWeights = Literal[Reweight, "tempflow", "noise_level"]
"""`guard_loss` knows the first ones; `train.step_weights` finds the others from the schedule."""
ModelKind = Literal[
    "flux",
    "flux2",
    "flux2_klein",
    "kontext",
    "qwen_image",
    "sd3",
    "digits",
]
"""The names in `backbones.build.FAMILIES`, as types."""
Encoders = Literal["device", "int8", "cpu"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _at_least(low: float, **values: float) -> None:
    for name, value in values.items():
        _require(value >= low, f"{name} must be at least {low:g}, got {value}")


def _at_most(high: float, **values: float) -> None:
    """For values that nobody means when they are this large, and that would hang, or end the run much later."""
    for name, value in values.items():
        _require(value <= high, f"{name} must be at most {high:.10g}, got {value}")


def _within(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        _require(low <= value <= high, f"{name} must lie in [{low:.10g}, {high:.10g}], got {value}")


def recompute_levels(fuse: bool) -> tuple[Recompute, ...]:
    """The levels of model.recompute that there are with model.fuse, from the fastest to the smallest."""
    return get_args(Recompute) if fuse else ("none", "block", "offload")


def _check_images(images: int, called: str, num_steps: int, steps_called: str) -> None:
    """A rollout or an evaluation that begins within minutes, and whose seeds fit into memory."""
    _require(images <= MOST_IMAGES, f"{called} = {images} images must be at most {MOST_IMAGES}: lower one of the two")
    draws = images * (num_steps + 1)
    _require(
        draws <= MOST_DRAWS,
        f"{called} * ({steps_called} + 1) = {draws} draws of noise must be at most {MOST_DRAWS}: lower one of them",
    )


@dataclass(frozen=True)
class RunConfig:
    """Where a run is stored and how long it takes."""

    dir: Path = Path("runs/train")
    """folder of the run: checkpoints, metrics, images, report"""
    seed: int = 0
    """run seed; prompts, noise and the order of minibatches depend on it alone"""
    epochs: int = 100
    """epochs (rollouts, each followed by its updates) of the whole run"""
    save_every: int = 5
    """epochs between checkpoints; the last epoch is always saved"""
    keep_last: int = 2
    """newest checkpoints that are not deleted; the best one stays too"""
    images_every: int = 10
    """epochs between grids of rollout images; 0 writes none"""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """trackers that also receive the metrics of metrics.jsonl (wandb needs `pip install wandb`)"""

    def __post_init__(self) -> None:
        _at_least(0, seed=self.seed, images_every=self.images_every)
        _require(self.seed < 2**32, f"seed must be below 2**32, got {self.seed}")
        _at_least(1, epochs=self.epochs, save_every=self.save_every, keep_last=self.keep_last)
        _at_most(999_999, epochs=self.epochs)  # six digits in names; evaluations draw from the seeds of later ones


@dataclass(frozen=True)
class ModelConfig:
    """The model that is trained.

    The levels of `recompute`, from the fastest to the smallest: `none` saves the input of every linear layer.
    `pointwise` recomputes LayerNorms, activations, and normalized query and key, but no matmul. `mlp` also recomputes
    the first layer of each feed-forward. `block` recomputes whole blocks (gradient checkpointing). `offload` does, too,
    and the inputs of blocks wait in host memory. Unfused blocks have only `none`, `block` and `offload`.
    """

    kind: ModelKind = "flux"
    """model family, by a kind of diffusers pipeline; or the demo's digit model, which reads only `kind` and `fuse`"""
    path: str = "black-forest-labs/FLUX.1-dev"
    """folder of the pipeline in diffusers' layout, or its name on the model hub"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of the weights that are not trained, of activations and of latents"""
    height: int = 512
    """image height in pixels, a multiple of 16 for all but the tiny models (8 for the VAE, 2 for the patches)"""
    width: int = 512
    """image width in pixels"""
    guidance: float = 3.5
    """guidance scale: an input of distilled models such as Flux.1-dev, else classifier-free guidance (off at 1)"""
    negative_prompt: str = ""
    """prompt of the other branch of classifier-free guidance"""
    guidance_gradient: Literal["both", "conditional"] = "both"
    """branches of classifier-free guidance with a gradient: both, which is exact, or the prompt's alone, cheaper"""
    train: Literal["lora", "full"] = "lora"
    """what is trained: float32 LoRA adapters, or every weight of the transformer in `dtype`"""
    quantize: Literal["none", "int8", "float8", "nf4"] = "none"
    """format of the blocks' frozen weights: `dtype`, torchao's int8 or float8 (8 bits), bitsandbytes' nf4 (4 bits)"""
    fuse: bool = True
    """run the transformer's blocks with fused kernels, which save less for backward"""
    recompute: Literal["auto", Recompute] = "auto"
    """what backward recomputes instead of saving it; auto takes the fastest level that fits, by the planner"""
    attention: str = "native"
    """attention backend, by diffusers' name (native, flash, _flash_3, ...)"""
    compile: Literal["none", "blocks"] = "none"
    """what torch.compile compiles: nothing, or each transformer block by itself, which takes minutes at the start"""

    def __post_init__(self) -> None:
        _at_least(1, height=self.height, width=self.width)
        _at_most(16_384, height=self.height, width=self.width)
        _at_least(0, guidance=self.guidance)
        _at_most(1000, guidance=self.guidance)
        _require(
            self.recompute in recompute_levels(self.fuse) or self.recompute == "auto",
            f'recompute = "{self.recompute}" needs fused blocks: set fuse = true, or recompute to auto, none, block or '
            "offload",
        )
        _require(
            self.quantize == "none" or self.train == "lora",
            f'quantize = "{self.quantize}" takes frozen weights, and train = "{self.train}" trains them: set train = '
            '"lora", or quantize = "none"',
        )


@dataclass(frozen=True)
class LoraConfig:
    """LoRA adapters (peft); read with model.train = "lora"."""

    rank: int = 64
    """rank of the adapters"""
    alpha: int = 128
    """scale of the adapters: their output is multiplied by alpha / rank"""
    targets: Literal["auto"] | tuple[str, ...] = "auto"
    """layers that get an adapter, by the end of their names; auto takes the model family's list"""

    def __post_init__(self) -> None:
        _at_least(1, rank=self.rank, alpha=self.alpha)
        _at_most(MOST_AT_ONCE, rank=self.rank, alpha=self.alpha)
        _require(len(self.targets) > 0, "lora.targets must name at least one layer")


@dataclass(frozen=True)
class PromptsConfig:
    """The prompts."""

    file: Path = Path("prompts.txt")
    """text file with a prompt per line, or .jsonl with {"prompt": ...}, whose further keys are metadata for rewards"""
    per_epoch: int = 48
    """prompts per rollout, over all processes; in a seeded order, and none comes twice before all have come once"""
    max_tokens: int = 128
    """tokens per prompt of the encoder with the most (T5, or a language model); longer prompts are cut"""
    encoders: Encoders = "device"
    """where prompts are encoded: on the GPU, there with the large weights in 8 bits (torchao), or on the host"""
    cache: Path | None = None
    """folder of encoded prompts; none takes $FASTGUARD_CACHE, or ~/.cache/fastguard"""

    def __post_init__(self) -> None:
        _at_least(1, per_epoch=self.per_epoch, max_tokens=self.max_tokens)
        _at_most(MOST_PROMPTS, per_epoch=self.per_epoch)
        _at_most(4096, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class SamplerConfig:
    """How images are sampled."""

    kind: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    """stochastic step: Flow-GRPO's, DanceGRPO's, or Flow-CPS'"""
    num_steps: int = 6
    """denoising steps per image"""
    shift: float | Literal["auto"] = "auto"
    """schedule shift; 1 has uniform steps, larger values take more steps near the noise, auto takes the model's own"""
    noise_level: float = 0.9
    """eta of the stochastic step, a factor on the noise that it adds; at most 1 for cps"""
    sde_steps: int = 5
    """steps of the window, which are stochastic and trained; all others are deterministic (ODE) and not trained"""
    window: Literal["fixed", "random", "sliding"] = "fixed"
    """fixed stays at window_start, random is drawn for each epoch, sliding moves one step every window_epochs"""
    window_start: int = 0
    """first step of the window; 0 starts from pure noise; for random and sliding, the earliest first step"""
    window_epochs: int = 10
    """epochs before a sliding window moves; after its last place it returns to its first"""
    group_size: int = 24
    """images per prompt and rollout, over all processes; advantages compare the images of a group"""
    batch_size: int = 4
    """images sampled at once, per process"""
    decode_batch: int = 4
    """images that the VAE decodes at once, per process"""
    decode_tiled: bool = False
    """decode images above 512 pixels in overlapping tiles of 512: less memory, and pixels that differ a little"""
    store: Literal["device", "cpu"] = "cpu"
    """where trained transitions wait for their update: on the GPU, or in pinned host memory"""

    def __post_init__(self) -> None:
        _at_least(
            1,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            decode_batch=self.decode_batch,
            window_epochs=self.window_epochs,
        )
        _at_most(MOST_STEPS, num_steps=self.num_steps)
        _at_most(MOST_AT_ONCE, batch_size=self.batch_size, decode_batch=self.decode_batch, group_size=self.group_size)
        _at_least(0, window_start=self.window_start)
        # Without noise a step has no density; the smallest standard deviations are 1e-6 of this, and their squares have
        # to fit into float32. Recipes use about 1: ten times as much drowns every image.
        _within(1e-6 if self.sde_steps else 0, 1 if self.kind == "cps" else 10, noise_level=self.noise_level)
        _require(self.group_size >= 2, f"group_size must be at least 2 to compare images, got {self.group_size}")
        _require(self.shift == "auto" or self.shift > 0, f"shift must be positive or auto, got {self.shift}")
        _require(
            self.shift == "auto" or 1e-3 <= self.shift <= 1e3, f"shift must lie in [0.001, 1000], got {self.shift}"
        )
        _require(
            0 <= self.sde_steps <= self.num_steps,
            f"sde_steps must lie in [0, num_steps = {self.num_steps}], got {self.sde_steps}",
        )
        _require(
            self.window_start + self.sde_steps <= self.last_window_end,
            f"the window of sde_steps = {self.sde_steps} from window_start = {self.window_start} must end by step "
            f"{self.last_window_end}" + (": the last step of cps has no noise" if self.kind == "cps" else ""),
        )

    def shift_for(self, model_shift: float) -> float:
        """The schedule shift: as set, or the model's own. Raises UserError if that leaves no steps between 1 and 0.

        A model's own grows with the exponential of the image's area.
        """
        shift = model_shift if self.shift == "auto" else self.shift
        _require(
            1e-9 <= shift <= 1e9,
            f'sampler.shift = "auto" takes the model\'s own shift, which at this size of images is {shift:g}: set '
            "sampler.shift to a number in [0.001, 1000], or lower model.height and model.width",
        )
        return shift

    @property
    def last_window_end(self) -> int:
        """Steps from here on are never stochastic: moving windows, like public recipes, leave the last one out."""
        moving = self.window != "fixed" or self.kind == "cps"
        return self.num_steps - 1 if moving and self.sde_steps else self.num_steps


@dataclass(frozen=True)
class _Named:
    """Base of the sections whose `name` chooses their further fields: the options of a class of a table."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        name: str = self.name  # type: ignore[attr-defined]
        if NAMED[self.section].configs.get(name) is not type(self):
            raise UserError(
                f"{self.section}.name = {name!r} does not fit the options of {type(self).__name__}: make one "
                f"of another name with {self.section}_config(name, ...)"
            )
        try:
            super().__post_init__()  # type: ignore[misc]
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None


@dataclass(frozen=True)
class ObjectiveConfig(_Named, Objective):
    """What `guard_loss` minimizes. The options of the objective that `name` chooses are further fields.

    `objective_config` makes one. The class of each objective in `fastguard.loss.objectives` documents its options.
    """

    section: ClassVar[str] = "objective"

    name: str = DEFAULT_OBJECTIVE
    """the objective; its options are the other fields, and start from their defaults when another one is named"""
    reweight: StepWeights = "inverse_dt"
    """factor on a step's loss: 1/|dt|, 1/|velocity_coef|, 1, std / mean std (tempflow), std / sqrt|dt| (noise_level)"""
    kl_weight: float = 0.0
    """weight of the KL to the model before training; 0 computes none"""
    kl_type: KlType = "gaussian"
    """KL of the step's Gaussians, or the mean squared velocity difference, which is about 100 times larger"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(0, kl_weight=self.kl_weight)
        _at_most(10**6, kl_weight=self.kl_weight)


@dataclass(frozen=True)
class AdvantagesConfig(_Named, Estimator):
    """How rewards become advantages. The options of the estimator that `name` chooses are further fields.

    `advantages_config` makes one. The class of each estimator in `fastguard.advantages` documents its options.
    """

    section: ClassVar[str] = "advantages"

    name: str = DEFAULT_ESTIMATOR
    """the estimator; its options are the other fields, and start from their defaults when another one is named"""


def _with_options_of(table: Mapping[str, type], name: str, base: type[_Named]) -> Any:
    """A section with the options of one class of a table; it is an instance of that class itself."""
    kind = table[name]
    known = tyro.conf.arg(metavar="{" + ",".join(table) + "}")
    named: Any = ("name", Annotated[Literal[name], known], field(default=name))
    made = make_dataclass(f"{kind.__name__}Config", [named], bases=(base, kind), frozen=True)
    made.__doc__, made.__module__ = kind.__doc__, __name__
    globals()[made.__name__] = made  # where pickle looks for it
    return made


@dataclass(frozen=True)
class NamedSection:
    """The classes behind a section whose `name` chooses its further fields."""

    default: str
    """the name where a recipe gives none"""
    base: type
    """class with the fields that every name has"""
    configs: Mapping[str, Any]
    """name -> class of the section"""
    options: Options
    """name -> its own options"""


OBJECTIVE_CONFIGS: dict[str, type[ObjectiveConfig]] = {
    name: _with_options_of(OBJECTIVES, name, ObjectiveConfig) for name in OBJECTIVES
}
ADVANTAGES_CONFIGS: dict[str, type[AdvantagesConfig]] = {
    name: _with_options_of(ESTIMATORS, name, AdvantagesConfig) for name in ESTIMATORS
}
NAMED = {
    "objective": NamedSection(DEFAULT_OBJECTIVE, ObjectiveConfig, OBJECTIVE_CONFIGS, OPTIONS),
    "advantages": NamedSection(DEFAULT_ESTIMATOR, AdvantagesConfig, ADVANTAGES_CONFIGS, ESTIMATOR_OPTIONS),
}
"""The sections whose `name` chooses their further fields."""
if TYPE_CHECKING:
    AnyObjectiveConfig = ObjectiveConfig
    AnyAdvantagesConfig = AdvantagesConfig
else:
    AnyObjectiveConfig = Annotated[reduce(or_, OBJECTIVE_CONFIGS.values()), Field(discriminator="name")]
    AnyAdvantagesConfig = Annotated[reduce(or_, ADVANTAGES_CONFIGS.values()), Field(discriminator="name")]


def named_config(section: str, name: str, **options: Any) -> Any:
    """A section of `NAMED`. Raises UserError for an unknown name, TypeError for an unknown option."""
    configs = NAMED[section].configs
    if name not in configs:
        raise UserError(f"{section}.name must be one of {', '.join(configs)}, got {name!r}")
    return configs[name](**options)


def objective_config(name: str = DEFAULT_OBJECTIVE, **options: Any) -> ObjectiveConfig:
    """The [objective] table of a recipe, see `named_config`."""
    config: ObjectiveConfig = named_config("objective", name, **options)
    return config


def advantages_config(name: str = DEFAULT_ESTIMATOR, **options: Any) -> AdvantagesConfig:
    """The [advantages] table of a recipe, see `named_config`."""
    config: AdvantagesConfig = named_config("advantages", name, **options)
    return config


RewardOption = bool | int | float | str


@dataclass(frozen=True)
class RewardConfig:
    """One reward function."""

    use: str
    """a built-in's name, `module:function` (or `module:Class`), or the http(s) address of a reward server"""
    weight: float = 1.0
    """factor in the weighted sum of all rewards"""
    name: str = ""
    """name in metrics and messages; empty means `use`"""
    options: dict[str, RewardOption] = field(default_factory=dict)
    """keyword arguments of the reward; the docstring of a built-in lists its own"""

    @property
    def label(self) -> str:
        return self.name or self.use


@dataclass(frozen=True)
class ScoringConfig:
    """How rewards are computed. Scoring runs while the next images are sampled."""

    threads: int = 2
    """scoring threads per process"""
    timeout_s: float = 300.0
    """seconds that one batch may wait for one reward"""
    on_failure: Literal["stop", "drop_group"] = "stop"
    """if a reward raises, times out or gives no finite score: save and stop, or train without that prompt's images"""
    normalize_each: bool = False
    """normalize each reward within its group before the weighted sum, so that weights do not depend on its scale"""

    def __post_init__(self) -> None:
        _at_least(1, threads=self.threads)
        _at_most(256, threads=self.threads)
        # No thread answers sooner, and Python's locks wait no longer than 2**63 nanoseconds.
        _within(0.001, 10**9, timeout_s=self.timeout_s)


@dataclass(frozen=True)
class UpdateConfig:
    """How the weights change."""

    inner_epochs: int = 1
    """passes over each rollout"""
    minibatches: int = 2
    """optimizer updates per pass; each takes an equal share of the transitions of every rollout batch"""
    subsample: float = 1.0
    """share of the images that a pass trains on, drawn by |advantage| and weighted so that the gradient has no bias"""
    draws: int = 4
    """flow times and noises of each image in a pass, for objectives of the forward process"""
    micro_batch: int = 4
    """transitions per forward and backward pass, per process; 0 takes the whole share of a minibatch at once"""
    stop: Literal["none", "espo"] = "none"
    """a rule that ends the updates of a rollout early: "espo" (arXiv 2202.00079) once the policy is stop_at away"""
    stop_at: float = 0.25
    """mean of |r - 1| under the rollout policy, r the ratio of the whole latent: twice the total variation, below 2"""
    optimizer: Literal["adamw", "adamw8bit", "adamw_cpu"] = "adamw"
    """plain AdamW; with 8-bit state and stochastic rounding (torchao); or with float32 weights and state on the host"""
    learning_rate: float = 1e-4
    """AdamW learning rate"""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decay rates"""
    eps: float = 1e-8
    """AdamW epsilon"""
    weight_decay: float = 1e-4
    """AdamW weight decay"""
    max_grad_norm: float = 1.0
    """gradient norm above which the gradient is scaled down"""
    ema_decay: float = 0.0
    """decay of the averaged weights, which are evaluated and exported; 0 averages none"""
    ema_every: int = 8
    """optimizer updates between steps of the average"""
    copies: Literal["cpu", "device"] = "device"
    """where copies of weights are stored: averages, and in full fine-tuning the model before it, if it is needed"""
    parity: float = 0.5
    """before the first update, rollout steps scored again may differ by this share of the clip range; 0 skips it"""
    max_bad_updates: int = 3
    """updates in a row that are skipped, since loss or gradient is not finite, before the run stops"""

    def __post_init__(self) -> None:
        _at_least(
            1,
            inner_epochs=self.inner_epochs,
            minibatches=self.minibatches,
            draws=self.draws,
            ema_every=self.ema_every,
            max_bad_updates=self.max_bad_updates,
        )
        _at_most(MOST_STEPS, inner_epochs=self.inner_epochs, draws=self.draws)
        _at_most(MOST_UPDATES, **{"inner_epochs * minibatches": self.inner_epochs * self.minibatches})
        _at_least(0, micro_batch=self.micro_batch, parity=self.parity)
        _at_least(0, learning_rate=self.learning_rate, weight_decay=self.weight_decay)
        _at_most(10, learning_rate=self.learning_rate)
        _at_most(1000, weight_decay=self.weight_decay)
        # An update multiplies every weight by 1 minus this product.
        _at_most(1, **{"learning_rate * weight_decay": self.learning_rate * self.weight_decay})
        # AdamW divides by the root of a mean of squares, which float32 takes for 0 where gradients are below 1e-22.
        _within(1e-20, 1, eps=self.eps)
        _require(0 < self.subsample <= 1, f"subsample must lie in (0, 1], got {self.subsample}")
        _require(0 < self.stop_at < 2, f"stop_at must lie in (0, 2), got {self.stop_at}")
        _require(self.max_grad_norm > 0, f"max_grad_norm must be positive, got {self.max_grad_norm}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas must lie in [0, 1), got {self.betas}")
        _require(0 <= self.ema_decay < 1, f"ema_decay must lie in [0, 1), got {self.ema_decay}")


@dataclass(frozen=True)
class MonitorConfig:
    """Watches for over-optimization: held-out gold rewards on fixed prompts and seeds."""

    every: int = 0
    """epochs between evaluations; 0 turns the monitor off"""
    file: Path | None = None
    """prompts of the evaluation, as in prompts.file; none takes the first prompts of the training set"""
    prompts: int = 16
    """prompts per evaluation, over all processes, taken from the top of the file"""
    images_per_prompt: int = 4
    """images per prompt and evaluation"""
    num_steps: int = 28
    """denoising steps of the evaluation, all deterministic"""
    drop: float = 2.0
    """how far the gold score must fall below its best, in standard errors of the paired difference over the images"""
    patience: int = 2
    """evaluations in a row, with the gold score fallen and the proxy risen since its best, before the warning"""
    on_hacking: Literal["warn", "stop"] = "warn"
    """when the proxy rises while the gold score falls: warn, or warn and stop the run"""
    gold: tuple[RewardConfig, ...] = ()
    """rewards that are measured and never trained on; their weighted sum is the gold score"""

    def __post_init__(self) -> None:
        _at_least(0, every=self.every, drop=self.drop)
        _at_least(
            1,
            prompts=self.prompts,
            images_per_prompt=self.images_per_prompt,
            num_steps=self.num_steps,
            patience=self.patience,
        )
        _at_most(MOST_PROMPTS, prompts=self.prompts)
        _at_most(MOST_AT_ONCE, images_per_prompt=self.images_per_prompt)
        _at_most(MOST_STEPS, num_steps=self.num_steps)
        _check_images(self.prompts * self.images_per_prompt, "prompts * images_per_prompt", self.num_steps, "num_steps")
        _require(not self.every or len(self.gold) > 0, "monitor.every needs a reward in [[monitor.gold]]")


@dataclass(frozen=True)
class HardwareConfig:
    """The hardware that the run is planned for. The launch is checked against it."""

    processes: int = 1
    """GPUs (processes) that the run is launched on"""
    sharding: Literal["none", "fsdp2"] = "none"
    """weights unsharded on every GPU (DDP), or sharded over the GPUs (FSDP2)"""
    memory_gb: float = 80.0
    """memory of one GPU in GB (1e9 bytes), for the planner"""
    tflops: float = 989.0
    """peak of one GPU in TFLOP/s, for the planner's hours; the default is an H100 SXM's in dense bf16"""

    def __post_init__(self) -> None:
        _at_least(1, processes=self.processes)
        _at_most(MOST_AT_ONCE, processes=self.processes)
        _require(self.memory_gb > 0, f"memory_gb must be positive, got {self.memory_gb}")
        _at_most(10**6, memory_gb=self.memory_gb)
        _require(self.tflops > 0, f"tflops must be positive, got {self.tflops}")
        _at_most(10**6, tflops=self.tflops)


@dataclass(frozen=True)
class Recipe:
    """Everything about one reinforcement-learning run."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # read by recipe.py: unknown fields are errors
    run: RunConfig = field(default_factory=RunConfig)
    """where the run is stored and how long it takes"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """what is trained"""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """adapters"""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """the prompts"""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """how images are sampled"""
    objective: AnyObjectiveConfig = field(default_factory=objective_config)
    """the loss"""
    rewards: tuple[RewardConfig, ...] = ()
    """what the policy learns to raise"""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """how rewards are computed"""
    advantages: AnyAdvantagesConfig = field(default_factory=advantages_config)
    """how rewards become advantages"""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    """how the weights change"""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """gold rewards that watch for over-optimization"""
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    """the hardware that it is planned for"""

    def __post_init__(self) -> None:
        self._check_values()
        _require(len(self.rewards) > 0, "a recipe needs at least one [[rewards]] entry")
        labels = Counter(reward.label for reward in self.rewards + self.monitor.gold)
        twice = sorted(label for label, count in labels.items() if count > 1)
        _require(not twice, f"two rewards are called {twice}; give one of them a `name`")
        forward = self.objective.process == "forward"
        _require(
            forward or self.sampler.sde_steps >= 1,
            "sampler.sde_steps must be at least 1: only those steps are trained",
        )
        images, steps = ("prompts.per_epoch * sampler.group_size", "sampler.num_steps")
        _check_images(self.images_per_epoch, images, self.sampler.num_steps, steps)
        if forward:
            _check_images(self.images_per_epoch, images, self.stored_steps, "update.inner_epochs * update.draws")
        self._check_divisions()
        self._check_per_step()
        _require(
            self.update.stop == "none" or not forward,
            f"update.stop = {self.update.stop} measures how far denoising steps are from the rollout's, and "
            f"objective.name = {self.objective.name} takes none: set update.stop to none",
        )
        _require(
            self.update.stop == "none" or self.objective.rollouts == 1,
            f"update.stop = {self.update.stop} measures how far the policy is from the fresh rollout's, and "
            f"objective.name = {self.objective.name} trains on earlier ones too: set update.stop to none, or "
            "objective.window to 1",
        )
        sharded = self.hardware.sharding == "fsdp2"
        _require(
            not sharded or self.model.quantize == "none",
            f'model.quantize = "{self.model.quantize}" cannot be sharded, as that would part codes from their scales: '
            'set hardware.sharding = "none" (quantized weights fit on every GPU), or model.quantize = "none"',
        )
        for name, works, value in (
            ("optimizer", "adamw", self.update.optimizer),
            ("copies", "device", self.update.copies),
        ):
            _require(
                not sharded or value == works,
                f'update.{name} = "{value}" works on whole weights; with hardware.sharding = "fsdp2" use "{works}", '
                "which is sharded too",
            )

    def _check_values(self) -> None:
        """Every number is finite, and of a size that somebody may mean; every text can be handed to the system."""
        sections = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rewards"}
        sections |= {f"rewards.{i}": reward for i, reward in enumerate(self.rewards)}
        sections |= {f"monitor.gold.{i}": reward for i, reward in enumerate(self.monitor.gold)}
        for section, values in sections.items():
            for f in fields(values):
                value = getattr(values, f.name)
                for one in value if isinstance(value, tuple) else (value,):
                    _check_value(f"{section}.{f.name}", one)

    def _check_divisions(self) -> None:
        """Work divides evenly over processes, batches and minibatches, so that every rank takes the same steps."""
        sampler, processes = self.sampler, self.hardware.processes
        if self.images_per_epoch % (sampler.batch_size * processes):
            raise UserError(
                f"prompts.per_epoch * sampler.group_size = {self.images_per_epoch} images do not divide into batches "
                f"of sampler.batch_size = {sampler.batch_size} on hardware.processes = {processes}. "
                f"Nearest that work: {nearest_divisible(self)}"
            )
        images, share = self.trained_images, self.update.subsample
        _require(
            math.isclose(images, share * sampler.batch_size) and images > 0,
            f"update.subsample = {share:g} of sampler.batch_size = {sampler.batch_size} images is no whole number",
        )
        of = f"update.subsample * sampler.batch_size = {images}" if share < 1 else f"sampler.batch_size = {images}"
        if self.objective.scope == "trajectory":
            _require(
                images % self.update.minibatches == 0,
                f"objective.name = {self.objective.name} takes all steps of an image in one update, and {of} images do "
                f"not divide into update.minibatches = {self.update.minibatches}",
            )
        if self.objective.scope == "group":
            _require(
                share == 1,
                f"objective.name = {self.objective.name} takes all images of a group in one update: set "
                f"update.subsample = 1 instead of {share:g}",
            )
            _require(
                self.update.draws % self.update.minibatches == 0,
                f"objective.name = {self.objective.name} takes all images of a group in one update, so "
                f"update.minibatches = {self.update.minibatches} must divide update.draws = {self.update.draws}",
            )
        pairs = images * self.trained_steps
        steps = "update.draws" if self.objective.process == "forward" else "sampler.sde_steps"
        if self.objective.process == "reverse" and self.trained_steps != sampler.sde_steps:
            steps = f"{self.trained_steps} trained steps (objective.keep of sampler.sde_steps)"
        _require(
            pairs % self.update.minibatches == 0,
            f"{of.split(' =')[0]} * {steps} = {pairs} transitions of a rollout batch do not divide into "
            f"update.minibatches = {self.update.minibatches}",
        )

    def _check_per_step(self) -> None:
        """Advantages per step go with a loss per step, and with rewards as they are."""
        name = self.advantages.name
        if not self.advantages.per_step:
            return
        _require(
            (self.objective.scope, self.objective.process, self.objective.rollouts) == ("transition", "reverse", 1),
            f"advantages.name = {name} gives each denoising step its own advantage, and objective.name = "
            f"{self.objective.name} takes one for each image: change one of the two",
        )
        _require(
            not self.scoring.normalize_each,
            f"scoring.normalize_each centers rewards at 0, and advantages.name = {name} needs rewards that are not "
            "negative: set scoring.normalize_each = false",
        )

    def unread(self, by_model: Mapping[str, str]) -> dict[str, str]:
        """`section.field` -> reason, for values that are not the default and that nothing reads.

        They were meant to have an effect, so that recipe.py refuses them where they are written down.

        Args:
            by_model: `section` or `section.field` -> reason, for what the model family does not read.
        """
        model, sampler, objective = self.model, self.sampler, self.objective
        forward = objective.process == "forward"
        has_adapters = model.train == "lora" and "lora" not in by_model
        unread: list[tuple[bool, str, str]] = [
            *((True, path, reason) for path, reason in by_model.items()),
            *((model.guidance <= 1, f"model.{name}", "model.guidance = 1 and below has no second branch")
              for name in ("negative_prompt", "guidance_gradient")),
            (model.train == "full", "lora", 'model.train = "full" trains every weight'),
            (sampler.window != "sliding", "sampler.window_epochs", f"sampler.window = {sampler.window} does not slide"),
            (objective.kl_weight == 0, "objective.kl_type", "objective.kl_weight = 0 computes no KL"),
            *((forward, field, f"objective.name = {objective.name} takes no denoising steps, and samples without noise")
              for field in ("objective.reweight", "objective.kl_type", "sampler.kind", "sampler.noise_level",
                            "sampler.window", "sampler.window_epochs")),
            (objective.anchor != "rollout", "update.parity", f"objective.name = {objective.name} has no ratio of 1"),
            (not forward, "update.draws", f"objective.name = {objective.name} trains on denoising steps"),
            (
                self.update.ema_decay == 0
                and objective.anchor != "average"
                and (has_adapters or (objective.kl_weight == 0 and objective.anchor != "reference")),
                "update.copies",
                "there is no average (update.ema_decay), and no copy of the model before training",
            ),
            *((objective.reuse == "best" and objective.rollouts == 1, f"objective.{name}",
               "objective.window = 1 keeps no earlier rollout") for name in ("replayed", "cap")),
            (self.update.stop == "none", "update.stop_at", "update.stop = none asks for no distance"),
            (self.update.ema_decay == 0, "update.ema_every", "update.ema_decay = 0 keeps no average"),
            *((self.monitor.every == 0, f"monitor.{f.name}", "monitor.every = 0 turns it off")
              for f in fields(MonitorConfig) if f.name != "every"),
        ]  # fmt: skip
        return {field: reason for never, path, reason in unread if never for field in _changed(self, path)}

    @property
    def images_per_epoch(self) -> int:
        """Images per rollout, over all processes."""
        return self.prompts.per_epoch * self.sampler.group_size

    @property
    def images_per_process(self) -> int:
        """Images per rollout and process."""
        return self.images_per_epoch // self.hardware.processes

    @property
    def scored_per_image(self) -> int:
        """Images that are decoded and scored for each one that is sampled."""
        return self.sampler.sde_steps if self.advantages.per_step else 1

    @property
    def trained_images(self) -> int:
        """Images of a rollout batch that a pass trains on."""
        return round(self.update.subsample * self.sampler.batch_size)

    @property
    def trained_steps(self) -> int:
        """Transitions of an image that a pass trains on: denoising steps, or draws of the forward process."""
        forward = self.objective.process == "forward"
        return self.update.draws if forward else self.objective.trained_steps(self.sampler.sde_steps)

    @property
    def stored_steps(self) -> int:
        """Transitions of an image that a rollout stores: each pass of the forward process has draws of its own."""
        forward = self.objective.process == "forward"
        return self.update.draws * self.update.inner_epochs if forward else self.sampler.sde_steps

    @property
    def draws_of_noise(self) -> int:
        """Draws of an image beside its initial latents: one for each denoising step, or for each stored draw."""
        return max(self.sampler.num_steps, self.stored_steps)

    @property
    def averages(self) -> int:
        """Averages of the weights, in float32: the one that is exported, and the one that samples."""
        return (self.update.ema_decay > 0) + (self.objective.anchor == "average")

    @property
    def best_images(self) -> int:
        """Images of a rollout that the objective keeps as the best of their prompts, over all processes."""
        if self.objective.rollouts == 1:
            return 0
        return self.prompts.per_epoch * self.objective.replayed_images(self.sampler.group_size)

    @property
    def fresh_transitions(self) -> int:
        """Transitions of the fresh rollout that one process contributes to an optimizer update."""
        batches = self.images_per_process // self.sampler.batch_size
        return batches * self.trained_images * self.trained_steps // self.update.minibatches

    @property
    def transitions_per_update(self) -> int:
        """Transitions that one process contributes to an optimizer update, once all earlier rollouts are there."""
        fresh = self.fresh_transitions
        if self.objective.reuse == "rollouts":
            return fresh * self.objective.rollouts
        shares = self.update.minibatches * self.hardware.processes
        return fresh + math.ceil(self.best_images * self.trained_steps / shares)

    @property
    def micro_batch(self) -> int:
        """Transitions per forward and backward pass, per process (the last pass of an update may have fewer)."""
        return min(self.update.micro_batch or self.transitions_per_update, self.transitions_per_update)


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""NUL ends a text for the system, and others act on a terminal that shows them."""


def _check_value(name: str, value: Any) -> None:
    for text in (*value, *value.values()) if isinstance(value, dict) else (value,):
        found = _CONTROL.search(str(text)) if isinstance(text, str | Path) else None
        _require(found is None, f"{name}: {str(text)!r} holds a control character; remove it")
    if isinstance(value, float):
        _require(math.isfinite(value), f"{name} must be finite, got {value}")
        _require(
            value == 0 or SMALLEST_FLOAT <= abs(value) <= LARGEST_FLOAT,
            f"{name} must be 0 or lie in +-[{SMALLEST_FLOAT}, {LARGEST_FLOAT}], as float32 does, got {value}",
        )
    elif isinstance(value, int) and not name.endswith(".seed"):  # which has 32 bits
        _require(abs(value) <= LARGEST_INT, f"{name} must lie in +-{LARGEST_INT}, got {value}")


def _changed(recipe: Recipe, path: str) -> list[str]:
    """Fields at `section` or `section.field` whose value is not the default."""
    section, _, name = path.partition(".")
    value: Any = getattr(recipe, section)
    default = type(value)()
    names = [name] if name else [f.name for f in fields(value)]
    return [f"{section}.{n}" for n in names if getattr(value, n) != getattr(default, n)]


def nearest_divisible(recipe: Recipe) -> str:
    """Settings next to the recipe's that divide its images over processes and batches, in words."""
    images, processes = recipe.images_per_epoch, recipe.hardware.processes
    per_epoch, group, batch = recipe.prompts.per_epoch, recipe.sampler.group_size, recipe.sampler.batch_size
    together = batch * processes
    groups = _multiples(group, together // math.gcd(together, per_epoch))
    prompts = _multiples(per_epoch, together // math.gcd(together, group))
    batches = _divisors(images // processes) if images % processes == 0 else []
    fewer = [p for p in _divisors(images // batch) if p < processes] if images % batch == 0 else []
    candidates = (
        ("sampler.batch_size", batch, batches),
        ("sampler.group_size", group, [g for g in groups if 2 <= g <= MOST_AT_ONCE]),
        ("prompts.per_epoch", per_epoch, [p for p in prompts if 1 <= p <= MOST_PROMPTS]),
        ("hardware.processes", processes, fewer),
    )
    nearest = [f"{name} = {min(near, key=lambda v: (abs(v - at), v))}" for name, at, near in candidates if near]
    return " or ".join(nearest) or "none"


def _multiples(near: int, of: int) -> tuple[int, ...]:
    """Multiples of `of` around a number."""
    below = near // of * of
    return below, below + of, below + 2 * of


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return [*small, *(n // d for d in small)]
