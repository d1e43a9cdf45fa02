"""Values of each denoising step (VGPO, arXiv 2512.12387).

Axes: N image, R reward function, T trained denoising step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastguard.advantages.base import EPS, Estimator, Groups
from fastguard.options import check_at_least_0, check_number


class NegativeRewardError(ValueError):
    """A weighted sum of rewards that is negative, and whose reward function and prompt made it so."""

    def __init__(self, message: str, function: int, prompt: int) -> None:
        super().__init__(message)
        self.function, self.prompt = function, prompt


@dataclass(frozen=True)
class Vgpo(Estimator):
    """`omega_t (z_t + k Q_t)` at step t, from the rewards `r_t` of the image after each step (arXiv 2512.12387).

    `Q_t` is the sum over the steps j from t on of `gamma^(j - t) r_j` (Eq. 10), `z_t` is `(Q_t - mean) / (std + eps)`
    of the group, and `omega_t` is `Q_t` over its mean over the steps of the image (Eq. 11). Only the first steps have
    the term `k Q_t`. Reconstructed from Eqs. 9 to 13: Eq. 13 with `alpha = k std` is this sum. We do not know the
    published gamma and k; the defaults are ours.

    The rewards are (N, T), or (R, N, T) of R reward functions, and so are the advantages (N, T). A trainer decodes and
    scores T images per sample: after each trained step the one-step image `x - sigma v`, after the last one the final
    image.

    `k Q_t` pushes all images of a group up. So a flat group does not get 0: its images get `omega_t k Q_t`. Rewards
    must not be negative, or `omega_t` changes its sign.
    """

    title: ClassVar[str] = "VGPO"
    within_groups: ClassVar[bool] = False
    per_step: ClassVar[bool] = True

    gamma: float = 0.99
    """discount of the rewards of later steps, in [0, 1]; 0 takes the step's own reward alone"""
    k: float = 0.1
    """factor on the absolute term; 0 compares the images of a group alone"""
    absolute_share: float = 0.5
    """share of the trained steps, the first ones, that have the absolute term"""
    rescale: Literal["none", "minmax"] = "none"
    """none refuses negative weighted sums of rewards; minmax maps the lowest of a rollout to 0, the highest to 1"""
    eps: float = EPS
    """added to the standard deviation"""

    def __post_init__(self) -> None:
        for name in ("gamma", "absolute_share"):
            value = getattr(self, name)
            check_number(name, value)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1]; got {value}")
        check_at_least_0("k", self.k)
        if self.k == math.inf:
            raise ValueError("k must be finite; got inf")
        if self.rescale not in ("none", "minmax"):
            raise ValueError(f"rescale must be none or minmax; got {self.rescale!r}")
        check_at_least_0("eps", self.eps)

    def combine(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        parts = weights[:, None, None] * rewards
        reward = parts.sum(0)
        if self.rescale == "minmax":
            low, high = reward.min(), reward.max()
            return (reward - low) / (high - low) if high > low else torch.zeros_like(reward)
        if (negative := (reward < 0).nonzero()).numel():
            image, step = negative[0].tolist()
            function = int(parts[:, image, step].argmin())
            prompt = int(groups.prompts[groups.index[image]])
            raise NegativeRewardError(
                f"vgpo takes rewards that are not negative; reward function {function} gave "
                f"{rewards[function, image, step].item():g}, with the weight {weights[function].item():g}, to an image "
                f"of prompt {prompt} (trained step {step + 1} of {reward.shape[1]}), and the weighted sum is "
                f'{reward[image, step].item():g}. Set rescale = "minmax", or add a constant to the reward',
                function,
                prompt,
            )
        return reward

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        q = self.values(reward)
        relative = torch.stack([groups.standardized(column, self.eps) for column in q.unbind(1)], dim=1)
        absolute = self.k * q
        absolute[:, self.absolute_steps(q.shape[1]) :] = 0
        # An image without any reward has the omega of a constant one, the limit as it goes to 0.
        anchor = torch.where(q.sum(1, keepdim=True) > 0, q, self.values(torch.ones_like(reward)))
        omega = anchor / anchor.mean(1, keepdim=True)
        return omega * (relative + absolute)

    def values(self, reward: Tensor) -> Tensor:
        """Q_t, the discounted sum of the rewards from each step on, (N, T)."""
        columns = list(reward.unbind(1))
        for step in range(len(columns) - 2, -1, -1):
            columns[step] = columns[step] + self.gamma * columns[step + 1]
        return torch.stack(columns, dim=1)

    def absolute_steps(self, steps: int) -> int:
        """The first so many of the trained steps have the absolute term."""
        return math.floor(self.absolute_share * steps + 1e-9)  # 0.29 of 100 steps are 29
