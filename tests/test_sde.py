"""Coefficients of the samplers: values off the golden grid, the first step, batches, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastguard as fg


def test_floats_give_one_float32_entry_on_the_host() -> None:
    step = fg.flow_sde(0.8, 0.6, noise_level=0.5)
    assert step.std.shape == (1,)
    assert step.std.dtype == torch.float32
    diffusion = 0.5 * math.sqrt(0.8 / 0.2)
    assert step.std.item() == pytest.approx(diffusion * math.sqrt(0.2), rel=1e-6)
    assert step.latents_coef.item() == pytest.approx(1 - diffusion**2 * 0.2 / 1.6, rel=1e-6)
    assert step.velocity_coef.item() == pytest.approx(-0.2 * (1 + diffusion**2 * 0.2 / 1.6), rel=1e-6)
    assert step.dt.item() == pytest.approx(-0.2)


def test_float64_stays_float64_and_float32_is_computed_in_float64() -> None:
    sigma = torch.tensor([0.9, 0.3], dtype=torch.float64)
    exact = fg.dance_sde(sigma, sigma / 2, 0.3)
    assert exact.std.dtype == torch.float64
    rounded = fg.dance_sde(sigma.float(), sigma.float() / 2, 0.3)
    again = fg.dance_sde(sigma.float().double(), sigma.float().double() / 2, 0.3)
    assert torch.equal(rounded.velocity_coef, again.velocity_coef.float())


SAMPLERS: list[Callable[..., fg.Transition]] = [fg.flow_sde, fg.dance_sde, fg.cps, fg.ode]


def coefficients(step: fg.Transition) -> torch.Tensor:
    return torch.stack([step.latents_coef, step.velocity_coef, step.std, step.dt])


def exactly(sampler: Callable[..., fg.Transition], sigma: Any, sigma_next: Any, *level: float) -> torch.Tensor:
    """The coefficients from float64 tensors, rounded to float32 at the end."""
    times = (torch.tensor(value, dtype=torch.float64) for value in (sigma, sigma_next))
    return coefficients(sampler(*times, *level)).float()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_numbers_count_with_all_their_digits(sampler: Callable[..., fg.Transition]) -> None:
    """A short step is the difference of two close numbers: rounded to float32 first, it would be off by 1e-5."""
    level = () if sampler is fg.ode else (0.7,)
    expected = exactly(sampler, 0.7, 0.699, *level)
    assert expected[3].item() == pytest.approx(-0.001, rel=1e-7)
    assert torch.equal(coefficients(sampler(0.7, 0.699, *level)), expected)
    assert torch.equal(coefficients(sampler(np.float64(0.7), np.float64(0.699), *level)), expected)
    assert torch.equal(coefficients(sampler(np.array([0.7]), [0.699], *level)), expected)
    pair = exactly(sampler, [0.7, 1 / 3], [0.699, 0.0], *level)
    assert torch.equal(coefficients(sampler([0.7, 1 / 3], [0.699, 0], *level)), pair)
    single = np.float32(0.7), np.float32(0.699)
    assert torch.equal(coefficients(sampler(*single, *level)), exactly(sampler, *map(float, single), *level))
    if level:
        rounded = np.float32(0.7)
        assert torch.equal(coefficients(sampler(0.7, 0.699, rounded)), exactly(sampler, 0.7, 0.699, rounded.item()))
        assert torch.equal(coefficients(sampler(0.7, 0.699, 1)), exactly(sampler, 0.7, 0.699, 1.0))


def test_numbers_count_the_same_whatever_the_defaults_of_torch(other_defaults) -> None:
    def results() -> list[torch.Tensor]:
        first = (fg.flow_sde(1, 0.9, 0.7, sigma_max=value) for value in (0.9, np.float32(0.9), [0.9]))
        steps = [*first, *(sampler(value, 0.699) for sampler in SAMPLERS for value in (0.7, np.float32(0.7), [0.7]))]
        return [coefficients(step) for step in steps]

    expected = results()
    with other_defaults():
        came = results()
    assert all(torch.equal(a, b) for a, b in zip(came, expected, strict=True))
    assert all(a.dtype == torch.float32 for a in came)


def test_a_batch_of_mixed_times_equals_its_samples() -> None:
    sigma = torch.tensor([1.0, 0.7, 0.2])
    sigma_next = torch.tensor([0.9, 0.4, 0.0])
    batch = fg.flow_sde(sigma, sigma_next, 0.9, sigma_max=0.9)
    for index in range(3):
        single = fg.flow_sde(sigma[index], sigma_next[index], 0.9, sigma_max=0.9)
        for field in ("latents_coef", "velocity_coef", "std", "dt"):
            assert torch.equal(getattr(batch, field)[index : index + 1], getattr(single, field))


@pytest.mark.parametrize("sigma", [1.0, 0.9999, 1 - 6e-8])
def test_the_first_step_uses_the_second_sigma(sigma: float) -> None:
    step = fg.flow_sde(sigma, 0.9, noise_level=0.7, sigma_max=0.9)
    # An exact test for 1.0 gives std 22 at 0.9999; the substitute gives sqrt(10) * 0.7 * sqrt(0.1).
    assert step.std.item() == pytest.approx(0.7, rel=1e-3)


def test_wan_s_diffusion_is_the_second_sigma_times_the_time() -> None:
    t, t_next = torch.tensor([1.0, 0.7], dtype=torch.float64), torch.tensor([0.9, 0.55], dtype=torch.float64)
    step = fg.wan_sde(t, t_next, sigma_max=0.9)
    diffusion, dt = 0.9 * t, t_next - t
    torch.testing.assert_close(step.std, diffusion * (-dt).sqrt())
    torch.testing.assert_close(step.latents_coef, 1 + diffusion**2 * dt / (2 * t))
    torch.testing.assert_close(step.velocity_coef, dt * (1 + diffusion**2 * (1 - t) / (2 * t)))
    with pytest.raises(ValueError, match="sigma_max must lie strictly between 0 and 1"):
        fg.wan_sde(t, t_next, sigma_max=1.0)


def test_a_step_from_coefficients_of_one_s_own() -> None:
    like = fg.flow_sde(torch.tensor([0.9, 0.5]), torch.tensor([0.7, 0.4]))
    parts = (like.std, like.dt, like.latents_coef, like.velocity_coef)
    for shape in ((2,), (2, 1), (2, 1, 1)):
        own = fg.gaussian_step(*(part.view(shape) for part in parts))
        for name in ("std", "dt", "latents_coef", "velocity_coef"):
            assert torch.equal(getattr(own, name), getattr(like, name))
        assert own.has_density
    mixed = fg.gaussian_step(0.2, like.dt.view(2, 1, 1))
    assert mixed.velocity_coef is None
    assert mixed.std.tolist() == [torch.tensor(0.2).item()] * 2
    assert len(fg.gaussian_step(0.2, -0.1)) == 1
    assert fg.gaussian_step(torch.tensor(0.2, dtype=torch.float64), -0.1).dt.item() == -0.1
    assert len(fg.Transition.cat([mixed, fg.gaussian_step(0.1, -0.2)]).to("cpu")[[0, 2]].expand(2)) == 2
    for arguments, error, message in (
        ((0.2, 0.1), ValueError, "dt = sigma_next - sigma < 0"),
        ((-0.2, -0.1), ValueError, "std >= 0"),
        ((math.nan, -0.1), ValueError, "std of a Transition must be finite"),
        ((None, -0.1), TypeError, "std must be a number or a floating point tensor; got NoneType"),
        ((0.2, torch.tensor([-1])), TypeError, "dt must be a number .* got torch.int64"),
        ((torch.ones(2), -torch.ones(3)), ValueError, "one entry, or one per sample; got {'std': 2, 'dt': 3}"),
        (
            (torch.ones(2, 2), -0.1),
            ValueError,
            r"std must have one entry per sample, \(B,\) or \(B, 1, 1\); got \(2, 2\)",
        ),
        ((0.2, -0.1, 1.0), ValueError, "both latents_coef and velocity_coef, or neither; velocity_coef is None"),
    ):
        with pytest.raises(error, match=message):
            fg.gaussian_step(*arguments)
    with pytest.raises(ValueError, match="all have a velocity_coef, or all have none"):
        fg.Transition.cat([mixed, fg.gaussian_step(0.1, -0.2, 1.0, -0.2)])


def test_times_below_the_first_step_do_not_use_sigma_max() -> None:
    assert torch.equal(fg.flow_sde(0.95, 0.5, sigma_max=0.6).std, fg.flow_sde(0.95, 0.5).std)


def test_cps_keeps_its_digits_near_full_noise() -> None:
    """sqrt(t'^2 - s^2) would leave none; k = t' cos(eta pi / 2) is exact."""
    level = 1 - 1e-7
    step = fg.cps(torch.tensor([0.8], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64), level)
    kept = step.latents_coef.item() - (1 - 0.5)
    assert kept == pytest.approx(0.5 * math.sin(1e-7 * math.pi / 2), rel=1e-6)


def test_density_is_known_on_the_host() -> None:
    assert fg.flow_sde(0.5, 0.0).has_density
    assert not fg.cps(0.5, 0.0).has_density
    assert fg.cps(0.5, 0.0).is_deterministic
    assert fg.ode(0.5, 0.4).is_deterministic
    assert not fg.flow_sde(0.5, 0.4, noise_level=0.0).has_density
    mixed = fg.cps(torch.tensor([0.5, 0.4]), torch.tensor([0.2, 0.0]))
    assert not mixed.has_density
    assert not mixed.is_deterministic
    assert mixed[:1].has_density
    assert mixed[[1]].is_deterministic


def test_expand_cat_and_index() -> None:
    a, b = fg.dance_sde(0.9, 0.8), fg.dance_sde(torch.tensor([0.5, 0.4]), 0.3)
    both = fg.Transition.cat([a.expand(2), b])
    assert len(both) == 4
    assert torch.equal(both[[0, 2]].dt, torch.cat([a.dt, b.dt[:1]]))
    assert both.has_density
    assert not fg.Transition.cat([fg.cps(0.5, 0.2), fg.cps(0.5, 0.0)]).has_density
    assert not fg.Transition.cat([fg.cps(0.5, 0.2), fg.cps(0.5, 0.0)]).is_deterministic
    assert fg.Transition.cat([fg.ode(0.5, 0.2), fg.ode(torch.empty(0), 0.1)]).is_deterministic
    with pytest.raises(ValueError, match="has 2 entries, the batch 3 samples"):
        b.expand(3)
    with pytest.raises(ValueError, match=r"one sampler; got \['cps', 'dance_sde'\]"):
        fg.Transition.cat([a, fg.cps(0.5, 0.2)])
    with pytest.raises(ValueError, match="share one shape"):
        fg.Transition("flow_sde", a.std, b.std, a.std, a.dt)
    one = torch.ones(1)
    assert fg.Transition("own", one, one, one, -one).has_density
    with pytest.raises(ValueError, match=r"dt = sigma_next - sigma < 0; got std \[1.0\], dt \[0.0\]"):
        fg.Transition("own", one, one, one, 0 * one)
    with pytest.raises(ValueError, match="velocity_coef of a Transition must be finite"):
        fg.Transition("own", one, one / 0, one, -one)


def test_an_empty_batch() -> None:
    empty = torch.empty(0)
    assert len(fg.dance_sde(empty, empty)) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.2, 0.5), r"sigma must lie in \[0, 1\]; got 1.2"),
        ((981.0, 961.0), "divided by 1000"),
        ((0.5, -0.1), "sigma_next must lie"),
        ((float("nan"), 0.5), "sigma must lie"),
        ((0.5, 0.5), "sigma_next must be below sigma"),
        ((torch.tensor([0.9, 0.3]), torch.tensor([0.8, 0.4])), "at sample 1"),
        ((torch.rand(3), torch.rand(2)), "3 entries, sigma_next 2"),
        ((torch.rand(3, 1), 0.1), r"shape \(\) or \(B,\)"),
    ],
)
@pytest.mark.parametrize("kind", [fg.flow_sde, fg.dance_sde, fg.cps, fg.ode])
def test_bad_schedules_are_refused(kind, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        kind(*arguments)


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="sigma must be a float or a tensor .* got None"):
        fg.flow_sde(None, 0.3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="noise_level must be a number; got '0.7'"):
        fg.flow_sde(0.5, 0.3, noise_level="0.7")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"with a slice or a list, which keep the batch axis: \[0:1\]"):
        fg.flow_sde(0.5, 0.3)[0]  # type: ignore[index]


def test_bad_noise_levels_and_second_sigmas_are_refused() -> None:
    with pytest.raises(ValueError, match="noise_level must be a finite number >= 0; got -0.1"):
        fg.flow_sde(0.5, 0.4, noise_level=-0.1)
    with pytest.raises(ValueError, match="between 0 and 1; got 1.5"):
        fg.cps(0.5, 0.4, noise_level=1.5)
    with pytest.raises(ValueError, match="needs sigma_max at sigma = 1"):
        fg.flow_sde(1.0, 0.9)
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        fg.flow_sde(1.0, 0.9, sigma_max=1.0)
    with pytest.raises(ValueError, match="sigma_max has 3 entries"):
        fg.flow_sde(torch.tensor([1.0, 0.5]), 0.2, sigma_max=torch.tensor([0.9, 0.9, 0.9]))
