"""FLOPs of an epoch and of a run on one GPU, from the same fake runs as the bytes, and hours at an assumed speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from fastguard.config import Recipe
from fastguard.memory.passes import decode_pass, rollout_pass, update_pass
from fastguard.memory.phases import check_plannable, resolve_recompute, sampling_settings, update_settings

Count = Callable[[int], int]
"""FLOPs of so many transitions at once"""


@dataclass(frozen=True)
class EpochFlops:
    """FLOPs of one GPU in an epoch."""

    rollout: int
    """denoising steps of the images"""
    decode: int
    """of the images, and of those after each step that are scored"""
    velocities: int
    """passes over transitions before the updates: velocities for the loss and the KL, log-ratios of replayed images"""
    update: int
    """forward and backward passes of all updates, and what is recomputed; passes that find joint derivatives"""

    @property
    def total(self) -> int:
        return self.rollout + self.decode + self.velocities + self.update


@dataclass(frozen=True)
class RunFlops:
    """FLOPs of one GPU in a run that nothing ends early."""

    epoch: EpochFlops
    """of an epoch once all earlier rollouts are there"""
    parity: int
    """of the check before the first update"""
    total: int
    """of all epochs, and of the check once"""
    notes: tuple[str, ...]
    """what is counted and what is not"""


def run_flops(recipe: Recipe) -> RunFlops:
    """Count the FLOPs of a run.

    Where a recipe leaves them open, they are the most: no update is left out by update.stop, and as many images of
    earlier rollouts are replayed as may be.

    Raises UserError as `plan` does.
    """
    check_plannable(recipe)
    first = [_epoch(recipe, earlier) for earlier in range(recipe.objective.rollouts)]
    epochs, parity = recipe.run.epochs, _parity(recipe)
    total = sum(epoch.total for epoch in first[:epochs]) + max(0, epochs - len(first)) * first[-1].total
    return RunFlops(first[-1], parity, total + parity, tuple(_notes(recipe)))


def hours(flops: float, tflops: float, utilisation: float) -> float:
    """Hours that FLOPs take at a share of a peak in TFLOP/s.

    Raises ValueError for a share outside of (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"utilisation must lie in (0, 1], got {utilisation}")
    return flops / (utilisation * tflops * 1e12) / 3600


def _epoch(recipe: Recipe, earlier: int) -> EpochFlops:
    """earlier: rollouts before the fresh one that are there."""
    sampler, objective = recipe.sampler, recipe.objective
    batches = recipe.images_per_process // sampler.batch_size
    sampled = _without_gradients(recipe, sampler.batch_size)
    decoded = decode_pass(sampling_settings(recipe), sampler.decode_batch).flops
    stored = batches * recipe.stored_steps
    velocities = 0
    if objective.process == "forward":
        velocities += stored * _without_gradients(recipe, sampler.batch_size, objective.anchor != "reference")
    if objective.kl_weight > 0 and objective.anchor != "reference":
        velocities += stored * _without_gradients(recipe, sampler.batch_size, adapters=False)
    if objective.reuse == "best" and earlier:
        own = -(-_replayed(recipe) // recipe.hardware.processes)
        velocities += _in_parts(own, recipe.micro_batch, lambda n: _without_gradients(recipe, n))
    return EpochFlops(
        rollout=batches * sampler.num_steps * sampled,
        decode=batches * recipe.scored_per_image * decoded,
        velocities=velocities,
        update=sum(count * _update(recipe, *kind) for kind, count in Counter(_updates(recipe, earlier)).items()),
    )


def _updates(recipe: Recipe, earlier: int) -> Iterator[tuple[int, bool]]:
    """Of each update of an epoch: transitions on one process, and whether the weights have moved since the rollout."""
    fresh, minibatches = recipe.fresh_transitions, recipe.update.minibatches
    # Shares of what is replayed differ by one at most, and are dealt out to the processes.
    share, more = divmod(_replayed(recipe) if earlier else 0, minibatches)
    for number in range(recipe.update.inner_epochs):
        for i in range(minibatches):
            transitions = fresh - (-(share + (i < more)) // recipe.hardware.processes)
            if recipe.objective.reuse == "rollouts":
                transitions = fresh * (1 + earlier)
            yield transitions, number + i > 0


def _update(recipe: Recipe, transitions: int, moved: bool) -> int:
    """An update in micro-batches."""
    settings = update_settings(recipe, resolve_recompute(recipe))
    done = _in_parts(transitions, recipe.micro_batch, lambda n: update_pass(replace(settings, micro_batch=n)).flops)
    if recipe.objective.scope != "transition" and (moved or recipe.objective.anchor != "rollout"):
        done += _in_parts(transitions, recipe.micro_batch, lambda n: _without_gradients(recipe, n))
    return done


def _notes(recipe: Recipe) -> Iterator[str]:
    yield "FLOPs are those of matmuls, attention and convolutions, with what is recomputed"
    yield "without text encoding (once a prompt), rewards, and evaluations of the monitor"
    if recipe.sampler.decode_tiled:
        yield "decoding counts whole images, without what tiles decode twice where they overlap"
    if recipe.update.stop != "none":
        yield f"as if update.stop = {recipe.update.stop} left out no update"
    if recipe.best_images:
        yield f"as if every epoch but the first replayed {recipe.best_images} earlier images, the most"


def _parity(recipe: Recipe) -> int:
    if recipe.update.parity == 0 or recipe.objective.anchor != "rollout":
        return 0
    return _without_gradients(recipe, min(recipe.micro_batch, recipe.fresh_transitions))


def _replayed(recipe: Recipe) -> int:
    """Transitions of the best images of earlier rollouts, over all processes."""
    return recipe.best_images * recipe.trained_steps


def _without_gradients(recipe: Recipe, transitions: int, adapters: bool = True) -> int:
    """The forward pass of so many transitions."""
    settings = replace(sampling_settings(recipe), micro_batch=transitions)
    return (rollout_pass(settings) if adapters else rollout_pass(settings, adapters=False)).flops


def _in_parts(transitions: int, size: int, count: Count) -> int:
    """So many transitions in parts of a size; the last part may be smaller."""
    full, rest = divmod(transitions, size)
    return full * count(size) + (count(rest) if rest else 0)
