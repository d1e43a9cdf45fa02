"""Epochs of the toy one after the other, without a training loop: what is kept of them, and one update's gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fastguard.config import Recipe, objective_config
from fastguard.train.collect import SampledEpoch, sample_epoch
from fastguard.train.metrics import Clock
from fastguard.train.replay import TrainingSet, remember
from fastguard.train.state import build_state
from fastguard.train.update import update_weights
from helpers.toys import RECIPE, MemoryRecorder, ToyBackbone, pool, towards


def recipe_of(name: str, **options: Any) -> Recipe:
    """Two prompts of 8 images in four rollout batches, and one update of an epoch."""
    return replace(
        RECIPE,
        sampler=replace(RECIPE.sampler, group_size=8, batch_size=4, store="device"),
        update=replace(RECIPE.update, minibatches=1, inner_epochs=1, max_grad_norm=1e9),
        objective=objective_config(name, **{"reweight": "none", **options}),
    )


class Epochs:
    """Epochs without updates: the weights are moved by hand."""

    def __init__(self, recipe: Recipe, policy: Any = None, reward: Any = towards) -> None:
        self.recorder, self._reward = MemoryRecorder(), reward
        self.state = build_state(ToyBackbone(policy), recipe, Accelerator(cpu=True), None)

    def sample(self) -> SampledEpoch:
        state = self.state
        with pool(state.recipe, state.backbone, self._reward) as rewards:
            rolled = sample_epoch(state, rewards, self.recorder, Clock(state.accelerator.device))
        assert rolled is not None
        return rolled

    def remember(self, rolled: SampledEpoch) -> None:
        self.state.buffer = remember(self.state, rolled, rolled.transitions, self.recorder)
        self.state.epoch += 1

    def move(self, scale: float) -> None:
        """The same for every latent element, and another one in each epoch."""
        policy: Any = self.state.backbone.policy
        generator = torch.Generator().manual_seed(self.state.epoch)
        with torch.no_grad():
            policy.image += scale * torch.randn(policy.image.shape, generator=generator)

    def gradient(self, trained: TrainingSet) -> tuple[Tensor, Any]:
        """Of the one update, and what it logs."""
        state, found = self.state, []
        clip = state.accelerator.clip_grad_norm_

        def clipped(parameters: Any, norm: float) -> Any:
            found.append(parameters[0].grad.clone())
            return clip(parameters, norm)

        state.accelerator.clip_grad_norm_ = clipped  # type: ignore[method-assign]
        (minibatch,) = trained.minibatches(state)
        before = {name: parameter.detach().clone() for name, parameter in state.parameters.items()}
        update = update_weights(state, trained.transitions, minibatch, trained.advantages, self.recorder, True)
        with torch.no_grad():
            for name, parameter in state.parameters.items():
                parameter.copy_(before[name])
        state.accelerator.clip_grad_norm_ = clip  # type: ignore[method-assign]
        return found[0], update
