"""What an advantage estimator answers: how much better an image is than was to be expected of its prompt.

Axes: N image, R reward function, G group (the images of one prompt), T trained denoising step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

EPS = 1e-4
"""Added to standard deviations, as public trainers do."""


@dataclass(frozen=True)
class Groups:
    """Which images have the same prompt, on the host."""

    prompts: Tensor
    """(G,) int64: the prompt of each group"""
    index: Tensor
    """(N,) int64: the group of each image"""
    count: Tensor
    """(G,) int64: the images of each group"""

    @classmethod
    def of(cls, prompt_indices: Tensor) -> Groups:
        return cls(*torch.unique(prompt_indices.cpu(), return_inverse=True, return_counts=True))

    def sum(self, x: Tensor) -> Tensor:
        """(N,) -> (G,)"""
        # On the host: a handful of numbers, and CUDA's index_add would add them in a new order each time.
        return x.new_zeros(len(self.count)).index_add(0, self.index, x)

    def mean(self, x: Tensor) -> Tensor:
        """(N,) -> (G,)"""
        return self.sum(x) / self.count

    def centered(self, x: Tensor) -> Tensor:
        """Without the mean of the group, (N,)."""
        return x - self.mean(x)[self.index]

    def standardized(self, x: Tensor, eps: float) -> Tensor:
        """(x - mean) / (std + eps) of the group, (N,); 0 in a flat group. The std divides by n, not n - 1."""
        centered = self.centered(x)
        scale = self.mean(centered.square()).sqrt()[self.index]
        return torch.where(self.flat(x)[self.index], 0.0, centered / (scale + eps))

    def flat(self, x: Tensor) -> Tensor:
        """The groups in which all images have the same number, (G,) bool."""
        # Equality is exact here, where a standard deviation of equal rewards may round to a tiny nonzero number.
        zeros = x.new_zeros(len(self.count))
        lowest = zeros.scatter_reduce(0, self.index, x, "amin", include_self=False)
        highest = zeros.scatter_reduce(0, self.index, x, "amax", include_self=False)
        return lowest == highest


@dataclass(frozen=True)
class Estimator:
    """Base of all advantage estimators: frozen dataclasses whose fields are their options.

    An estimator combines the rewards of an image into one, and then compares that with other images.
    """

    title: ClassVar[str]
    """name in the documentation"""
    within_groups: ClassVar[bool] = True
    """whether it compares the images of a group alone, so that a group whose rewards are all equal teaches nothing"""
    per_step: ClassVar[bool] = False
    """whether it takes a reward of each trained step, (N, T), and gives each step its own advantage"""

    def __post_init__(self) -> None:
        """Check the options. Raises ValueError or TypeError."""

    def combine(self, rewards: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        """One reward from several: (R, N) and (R,) -> (N,); per step, (R, N, T) -> (N, T)."""
        return weights @ rewards

    def compare(self, reward: Tensor, groups: Groups, baselines: Mapping[int, float]) -> Tensor:
        """Advantages (N,) of the combined reward (N,), before flat groups get 0; per step, both are (N, T)."""
        raise NotImplementedError

    def next_baseline(self, mean: float, before: float | None) -> float | None:
        """What to expect of a prompt from now on, given its mean reward now; None remembers nothing."""
        return None

    def __call__(
        self,
        rewards: Tensor,
        prompt_indices: Tensor,
        weights: Sequence[float] | None = None,
        baselines: Mapping[int, float] | None = None,
    ) -> Tensor:
        """The advantage of each image, (N,) float32 on the device of the rewards; computed on the host in float64.

        An estimator with `per_step` takes rewards (N, T) or (R, N, T), and gives (N, T).

        Args:
            rewards: (N,) finite scores, or (R, N) of R reward functions; any real dtype.
            prompt_indices: (N,) int64; equal indices form a group.
            weights: R factors on the rewards; all 1 without them.
            baselines: what was to be expected of each prompt, from `next_baselines`; only `running` reads it.

        A group whose rewards are all equal gets 0, unless the estimator compares with an earlier rollout.

        Raises ValueError for wrong shapes, NaN or infinite rewards (naming their images), and rewards that the
        estimator cannot take.
        """
        scores, combined, groups = self._combined(rewards, prompt_indices, weights)
        values = self.compare(combined, groups, baselines or {}) if len(combined) else combined
        if self.within_groups:
            values = torch.where(all_equal(scores, combined, groups)[groups.index], 0.0, values)
        return values.float().to(rewards.device)

    def flat_groups(self, rewards: Tensor, prompt_indices: Tensor, weights: Sequence[float] | None = None) -> Tensor:
        """The groups whose rewards are all equal, (G,) bool on the host, in the order of their indices.

        Of an estimator with `per_step`, those whose rewards after the last step are all equal.
        """
        scores, combined, groups = self._combined(rewards, prompt_indices, weights)
        if self.per_step:
            scores, combined = scores[..., -1], combined[..., -1]
        return all_equal(scores, combined, groups)

    def next_baselines(
        self,
        rewards: Tensor,
        prompt_indices: Tensor,
        weights: Sequence[float] | None = None,
        baselines: Mapping[int, float] | None = None,
    ) -> dict[int, float]:
        """The baselines after this rollout, for the next call; arguments as in a call. Empty except for `running`."""
        _, combined, groups = self._combined(rewards, prompt_indices, weights)
        combined = combined[..., -1] if self.per_step else combined
        after = dict(baselines or {})
        for prompt, mean in zip(groups.prompts.tolist(), groups.mean(combined).tolist(), strict=True):
            baseline = self.next_baseline(mean, after.get(prompt))
            if baseline is not None:
                after[prompt] = baseline
        return after

    def _combined(
        self, rewards: Tensor, prompt_indices: Tensor, weights: Sequence[float] | None
    ) -> tuple[Tensor, Tensor, Groups]:
        """Rewards (R, N), their combination (N,), and the groups; per step, (R, N, T) and (N, T)."""
        scores, factors, groups = checked(rewards, prompt_indices, weights, self.per_step)
        return scores, self.combine(scores, factors, groups) if scores.numel() else scores[0], groups


def all_equal(scores: Tensor, combined: Tensor, groups: Groups) -> Tensor:
    """The groups whose rewards, or the combinations of them, are all equal, (G,) bool."""
    # A weighted sum of equal rewards may round differently at another place of the batch.
    each = torch.stack([groups.flat(row) for row in scores]).all(0)
    return each | groups.flat(combined)


def checked(
    rewards: Tensor, prompt_indices: Tensor, weights: Sequence[float] | None, per_step: bool = False
) -> tuple[Tensor, Tensor, Groups]:
    """Rewards (R, N), or (R, N, T) per step, and weights (R,) in float64 on the host, and the groups.

    Raises ValueError.
    """
    axes = 3 if per_step else 2
    scores = rewards[None] if rewards.ndim == axes - 1 else rewards
    if scores.ndim != axes or 0 in (len(scores), *scores.shape[2:]) or prompt_indices.shape != scores.shape[1:2]:
        of_one, of_all = ("(N, T) of T steps", "(R, N, T)") if per_step else ("(N,)", "(R, N)")
        raise ValueError(
            f"rewards must be {of_one}, or {of_all} of R reward functions, and prompt_indices (N,), one entry per "
            f"image; got {tuple(rewards.shape)} and {tuple(prompt_indices.shape)}"
        )
    if rewards.is_complex():
        raise ValueError(f"rewards must be real numbers; got {rewards.dtype}")
    if prompt_indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"prompt_indices must be whole numbers, int64; got {prompt_indices.dtype}")
    scores = scores.detach().cpu().double()
    for number, row in enumerate(scores):
        finite = torch.isfinite(row).all(1) if per_step else torch.isfinite(row)
        if bad := (~finite).nonzero().flatten().tolist():
            which = "" if len(scores) == 1 else f" {number}"
            raise ValueError(f"the reward function{which} returned NaN or infinite scores for the images {bad}")
    factors = [1.0] * len(scores) if weights is None else [float(weight) for weight in weights]
    if len(factors) != len(scores) or not all(map(math.isfinite, factors)):
        raise ValueError(f"weights must be {len(scores)} finite factors, one per reward function; got {factors}")
    return scores, torch.tensor(factors, dtype=torch.float64, device="cpu"), Groups.of(prompt_indices)
