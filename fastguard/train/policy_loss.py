"""The loss of a minibatch, with velocities from the rollout's own step function.

Axes: N transition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastguard.config import ObjectiveConfig
from fastguard.loss import GuardLoss, guard_loss, matching_loss
from fastguard.loss.checks import Reweight
from fastguard.loss.objectives import Given, MatchingObjective, Noised, Objective
from fastguard.train.advantages import advantages_of
from fastguard.train.rollout import Policy, RolloutBatch, predict_velocity
from fastguard.train.state import TrainState


def policy_loss(
    policy: Policy,
    batch: RolloutBatch,
    advantages: Tensor,
    objective: ObjectiveConfig,
    given: Objective | None = None,
    weights: Tensor | None = None,
) -> GuardLoss:
    """`guard_loss` of a minibatch, with the velocity from the rollout's own step function.

    weights: (N,) of the transitions, for their policy loss and their KL.
    given: in the place of the objective: it around another policy, or the derivatives of one of whole trajectories or
    groups. Without these each step is taken as the policy gradient has it, which is a trajectory objective's gradient
    as long as no ratio has moved.
    """
    if objective.scope != "transition" and given is None:
        still = torch.zeros_like(advantages)
        given = Given(
            by_log_ratio=-advantages, by_drift=still, clipped=still.bool(), log_ratio=objective.log_ratio,
            bandwidth=objective.bandwidth, moves_drift=False,
        )  # fmt: skip
    velocity = predict_velocity(policy, batch.latents, batch.sigma, batch.prompt_indices)
    kl_weight = objective.kl_weight if weights is None or not objective.kl_weight else objective.kl_weight * weights
    if objective.process == "forward":
        return matching_loss(
            velocity, batch.velocity, batch.noise, advantages, batch.sigma, objective=given or objective,
            sample_weight=weights, ref_velocity=batch.ref_velocity, kl_weight=kl_weight,
        )  # fmt: skip
    return guard_loss(
        velocity,
        batch.velocity,
        batch.noise,
        advantages,
        batch.step.to(velocity.device),
        objective=given or objective,
        reweight=step_factor(batch, objective),
        sample_weight=weights,
        ref_velocity=batch.ref_velocity,
        kl_weight=kl_weight,
        kl_type=objective.kl_type,
    )


def step_factor(batch: RolloutBatch, objective: ObjectiveConfig) -> Reweight | Tensor:
    """The factor on the policy loss: a name that the loss knows, or a number of each transition, (N,)."""
    if objective.reweight == "tempflow" or objective.reweight == "noise_level":
        assert batch.step_weight is not None  # `sample_epoch` found it from the schedule
        return batch.step_weight
    return objective.reweight


def joint_derivatives(
    state: TrainState, transitions: Sequence[RolloutBatch], parts: Sequence[Tensor], advantages: Tensor, moved: bool
) -> list[Given]:
    """Derivatives of an objective whose loss joins the transitions of an image, or of a group; one entry per part.

    The gradient is `sum of c_i d l_i`, and c_i depends on the other transitions through their log-ratios alone. So a
    pass without gradients finds the log-ratios, and the gradient then needs the memory of one transition. It is exact.
    As long as the policy is the one that it is compared with, all log-ratios are 0, and this pass is left out.

    Args:
        parts: the micro-batches of an update.
        moved: whether weights have changed since the rollout.
    """
    recipe, accelerator, objective = state.recipe, state.accelerator, state.recipe.objective
    of_groups = objective.scope == "group"
    columns: list[tuple[Tensor, ...]] = []
    for part in parts:
        batch = RolloutBatch.select(transitions, part).to(accelerator.device)
        log_ratio = drift = torch.zeros_like(batch.sigma)
        if moved or objective.anchor != "rollout":
            with torch.no_grad():
                result = policy_loss(state.policy, batch, torch.zeros_like(batch.sigma), objective)
            log_ratio, drift = result.log_ratio, result.drift
        unit = torch.stack([batch.prompt_indices if of_groups else batch.sample, batch.denoising_step], 1)
        a = advantages_of(batch, advantages)
        columns.append((log_ratio, drift, a, batch.sigma, unit))
    log_ratio, drift, a, sigma, unit = (torch.cat(column) for column in zip(*columns, strict=True))
    own = slice(0, len(log_ratio))
    if of_groups:  # images of a group may be on other processes
        own = slice(accelerator.process_index * len(log_ratio), (accelerator.process_index + 1) * len(log_ratio))
        log_ratio, drift, a, sigma, unit = (accelerator.gather(x) for x in (log_ratio, drift, a, sigma, unit))
    order = torch.argsort(unit[:, 0] * recipe.trained_steps + unit[:, 1], stable=True)
    width = recipe.sampler.group_size if of_groups else recipe.trained_steps
    log_ratio, drift, a, sigma = (x[order].view(-1, width) for x in (log_ratio, drift, a, sigma))
    n_elements = math.prod(state.backbone.latent_shape)
    if of_groups:
        assert isinstance(objective, MatchingObjective)
        terms = objective.terms(log_ratio, drift, a, n_elements=n_elements, noised=Noised(sigma))
    else:
        terms = objective.terms(log_ratio, drift, a[:, 0], n_elements=n_elements)
    # A loss of n images or groups is the mean over n; that of a minibatch divides by its transitions.
    found = (width * terms.by_log_ratio, width * terms.by_drift, terms.clipped)
    back = torch.argsort(order)
    sizes = [len(part) for part in parts]
    pieces = zip(*(x.flatten()[back][own].split(sizes) for x in found), strict=True)
    return [
        Given(by_log_ratio=by_log_ratio, by_drift=by_drift, clipped=clipped, log_ratio=objective.log_ratio,
              bandwidth=objective.bandwidth, moves_drift=objective.moves_drift)
        for by_log_ratio, by_drift, clipped in pieces
    ]  # fmt: skip
