"""KL weights of other trainers, against their KL terms as formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastguard as fg
from fastguard.integrations.kl import kl_weight
from fastguard.ops.transition import transition_mean

BETA = 0.04
SIGMA = torch.tensor([0.9, 0.6, 0.4], dtype=torch.float64)
STEPS = {
    "flow_sde": fg.flow_sde(SIGMA, SIGMA - 0.1),
    "dance_sde": fg.dance_sde(SIGMA, SIGMA - 0.1),
    "cps": fg.cps(SIGMA, SIGMA - 0.1),
    "wan_sde": fg.wan_sde(SIGMA, SIGMA - 0.1, 0.95),
}


def mean_square(difference: Tensor) -> Tensor:
    return difference.square().flatten(1).mean(1)


@pytest.mark.parametrize(
    ("trainer", "kind"),
    [
        *(("flow_grpo", kind) for kind in ("flow_sde", "cps", "wan_sde")),
        *(("verl_omni", kind) for kind in ("flow_sde", "dance_sde", "cps")),
        *(("flow_factory", kind) for kind in ("flow_sde", "dance_sde", "cps")),
    ],
)
def test_the_kl_term_of_another_trainer(trainer: Any, kind: str) -> None:
    step = STEPS[kind]
    latents, old, new, ref = torch.randn(4, 3, 50, 2, dtype=torch.float64)
    mean, old_mean, ref_mean = (transition_mean(latents, velocity, step) for velocity in (new, old, ref))
    # What they call std_dev_t: the diffusion for flow_sde, the draw's std elsewhere.
    std_dev_t = step.std / step.dt.abs().sqrt() if kind == "flow_sde" else step.std
    theirs = mean_square(mean - ref_mean)
    if trainer != "flow_factory":
        theirs = theirs / (2 * std_dev_t**2)

    def loss(weight: Any) -> Tensor:
        sample, advantages = old_mean + torch.ones_like(old_mean), torch.ones(3, dtype=torch.float64)
        return fg.guard_loss_from_means(
            sample, mean, old_mean, advantages, step, ref_prev_sample_mean=ref_mean, kl_weight=weight
        ).loss

    difference = loss(kl_weight(trainer, BETA, step)) - loss(0.0)
    torch.testing.assert_close(difference, BETA * theirs.mean(), rtol=1e-6, atol=1e-6 * float(loss(0.0).abs()))


def test_an_unknown_trainer_is_named() -> None:
    with pytest.raises(ValueError, match="one of flow_grpo, verl_omni, flow_factory; got 'trl'"):
        kl_weight("trl", BETA, STEPS["cps"])  # type: ignore[arg-type]


def test_a_step_whose_sampler_is_unknown_is_refused() -> None:
    """The factor of flow_sde differs from that of the others, and std and dt do not tell which it is."""
    step = fg.gaussian_step(0.3, -0.1)
    with pytest.raises(ValueError, match="depends on the sampler, which a gaussian step does not tell"):
        kl_weight("flow_grpo", BETA, step)
    assert kl_weight("flow_factory", BETA, step).item() == pytest.approx(2 * BETA * 0.09)
    with pytest.raises(ValueError, match="beta must be >= 0; got -1"):
        kl_weight("flow_factory", -1, step)
