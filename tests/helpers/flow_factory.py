"""Flow-Factory's interfaces for the tests of its integration: a stand-in for the package, and trainers without a model.

Axes: N samples of a rollout, T denoising steps, S tokens, C channels.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastguard as fg


class Arguments(dict[str, Any]):
    """Arguments as attributes and as keywords."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


# --- a stand-in for the package -------------------------------------------------------------------------------------


class Sample:
    """One trajectory: fields without a batch axis, of which two are the same for a batch."""

    SHARED = ("latent_index_map", "log_prob_index_map")

    def __init__(self, *, extra_kwargs: dict[str, Any], **fields: Any) -> None:
        self.fields = fields | extra_kwargs

    def __getitem__(self, name: str) -> Any:
        return self.fields[name]

    def to(self, device: torch.device) -> Sample:
        return self

    @staticmethod
    def stack(samples: list[Sample]) -> dict[str, Any]:
        first = samples[0].fields
        return {
            name: first[name] if name in Sample.SHARED else torch.stack([sample.fields[name] for sample in samples])
            for name in first
        }


class Scheduler:
    """A schedule and its sampler, with the conventions of Flow-Factory for `std_dev_t` and `dt`."""

    def __init__(self, dynamics_type: str, timesteps: Tensor, noise_level: float = 0.7) -> None:
        self.dynamics_type, self.timesteps, self.noise_level = dynamics_type, timesteps, noise_level
        self.train_timesteps = torch.arange(len(timesteps) - 1)

    def transition(self, t: Tensor, t_next: Tensor, noise_level: float) -> fg.Transition:
        """The step between two times (B,) in 0 to 1000, in their dtype."""
        make = {"Flow-SDE": fg.flow_sde, "Dance-SDE": fg.dance_sde, "CPS": fg.cps}[self.dynamics_type]
        options = {"sigma_max": self.timesteps[1].to(t.dtype) / 1000} if self.dynamics_type == "Flow-SDE" else {}
        return make(t / 1000, t_next / 1000, noise_level, **options)

    def step(
        self,
        noise_pred: Tensor,
        timestep: Tensor,
        latents: Tensor,
        *,
        next_latents: Tensor | None,
        timestep_next: Tensor,
        noise_level: float,
        compute_log_prob: bool,
        return_kwargs: list[str],
    ) -> SimpleNamespace:
        step = self.transition(timestep, timestep_next, noise_level).expand(len(latents))

        def columns(value: Tensor) -> Tensor:
            return value.view(-1, *[1] * (latents.ndim - 1))

        assert not compute_log_prob, "the log-probability's graph would stay alive"
        mean = columns(step.latents_coef) * latents.float() + columns(step.velocity_coef) * noise_pred.float()
        if next_latents is None:
            next_latents = (mean + columns(step.std) * torch.randn(mean.shape)).to(latents.dtype)
        bare = step.std if self.dynamics_type == "CPS" else step.std / (-step.dt).sqrt()
        made = {"next_latents": next_latents, "next_latents_mean": mean, "noise_pred": noise_pred}
        made |= {"std_dev_t": columns(bare), "dt": columns(step.dt)}
        return SimpleNamespace(**{name: made[name] for name in return_kwargs})


