"""The loss in the scripts of flow_grpo (github.com/yifan123/flow_grpo).

`grpo_loss` takes the place of a script's loss lines. `recorded_means` gives a rollout the means of its steps, which
most scripts do not store. docs/integrations/flow_grpo.md says which lines change.

Axes: B sample, T stored step; every further axis of the latents counts as elements, D of them per sample.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastguard.integrations.kl import kl_weight
from fastguard.loss import GuardLoss, guard_loss_from_means
from fastguard.loss.checks import Reweight, check_draw_from_means
from fastguard.loss.objectives import OPTIONS, build_objective
from fastguard.sde import FIRST_STEP, Transition, cps, flow_sde, wan_sde

SdeType = Literal["sde", "cps", "wan"]
SAMPLER = "sde_step_with_logprob"
"""the function that draws a step in flow_grpo's pipelines"""


class ScriptLoss(NamedTuple):
    """What the lines below a script's loss need.

    Attributes:
        loss: () for backward: the policy loss plus `config.train.beta` times the KL loss.
        metrics: () each, without a gradient, under the names of the script's `info`: approx_kl, clipfrac,
            clipfrac_gt_one, clipfrac_lt_one, policy_loss, loss, and kl_loss with a reference.
        details: the GuardLoss, with `ratio`, `log_ratio` and `clipped`, (B,) each.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    details: GuardLoss


def grpo_loss(
    prev_sample_mean: Tensor,
    sample: Mapping[str, Tensor],
    j: int,
    scheduler: Any,
    config: Any,
    *,
    prev_sample_mean_ref: Tensor | None = None,
    sde_type: SdeType = "sde",
    objective: str | None = None,
    reweight: Reweight | float | Tensor | None = None,
    bare_cps: bool = False,
    check_noise: bool = True,
    **options: Any,
) -> ScriptLoss:
    """Loss of step j of a batch. It reads neither the log-probs of the script nor their clipped advantages.

    Args:
        prev_sample_mean: (B, ...) the third output of the script's `compute_log_prob`. It alone gets a gradient.
        sample: the script's batch: `next_latents` and `prev_sample_mean` (B, T, ...), `timesteps` and `advantages`
            (B, T). The steps of a batch may differ.
        j: the step in `sample`.
        scheduler: the pipeline's scheduler, in the state of the rollout.
        config: the script's config. Its `train.clip_range`, `train.adv_clip_max`, `train.beta`, `sample.noise_level`
            and `rationorm` are read.
        prev_sample_mean_ref: (B, ...) the same output of the reference model. `config.train.beta` needs it.
        sde_type: "sde" or "cps", as the script passes it to `sde_step_with_logprob`; "wan" for the Wan script.
        objective: a name of `fastguard.loss.objectives.OBJECTIVES`; by default "grpo_guard" if `config.rationorm` is
            set, else "flow_grpo".
        reweight: as in `fastguard.guard_loss`; by default "inverse_dt" for "grpo_guard" and "none" for the others, as
            in the scripts.
        bare_cps: flow_grpo's log-prob of a cps step is -(x' - mean)^2, without the 1 / (2 std^2) of a Gaussian. True
            reproduces it: log-ratios are 2 std^2 times those of the Gaussian. For "flow_grpo" with "cps".
        check_noise: check that the rollout's noise, as the stored means and sde_type give it, has a mean square near 1.
            This waits for the GPU, as the script's own look-up of the timesteps does.
        options: options of the objective, in place of the config's.

    Raises:
        ValueError: the batch holds no means, or those of other steps; a value or shape does not fit.
        TypeError: a type or dtype does not fit.
    """
    old_mean, prev_sample = _stored(sample, j, prev_sample_mean)
    step = _step(scheduler, sample["timesteps"][:, j], config, sde_type).to(prev_sample_mean.device)
    if check_noise and step.has_density:
        check_draw_from_means(
            f"the rollout's noise, (next_latents - prev_sample_mean) / std with sde_type={sde_type!r},",
            prev_sample,
            old_mean,
            step,
            "check sde_type, config.sample.noise_level, the scheduler, and that sample['prev_sample_mean'] is "
            "torch.stack(means, dim=1)",
        )

    name = objective or ("grpo_guard" if getattr(config, "rationorm", False) else "flow_grpo")
    limits = {"clip_range": config.train.clip_range, "adv_clip": config.train.adv_clip_max}
    own = {option: value for option, value in limits.items() if option in OPTIONS.get(name, ())}
    chosen = build_objective(name, **{**own, **options})

    kl_scale = kl_weight("flow_grpo", 1.0, step)
    if bare_cps:
        if (name, sde_type) != ("flow_grpo", "cps"):
            raise ValueError(
                f"bare_cps=True is for objective='flow_grpo' with sde_type='cps'; got {name!r} with {sde_type!r}"
            )
        # A Gaussian of variance 1/2 has the bare log-prob; the KL keeps the step's own std.
        kl_scale = kl_scale / (2 * step.std**2)
        step = replace(step, std=torch.full_like(step.std, math.sqrt(0.5)))

    beta = float(config.train.beta)
    if beta > 0 and prev_sample_mean_ref is None:
        raise ValueError(
            f"config.train.beta = {beta:g} needs the reference's mean; pass prev_sample_mean_ref, which the script's "
            "compute_log_prob gives under disable_adapter"
        )
    details = guard_loss_from_means(
        prev_sample,
        prev_sample_mean,
        old_mean,
        sample["advantages"][:, j],
        step,
        objective=chosen,
        reweight=reweight if reweight is not None else "inverse_dt" if name == "grpo_guard" else "none",
        ref_prev_sample_mean=prev_sample_mean_ref,
        kl_weight=beta * kl_scale if beta > 0 else 0.0,
    )

    loss, log_ratio = details.loss.detach(), details.log_ratio
    outside = chosen.moved(log_ratio, details.drift, n_elements=prev_sample[0].numel()) > chosen.limit
    metrics = {
        "approx_kl": 0.5 * (details.cross - details.drift / 2).square().mean(),
        "clipfrac": outside.float().mean(),
        "clipfrac_gt_one": (outside & (log_ratio > 0)).float().mean(),
        "clipfrac_lt_one": (outside & (log_ratio < 0)).float().mean(),
        "policy_loss": loss,
        "loss": loss,
    }
    if details.kl is not None:
        kl_loss = (kl_scale * details.kl).mean()
        metrics |= {"kl_loss": kl_loss, "policy_loss": loss - beta * kl_loss}
    return ScriptLoss(details.loss, metrics, details)


@contextmanager
def recorded_means(pipeline_with_logprob: Callable[..., Any]) -> Iterator[list[Tensor]]:
    """Record the mean of each step that a pipeline call inside the `with` draws.

    The steps are those whose log-probs the pipeline returns: steps without noise, which lie outside an SDE window, and
    steps that are only scored, are left out.

    Args:
        pipeline_with_logprob: the script's function of that name, or `wan_pipeline_with_logprob`.

    Yields:
        the means, (B, ...) float32 each. `torch.stack(means, dim=1)` goes into the script's sample beside `log_probs`.

    Raises:
        TypeError: the argument is not a Python function.
        ValueError: its module does not draw with `sde_step_with_logprob`, or nothing was drawn inside the `with`.
    """
    function = inspect.unwrap(pipeline_with_logprob) if callable(pipeline_with_logprob) else pipeline_with_logprob
    if not inspect.isfunction(function):
        came = type(pipeline_with_logprob).__name__
        raise TypeError(f"pipeline_with_logprob must be a function of flow_grpo's; got an object of type {came}")
    names = function.__globals__
    if SAMPLER not in names:
        raise ValueError(
            f"the module of {function.__name__} ({function.__module__}) has no {SAMPLER}; pass the function that the "
            "script imports as pipeline_with_logprob"
        )
    original = names[SAMPLER]
    signature = inspect.signature(original)
    means: list[Tensor] = []

    @functools.wraps(original)
    def recording(*args: Any, **kwargs: Any) -> Any:
        outputs = original(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        scored = given.get("prev_sample") is not None
        if not scored and given.get("noise_level") != 0 and not given.get("determistic"):
            means.append(outputs[2].detach())
        return outputs

    names[SAMPLER] = recording
    try:
        yield means
    finally:
        names[SAMPLER] = original
    if not means:
        raise ValueError(
            f"no step with noise was drawn inside recorded_means: call {function.__name__} of {function.__module__} "
            "inside its `with`, with a noise_level above 0"
        )


def _stored(sample: Mapping[str, Tensor], j: int, prev_sample_mean: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the result of the rollout's step, (B, ...) each."""
    if "prev_sample_mean" not in sample:
        raise ValueError(
            f"sample holds no 'prev_sample_mean', but {', '.join(map(repr, sample))}; record the means of the rollout "
            "with recorded_means, and store them beside 'log_probs'"
        )
    means, advantages = sample["prev_sample_mean"], sample["advantages"]
    if not isinstance(means, Tensor):
        raise TypeError(
            f"sample['prev_sample_mean'] must be a tensor, torch.stack(means, dim=1); got {type(means).__name__}"
        )
    if advantages.ndim != 2 or advantages.shape[0] != means.shape[0] or advantages.shape[1] <= j:
        raise ValueError(
            f"sample['advantages'] has shape {tuple(advantages.shape)}; expected one per sample and stored step, "
            f"(B, T), of {means.shape[0]} samples and more than {j} steps"
        )
    old_mean, prev_sample = means[:, j], sample["next_latents"][:, j]
    if old_mean.shape != prev_sample_mean.shape:
        raise ValueError(
            f"sample['prev_sample_mean'][:, {j}] has shape {tuple(old_mean.shape)}, prev_sample_mean "
            f"{tuple(prev_sample_mean.shape)}. Without config.rationorm the Guard script stores log-probs under this "
            "name; store the means of the rollout"
        )
    return old_mean, prev_sample


