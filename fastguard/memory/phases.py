"""Peak memory of each phase of a recipe: a fake run, and what waits on the GPU meanwhile."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fastguard.backbones import family_of
from fastguard.config import ModelConfig, Recipe, Recompute, objective_config, recompute_levels
from fastguard.errors import UserError
from fastguard.memory.live import allocated, pinned
from fastguard.memory.passes import (
    Pass,
    PassSettings,
    Sizes,
    Weights,
    as_built,
    decode_pass,
    dtype_of,
    encode_pass,
    rollout_pass,
    update_pass,
    weights_of,
)

GIB = 2**30
LIBRARY_BYTES = 64 * 2**20
"""workspaces of cuBLAS and cuBLASLt on Hopper, 32 MiB each; PyTorch takes them from its own allocator"""
RESERVE = 0.05
"""share of the GPU that model.recompute = "auto" leaves free"""


@dataclass(frozen=True)
class Phase:
    """Bytes on one GPU at the peak of a phase; the parts add up to `peak`."""

    name: str
    """encode, rollout, decode or update"""
    weights: int
    """transformer and decoder (encode: the text encoders), copies of trained weights on the GPU"""
    gradients: int
    """with DDP's buckets"""
    optimizer: int
    """its state and float32 masters on the GPU"""
    activations: int
    """everything else that is alive: activations, temporaries, workspaces"""
    trajectories: int
    """stored transitions, of the epoch and of earlier ones, and the embeddings of their prompts"""
    host: int = 0
    """bytes in host memory per process, by sampler.store, update.copies, adamw_cpu, prompts.encoders and `offload`"""

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.trajectories


def gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB"


def limit_bytes(recipe: Recipe) -> int:
    return int(recipe.hardware.memory_gb * 1e9)


def check_plannable(recipe: Recipe) -> None:
    """Raise UserError for a model that is too small to plan."""
    kind = recipe.model.kind
    if footprint := family_of(kind).footprint:
        raise UserError(f'model.kind = "{kind}" takes {footprint}: there is nothing to plan')


def resolve_recompute(recipe: Recipe) -> Recompute:
    """model.recompute; for "auto" the fastest level whose update fits with the reserve, else the smallest."""
    if recipe.model.recompute != "auto":
        return recipe.model.recompute
    weights = weights_of(as_built(recipe.model), recipe.lora)
    levels = recompute_levels(recipe.model.fuse)
    return next((level for level in levels[:-1] if leaves_reserve(recipe, _update(recipe, weights, level))), levels[-1])


def leaves_reserve(recipe: Recipe, phase: Phase) -> bool:
    return phase.peak <= (1 - RESERVE) * limit_bytes(recipe)


def update_settings(recipe: Recipe, recompute: Recompute) -> PassSettings:
    return PassSettings(
        model=as_built(recipe.model),
        lora=recipe.lora,
        objective=recipe.objective,
        max_tokens=recipe.prompts.max_tokens,
        micro_batch=recipe.micro_batch,
        recompute=recompute,
        accumulate=recipe.micro_batch < recipe.transitions_per_update,
    )


def planned_phases(recipe: Recipe, recompute: Recompute) -> tuple[Phase, ...]:
    weights = weights_of(as_built(recipe.model), recipe.lora)
    return (
        _encode(recipe),
        _rollout(recipe, weights, recompute),
        _decode(recipe, weights),
        _update(recipe, weights, recompute),
    )


def _encode(recipe: Recipe) -> Phase:
    """Before anything else is loaded; nothing if all prompts are in the cache."""
    model, prompts = recipe.model, recipe.prompts
    alone = ModelConfig(kind=model.kind, path=model.path, dtype=model.dtype)
    run = encode_pass(alone, prompts.max_tokens, prompts.encoders)
    if prompts.encoders == "cpu":
        return Phase("encode", 0, 0, 0, 0, 0, host=run.peak)
    weights, activations = (run.at_peak.get(kind, 0) for kind in ("weights", "activations"))
    return Phase("encode", weights, 0, 0, activations + LIBRARY_BYTES, 0)


def _rollout(recipe: Recipe, weights: Weights, recompute: Recompute) -> Phase:
    """Compiled blocks run as in training, so that the level of recompute counts."""
    level = recompute if recipe.model.compile == "blocks" else "none"
    return _resident(recipe, weights, "rollout", rollout_pass(sampling_settings(recipe, level)), swaps=True)


def _decode(recipe: Recipe, weights: Weights) -> Phase:
    run = decode_pass(sampling_settings(recipe), recipe.sampler.decode_batch, recipe.sampler.decode_tiled)
    return _resident(recipe, weights, "decode", run, swaps=False)


