"""The objectives as formulas that autograd differentiates, written independently of the package.

    python tests/helpers/objective_formulas.py    writes tests/data/objective_cases.json from them

Axes: N transition. Each formula takes log_ratio, drift and advantages, (N,) float64, the number D of elements and the
options, and gives the loss, (N,). What the published gradient leaves out is detached.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).parent.parent / "data" / "objective_cases.json"


def pair(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    return (clip_range, clip_range) if isinstance(clip_range, float) else clip_range


def ppo(log_r: Tensor, drift: Tensor, a: Tensor, d: int, clip_range=2e-6, adv_clip=5.0, dual_clip=None) -> Tensor:
    low, high = pair(clip_range)
    a = a if adv_clip is None else a.clamp(-adv_clip, adv_clip)
    loss = torch.maximum(-a * log_r.exp(), -a * log_r.exp().clamp(1 - low, 1 + high))
    return loss if dual_clip is None else torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)


def masked(log_r: Tensor, drift: Tensor, a: Tensor, d: int, divergence="tv", threshold=0.15) -> Tensor:
    distance = torch.erf((d * drift / 8).sqrt()) if divergence == "tv" else drift / 2
    return torch.where((distance >= threshold) & (a * log_r > 0), 0.0, -a * log_r.exp())


def flow_dppo(log_r: Tensor, drift: Tensor, a: Tensor, d: int, kl_threshold=1e-5) -> Tensor:
    return masked(log_r, drift, a, d, "kl", kl_threshold)


def copg(log_r: Tensor, drift: Tensor, a: Tensor, d: int, clip_range=1e-5) -> Tensor:
    low, high = pair(clip_range)
    return torch.maximum(-a * log_r, -a * log_r.clamp(math.log1p(-low), math.log1p(high)))


def hinge(log_r: Tensor, drift: Tensor, a: Tensor, d: int, margin=1e-5, classifier="ratio") -> Tensor:
    value = {"ratio": log_r.expm1(), "log": log_r, "root": (log_r / 2).expm1()}[classifier]
    return a.abs() * torch.relu(margin - a.sign() * value)


def ppo_rpe(log_r: Tensor, drift: Tensor, a: Tensor, d: int, threshold=5e-6, beta=0.5) -> Tensor:
    """The gain is found from the condition that the gradient vanishes at the threshold, by autograd."""

    def divergence(log_ratio: Tensor) -> Tensor:
        return (1 - beta) ** 2 * log_ratio.expm1() ** 2 / (2 * (1 - beta + beta * log_ratio.exp()))

    edge = 1 + a.sign() * threshold
    at_edge = torch.log(edge * (1 - beta) / (1 - beta * edge)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(divergence(at_edge).sum(), at_edge)
    gain = torch.where(a == 0, 0.0, a.abs() * at_edge.exp() / slope.abs()).detach()
    return -a * log_r.exp() + gain * divergence(log_r)


def fr_ppo(log_r: Tensor, drift: Tensor, a: Tensor, d: int, tau=1e-3) -> Tensor:
    return -a * log_r.exp() + (1 - torch.exp(-drift / 4)) / tau


def surrogate(log_r: Tensor, drift: Tensor, a: Tensor, d: int) -> Tensor:
    return -a * log_r.exp()


def power_mean(log_r: Tensor, drift: Tensor, a: Tensor, d: int, lam=0.3) -> Tensor:
    return -a * log_r.expm1() if lam == 0 else -a * torch.log(1 - lam + lam * log_r.exp()) / lam


def rpg(log_r: Tensor, drift: Tensor, a: Tensor, d: int, lam=0.3, window=2) -> Tensor:
    """The integral of the weight `r / (1 - lam + lam r)`, from its value at r = 1."""
    if lam in (0, 1):
        return -a * (log_r if lam else log_r.expm1())
    return -a * (torch.logaddexp(log_r.new_tensor(math.log(1 - lam)), math.log(lam) + log_r)) / lam


def cispo(log_r: Tensor, drift: Tensor, a: Tensor, d: int, clip_range=1e-5) -> Tensor:
    low, high = pair(clip_range)
    return -a * log_r.exp().clamp(1 - low, 1 + high).detach() * log_r


def sapo(log_r: Tensor, drift: Tensor, a: Tensor, d: int, tau_positive=1.0, tau_negative=1.05) -> Tensor:
    tau = torch.where(a > 0, a.new_tensor(tau_positive), a.new_tensor(tau_negative))
    return -a * 4 / tau * torch.sigmoid(tau * log_r.expm1())


def spo(log_r: Tensor, drift: Tensor, a: Tensor, d: int, epsilon=1e-5) -> Tensor:
    return -a * log_r.exp() + a.abs() * log_r.expm1() ** 2 / (2 * epsilon)


def dro(log_r: Tensor, drift: Tensor, a: Tensor, d: int, beta=1e5) -> Tensor:
    return -a * log_r + beta * log_r**2 / 2


def tic_grpo(log_r: Tensor, drift: Tensor, a: Tensor, d: int, clip_range=1e-5, low=None) -> Tensor:
    """Of trajectories: log_r and drift (n, T), a (n,)."""
    ratio = log_r.mean(1).exp()
    kept = ratio.clamp(None if low is None else 1 - low, 1 + clip_range)
    return torch.maximum(-a * ratio, -a * kept)


def gmpo(log_r: Tensor, drift: Tensor, a: Tensor, d: int, clip_range=2e-5) -> Tensor:
    low, high = pair(clip_range)
    sign = a.sign()[:, None]
    kept = sign * torch.minimum(sign * log_r, sign * log_r.clamp(-low, high))
    return -a * torch.where(sign == 0, log_r, kept).mean(1).exp()


def op_grpo(
    log_r: Tensor, drift: Tensor, a: Tensor, d: int, clip_range=2e-6, adv_clip=5.0, dual_clip=None, offset=0.0, **buffer
) -> Tensor:
    """Without the weight of its image; the ratio is to another policy by the offset."""
    return ppo(log_r - offset, drift, a, d, clip_range, adv_clip, dual_clip)


FORMULAS: dict[str, Callable[..., Tensor]] = {
    "grpo_guard": ppo, "flow_grpo": ppo, "flow_dppo": flow_dppo, "dppo": masked, "copg": copg, "hinge": hinge,
    "ppo_rpe": ppo_rpe, "fr_ppo": fr_ppo, "surrogate": surrogate, "power_mean": power_mean, "cispo": cispo,
    "sapo": sapo, "spo": spo, "dro": dro, "tic_grpo": tic_grpo, "gmpo": gmpo, "rpg": rpg,
    "op_grpo": op_grpo,
}  # fmt: skip

# Options of each objective at two scales of the log-ratio: that of a mean over 65,536 elements, and an ordinary one.
SMALL: dict[str, list[dict[str, Any]]] = {
    "grpo_guard": [{}, {"clip_range": (1e-6, 3e-6), "adv_clip": None}],
    "flow_grpo": [{"clip_range": 1e-5}],
    "flow_dppo": [{}, {"kl_threshold": 1e-6}],
    "dppo": [{}, {"divergence": "kl", "threshold": 1e-6}],
    "copg": [{}, {"clip_range": (2e-6, 4e-6)}],
    "hinge": [{"classifier": kind} for kind in ("ratio", "log", "root")],
    "ppo_rpe": [{}, {"beta": 0.2}],
    "fr_ppo": [{}],
    "surrogate": [{}],
    "power_mean": [{}],
    "cispo": [{}],
    "sapo": [{}, {"tau_positive": 1e5, "tau_negative": 2e5}],
    "spo": [{}],
    "dro": [{}],
    "tic_grpo": [{}, {"low": 2e-5}],
    "gmpo": [{}],
    "rpg": [{}],
    "op_grpo": [{"clip_range": 1e-5}],
}
LARGE: dict[str, list[dict[str, Any]]] = {
    "grpo_guard": [{"clip_range": 0.2}, {"clip_range": (0.2, 0.28), "dual_clip": 1.3}],
    "flow_grpo": [{"clip_range": (0.1, 0.3), "adv_clip": 1.0}, {"clip_range": 0.2, "dual_clip": 1.5}],
    "flow_dppo": [{"kl_threshold": 0.1}],
    "dppo": [{"threshold": 0.5}, {"divergence": "kl", "threshold": 0.1}],
    "copg": [{"clip_range": (0.1, 0.3)}],
    "hinge": [{"margin": 0.2, "classifier": kind} for kind in ("ratio", "log", "root")],
    "ppo_rpe": [{"threshold": 0.2}, {"threshold": 0.2, "beta": 0.2}, {"threshold": 0.2, "beta": 0.0}],
    "fr_ppo": [{"tau": 0.05}],
    "surrogate": [{}],
    "power_mean": [{"lam": lam} for lam in (0.0, 0.1, 0.5, 1.0)],
    "cispo": [{"clip_range": (0.1, 0.3)}],
    "sapo": [{}, {"tau_positive": 3.0, "tau_negative": 5.0}],
    "spo": [{"epsilon": 0.2}],
    "dro": [{"beta": 3.0}],
    "tic_grpo": [{"clip_range": 0.1}, {"clip_range": 0.1, "low": 0.1}],
    "gmpo": [{"clip_range": (0.1, 0.2)}],
    "rpg": [{"lam": 0.1, "window": 8}, {"lam": 1.0}],
    "op_grpo": [{"clip_range": (0.1, 0.3), "cap": 1.5}],
}


def derivatives(name: str, options: dict[str, Any], log_r: Tensor, drift: Tensor, a: Tensor, d: int) -> list[Tensor]:
    """Loss and its two derivatives, (N,) each."""
    log_r, drift = log_r.clone().requires_grad_(), drift.clone().requires_grad_()
    loss = FORMULAS[name](log_r, drift, a, d, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), (log_r, drift), allow_unused=True, materialize_grads=True)]


def points(scale: float, drift_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios, drifts and advantages, of all signs and on both sides of the limits."""
    ratios = scale * torch.tensor([-2.7, -0.9, -0.13, 0.0, 0.13, 0.9, 2.7], dtype=torch.float64)
    drifts = drift_scale * torch.tensor([0.03, 1.7], dtype=torch.float64)
    scores = torch.tensor([-7.0, -0.6, 0.0, 1.3], dtype=torch.float64)
    return tuple(axis.flatten() for axis in torch.meshgrid(ratios, drifts, scores, indexing="ij"))  # type: ignore