def stand_in() -> dict[str, ModuleType]:
    """The modules of Flow-Factory that the integration imports, with what it uses of them."""

    @dataclass(kw_only=True)
    class GRPOTrainingArguments:
        trainer_type: str = "grpo"
        clip_range: float = 1e-4

        def __post_init__(self) -> None:
            pass

    def filter_kwargs(function: Callable[..., Any], **kwargs: Any) -> dict[str, Any]:
        return {name: kwargs[name] for name in inspect.signature(function).parameters if name in kwargs}

    def create_generator(*keys: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash(keys) % 2**32)

    def reduce_loss_info(accelerator: Any, numbers: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {
            name: torch.stack(values).mean() if values[0].ndim == 0 else torch.cat(values)
            for name, values in numbers.items()
        }

    contents: dict[str, dict[str, Any]] = {
        "": {},
        ".train": {"main": lambda: None},
        ".samples": {"BaseSample": Sample},
        ".hparams": {},
        ".hparams.training_args": {
            "GRPOTrainingArguments": GRPOTrainingArguments,
            "_TRAINING_ARGS_REGISTRY": dict.fromkeys(("grpo", "grpo-guard", "nft"), GRPOTrainingArguments),
        },
        ".trainers": {},
        ".trainers.registry": {"_TRAINER_REGISTRY": {"grpo": "theirs", "grpo-guard": "theirs", "nft": "theirs"}},
        ".trainers.grpo": {"GRPOGuardTrainer": type("GRPOGuardTrainer", (), {})},
        ".utils": {},
        ".utils.base": {"filter_kwargs": filter_kwargs, "create_generator": create_generator},
        ".utils.dist": {"reduce_loss_info": reduce_loss_info},
    }
    modules = {}
    for name, names in contents.items():
        module = modules[f"flow_factory{name}"] = ModuleType(f"flow_factory{name}")
        vars(module).update(names)
        if name:
            parent, _, child = f"flow_factory{name}".rpartition(".")
            setattr(modules[parent], child, module)
    return modules


@contextmanager
def use_stand_in() -> Iterator[dict[str, ModuleType]]:
    """`import flow_factory` gives the stand-in meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.partition(".")[0] == "flow_factory"]:
            patch.delitem(sys.modules, name)
        modules = stand_in()
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        yield modules


# --- trainers without a model ---------------------------------------------------------------------------------------


class Adapter:
    """A policy whose velocities are given: those of a trajectory travel with it, one per step."""

    trainable_components = ()

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.reference = scheduler, False

    def train(self) -> None:
        self.reference = False

    def get_trainable_parameters(self) -> list[Tensor]:
        return []

    @contextmanager
    def use_ref_parameters(self) -> Iterator[None]:
        self.reference = True
        yield
        self.reference = False

    def forward(
        self,
        t: Tensor,
        t_next: Tensor,
        latents: Tensor,
        next_latents: Tensor,
        noise_level: float,
        compute_log_prob: bool,
        return_kwargs: list[str],
        timesteps: Tensor,
        velocity: Tensor,
        ref_velocity: Tensor,
    ) -> Any:
        assert self.reference <= (not torch.is_grad_enabled()), "the reference needs no graph"
        steps = (timesteps == t[:, None]).int().argmax(1).tolist()
        velocities = ref_velocity if self.reference else velocity
        chosen = torch.stack([of_sample[step] for of_sample, step in zip(velocities, steps, strict=True)])
        return self.scheduler.step(
            chosen, t, latents, next_latents=next_latents, timestep_next=t_next, noise_level=noise_level,
            compute_log_prob=compute_log_prob, return_kwargs=return_kwargs,
        )  # fmt: skip


class Accelerator:
    """One process; records losses, and steps the optimizer after every `accumulated` of them."""

    device = torch.device("cpu")

    def __init__(self, accumulated: int | None = None) -> None:
        self.accumulated, self.losses = accumulated, []

    def accumulate(self, *models: Any) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        loss.backward()

    @property
    def sync_gradients(self) -> bool:
        return self.accumulated is not None and len(self.losses) % self.accumulated == 0

    def reduce(self, value: Any, reduction: str) -> Any:
        return value

    def clip_grad_norm_(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        return torch.tensor(0.0)


def make_trainer(scheduler: Any, objective: str, accumulated: int | None = None, **args: Any) -> Any:
    """What `optimize` uses of a trainer, ours or theirs."""
    defaults: dict[str, Any] = {
        "per_device_batch_size": 4, "num_inner_epochs": 1, "seed": 3, "clip_range": (-1e-2, 2e-2), "max_grad_norm": 1.0,
        "adv_clip_range": (-1.5, 6.0), "kl_beta": 0.0, "kl_type": "x-based", "reweight": "none",
    }  # fmt: skip
    args = Arguments(defaults | args)
    logged: list[dict[str, Any]] = []
    optimized: list[str] = []
    optimizer = SimpleNamespace(**{name: partial(optimized.append, name) for name in ("step", "zero_grad")})
    return SimpleNamespace(
        training_args=args, adapter=Adapter(scheduler), accelerator=Accelerator(accumulated), objective=objective,
        enable_kl_loss=args["kl_beta"] > 0, autocast=nullcontext, show_progress_bar=False, epoch=0, step=0,
        optimizer=optimizer,
        log_data=lambda data, step: logged.append(data), logged=logged, optimized=optimized,
    )  # fmt: skip


def saved_bytes(trainer: Any, update: Callable[[Any, list[Any]], None], samples: list[Any]) -> list[int]:
    """What each step of an update saves for backward: storages that are neither the batch's nor the model's output."""
    from flow_factory.samples import BaseSample

    known: list[Tensor] = []
    saved: list[Tensor] = []
    sizes: list[int] = []
    stack, scheduler_step, backward = BaseSample.stack, trainer.adapter.scheduler.step, trainer.accelerator.backward

    def recorded_stack(samples: list[Any]) -> dict[str, Any]:
        batch = stack(samples)
        known.extend(value for value in batch.values() if isinstance(value, Tensor))
        return batch

    def recorded_step(velocity: Tensor, *args: Any, **options: Any) -> Any:
        known.append(velocity)
        return scheduler_step(velocity, *args, **options)

    def recorded_backward(loss: Tensor) -> None:
        places = {tensor.untyped_storage().data_ptr() for tensor in known}
        new = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
        sizes.append(sum(size for place, size in new.items() if place not in places))
        backward(loss)
        saved.clear()

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    trainer.step = 1  # in the first update, checks of the values make graphs that are dropped at once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseSample, "stack", staticmethod(recorded_stack))
        patch.setattr(trainer.adapter.scheduler, "step", recorded_step)
        patch.setattr(trainer.accelerator, "backward", recorded_backward)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            update(trainer, samples)
    return sizes


@dataclass(frozen=True)
class Rollout:
    """Trajectories (N, ...) as a rollout stores them, and the velocities (N, T, S, C) of the update."""

    timesteps: Tensor
    all_latents: Tensor
    next_latents_mean: Tensor
    old_velocity: Tensor
    velocity: Tensor
    ref_velocity: Tensor
    advantage: Tensor

    def samples(self, dtype: torch.dtype | None = None, log_probs: Tensor | None = None) -> list[Any]:
        """As Flow-Factory's samples, with all but the times in `dtype`; `velocity` is a leaf of each."""
        from flow_factory.samples import BaseSample

        def cast(value: Tensor) -> Tensor:
            return value.to(dtype or value.dtype)

        n_steps = self.timesteps.shape[1]
        return [
            BaseSample(
                timesteps=self.timesteps[i],
                all_latents=cast(self.all_latents[i]),
                log_probs=torch.zeros(n_steps) if log_probs is None else log_probs[i],
                latent_index_map=torch.arange(n_steps + 1),
                log_prob_index_map=torch.arange(n_steps),
                extra_kwargs={
                    "next_latents_mean": self.next_latents_mean[i].to(dtype or torch.float32),
                    "callback_index_map": torch.arange(n_steps),
                    "advantage": self.advantage[i],
                    "velocity": cast(self.velocity[i]).requires_grad_(),
                    "ref_velocity": cast(self.ref_velocity[i]),
                },
            )
            for i in range(len(self.timesteps))
        ]


def roll_out(
    step: Callable[..., Any],
    timesteps: Tensor,
    storage: torch.dtype = torch.float32,
    moved: float = 0.05,
    shape: tuple[int, int] = (8, 16),
) -> Rollout:
    """Trajectories at timesteps (N, T), drawn by a scheduler's step and rounded to `storage` at every step.

    Args:
        step: (velocity, t, latents, t_next) -> (mean, next latents), both (N, S, C).
        moved: how far velocities have moved since the rollout.
        shape: (S, C).
    """
    torch.manual_seed(0)
    n, n_steps = timesteps.shape
    old = torch.randn(n, n_steps, *shape)
    latents, means = [torch.randn(n, *shape).to(storage)], []
    times = torch.nn.functional.pad(timesteps, (0, 1))
    for i in range(n_steps):
        mean, drawn = step(old[:, i], times[:, i], latents[-1], times[:, i + 1])
        means.append(mean)
        latents.append(drawn.to(storage))
    new, ref = (old + moved * torch.randn(old.shape) for _ in range(2))
    advantage = torch.linspace(-3, 7, n, dtype=torch.float64)
    return Rollout(timesteps, torch.stack(latents, 1), torch.stack(means, 1), old, new, ref, advantage)
