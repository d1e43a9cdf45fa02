"""The objectives of the forward process as they were published, for autograd, written independently of the package.

    python tests/helpers/matching_formulas.py    writes tests/data/matching_cases.json from them

Axes: g group, n image of a group, D element. Velocities, final latents and noise are (g, n, D) float64; times and
advantages (g, n). A formula gives the losses: (g, n), or (g,) of a whole group.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).parent.parent / "data" / "matching_cases.json"
INPUTS = ("velocity", "old_velocity", "final", "noise", "sigma", "advantages")


def error(velocity: Tensor, final: Tensor, noise: Tensor) -> Tensor:
    """(g, n): the mean squared error of a velocity."""
    return ((velocity - (noise - final)) ** 2).mean(-1)


def nft(v: Tensor, old: Tensor, final: Tensor, noise: Tensor, t: Tensor, a: Tensor, beta=1.0, adv_clip=5.0, **_: Any):
    noised = (1 - t)[..., None] * final + t[..., None] * noise
    loss = 0.0
    good = (0.5 + 0.5 * a / adv_clip).clamp(0, 1)
    for share, guided in ((good, beta * v + (1 - beta) * old), (1 - good, (1 + beta) * old - beta * v)):
        wrong = noised - t[..., None] * guided - final
        scale = wrong.detach().abs().mean(-1, keepdim=True).clamp(min=1e-5)
        loss = loss + share / beta * (wrong**2 / scale).mean(-1)
    return adv_clip * loss


def awm(
    v: Tensor, old: Tensor, final: Tensor, noise: Tensor, t: Tensor, a: Tensor, clip_range=1e-5, adv_clip=5.0,
    dual_clip=None, time_weight="none",
):  # fmt: skip
    low, high = (clip_range, clip_range) if isinstance(clip_range, float) else clip_range
    weight = {"none": 1.0, "sigma": t, "sigma_squared": t * t}[time_weight]
    ratio = torch.exp(-weight * error(v, final, noise) + weight * error(old, final, noise))
    a = a if adv_clip is None else a.clamp(-adv_clip, adv_clip)
    loss = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    return loss if dual_clip is None else torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)


def dgpo(v: Tensor, old: Tensor, final: Tensor, noise: Tensor, t: Tensor, a: Tensor, beta=100.0, adv_clip=5.0):
    a = a if adv_clip is None else a.clamp(-adv_clip, adv_clip)
    worse = error(v, final, noise) - error(old, final, noise)
    return -torch.nn.functional.logsigmoid(-beta * (a * worse).mean(1)) / beta


def dpo(v: Tensor, old: Tensor, final: Tensor, noise: Tensor, t: Tensor, a: Tensor, beta=100.0, pairs="extremes"):
    worse = error(v, final, noise) - error(old, final, noise)
    losses = []
    for worse_one, scores in zip(worse, a.tolist(), strict=True):
        ranks = sorted(range(len(scores)), key=lambda i: scores[i])
        of_group = worse_one.new_zeros(())
        count = 1 if pairs == "extremes" else len(ranks) // 2
        for loser, winner in zip(ranks[:count], ranks[::-1][:count], strict=True):
            if scores[winner] > scores[loser]:
                margin = worse_one[winner] - worse_one[loser]
                of_group = of_group - torch.nn.functional.logsigmoid(-beta / 2 * margin) / count
        losses.append(of_group)
    return torch.stack(losses)


FORMULAS: dict[str, Callable[..., Tensor]] = {"diffusion_nft": nft, "awm": awm, "dgpo": dgpo, "dpo": dpo}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "diffusion_nft": [{}, {"beta": 0.1, "adv_clip": 1.0}],
    "awm": [
        {"clip_range": 0.3},
        {"clip_range": (0.05, 0.2), "adv_clip": None, "time_weight": "sigma"},
        {"clip_range": 0.3, "dual_clip": 1.2, "time_weight": "sigma_squared"},
    ],
    "dgpo": [{}, {"beta": 3.0, "adv_clip": None}],
    "dpo": [{"beta": 5.0}, {"beta": 5.0, "pairs": "all"}],
}


def inputs(change: float = 0.3, n_elements: int = 5) -> dict[str, Tensor]:
    """3 groups of 4 images; the last group's advantages are equal, and the first has two that are."""
    generator = torch.Generator().manual_seed(0)
    old, moved, final, noise = torch.randn(4, 3, 4, n_elements, generator=generator, dtype=torch.float64)
    # Near the target, as a trained model's velocities are.
    old = noise - final + 0.5 * old
    sigma = torch.tensor([0.93, 0.5, 0.07], dtype=torch.float64)[:, None].expand(3, 4)
    advantages = torch.tensor([[1.0, -0.5, -0.5, 0.0], [7.0, -6.0, 0.4, -1.4], [0.0] * 4], dtype=torch.float64)
    return dict(zip(INPUTS, (old + change * moved, old, final, noise, sigma, advantages), strict=True))


def outcome(name: str, options: dict[str, Any], given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The losses, and the gradient of their sum, (g, n, D)."""
    velocity = given["velocity"].clone().requires_grad_()
    loss = FORMULAS[name](velocity, *(given[key] for key in INPUTS[1:]), **options)
    (gradient,) = torch.autograd.grad(loss.sum(), velocity)
    return loss.detach(), gradient


def cases() -> list[dict[str, Any]]:
    """Every objective with its options, and what comes out of `inputs()`."""
    made = []
    for name, every in OPTIONS.items():
        for options in every:
            loss, gradient = outcome(name, options, inputs())
            made.append({"objective": name, "options": options, "loss": loss.tolist(), "gradient": gradient.tolist()})
    return made


if __name__ == "__main__":
    stored = {key: value.tolist() for key, value in inputs().items()}
    lines = ",\n".join(map(json.dumps, cases()))
    PATH.write_text('{"inputs": ' + json.dumps(stored) + ',\n"cases": [\n' + lines + "\n]}\n")
