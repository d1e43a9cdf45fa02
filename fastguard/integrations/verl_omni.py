"""verl-omni: `actor_rollout_ref.model.external_lib=fastguard.integrations.verl_omni` (docs/integrations/verl_omni.md).

verl-omni imports its external_lib in every worker that builds a model's config. Its losses are registered by then, and
its config refuses new names. So this module, on import, takes over the names of four losses.

Axes: B sample.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguard.loss import GuardLoss, guard_loss_from_means
from fastguard.loss.checks import Reweight
from fastguard.sde import Transition, gaussian_step

Metrics = dict[str, Tensor]

DRAW = "fastguard_draw"
"""attribute of the mean that the scheduler returns: its `Draw`"""

STD_HAS_DT = {"sde": False, "dance_sde": True, "cps": True}
"""by sde_type, whether the scheduler's std_dev_t includes sqrt(|dt|)"""


class Draw(NamedTuple):
    """What the scheduler is told and the loss is not."""

    prev_sample: Tensor
    sde_type: str


class Loss(NamedTuple):
    """How a loss of verl-omni is computed here."""

    objective: str
    reweight: Reweight
    options: dict[str, str]
    """option of the objective -> field of `actor.diffusion_loss`"""
    metrics: Callable[[GuardLoss, Tensor, Any], Metrics]
    """(result, advantages, config.diffusion_loss) -> what verl-omni logs for this loss"""


def clip_metrics(result: GuardLoss, advantages: Tensor, config: Any) -> Metrics:
    change = torch.expm1(result.log_ratio)  # ratio - 1, with the digits that a float32 ratio has lost
    return {
        "actor/ppo_kl": -_plain_log_ratio(result).mean(),
        "actor/pg_clipfrac": _fraction(change.abs() > config.clip_ratio),
        "actor/pg_clipfrac_higher": _fraction(change > config.clip_ratio),
        "actor/pg_clipfrac_lower": _fraction(-change > config.clip_ratio),
        "actor/ratio_mean": 1 + change.mean(),
        "actor/ratio_std": change.std(),
    }


def mask_metrics(result: GuardLoss, advantages: Tensor, config: Any) -> Metrics:
    log_ratio, kl, masked = _plain_log_ratio(result), result.drift / 2, result.clipped
    change = torch.expm1(log_ratio)
    return {
        "actor/ppo_kl": -log_ratio.mean(),
        "actor/approx_kl": 0.5 * log_ratio.square().mean(),
        "actor/ratio_mean": 1 + change.mean(),
        "actor/ratio_std": change.std(unbiased=False),
        "actor/ratio_min": 1 + change.min(),
        "actor/ratio_max": 1 + change.max(),
        "actor/kl_new_old_mean": kl.mean(),
        "actor/kl_new_old_max": kl.max(),
        "actor/kl_mask_fraction": _fraction(kl >= config.kl_mask_threshold),
        "actor/pos_rm_fraction": _fraction(masked & (advantages > 0)),
        "actor/neg_rm_fraction": _fraction(masked & (advantages < 0)),
        "actor/masked_fraction": _fraction(masked),
        "actor/unmasked_fraction": _fraction(~masked),
    }


def _plain_log_ratio(result: GuardLoss) -> Tensor:
    return result.cross - result.drift / 2


def _fraction(these: Tensor) -> Tensor:
    return these.to(torch.float32).mean()


CLIPPED = {"clip_range": "clip_ratio", "adv_clip": "adv_clip_max"}
FLOW_GRPO = Loss("flow_grpo", "none", CLIPPED, clip_metrics)
LOSSES = {
    "grpo_guard": Loss("grpo_guard", "inverse_dt", CLIPPED, clip_metrics),
    "flow_grpo": FLOW_GRPO,
    "dance_grpo": FLOW_GRPO,
    "flow_dppo": Loss("flow_dppo", "none", {"kl_threshold": "kl_mask_threshold"}, mask_metrics),
}


def take_over() -> None:
    """Let the scheduler's means carry their draws, and put our losses into the registry. Once per process."""
    from verl_omni.pipelines.schedulers import FlowMatchSDEDiscreteScheduler as Scheduler
    from verl_omni.trainer.diffusion.diffusion_algos import DIFFUSION_LOSS_REGISTRY as registry

    if hasattr(Scheduler.sample_previous_step, "__wrapped__"):
        return
    Scheduler.sample_previous_step = carrying_draws(Scheduler.sample_previous_step)
    for name in LOSSES.keys() & registry.keys():
        registry[name] = fused_class(name, type(registry[name]))()


