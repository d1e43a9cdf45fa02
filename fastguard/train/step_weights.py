"""Factors on the policy loss of each denoising step that depend on a schedule, not on one step alone.

Axes: S denoising step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.config import StepWeights
from fastguard.train.rollout import Schedule


def step_weights(reweight: StepWeights, schedule: Schedule) -> Tensor | None:
    """The factor of each step, (S,) float32 on the host, 0 where nothing is trained.

    "tempflow" is std over its mean over the trained steps (TempFlow-GRPO, arXiv 2508.04324): the step's noise, in
    units that keep the loss's size. "noise_level" is std / sqrt(|dt|), which is the sampler's noise per square root of
    time, noise_level times its sigma (SuperFlow, arXiv 2512.17951). Both are reconstructed from their summaries.

    None for the factors that `guard_loss` finds itself.
    """
    if reweight not in ("tempflow", "noise_level"):
        return None
    trained = [schedule.step(i) for i in schedule.window]
    std, dt = (torch.cat([getattr(step, name) for step in trained]).double() for name in ("std", "dt"))
    weights = torch.zeros(len(schedule), dtype=torch.float32, device="cpu")
    weights[list(schedule.window)] = (std / std.mean() if reweight == "tempflow" else std / dt.abs().sqrt()).float()
    return weights
