"""The kernel of Hugging Face's hub beside the installed package: how it is loaded, and whether both give one result."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import fastguard
from fastguard.loss.objectives import OBJECTIVES
from helpers import own_options


def load(variant: Path) -> ModuleType:
    """A variant as a module of its id, without Hugging Face's package."""
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(api: Any, device: str, backend: str) -> dict[str, Tensor]:
    """Losses and gradients of each objective, a rollout step and the moments, by the functions of `api`."""
    generator = torch.Generator().manual_seed(0)
    x, old, noise, ref = torch.randn(4, 3, 37, generator=generator).to(device).unbind()
    old, ref = x + 1e-3 * old, x + 1e-3 * ref
    advantages = torch.tensor([1.0, -1.0, 0.5], device=device)
    step = api.flow_sde(torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.8, 0.4, 0.1])).to(device)
    made: dict[str, Tensor] = {}

    def add(name: str, values: Any, velocity: Tensor) -> None:
        made.update({f"{name}.{field}": value for field, value in values._asdict().items() if value is not None})
        upstream = [value for value in values if value is not None and value.requires_grad]
        weighted = sum((value * (i + 0.3)).sum() for i, value in enumerate(upstream))
        (made[f"{name}.grad"],) = torch.autograd.grad(weighted, velocity)

    for name in (name for name, objective in OBJECTIVES.items() if objective.scope == "transition"):
        velocity = x.clone().requires_grad_()
        options = {**own_options(name, clip_range=0.5, kl_threshold=1.0), "backend": backend}
        if OBJECTIVES[name].process == "forward":
            sigma = torch.tensor([0.9, 0.5, 0.2], device=device)
            add(name, api.matching_loss(velocity, old, noise, advantages, sigma, **options), velocity)
            continue
        loss = api.guard_loss(velocity, old, noise, advantages, step, ref_velocity=ref, kl_weight=0.1, **options)
        add(name, loss, velocity)
        mean = x.clone().requires_grad_()
        add(f"{name} of means", api.guard_loss_from_means(old + noise, mean, old, advantages, step, **options), mean)
    velocity = x.clone().requires_grad_()
    add("moments", api.transition_moments(velocity, old, noise, step, backend=backend), velocity)
    drawn = api.sde_step(x, old, step, seeds=torch.arange(3, device=device), backend=backend)
    return {**made, "latents": drawn.latents, "noise": drawn.noise}


def assert_same_bits(kernel: ModuleType, device: str = "cpu", backend: str = "auto") -> None:
    """The results of the kernel are those of the installed package."""
    expected, got = results(fastguard, device, backend), results(kernel, device, backend)
    assert expected.keys() == got.keys()
    different = [name for name, value in expected.items() if not torch.equal(value, got[name])]
    assert not different, different
    empty = [name for name, value in got.items() if not (value.isfinite().all() and value.any())]
    assert all(name.endswith(".clipped") for name in empty), empty  # nothing is compared with nothing


def assert_compiles(kernel: ModuleType) -> None:
    """Loss and gradient of a compiled call, without a graph break, are those of the installed package."""
    x, old, noise = torch.randn(3, 2, 37, generator=torch.Generator().manual_seed(0)).unbind()
    advantages = torch.tensor([1.0, -1.0])
    made = []
    for api in (fastguard, kernel):
        step, velocity = api.dance_sde(0.5, 0.4), x.clone().requires_grad_()

        def loss(velocity: Tensor, api: Any = api, step: Any = step) -> Tensor:
            value: Tensor = api.guard_loss(velocity, old, noise, advantages, step).loss
            return value

        value = (loss if api is fastguard else torch.compile(loss, fullgraph=True, backend="eager"))(velocity)
        made.append((value, *torch.autograd.grad(value, velocity)))
    assert all(map(torch.equal, *made))
