"""What changes while a run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from fastguard.backbones import Backbone
from fastguard.config import Recipe
from fastguard.errors import NotFiniteError, UserError
from fastguard.loss.objectives import MatchingObjective
from fastguard.train.buffer import Buffer
from fastguard.train.ema import Shadow
from fastguard.train.monitor import Monitor
from fastguard.train.optim import Optimizer, build_optimizer, state_tensors
from fastguard.utils.finite import names_not_finite
from fastguard.utils.sharding import trained_parameters
from fastguard.utils.terminal import a_few


@dataclass
class TrainState:
    """Everything that changes while a run goes on, and so everything that a checkpoint holds."""

    accelerator: Accelerator
    recipe: Recipe
    backbone: Backbone
    policy: nn.Module
    """the backbone's policy as accelerate wrapped it"""
    parameters: dict[str, nn.Parameter]
    """what is trained, by name"""
    optimizer: Optimizer
    average: Shadow | None
    """averaged weights (EMA)"""
    reference_policy: Callable[[], AbstractContextManager[None]] | None
    """context in which the policy is the model before training; None where the objective does not ask for it"""
    monitor: Monitor | None
    old: Shadow | None = None
    """the policy that samples, an average of those so far, for objectives that compare with it"""
    epoch: int = 0
    """epochs done"""
    updates: int = 0
    """optimizer updates done, without skipped ones"""
    bad_in_a_row: int = 0
    """updates skipped since the last good one"""
    baselines: dict[int, float] = field(default_factory=dict)
    """what the advantage estimator expects of each prompt; empty unless it remembers earlier rollouts"""
    buffer: Buffer = field(default_factory=Buffer)
    """earlier rollouts that updates still train on; empty unless the objective asks for them"""
    checked: bool = False
    """whether this process has passed the parity preflight"""

    def tensors(self) -> dict[str, Iterable[tuple[str, Tensor]]]:
        """Group -> (name, live tensor) of what updates change: weights, averages (none without one), optimizer."""
        old = {} if self.old is None else {"old": self.old.tensors.items()}
        return {
            "weights": self.parameters.items(),
            "average": {} if self.average is None else self.average.tensors.items(),
            "optimizer": state_tensors(self.optimizer, self.parameters),
            **old,
        }

    def sampling_policy(self) -> AbstractContextManager[None]:
        """Context in which the policy is the one that samples."""
        return nullcontext() if self.old is None else self.old.in_place()

    def anchor_policy(self) -> AbstractContextManager[None]:
        """Context inside `sampling_policy` in which the policy is the one that the objective compares with."""
        if self.recipe.objective.anchor != "reference":
            return nullcontext()
        assert self.reference_policy is not None
        return self.reference_policy()

    def end_epoch(self) -> None:
        """Count an epoch; the policy that samples then follows the weights."""
        self.epoch += 1
        if self.old is not None:
            assert isinstance(self.recipe.objective, MatchingObjective)
            self.old.move_towards(self.recipe.objective.decay_of_average(self.epoch))

    def require_finite(self) -> None:
        """Raise NotFiniteError, naming tensors, if these hold NaN or Inf. Collective: on one process, on all.

        An infinite second moment is no exception: its weight would never move again.
        """
        own = [(group, name) for group, named in self.tensors().items() for name in names_not_finite(named)]
        bad: dict[str, list[str]] = {}
        for group, name in sorted(set(gather_object(own))):
            bad.setdefault(group, []).append(name)
        if bad:
            where = "; ".join(f"{group}: {a_few(names)}" for group, names in bad.items())
            raise NotFiniteError(
                f"epoch {self.epoch}: after {self.updates} updates this state holds NaN or infinity ({where}), and was "
                "not saved. Lower update.learning_rate or update.max_grad_norm"
            )


def build_state(backbone: Backbone, recipe: Recipe, accelerator: Accelerator, monitor: Monitor | None) -> TrainState:
    """Wrap the policy for its processes and build what trains it."""
    update = recipe.update
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Gradients are summed in float32 whatever the weights' dtype; the optimizer comes after the sharding.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        idle = torch.optim.SGD([p for p in backbone.policy.parameters() if p.requires_grad], lr=0.0)
        policy, _ = accelerator.prepare(backbone.policy, idle)
    else:
        policy = accelerator.prepare(backbone.policy)
    parameters = trained_parameters(policy)
    reference_policy = None
    if recipe.objective.kl_weight > 0 or recipe.objective.anchor == "reference":
        reference_policy = backbone.adapters_off if backbone.has_adapters else Shadow(policy, update.copies).in_place
    average = Shadow(policy, update.copies, torch.float32) if update.ema_decay > 0 else None
    old = Shadow(policy, update.copies, torch.float32) if recipe.objective.anchor == "average" else None
    optimizer = build_optimizer(list(parameters.values()), update)
    return TrainState(
        accelerator, recipe, backbone, policy, parameters, optimizer, average, reference_policy, monitor, old
    )


def for_processes(recipe: Recipe, processes: int) -> Recipe:
    """The recipe for as many processes as were launched. Raises UserError, with what would work, if it cannot be."""
    try:
        return replace(recipe, hardware=replace(recipe.hardware, processes=processes))
    except UserError as error:
        planned = recipe.hardware.processes
        raise UserError(f"launched on {processes} processes (hardware.processes = {planned}): {error}") from None
