"""The rollout step: the noise stream, what it depends on, and the step itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fastguard as fg
from fastguard.ops import transition as naive
from fastguard.ops.sde_step import _box_muller, naive_sde_step

SIZES = [1, 3, 4, 4095, 4096, 4097, 10_000]


def noise_of(seeds: list[int], size: int, device: str = "cpu", backend: str = "torch") -> torch.Tensor:
    zeros = torch.zeros(len(seeds), size, device=device)
    step = fg.dance_sde(0.5, 0.4).to(device)
    noise = fg.sde_step(zeros, zeros, step, seeds=torch.tensor(seeds, device=device), backend=backend).noise
    assert noise is not None
    return noise.cpu()


def test_philox_known_answer() -> None:
    """Random123's known answer for Philox4x32-10 at counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = [torch.tensor([word]) for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]
    expected = torch.cat([*_box_muller(*words[:2]), *_box_muller(*words[2:])])
    assert torch.equal(noise_of([0], 4)[0], expected)


def test_box_muller_covers_the_circle() -> None:
    """Against the definition in float64, at every quadrant's edges and at the extremes of the radius."""
    edges = [q * 2**30 + offset for q in range(4) for offset in (0, 1, 2**29, 2**30 - 1)]
    angles = torch.tensor(edges)
    for bits in (0, 1, 2**31, 2**32 - 1):
        first, second = _box_muller(torch.full_like(angles, bits), angles)
        radius = math.sqrt(-2 * math.log((bits + 1) / 2**32))
        quadrant, rest = angles // 2**30, (angles % 2**30).double()
        # The offset runs from 0 to pi/4 and then from -pi/4 to 0 within a quadrant.
        offset = torch.where(rest < 2**29, rest, rest - 2**30) / 2**29 * (math.pi / 4)
        theta = quadrant.double() * math.pi / 2 + offset
        torch.testing.assert_close(first.double(), radius * torch.cos(theta), rtol=0, atol=1e-6)
        torch.testing.assert_close(second.double(), radius * torch.sin(theta), rtol=0, atol=1e-6)


def test_noise_is_standard_normal() -> None:
    noise = noise_of([11, 12, 13, 14], 250_000).double()
    count = noise.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((noise**power).mean().item() - moment) < 4.5 * math.sqrt(variance / count)
    assert abs(torch.corrcoef(noise)[0, 1:]).max().item() < 4.5 / math.sqrt(250_000)
    assert abs((noise[:, 1:] * noise[:, :-1]).mean().item()) < 4.5 / math.sqrt(count)
    assert noise.abs().max().item() < 6.7