def carrying_draws(sample_previous_step: Callable[..., Any]) -> Callable[..., Any]:
    """The scheduler's method, whose mean carries its draw wherever it has a graph, which is where it is trained."""
    signature = inspect.signature(sample_previous_step)

    @functools.wraps(sample_previous_step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        outputs = sample_previous_step(*args, **kwargs)
        prev_sample, _, mean = outputs[:3]
        if mean.requires_grad:
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            setattr(mean, DRAW, Draw(prev_sample.detach(), call.arguments["sde_type"]))
        return outputs

    return wrapped


def fused_class(name: str, theirs: type) -> type:
    """A class as `theirs`, called `name` in the registry, with our loss where its inputs are there."""

    def __call__(self: Any, *, config: Any, model_output: Any, data: Any) -> Any:
        obstacle = find_obstacle(name, config.diffusion_loss, model_output, data)
        if obstacle is None:
            return fused_loss(LOSSES[name], config.diffusion_loss, model_output, data)
        if torch.is_grad_enabled():
            warnings.warn(f"verl-omni's own {name} loss is used: {obstacle}", stacklevel=2)
        return theirs.__call__(self, config=config, model_output=model_output, data=data)

    return type(f"Fused{theirs.__name__}", (theirs,), {"__call__": __call__, "__doc__": theirs.__doc__})


def find_obstacle(name: str, config: Any, model_output: Any, data: Any) -> str | None:
    """Why our loss cannot be computed, or None."""
    missing = [key for key in ("prev_sample_mean", "std_dev_t", "sqrt_dt") if key not in model_output]
    if missing:
        return f"the model's output has no {', '.join(missing)}"
    draw = getattr(model_output["prev_sample_mean"], DRAW, None)
    if draw is None:
        return "prev_sample_mean is not the tensor that FlowMatchSDEDiscreteScheduler returned"
    if draw.sde_type not in STD_HAS_DT:
        return f"sde_type is {draw.sde_type!r}; known are {', '.join(STD_HAS_DT)}"
    if "old_prev_sample_mean" not in data:
        return "the batch has no old_prev_sample_mean, as with rollout_correction.bypass_mode=True"
    if name == "flow_dppo" and not getattr(config, "add_kl_coefficient", True):
        return "diffusion_loss.add_kl_coefficient is False, so its threshold is not one of a KL divergence"
    return None


def fused_loss(loss: Loss, config: Any, model_output: Any, data: Any) -> Any:
    from verl_omni.trainer.diffusion.diffusion_algos import DiffusionLossResult

    mean, advantages = model_output["prev_sample_mean"], data["advantages"].flatten()
    draw: Draw = getattr(mean, DRAW)
    result = guard_loss_from_means(
        draw.prev_sample,
        mean,
        data["old_prev_sample_mean"],
        advantages,
        transition(draw.sde_type, model_output["std_dev_t"], model_output["sqrt_dt"]),
        objective=loss.objective,
        reweight=loss.reweight,
        sample_weight=data.get("rollout_is_weights", None),
        **{ours: getattr(config, field) for ours, field in loss.options.items()},
    )
    # Nothing differentiates the log-prob now, and its graph would be saved for backward.
    model_output["log_probs"] = model_output["log_probs"].detach()
    metrics = loss.metrics(result, advantages, config)
    values = torch.stack(list(metrics.values())).tolist()  # one wait for the GPU
    return DiffusionLossResult(result.loss, dict(zip(metrics, values, strict=True)))


def transition(sde_type: str, std_dev_t: Tensor, sqrt_dt: Tensor) -> Transition:
    """The step's Transition from the scheduler's std_dev_t (B, 1, ...) and sqrt_dt (B,)."""
    if sde_type == "cps":
        warnings.warn(
            "verl-omni's log-probs of cps lack the factor 1 / (2 std^2) of a Gaussian. This loss has it, so a "
            "clip_ratio or a kl_mask_threshold that was tuned with theirs has to be tuned again",
            stacklevel=2,
        )
    std = std_dev_t.flatten()
    return gaussian_step(std if STD_HAS_DT[sde_type] else std * sqrt_dt, -(sqrt_dt**2))


if find_spec("verl_omni") is not None:
    take_over()
