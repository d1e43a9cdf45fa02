"""Earlier rollouts that updates still train on: how they are stored, in memory and in a checkpoint.

Axes: N transition, B image of this process's rollout, R reward function, M best image of a rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from fastguard.config import Recipe
from fastguard.sde import COEFS, Transition
from fastguard.train.rollout import RolloutBatch

FIELDS = tuple(f.name for f in fields(RolloutBatch) if f.name != "step")
OPTIONAL = ("ref_velocity", "step_weight")
"""Those that not every recipe has."""


@dataclass(frozen=True)
class StoredRollout:
    """What is kept of a rollout, by the objective's `reuse`: transitions exactly as they were drawn."""

    epoch: int
    transitions: tuple[RolloutBatch, ...]
    """"rollouts": this process's rollout batches; "best": one batch, the same on every process"""
    values: Tensor
    """"rollouts": advantages (B,) in their own groups; "best": rewards (R, M); on the host"""
    dropped: Tensor | None = None
    """"rollouts": (B,) bool, on the host: images that are not trained on, since a reward failed in their group"""


@dataclass(frozen=True)
class Buffer:
    """The rollouts before the fresh one, the newest first."""

    rollouts: tuple[StoredRollout, ...] = ()

    def __len__(self) -> int:
        return len(self.rollouts)

    def tensors(self, recipe: Recipe, accelerator: Accelerator) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all processes, for a checkpoint that any number of processes can read. Collective."""
        shared = recipe.objective.reuse == "best"

        def everyone(x: Tensor) -> list[Tensor]:
            return [x] if shared else list(_gather(x, accelerator).tensor_split(accelerator.num_processes))

        for rollout in self.rollouts:
            parts = everyone(rollout.values)
            yield f"{rollout.epoch}.values", parts[0] if shared else torch.cat(parts)
            if rollout.dropped is not None:
                yield f"{rollout.epoch}.dropped", torch.cat(everyone(rollout.dropped))
            batches = len(rollout.transitions)
            for i, batch in enumerate(rollout.transitions):
                for name, tensor in as_tensors(batch).items():
                    for process, part in enumerate(everyone(tensor)):
                        yield f"{rollout.epoch}.{process * batches + i}.{name}", part.clone()


def is_of(name: str, recipe: Recipe, process: int) -> bool:
    """Whether a process needs this tensor of a checkpoint's buffer."""
    _, part, *_ = name.split(".")
    if part in ("values", "dropped") or recipe.objective.reuse == "best":
        return True
    return int(part) // _batches(recipe) == process


def buffer_of(
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    latent_shape: tuple[int, ...],
    prompts: int,
    epoch_now: int,
    accelerator: Accelerator,
) -> Buffer:
    """The buffer of this process, from the tensors of a checkpoint that `is_of` it.

    Args:
        latent_shape: of one image.
        prompts: how many there are.
        epoch_now: epochs done.

    Raises LookupError or ValueError if a tensor is missing, has another shape, or holds what cannot be.
    """
    shared, own = recipe.objective.reuse == "best", recipe.images_per_process
    count = 1 if shared else _batches(recipe)
    first = 0 if shared else accelerator.process_index * count
    rollouts = []
    for epoch in sorted({int(name.split(".")[0]) for name in tensors}, reverse=True)[: recipe.objective.rollouts - 1]:
        if not 0 <= epoch < epoch_now:
            raise ValueError(f"epoch {epoch} is not among the {epoch_now} that are done")
        values, dropped = tensors[f"{epoch}.values"], None
        if (shared and values.ndim != 2) or len(values) != (len(recipe.rewards) if shared else recipe.images_per_epoch):
            raise ValueError(f"{epoch}.values has the shape {tuple(values.shape)}")
        if not shared:
            dropped = tensors[f"{epoch}.dropped"]
            if values.ndim != 1 or dropped.shape != values.shape or dropped.dtype != torch.bool:
                raise ValueError(f"{epoch}.values and {epoch}.dropped are not of {recipe.images_per_epoch} images")
            mine = slice(accelerator.process_index * own, (accelerator.process_index + 1) * own)
            values, dropped = values[mine].clone(), dropped[mine].clone()
        batches = []
        for number in range(first, first + count):
            prefix = f"{epoch}.{number}."
            found = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            batch = from_tensors(found, recipe.sampler.kind)
            images, steps = recipe.sampler.batch_size, recipe.sampler.sde_steps
            if shared:
                images, steps = values.shape[-1], recipe.trained_steps
            _check(batch, prefix, images * steps, latent_shape, prompts, recipe)
            batches.append(stored(batch.to(accelerator.device), recipe))
        rollouts.append(StoredRollout(epoch, tuple(batches), values, dropped))
    return Buffer(tuple(rollouts))