@pytest.mark.parametrize("size", SIZES)
def test_kernel_and_torch_draw_the_same_noise(kernel_device: str, size: int) -> None:
    seeds = [0, 1, 2**31, 2**40 + 5, 2**62 + 1]
    ours = noise_of(seeds, size)
    theirs = noise_of(seeds, size, kernel_device, "triton")
    # A few float32 roundings of values up to 6.7 (their ulp: 4.8e-7).
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_sample_s_noise_depends_on_its_seed_alone(backend: str, kernel_device: str) -> None:
    whole = noise_of([5, 6, 7], 5000, kernel_device, backend)
    assert torch.equal(whole[1:2], noise_of([6], 5000, kernel_device, backend))
    assert torch.equal(whole[:, :1000], noise_of([5, 6, 7], 1000, kernel_device, backend))
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_step_uses_the_noise_that_it_returns(kind: str, dtype: torch.dtype, backend: str, kernel_device, poisoned):
    generator = torch.Generator().manual_seed(3)
    latents, velocity = (torch.randn(3, 9, 500, generator=generator).to(dtype) for _ in range(2))
    sigma = torch.tensor([0.9, 0.6, 0.3])
    step = getattr(fg, kind)(sigma, sigma - 0.2)
    out = fg.sde_step(
        latents.to(kernel_device), velocity.to(kernel_device), step.to(kernel_device),
        seeds=torch.tensor([1, 2, 3], device=kernel_device), return_log_prob=True, backend=backend,
    )  # fmt: skip
    assert out.noise is not None
    assert out.log_prob is not None
    assert out.noise.dtype == out.latents.dtype == dtype
    noise = out.noise.cpu().double()
    exact = naive_sde_step(latents.double(), velocity.double(), noise, step)
    # One rounding to the storage dtype (the interpreter truncates: a whole ulp) after float32 arithmetic.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(out.latents.cpu().double(), exact, rtol=ulp, atol=1e-6)
    mean = naive.transition_mean(latents.double(), velocity.double(), step)
    unrounded = mean + naive.per_sample(step.std, mean) * noise
    torch.testing.assert_close(
        out.log_prob.cpu().double(), naive.log_prob(unrounded, mean, step.std.double()), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_deterministic_step_needs_no_seeds(backend: str, kernel_device: str) -> None:
    latents, velocity = torch.randn(2, 33), torch.randn(2, 33)
    step = fg.ode(0.5, 0.3)
    out = fg.sde_step(latents.to(kernel_device), velocity.to(kernel_device), step.to(kernel_device), backend=backend)
    assert out.noise is None
    torch.testing.assert_close(out.latents.cpu(), latents - 0.2 * velocity, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_strided_latents_and_mixed_dtypes(backend: str, kernel_device: str) -> None:
    base = torch.randn(4, 40, 6, device=kernel_device)
    velocity = torch.randn(4, 6, 40, device=kernel_device).bfloat16()
    step, seeds = fg.dance_sde(0.5, 0.3).to(kernel_device), torch.arange(4, device=kernel_device)
    strided = base.transpose(1, 2)
    got = fg.sde_step(strided, velocity, step, seeds=seeds, backend=backend)
    want = fg.sde_step(strided.contiguous(), velocity, step, seeds=seeds, backend=backend)
    assert torch.equal(got.latents, want.latents)
    assert got.latents.dtype == torch.float32
    assert got.noise is not None
    assert got.noise.dtype == torch.bfloat16


@pytest.mark.xdist_group("large")
@pytest.mark.gpu
def test_more_than_2_31_elements_in_total() -> None:
    """Offsets beyond 32 bits, over samples and within one: the last elements equal those of the sample alone."""
    step = fg.dance_sde(0.5, 0.4).to("cuda")
    for shape in ((9, 2**28), (1, 2**31 + 5)):
        latents = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
        latents[-1, -999:] = torch.arange(999, device="cuda")
        seeds = torch.arange(shape[0], device="cuda")
        out = fg.sde_step(latents, latents, step, seeds=seeds)
        alone = fg.sde_step(latents[-1:], latents[-1:], step, seeds=seeds[-1:])
        assert out.noise is not None
        assert alone.noise is not None
        assert torch.equal(out.noise[-1:], alone.noise)
        assert torch.equal(out.latents[-1:], alone.latents)
        assert out.latents[-1, -1].item() > 500
        # The noise of an element depends on the seed alone: a short sample has the first of a long one's.
        short = fg.sde_step(latents[-1:, :5000], latents[-1:, :5000], step, seeds=seeds[-1:])
        assert short.noise is not None
        assert torch.equal(out.noise[-1:, :5000], short.noise)
        del out, alone, short


def test_float64_and_an_empty_batch() -> None:
    latents = torch.randn(2, 8, dtype=torch.float64)
    step = fg.dance_sde(torch.tensor([0.5, 0.6], dtype=torch.float64), 0.2)
    out = fg.sde_step(latents, latents, step, seeds=torch.arange(2))
    assert out.noise is not None
    torch.testing.assert_close(out.latents, naive_sde_step(latents, latents, out.noise, step), rtol=1e-14, atol=0)
    empty = fg.sde_step(latents[:0], latents[:0], step[:0], seeds=torch.arange(0))
    assert empty.latents.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_defaults_of_torch_do_not_matter(dtype: torch.dtype, other_defaults) -> None:
    latents, velocity, seeds = torch.randn(2, 50).to(dtype), torch.randn(2, 50).to(dtype), torch.arange(2)

    def results() -> list[torch.Tensor]:
        drawn = fg.sde_step(latents, velocity, fg.flow_sde(0.5, 0.3), seeds=seeds, return_log_prob=True)
        assert drawn.noise is not None
        assert drawn.log_prob is not None
        return [drawn.latents, drawn.noise, drawn.log_prob, fg.sde_step(latents, velocity, fg.ode(0.5, 0.3)).latents]

    expected = results()
    with other_defaults():
        came = results()
    for a, b in zip(came, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("changing", ["batch size", "step"])
def test_compiled_once_for_all_values(changing: str, count_graphs) -> None:
    def batch(count: int, sigma: float) -> tuple[Any, ...]:
        latents = torch.linspace(-1, 1, 8 * count).view(count, 8)
        return latents, latents + 0.1, fg.flow_sde(sigma, 0.1), torch.arange(count)

    def draw(latents: torch.Tensor, velocity: torch.Tensor, step: fg.Transition, seeds: torch.Tensor) -> Any:
        return fg.sde_step(latents, velocity, step, seeds=seeds, return_log_prob=True)

    calls = [batch(i, 0.5) if changing == "batch size" else batch(4, 0.1 * i) for i in range(2, 10)]
    assert count_graphs(draw, calls) <= 2


GENERATORS = (lambda: torch.Generator().manual_seed(5), lambda: [torch.Generator().manual_seed(i) for i in range(3)])
"""one for the batch, and one per sample"""


def drawn_by(generator: torch.Generator | list[torch.Generator], *shape: int) -> torch.Tensor:
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator)
    return torch.stack([torch.randn(shape[1:], generator=one) for one in generator])


def test_diffusers_draws_with_generators_as_these_tests_do() -> None:
    reason = "diffusers is in no environment of the core alone"
    utils = pytest.importorskip("diffusers.utils.torch_utils", reason=reason)
    for make in GENERATORS:
        assert torch.equal(
            utils.randn_tensor((3, 5, 7), generator=make(), dtype=torch.float32), drawn_by(make(), 3, 5, 7)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_rollout_that_drew_its_own_noise_is_reproduced(backend: str, dtype: torch.dtype, kernel_device: str) -> None:
    """diffusers draws with one generator for the batch, or with one per sample, in float32."""
    latents, velocity = torch.randn(3, 5, 7), torch.randn(3, 5, 7).to(dtype)
    step = fg.flow_sde(0.6, 0.5)
    for make in GENERATORS:
        drawn = drawn_by(make(), *latents.shape)
        tensors = [value.to(kernel_device) for value in (latents, velocity, step)]
        by_generator = fg.sde_step(*tensors, generator=make(), backend=backend)
        by_noise = fg.sde_step(*tensors, noise=drawn.to(kernel_device), backend=backend)
        strided = drawn.transpose(1, 2).contiguous().transpose(1, 2).to(kernel_device)
        by_strided = fg.sde_step(*tensors, noise=strided, backend=backend)
        for out in (by_generator, by_noise, by_strided):
            assert out.noise is not None
            # The interpreter truncates where hardware rounds.
            torch.testing.assert_close(out.noise.cpu(), drawn.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)
            assert torch.equal(out.noise, by_noise.noise)
            assert torch.equal(out.latents, by_noise.latents)
            exact = naive_sde_step(latents.double(), velocity.double(), out.noise.cpu().double(), step)
            torch.testing.assert_close(out.latents.cpu().double(), exact, rtol=1e-6, atol=1e-6)
    own = torch.randn(3, 5, 7)
    used = fg.sde_step(latents, own, step, noise=own, noise_dtype=torch.float32).noise
    assert used is not None
    assert used.data_ptr() != own.data_ptr()  # the caller may overwrite what it passed


def test_refusals() -> None:
    x, step = torch.randn(2, 8), fg.dance_sde(0.5, 0.3)
    seeds = torch.arange(2)
    for given, came in (({}, "none"), ({"seeds": seeds, "noise": x}, "seeds and noise")):
        with pytest.raises(ValueError, match=rf"one of seeds \(2,\) int64, noise \(2, 8\) or generator; got {came}"):
            fg.sde_step(x, x, step, **given)
    with pytest.raises(ValueError, match=r"noise has shape \(2, 7\), latents \(2, 8\)"):
        fg.sde_step(x, x, step, noise=x[:, 1:])
    with pytest.raises(ValueError, match="generator has 1 generators, the batch 2 samples"):
        fg.sde_step(x, x, step, generator=[torch.Generator()])
    with pytest.raises(TypeError, match="must be a torch.Generator, or a sequence"):
        fg.sde_step(x, x, step, generator=[1, 2])
    with pytest.raises(TypeError, match="int64 tensor; got torch.int32"):
        fg.sde_step(x, x, step, seeds=seeds.int())
    with pytest.raises(ValueError, match=r"shape \(2,\), one per sample; got \(3,\)"):
        fg.sde_step(x, x, step, seeds=torch.arange(3))
    with pytest.raises(ValueError, match=r"velocity has shape \(2, 7\), latents \(2, 8\)"):
        fg.sde_step(x, x[:, 1:], step, seeds=seeds)
    with pytest.raises(TypeError, match="velocity must be bfloat16, .* got torch.int64"):
        fg.sde_step(x, x.long(), step, seeds=seeds)
    with pytest.raises(TypeError, match="step must be a Transition"):
        fg.sde_step(x, x, (0.5, 0.3), seeds=seeds)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="return_log_prob needs std > 0"):
        fg.sde_step(x, x, fg.ode(0.5, 0.3), return_log_prob=True)
    for wrong in (torch.int32, "bf16"):
        with pytest.raises(TypeError, match="noise_dtype must be a floating point torch.dtype"):
            fg.sde_step(x, x, step, seeds=seeds, noise_dtype=wrong)  # type: ignore[arg-type]


def test_a_draw_is_exact_at_the_edges_of_its_words(kernel_device: str) -> None:
    """0, the largest word, and those around which exponent, sign and quadrant change."""
    from helpers.draws import draw

    powers = torch.cat([2 ** torch.arange(32), 2 ** torch.arange(1, 32) * 2 // 3, 2 ** torch.arange(1, 32) * 4 // 3])
    near = (powers[:, None] + torch.arange(-3, 4)).flatten() % 2**32
    angles = (torch.arange(16)[:, None] * 2**28 + torch.arange(-3, 4)).flatten() % 2**32
    radius, angle = (part.flatten() for part in torch.meshgrid(near, angles, indexing="ij"))
    log, first, second = (t.cpu().double() for t in draw(radius.to(kernel_device), angle.to(kernel_device)))
    # The word is rounded to float32. The interpreter does not contract products and sums, as a GPU does.
    want = -2 * torch.log((radius.float() + 1).double() / 2**32)
    assert torch.equal(log == 0, want == 0)
    torch.testing.assert_close(log, want, rtol=2e-6, atol=0)
    for got, formula in zip((first, second), _box_muller(radius, angle), strict=True):
        torch.testing.assert_close(got, formula.double(), rtol=4e-6, atol=1e-6)