def sampling_settings(recipe: Recipe, recompute: Recompute = "none") -> PassSettings:
    """The same for all recipes that sample alike."""
    return PassSettings(
        model=as_built(recipe.model),
        lora=recipe.lora,
        objective=objective_config(),
        max_tokens=recipe.prompts.max_tokens,
        micro_batch=recipe.sampler.batch_size,
        recompute=recompute,
    )


def _resident(recipe: Recipe, weights: Weights, name: str, run: Pass, swaps: bool) -> Phase:
    """A phase between updates: gradients are freed, everything else waits."""
    state = optimizer_bytes(recipe, weights.trained)
    copies, copies_host = _copies(recipe, weights)
    trajectories, trajectories_host = _trajectories(recipe, weights, sampling=True)
    held = _swapped(recipe, weights) if swaps else 0
    return Phase(
        name,
        weights=_sharded_weights(recipe, weights) + weights.decoder + copies + held,
        gradients=_buckets(recipe, weights.trained),
        optimizer=state.device,
        activations=run.at_peak.get("activations", 0) + LIBRARY_BYTES,
        trajectories=trajectories,
        host=state.host + copies_host + trajectories_host,
    )


def _update(recipe: Recipe, weights: Weights, recompute: Recompute) -> Phase:
    """The larger of backward pass and optimizer step."""
    run = update_pass(update_settings(recipe, recompute))
    state = optimizer_bytes(recipe, weights.trained)
    copies, copies_host = _copies(recipe, weights)
    trajectories, trajectories_host = _trajectories(recipe, weights, sampling=False)
    gradients = _sharded_gradients(recipe, weights.trained)
    buckets = _buckets(recipe, weights.trained)
    resident = Phase(
        "update",
        weights=_sharded_weights(recipe, weights) + weights.decoder + copies,
        gradients=gradients + buckets,
        optimizer=state.device,
        activations=state.temporaries + LIBRARY_BYTES,
        trajectories=trajectories,
        host=state.host + copies_host + trajectories_host + run.host,
    )
    # A sharded gradient is whole only for its block; otherwise take the gradients that are there at the peak.
    there = gradients if recipe.hardware.sharding == "fsdp2" else run.at_peak.get("gradients", 0)
    backward = replace(
        resident,
        gradients=there + buckets,
        activations=run.at_peak["activations"] + LIBRARY_BYTES,
        trajectories=trajectories + run.at_peak.get("trajectories", 0),
    )
    return max(backward, resident, key=lambda phase: phase.peak)


@dataclass(frozen=True)
class OptimizerBytes:
    """What `fastguard.train.optim` keeps, and what its step needs for a moment."""

    device: int
    host: int
    temporaries: int