def trajectories(scale: float, drift_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """The points as images of 4 steps, in another order: (14, 4), (14, 4) and (14,)."""
    log_ratio, drift, advantages = points(scale, drift_scale)
    order = torch.randperm(len(log_ratio), generator=torch.Generator().manual_seed(0))
    return log_ratio[order].view(-1, 4), drift[order].view(-1, 4), advantages[order].view(-1, 4)[:, 0]


TRAJECTORY = ("tic_grpo", "gmpo")


def cases() -> list[dict[str, Any]]:
    """Every objective with its options, where it is, and what comes out."""
    made = []
    for table, scale, drift_scale, d in ((SMALL, 1e-5, 1e-5, 65_536), (LARGE, 0.3, 0.3, 24)):
        for name, every in table.items():
            for options in every:
                of = trajectories if name in TRAJECTORY else points
                found = derivatives(name, options, *of(scale, drift_scale), d)
                place = {"scale": scale, "drift_scale": drift_scale, "n_elements": d}
                results = dict(zip(("loss", "by_log_ratio", "by_drift"), (x.tolist() for x in found), strict=True))
                made.append({"objective": name, "options": options, **place, **results})
    return made


if __name__ == "__main__":
    PATH.write_text("[\n" + ",\n".join(map(json.dumps, cases())) + "\n]\n")
