"""The schedules, against diffusers' own scheduler."""

from __future__ import annotations

import math

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

import fastguard as fg


@pytest.mark.parametrize("num_steps", [1, 4, 10, 28])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_sd3_s_schedule_is_that_of_its_scheduler(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    assert fg.sd3_sigmas(num_steps, shift) == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)


def test_sd3_shifts_twice() -> None:
    assert fg.sd3_sigmas(10)[-2] == pytest.approx(0.00893, abs=5e-6)
    assert fg.shifted_sigmas(10, 3.0)[-2] == pytest.approx(0.25)


@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_flux_s_schedule_is_that_of_its_pipeline(num_steps: int) -> None:
    """The pipeline passes equally spaced sigmas and mu, which depends on the image's size."""
    mu = 0.87
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=mu)
    assert fg.shifted_sigmas(num_steps, math.exp(mu)) == pytest.approx(scheduler.sigmas.tolist(), abs=2e-7)


def test_bad_schedules_are_refused() -> None:
    for schedule in (fg.shifted_sigmas, fg.sd3_sigmas):
        with pytest.raises(ValueError, match="num_steps must be at least 1; got 0"):
            schedule(0, 3.0)
        with pytest.raises(ValueError, match="shift must be positive and finite; got 0"):
            schedule(4, 0)
    with pytest.raises(ValueError, match="num_train_timesteps must be at least 1; got 0"):
        fg.sd3_sigmas(4, num_train_timesteps=0)