def _check(
    batch: RolloutBatch, prefix: str, count: int, latent_shape: tuple[int, ...], prompts: int, recipe: Recipe
) -> None:
    """Raise ValueError unless these can be so many transitions of this recipe."""
    found = as_tensors(batch)
    of_latents = ("latents", "velocity", "noise", "ref_velocity")
    for name, tensor in found.items():
        if tensor.shape != ((count, *latent_shape) if name in of_latents else (count,)):
            raise ValueError(f"{prefix}{name} has the shape {tuple(tensor.shape)}, expected {count} transitions")
        if name in of_latents and tensor.dtype != batch.latents.dtype:
            raise ValueError(f"{prefix}{name} is {tensor.dtype}, the latents {batch.latents.dtype}")
    if ("ref_velocity" in found) != (recipe.objective.kl_weight > 0):
        raise ValueError(f"{prefix}ref_velocity does not go with objective.kl_weight = {recipe.objective.kl_weight}")
    ranges = {"prompt_indices": prompts, "denoising_step": recipe.sampler.num_steps}
    for name, end in ranges.items():
        if not bool(((found[name] >= 0) & (found[name] < end)).all()):
            raise ValueError(f"{prefix}{name} is not below {end}")


def _batches(recipe: Recipe) -> int:
    return recipe.images_per_process // recipe.sampler.batch_size


def stored(batch: RolloutBatch, recipe: Recipe) -> RolloutBatch:
    """The transitions where `sampler.store` wants them to wait."""
    return batch if recipe.sampler.store == "device" else batch.to("cpu")


def as_tensors(batch: RolloutBatch) -> dict[str, Tensor]:
    """All tensors of a batch by name; `from_tensors` is the inverse."""
    named = {name: getattr(batch, name) for name in FIELDS}
    named |= {f"step_{name}": getattr(batch.step, name) for name in COEFS}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def from_tensors(tensors: Mapping[str, Tensor], kind: str) -> RolloutBatch:
    """kind: of the sampler that drew it. Raises KeyError if a tensor is missing, ValueError for an impossible step."""
    step = Transition(kind, **{name: tensors[f"step_{name}"].cpu() for name in COEFS})  # type: ignore[arg-type]
    named: dict[str, Any] = {name: tensors[name] for name in FIELDS if name not in OPTIONAL}
    named |= {name: tensors.get(name) for name in OPTIONAL}
    return RolloutBatch(**named, step=step)


def _gather(tensor: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all processes, on the host."""
    gathered: Tensor = accelerator.gather(tensor.to(accelerator.device).contiguous())
    return gathered.cpu()


def collected(
    transitions: Sequence[RolloutBatch], own: Tensor, most: int, images: int, accelerator: Accelerator
) -> RolloutBatch:
    """Transitions of all processes in one batch, on the device, the same on every process. Collective.

    Its images are numbered over all processes, and it lies step by step, whatever the number of processes.

    Args:
        own: 1-d int64 on the host: this process's transitions, in the order of its rollout batches.
        most: the largest number of them on any process.
        images: of the rollout of each process.
    """
    padding = most - len(own)
    index = torch.cat([torch.zeros(padding, dtype=torch.int64, device="cpu"), own.sort().values])
    batch = RolloutBatch.select(transitions, index)
    batch = replace(batch, sample=batch.sample + accelerator.process_index * images)
    is_own = torch.arange(most, device=accelerator.device) >= padding
    chosen = accelerator.gather(is_own).nonzero()[:, 0]
    named = {
        name: accelerator.gather(tensor.to(accelerator.device).contiguous())[chosen]
        for name, tensor in as_tensors(batch).items()
    }
    everyone = from_tensors(named, batch.step.kind)
    by_step = np.lexsort((everyone.sample.cpu().numpy(), everyone.denoising_step.cpu().numpy()))
    return everyone[torch.from_numpy(by_step)]


def renumbered(batch: RolloutBatch, images: int, first: int) -> RolloutBatch:
    """The batch of so many images, which lies step by step, with numbers from `first` on for its images."""
    sample = torch.arange(len(batch), device=batch.sample.device) % images + first
    return replace(batch, sample=sample)
