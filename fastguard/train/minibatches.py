"""Minibatches: which transitions of a rollout an update trains on.

Axes: N transition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastguard.train.advantages import size_of_each
from fastguard.train.state import TrainState
from fastguard.train.subsample import choose


@dataclass(frozen=True)
class Minibatch:
    """What one update trains on."""

    index: Tensor
    """(N,) int64, on the host: transitions of this process's rollout"""
    weights: Tensor | None = None
    """of each image, on the host, where a pass trains on some alone (`update.subsample`) or on earlier ones too"""
    offsets: Tensor | None = None
    """(images, steps) on the device: log-ratio of the policy at the start of the updates to the one that drew a step"""

    def without(self, dropped: Tensor, images: int) -> Minibatch:
        """The same transitions, with weight 0 for those of dropped images, (B,) bool of the first B of so many."""
        weights = torch.ones(images, device="cpu") if self.weights is None else self.weights.clone()
        weights[: len(dropped)][dropped] = 0.0
        return replace(self, weights=weights)


def minibatches(state: TrainState, advantages: Tensor) -> Iterator[Minibatch]:
    """Every transition that a pass trains on, once per pass; for the advantages of several rollouts, of all of them.

    An objective of whole trajectories gets all steps of an image in one update, one of groups all images of a draw.
    Each rollout batch is shuffled and shared out on its own, seeded by its place in the whole rollout: an update sees
    the same transitions on 1, 2 or 8 processes.
    """
    recipe = state.recipe
    images, steps, scope = recipe.sampler.batch_size, recipe.trained_steps, recipe.objective.scope
    batches = recipe.images_per_process // images
    first = state.accelerator.process_index * batches
    rollouts = len(advantages) // recipe.images_per_process
    words = [[recipe.run.seed, state.epoch, first + i, age] for age in range(rollouts) for i in range(batches)]
    generators = [np.random.default_rng(np.random.SeedSequence(w)) for w in words]
    # A word of its own for what all batches share.
    common = np.random.default_rng(np.random.SeedSequence([recipe.run.seed, state.epoch, 0, 0, 2]))
    for number in range(recipe.update.inner_epochs):
        shares, weights = [], torch.zeros(len(advantages), device="cpu")
        first_step = number * steps if recipe.objective.process == "forward" else 0
        order_of_steps = common.permutation(steps)
        for i, generator in enumerate(generators):
            chosen = np.arange(images)
            if recipe.update.subsample < 1:
                sizes = size_of_each(advantages[i * images :][:images]).numpy()
                chosen, factors = choose(sizes, recipe.trained_images, generator)
                weights[i * images + chosen] = torch.from_numpy(factors).float()
            # A rollout batch lies step by step. What is shuffled are rows of transitions that stay together.
            rows = chosen[:, None] + images * (first_step + np.arange(steps))
            if scope == "group":  # an image of a group may be in any batch
                rows = rows.T[order_of_steps]
            else:
                rows = rows if scope == "trajectory" else rows.T.reshape(-1, 1)
                rows = rows[generator.permutation(len(rows))]
            order = torch.from_numpy(rows + i * images * recipe.stored_steps)
            shares.append(order.tensor_split(recipe.update.minibatches))
        for parts in zip(*shares, strict=True):
            index = torch.cat([part.flatten() for part in parts])
            yield Minibatch(index, weights if recipe.update.subsample < 1 else None)
