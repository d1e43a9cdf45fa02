"""What an epoch reports: plain numbers for JSON, reduced from tensors that stay on the device until the epoch's end.

Axes: N transition, T trained denoising step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class Update:
    """What one optimizer update leaves for the log: tensors (N,) of this process, on the device."""

    advantages: Tensor
    denoising_step: Tensor
    log_ratio: Tensor
    clipped: Tensor
    kl: Tensor | None
    grad_norm: Tensor
    """() before it is scaled down"""
    skipped: bool = False
    """whether the loss or the gradient was not finite, so that the weights were left as they were"""
    drift: Tensor | None = None
    """of the forward pass; None where no rule to stop asks for it"""


@dataclass(frozen=True)
class RatioLog:
    """Statistics of the ratio over a set of transitions."""

    bias: float
    """mean of ratio - 1"""
    std: float
    """standard deviation of the ratio"""
    clip_fraction_positive: float
    """share of transitions with a positive advantage that were clipped"""
    clip_fraction_negative: float
    """the same for negative advantages"""
    kl: float | None
    """mean KL to the model before training, where one is computed"""


@dataclass(frozen=True)
class UpdateLog:
    """One optimizer update."""

    ratio: RatioLog
    grad_norm: float
    """gradient norm before it is scaled down"""
    skipped: bool
    """whether the update was skipped because its loss or gradient was not finite"""


@dataclass(frozen=True)
class RewardLog:
    """Scores of one reward over a rollout."""

    mean: float
    std: float


@dataclass(frozen=True)
class EpochLog:
    """One rollout and its updates."""

    epoch: int
    """0 is the first rollout"""
    reward_mean: float
    """mean weighted reward of the rollout, which precedes the epoch's updates"""
    reward_std: float
    """standard deviation of the weighted reward over the rollout"""
    rewards: dict[str, RewardLog]
    """each reward by its name"""
    zero_spread_share: float
    """share of groups whose rewards were all equal, which teach nothing except by `running` and `vgpo`"""
    dropped_groups: int
    """groups that were not trained on because a reward failed"""
    updates: tuple[UpdateLog, ...]
    """in order"""
    steps: tuple[int, ...]
    """(T,): the trained denoising steps"""
    per_step: tuple[RatioLog, ...]
    """(T,): over the last pass of the epoch"""
    clip_fraction_positive: float
    """share of transitions with a positive advantage that were clipped, over all updates"""
    clip_fraction_negative: float
    """the same for negative advantages"""
    clip_range_for_30_percent: float | None
    """the clip range that would have clipped 30% of all transitions, as measured; None if the ratio moved too little"""
    clip_range_for_10_percent: float | None
    """the same for 10%"""
    seconds: dict[str, float]
    """wall time by phase"""
    images_per_s: float
    """images of the rollout, over all processes, per second of the whole epoch"""
    peak_memory_gib: float | None
    """largest allocation on any GPU during the epoch; None without one"""
    earlier_images: int = 0
    """images of earlier rollouts that were trained on, over all processes"""

    @property
    def grad_norm(self) -> float:
        """Mean gradient norm over the updates that were not skipped."""
        norms = [update.grad_norm for update in self.updates if not update.skipped]
        return sum(norms) / len(norms) if norms else math.nan

    @property
    def ratio_bias(self) -> tuple[float, ...]:
        """(T,): mean of ratio - 1 per denoising step."""
        return tuple(ratio.bias for ratio in self.per_step)

    @property
    def ratio_std(self) -> tuple[float, ...]:
        """(T,): standard deviation of the ratio per denoising step."""
        return tuple(ratio.std for ratio in self.per_step)

    def scalars(self) -> dict[str, float]:
        """Flat name -> number, for trackers."""
        flat = {
            "reward/mean": self.reward_mean,
            "reward/std": self.reward_std,
            "reward/zero_spread_share": self.zero_spread_share,
            "reward/dropped_groups": float(self.dropped_groups),
            "update/count": float(len(self.updates)),
            "update/grad_norm": self.grad_norm,
            "update/earlier_images": float(self.earlier_images),
            "update/skipped": float(sum(update.skipped for update in self.updates)),
            "update/clip_fraction_positive": self.clip_fraction_positive,
            "update/clip_fraction_negative": self.clip_fraction_negative,
            "speed/images_per_s": self.images_per_s,
        }
        for name, reward in self.rewards.items():
            flat |= {f"reward/{name}/mean": reward.mean, f"reward/{name}/std": reward.std}
        for step, ratio in zip(self.steps, self.per_step, strict=True):
            flat |= {f"ratio/bias/step_{step}": ratio.bias, f"ratio/std/step_{step}": ratio.std}
            if ratio.kl is not None:
                flat[f"kl/step_{step}"] = ratio.kl
        flat |= {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        if self.peak_memory_gib is not None:
            flat["memory/peak_gib"] = self.peak_memory_gib
        return {name: value for name, value in flat.items() if math.isfinite(value)}


class Clock:
    """Wall time by phase, with the GPU's work counted in the phase that gave it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def gather_updates(updates: Sequence[Update], accelerator: Accelerator) -> list[Update]:
    """The updates with the transitions of all processes, on the host."""

    def everyone(x: Tensor) -> Tensor:
        return accelerator.gather(x).cpu()

    return [
        Update(
            everyone(u.advantages),
            everyone(u.denoising_step),
            everyone(u.log_ratio),
            everyone(u.clipped),
            None if u.kl is None else everyone(u.kl),
            u.grad_norm.cpu(),  # the same on every process
            u.skipped,
        )
        for u in updates
    ]


def ratio_log(updates: Sequence[Update], step: int | None = None) -> RatioLog:
    """Reduce updates (of one denoising step only, if given) to numbers; NaN where there is nothing to average."""
    columns = [
        torch.cat([getattr(u, name) for u in updates])
        for name in ("denoising_step", "log_ratio", "clipped", "advantages")
    ]
    chosen = torch.ones_like(columns[0], dtype=torch.bool) if step is None else columns[0] == step
    if not chosen.any():
        return RatioLog(math.nan, math.nan, math.nan, math.nan, None)
    _, log_ratio, clipped, advantages = (column[chosen] for column in columns)
    # expm1 keeps the digits that exp(log_ratio) - 1 loses.
    deviation = log_ratio.double().expm1()
    positive, negative = clip_fractions(clipped, advantages)
    kl = None
    if updates[0].kl is not None:
        kl = torch.cat([u.kl for u in updates if u.kl is not None])[chosen].double().mean().item()
    return RatioLog(deviation.mean().item(), deviation.std(correction=0).item(), positive, negative, kl)


def clip_fractions(clipped: Tensor, advantages: Tensor) -> tuple[float, float]:
    """Share of clipped transitions among those with positive and with negative advantage (0 if there are none)."""
    shares = []
    for selected in (advantages > 0, advantages < 0):
        shares.append(((clipped.float() * selected).sum() / selected.sum().clamp(min=1)).item())
    return shares[0], shares[1]


def clip_range_for(share: float, updates: Sequence[Update]) -> float | None:
    """The clip range at which this share of the transitions would have been clipped, from their measured ratios.

    A transition is clipped where its ratio lies beyond the range on the side that its advantage wants: the range is a
    quantile of sign(advantage) * (ratio - 1). None if fewer than this share moved that way at all.
    """
    log_ratio = torch.cat([u.log_ratio for u in updates]).double()
    advantages = torch.cat([u.advantages for u in updates])
    moved = (log_ratio.expm1() * advantages.sign())[advantages != 0]
    if len(moved) == 0 or not bool(torch.isfinite(moved).all()):
        return None
    quantile = torch.quantile(moved, 1 - share).item()
    return quantile if quantile > 0 else None