def optimizer_bytes(recipe: Recipe, trained: Sizes) -> OptimizerBytes:
    """One parameter is stepped at a time, so that temporaries are those of the largest.

    adamw: two float32 states, and a float32 master of a bf16 weight; a step makes a float32 gradient for a master,
    and the square root of the second moment. adamw8bit: two bytes and two float32 scales per 256 elements; its
    compiled step is taken to hold four float32 copies. adamw_cpu: everything on the host, and a float32 gradient on
    its way there.
    """
    share = _share(recipe, trained)
    count, largest = int(trained.count * share), int(4 * trained.largest * share)
    masters = trained.n_bytes < 4 * trained.count
    if recipe.update.optimizer == "adamw8bit":
        return OptimizerBytes(2 * count + 2 * 4 * count // 256, 0, 4 * largest)
    if recipe.update.optimizer == "adamw_cpu":
        return OptimizerBytes(0, 12 * count + largest, largest)
    return OptimizerBytes((12 if masters else 8) * count, 0, (2 if masters else 1) * largest)


def _share(recipe: Recipe, sizes: Sizes) -> float:
    """Share of these parameters that one process holds: FSDP2 divides those of the blocks."""
    if recipe.hardware.sharding == "none":
        return 1.0
    return 1 - sizes.block_bytes / sizes.n_bytes * (1 - 1 / recipe.hardware.processes)


def _sharded_weights(recipe: Recipe, weights: Weights) -> int:
    """The transformer's weights; under FSDP2 a share, and two whole blocks (one in use, one on its way)."""
    sizes = weights.transformer
    gathered = 2 * sizes.largest_block if recipe.hardware.sharding == "fsdp2" else 0
    return int(sizes.n_bytes * _share(recipe, sizes)) + gathered


def _sharded_gradients(recipe: Recipe, trained: Sizes) -> int:
    """Gradients; under FSDP2 a share, two whole blocks' in their dtype, and one's in float32 to be summed."""
    if recipe.hardware.sharding == "none":
        return trained.n_bytes
    wide = 4 * trained.largest_block * trained.count // trained.n_bytes
    return int(trained.n_bytes * _share(recipe, trained)) + 2 * trained.largest_block + wide


def _buckets(recipe: Recipe, trained: Sizes) -> int:
    """DDP's flat copies of all gradients, from which it sums over the processes."""
    several = recipe.hardware.processes > 1 and recipe.hardware.sharding == "none"
    return trained.n_bytes if several else 0


def _copies(recipe: Recipe, weights: Weights) -> tuple[int, int]:
    """(device, host) bytes of the averages, in float32, and of the model before full fine-tuning, in its dtype."""
    trained, share = weights.trained, _share(recipe, weights.trained)
    n_bytes = 0
    n_bytes += recipe.averages * int(4 * trained.count * share)
    if _has_reference_copy(recipe):
        n_bytes += int(trained.n_bytes * share)
    return (n_bytes, 0) if recipe.update.copies == "device" else (0, n_bytes)


def _has_reference_copy(recipe: Recipe) -> bool:
    asked_for = recipe.objective.kl_weight > 0 or recipe.objective.anchor == "reference"
    return asked_for and recipe.model.train == "full"


def _swapped(recipe: Recipe, weights: Weights) -> int:
    """Trained weights put aside on the GPU while a copy scores or samples in their place."""
    swaps = _has_reference_copy(recipe) or recipe.objective.anchor == "average"
    swaps |= recipe.update.ema_decay > 0 and recipe.monitor.every > 0
    on_device = swaps and recipe.update.copies == "device"
    return int(weights.trained.n_bytes * _share(recipe, weights.trained)) if on_device else 0


def _trajectories(recipe: Recipe, weights: Weights, sampling: bool) -> tuple[int, int]:
    """(device, host) bytes of the transitions that wait, of an epoch and of earlier ones, and of prompts on the device.

    A rollout batch stores each of its tensors at once. While a batch is sampled, its transitions exist once more, and
    those of the batch before are still referenced. So do the images after each step, where advantages are per step.
    Pinned memory is handed out in powers of two. An update needs the prompts of the earlier rollouts, too.
    """
    sampler = recipe.sampler
    one = _transition_bytes(recipe, weights) * sampler.batch_size * recipe.stored_steps
    tensors = _stored_tensors(recipe)
    batches = recipe.images_per_process // sampler.batch_size
    prompts = min(recipe.prompts.per_epoch, recipe.images_per_process // sampler.group_size + 2)
    if not sampling and recipe.objective.reuse == "rollouts":
        prompts *= recipe.objective.rollouts
    elif not sampling and recipe.best_images:
        prompts = recipe.prompts.per_epoch
    text, pooled = weights.text
    table = prompts * (recipe.prompts.max_tokens * text + pooled) * dtype_of(recipe.model).itemsize
    images = 2 * (recipe.scored_per_image - 1) * allocated(one // recipe.stored_steps) if sampling else 0
    batch = tensors * allocated(one) if sampling else 0
    if recipe.objective.reuse == "rollouts":
        batches *= recipe.objective.rollouts
    best = _transition_bytes(recipe, weights) * recipe.best_images * recipe.trained_steps
    # The best images of each earlier rollout; in an update, those that are replayed have been copied out of them.
    kept, replayed = tensors * (recipe.objective.rollouts - 1), 0 if sampling else tensors * best
    if sampler.store == "cpu":
        return table + images + 2 * batch, batches * tensors * pinned(one) + kept * pinned(best) + replayed
    return table + images + batch + batches * tensors * allocated(one) + kept * allocated(best) + replayed, 0


def _transition_bytes(recipe: Recipe, weights: Weights) -> int:
    """Of one tensor of a transition."""
    return math.prod(weights.latent_shape) * dtype_of(recipe.model).itemsize


def _stored_tensors(recipe: Recipe) -> int:
    """Latents, velocity, noise; with a KL the reference's velocity, unless that is the velocity already."""
    return 3 + (recipe.objective.kl_weight > 0 and recipe.objective.anchor != "reference")


def buffer_bytes(recipe: Recipe) -> int:
    """Bytes of the earlier rollouts of one process that updates still train on, as a full buffer holds them."""
    weights = weights_of(as_built(recipe.model), recipe.lora)
    images, steps = recipe.best_images, recipe.trained_steps
    if recipe.objective.reuse == "rollouts":
        images, steps = recipe.images_per_process, recipe.sampler.sde_steps
    earlier = recipe.objective.rollouts - 1
    return earlier * images * steps * _stored_tensors(recipe) * _transition_bytes(recipe, weights)
