"""The reference against mathematics from elsewhere: torch.distributions, autograd, and itself in the other form."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import fastguard as fg
from fastguard.ops import transition as naive
from fastguard.ops.sde_step import naive_sde_step


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn((3, 5, 7), dtype=torch.float64, generator=generator)
        for key in ("latents", "velocity", "old_velocity", "noise", "ref_velocity")
    }
    return tensors


STEPS = [
    fg.flow_sde(torch.tensor([1.0, 0.7, 0.2]).double(), torch.tensor([0.9, 0.5, 0.0]).double(), 0.9, sigma_max=0.9),
    fg.dance_sde(torch.tensor([1.0, 0.7, 0.2]).double(), torch.tensor([0.9, 0.5, 0.0]).double(), 0.3),
    fg.cps(torch.tensor([1.0, 0.7, 0.2]).double(), torch.tensor([0.9, 0.5, 0.1]).double(), 0.8),
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.kind)
def test_density_and_kl_agree_with_torch_distributions(step: fg.Transition, batch: dict[str, torch.Tensor]) -> None:
    old_mean = naive.transition_mean(batch["latents"], batch["old_velocity"], step)
    mean = naive.transition_mean(batch["latents"], batch["velocity"], step)
    sample = naive_sde_step(batch["latents"], batch["old_velocity"], batch["noise"], step)
    scale = naive.per_sample(step.std, mean)
    new, old = (Independent(Normal(m, scale), 2) for m in (mean, old_mean))
    size = mean[0].numel()

    torch.testing.assert_close(naive.log_prob(sample, mean, step.std), new.log_prob(sample) / size)
    cross, drift = naive.moments(batch["velocity"], batch["old_velocity"], batch["noise"], step)
    torch.testing.assert_close(naive.log_ratio(cross, drift), (new.log_prob(sample) - old.log_prob(sample)) / size)
    torch.testing.assert_close(naive.gaussian_kl(drift), kl_divergence(new, old) / size)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.kind)
def test_textbook_and_moment_form_agree_in_value_and_gradient(step, batch) -> None:
    velocity = batch["velocity"].requires_grad_()
    old_mean = naive.transition_mean(batch["latents"], batch["old_velocity"], step)
    sample = naive_sde_step(batch["latents"], batch["old_velocity"], batch["noise"], step)
    mean = naive.transition_mean(batch["latents"], velocity, step)
    cross, drift = naive.moments(velocity, batch["old_velocity"], batch["noise"], step)
    from_means = naive.moments_from_means(sample, mean, old_mean, step.std)
    upstream = torch.tensor([0.3, -1.1, 2.0], dtype=torch.float64)
    for textbook, moments in (
        (naive.log_ratio_by_subtraction(sample, mean, old_mean, step.std), naive.log_ratio(cross, drift)),
        (naive.ratio_norm_by_subtraction(sample, mean, old_mean, step.std), naive.ratio_norm(cross, step.std)),
        (from_means[0], cross),
        (from_means[1], drift),
    ):
        torch.testing.assert_close(textbook, moments, rtol=1e-10, atol=1e-12)
        grads = [torch.autograd.grad(v, velocity, upstream, retain_graph=True)[0] for v in (textbook, moments)]
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_the_left_shift_and_its_repair() -> None:
    """E[log r] = -drift / 2 under the rollout policy, and RatioNorm has mean zero (paper, Section 4)."""
    generator = torch.Generator().manual_seed(1)
    size, count = 64, 20_000
    step = fg.dance_sde(torch.tensor([0.5], dtype=torch.float64), 0.4, 0.3).expand(count)
    old = torch.randn((1, size), dtype=torch.float64, generator=generator).expand(count, size)
    velocity = old + 0.3 * torch.randn((1, size), dtype=torch.float64, generator=generator)
    noise = torch.randn((count, size), dtype=torch.float64, generator=generator)
    cross, drift = naive.moments(velocity, old, noise, step)
    standard_error = math.sqrt(drift[0].item() / size / count)
    assert abs(naive.log_ratio(cross, drift).mean().item() + drift[0].item() / 2) < 4 * standard_error
    assert abs(naive.ratio_norm(cross, step.std).mean().item()) < 4 * standard_error * step.std[0].item()
    assert drift[0].item() / 2 > 20 * standard_error  # so the shift is seen, were it not repaired
    assert cross.var().item() == pytest.approx(drift[0].item() / size, rel=0.05)
