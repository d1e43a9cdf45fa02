"""Schedules, by the pipeline's own scheduler."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from diffusers.pipelines.flux.pipeline_flux import calculate_shift


def equal_steps(scheduler: Any, num_steps: int, mu: float) -> tuple[float, ...]:
    """The schedule (num_steps + 1,), from 1 to 0, of a pipeline that hands equally spaced times to the scheduler."""
    return _sigmas(scheduler, mu, sigmas=np.linspace(1.0, 1 / num_steps, num_steps))


def own_steps(scheduler: Any, num_steps: int, mu: float) -> tuple[float, ...]:
    """The schedule (num_steps + 1,), from 1 to 0, of a pipeline that leaves the times to the scheduler."""
    return _sigmas(scheduler, mu, num_inference_steps=num_steps)


def _sigmas(scheduler: Any, mu: float, **steps: Any) -> tuple[float, ...]:
    scheduler = copy.copy(scheduler)  # setting its times changes it
    if scheduler.config.use_dynamic_shifting:
        steps["mu"] = mu
    scheduler.set_timesteps(device="cpu", **steps)
    return tuple(scheduler.sigmas.tolist())


def linear_mu(scheduler_config: Any, tokens: int) -> float:
    """The logarithm of the shift for so many image tokens, between those of the scheduler's two sizes and beyond."""
    return calculate_shift(
        tokens,
        scheduler_config.base_image_seq_len,
        scheduler_config.max_image_seq_len,
        scheduler_config.base_shift,
        scheduler_config.max_shift,
    )