def _step(scheduler: Any, timesteps: Tensor, config: Any, sde_type: SdeType) -> Transition:
    """The transitions of these timesteps, on the host."""
    if sde_type not in get_args(SdeType):
        raise ValueError(f"sde_type must be one of {', '.join(get_args(SdeType))}; got {sde_type!r}")
    schedule, sigmas = scheduler.timesteps.cpu(), scheduler.sigmas.cpu()
    # As the scripts look them up, but on the host, where it does not wait for the GPU once per sample.
    index = torch.tensor([scheduler.index_for_timestep(t, schedule) for t in timesteps.cpu()])
    sigma, sigma_next, sigma_max = sigmas[index], sigmas[index + 1], sigmas[1]
    if sde_type == "wan":
        return wan_sde(sigma, sigma_next, sigma_max)
    if sde_type == "cps":
        return cps(sigma, sigma_next, config.sample.noise_level)
    near = (sigma > FIRST_STEP) & (sigma < 1)
    if bool(near.any()):
        raise ValueError(
            f"the scheduler's sigma {sigma[near][0].item():.6g} is near 1 but not 1. flow_grpo replaces only an exact "
            "1 by sigmas[1], so the rollout drew this step with a std in the tens; give the scheduler sigmas that "
            "start at 1"
        )
    return flow_sde(sigma, sigma_next, config.sample.noise_level, sigma_max)
