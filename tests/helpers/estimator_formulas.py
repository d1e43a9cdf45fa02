"""The estimators of advantages as formulas in NumPy, written independently of the package.

    python tests/helpers/estimator_formulas.py    writes tests/data/estimator_cases.json from them

Axes: R reward function, N image, T denoising step.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

PATH = Path(__file__).parent.parent / "data" / "estimator_cases.json"
EPS = 1e-4
PROMPTS = np.array([4, 9, 4, 2, 9, 9, 4, 2, 9, 4, 4, 7, 7, 9, 2])
MEMBERS = {prompt: np.flatnonzero(np.equal(PROMPTS, prompt)) for prompt in set(PROMPTS.tolist())}
"""The places of the images of each prompt: groups of 5, 5, 3 and 2, mixed."""
WEIGHTS = [0.7, -1.5, 2.0]


def some_rewards(rows: int = 1, seed: int = 0, scale: tuple[float, ...] = (20.0, 30.0, 0.01)) -> np.ndarray:
    """(rows, N) in float64 that float32 holds exactly."""
    drawn = np.random.default_rng(seed).normal(size=(rows, len(PROMPTS)))
    return (np.array(scale[:rows])[:, None] * drawn).astype(np.float32).astype(np.float64)


def each_group(rewards: np.ndarray, of: Any) -> np.ndarray:
    """`of(rewards of one group)`, back in the places of its images."""
    result = np.empty_like(rewards)
    for own in MEMBERS.values():
        result[own] = of(rewards[own])
    return result


def standardized(r: np.ndarray, eps: float = EPS) -> np.ndarray:
    return (r - r.mean()) / (r.std() + eps)


def trimmed(r: np.ndarray, share: float) -> np.ndarray:
    kept = sorted(r)[math.floor(len(r) * share) :]
    return (r - np.mean(kept)) / (np.std(kept) + EPS)


def beta_normalized(rewards: np.ndarray, low: float, high: float, cap: float) -> np.ndarray:
    x = (rewards - low) / (high - low)
    p = np.array([x[own].mean() for own in MEMBERS.values()])
    mean, variance = p.mean(), ((p - p.mean()) ** 2).sum() / (len(p) - 1)
    a = mean * (mean * (1 - mean) / variance - 1)
    b = a * (1 - mean) / mean
    alpha, beta = max(1, 1 + a / 3), max(1, 1 + b / 3)

    def of(x: np.ndarray) -> np.ndarray:
        constant = math.exp(math.lgamma(alpha + beta) - math.lgamma(alpha) - math.lgamma(beta))
        density = constant * x.mean() ** (alpha - 1) * (1 - x.mean()) ** (beta - 1)
        return (x - x.mean()) * min(1 / density, cap)

    return each_group(x, of)


def reference(name: str, rewards: np.ndarray, weights: list[float]) -> np.ndarray:
    """Advantages in float64 of (R, N) rewards, with the options of `OPTIONS`."""
    total = np.array(weights) @ rewards
    if name == "group":
        return each_group(total, standardized)
    if name == "global":
        return each_group(total, lambda r: r - r.mean()) / (total.std() + EPS)
    if name == "none":
        return each_group(total, lambda r: r - r.mean())
    if name == "loo":
        return each_group(total, lambda r: np.array([r[i] - np.delete(r, i).mean() for i in range(len(r))]))
    if name == "trim":
        return each_group(total, lambda r: trimmed(r, 0.4))
    if name == "bnpo":
        return beta_normalized(total, -200.0, 200.0, 10.0)
    if name == "gdpo":
        return standardized(sum(w * each_group(r, standardized) for w, r in zip(weights, rewards, strict=True)))
    if name == "std_scaled":
        return each_group(sum(w * r / r.std() for w, r in zip(weights, rewards, strict=True)), standardized)
    assert name == "running"
    means = {prompt: total[own].mean() for prompt, own in MEMBERS.items()}
    return total - np.array([BASELINES.get(prompt, means[prompt]) for prompt in PROMPTS])


NAMES = ("group", "global", "none", "loo", "trim", "bnpo", "gdpo", "std_scaled", "running")
OPTIONS: dict[str, dict[str, float]] = {"trim": {"share": 0.4}, "bnpo": {"low": -200.0, "high": 200.0}}
BASELINES = {4: 0.5, 9: -2.0}


def value_anchored(
    rewards: np.ndarray, prompts: np.ndarray, gamma: float = 0.99, k: float = 0.1, absolute: int = 2
) -> np.ndarray:
    """Eqs. 9 to 13 with alpha = k (std + eps), image by image and step by step; rewards (N, T)."""
    steps = rewards.shape[1]
    q = np.array([[sum(gamma ** (j - t) * r[j] for j in range(t, steps)) for t in range(steps)] for r in rewards])
    result = np.empty_like(q)
    for i, prompt in enumerate(prompts):
        own = q[np.equal(prompts, prompt)]
        for t in range(steps):
            alpha = k * (own[:, t].std() + EPS) if t < absolute else 0.0
            omega = q[i, t] / q[i].mean()
            result[i, t] = omega * ((1 + alpha) * q[i, t] - own[:, t].mean()) / (own[:, t].std() + EPS)
    return result


def cases() -> list[dict[str, Any]]:
    """Every estimator on three rewards of one rollout, or on those of each step, and what comes out."""
    rewards = some_rewards(3)
    made = [
        {"estimator": name, "options": OPTIONS.get(name, {}), "rewards": rewards.tolist(), "weights": WEIGHTS,
         "advantages": reference(name, rewards, WEIGHTS).tolist()}
        for name in NAMES
    ]  # fmt: skip
    by_step = (
        np.random.default_rng(0).uniform(0.1, 3.0, size=(2, len(PROMPTS), 4)).astype(np.float32).astype(np.float64)
    )
    total = np.einsum("r,rnt->nt", np.array([0.7, 2.0]), by_step)
    advantages = value_anchored(total, PROMPTS, gamma=0.9, k=0.3, absolute=2).tolist()
    options = {"gamma": 0.9, "k": 0.3}
    step = {"estimator": "vgpo", "options": options, "rewards": by_step.tolist(), "weights": [0.7, 2.0]}
    return [*made, {**step, "advantages": advantages}]


if __name__ == "__main__":
    PATH.write_text("[\n" + ",\n".join(map(json.dumps, cases())) + "\n]\n")
