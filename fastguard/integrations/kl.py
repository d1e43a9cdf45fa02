"""How other trainers' weights on the KL divergence from the reference convert.

Ours is the Gaussian KL per element, `mean((mu - mu_ref)^2) / (2 std^2)`, where std includes sqrt(|dt|).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from fastguard.options import check_at_least_0
from fastguard.sde import Transition

Trainer = Literal["flow_grpo", "verl_omni", "flow_factory"]
SAMPLERS = ("flow_sde", "dance_sde", "wan_sde", "cps")


def kl_weight(trainer: Trainer, beta: float, step: Transition) -> Tensor:
    """The `kl_weight` of our losses, with kl_type="gaussian", that gives the KL term of another trainer.

    - "flow_grpo" and "verl_omni" divide by `2 std_dev_t^2`. For `flow_sde` their std_dev_t lacks sqrt(|dt|), so the
      factor is |dt|. For the other samplers it is the std, and the factor is 1.
    - "flow_factory" with kl_type "x-based" divides by nothing, so the factor is `2 std^2`. Its "v-based" KL is our
      kl_type="velocity", with the same weight.

    Args:
        trainer: whose weight `beta` is.
        beta: `config.train.beta`, `kl_loss_coef` or `kl_beta`.
        step: the Transition of each sample's step.

    Returns:
        (B,), or (1,) for a step of length 1, of the step's dtype and device.

    Raises:
        ValueError: the trainer is unknown; or its factor depends on the sampler, and the step does not tell it.
        TypeError: beta is not a number.
    """
    if trainer not in get_args(Trainer):
        raise ValueError(f"trainer must be one of {', '.join(get_args(Trainer))}; got {trainer!r}")
    check_at_least_0("beta", beta)
    if trainer == "flow_factory":
        return 2 * beta * step.std**2
    if step.kind not in SAMPLERS:
        raise ValueError(
            f"the KL of {trainer} depends on the sampler, which a {step.kind} step does not tell; build the step with "
            f"{', '.join(SAMPLERS)}"
        )
    return beta * (step.dt.abs() if step.kind == "flow_sde" else torch.ones_like(step.dt))
