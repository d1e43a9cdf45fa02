"""Schedules: the flow times of the denoising steps, from 1 (noise) to 0 (image).

A model's own schedule is that of its diffusers scheduler. These two are computed without diffusers.
"""

from __future__ import annotations

import math


def shifted_sigmas(num_steps: int, shift: float) -> tuple[float, ...]:
    """The schedule of models whose pipeline hands equally spaced sigmas to the scheduler: Flux.1, FLUX.2, Qwen-Image.

    Its last step starts at `shift / (num_steps + shift - 1)`. SD3 and SD3.5 have another schedule, `sd3_sigmas`.

    Args:
        num_steps: denoising steps, at least 1.
        shift: s > 0 of `s t / (1 + (s - 1) t)`; 1 leaves the times equally spaced. For dynamic shifting, which depends
            on the image's size, it is `exp(mu)`.

    Returns:
        `num_steps + 1` flow times, the first 1 and the last 0.

    Raises:
        ValueError: a value is out of range.
    """
    _check(num_steps, shift)
    return tuple(_shifted(1 - i / num_steps, shift) for i in range(num_steps + 1))


def sd3_sigmas(num_steps: int, shift: float = 3.0, num_train_timesteps: int = 1000) -> tuple[float, ...]:
    """The schedule of SD3, SD3.5 and others whose pipeline leaves the sigmas to diffusers'
    FlowMatchEulerDiscreteScheduler.

    The scheduler shifts twice. It spaces the steps equally from 1 down to its shortest training time, which is shifted,
    and then shifts them all. So the last step starts near 0: with 10 steps at 0.00893, where `shifted_sigmas` has 0.25.

    Args:
        num_steps: denoising steps, at least 1.
        shift: `shift` of the scheduler's config.
        num_train_timesteps: that of the scheduler's config.

    Returns:
        `num_steps + 1` flow times, the first 1 and the last 0.

    Raises:
        ValueError: a value is out of range.
    """
    _check(num_steps, shift)
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be at least 1; got {num_train_timesteps}")
    shortest = _shifted(1 / num_train_timesteps, shift)
    spacing = (1 - shortest) / max(num_steps - 1, 1)
    return (*(_shifted(1 - i * spacing, shift) for i in range(num_steps)), 0.0)


def _shifted(t: float, shift: float) -> float:
    return shift * t / (1 + (shift - 1) * t)


def _check(num_steps: int, shift: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift must be positive and finite; got {shift}")
