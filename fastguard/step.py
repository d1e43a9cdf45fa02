"""One rollout step: validate, then one operator that makes noise and next latents.

Axes: B sample; every further axis of the latents counts as elements, D of them per sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastguard.loss.checks import check_latents, check_step
from fastguard.ops.registry import Backend, compute_dtype, resolve_backend
from fastguard.ops.sde_step import sde_step as sde_step_operator
from fastguard.sde import Transition


class SdeStep(NamedTuple):
    """What a step returns.

    Attributes:
        latents: (B, ...) the next latents, dtype of the input latents.
        noise: (B, ...) the noise exactly as it was used, or None for a deterministic step.
        log_prob: (B,) float32 (float64 for float64 velocity), the Gaussian log-density averaged over the elements; None
            unless return_log_prob.
    """

    latents: Tensor
    noise: Tensor | None
    log_prob: Tensor | None


@torch.no_grad()
def sde_step(
    latents: Tensor,
    velocity: Tensor,
    step: Transition,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise_dtype: torch.dtype | None = None,
    return_log_prob: bool = False,
    backend: Backend = "auto",
) -> SdeStep:
    """Draw `x' = A x + B v + s eps`. eps is rounded to its storage dtype before use, so storing it loses nothing.

    The noise of a sample is Philox4x32-10 keyed by the sample's seed. It does not depend on the batch or on the number
    of GPUs. It depends on the device only by a float32 rounding of log and cos. A seed used twice gives the same noise,
    so take a new seed for every step. `noise` or `generator` in the place of the seeds reproduces a rollout that drew
    its noise elsewhere.

    Args:
        latents: (B, ...) floating.
        velocity: (B, ...) floating, the model's output at `latents`. Its dtype may differ from that of the latents.
        step: the Transition of each sample's step.
        seeds: (B,) int64, one per sample, on the device of the latents. A deterministic step needs no noise.
        noise: (B, ...) floating, standard normal, on the device of the latents.
        generator: draws the noise as diffusers' `randn_tensor` does for a float32 model output: on the generator's
            device, in float32 (float64 for float64 velocity). A sequence has one generator per sample.
        noise_dtype: storage dtype of the noise; by default that of the velocity.
        return_log_prob: also return the log-density of the draw, which takes one more pass over the noise.
        backend: as in `guard_loss`.

    Raises:
        ValueError: a shape, device or option does not fit; the message says what came and what was expected.
        TypeError: the same for a type or a dtype.
    """
    check_latents({"latents": latents, "velocity": velocity}, same_dtype=("latents",))
    check_step(step, "latents", latents, needs_density=False)
    noise_dtype = noise_dtype or velocity.dtype
    if not (isinstance(noise_dtype, torch.dtype) and noise_dtype.is_floating_point):
        raise TypeError(f"noise_dtype must be a floating point torch.dtype; got {noise_dtype!r}")
    dtype = compute_dtype(velocity.dtype)
    if step.is_deterministic:
        seeds = noise = None
    else:
        sources = {"seeds": seeds, "noise": noise, "generator": generator}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                f"the {step.kind} step draws noise: pass one of seeds ({latents.shape[0]},) int64, noise "
                f"{tuple(latents.shape)} or generator; got {' and '.join(given) or 'none'}"
            )
        if generator is not None:
            noise = _draw(generator, latents, dtype)
        if noise is not None:
            check_latents({"latents": latents, "noise": noise}, same_dtype=("latents",))
        else:
            seeds = _check_seeds(seeds, latents)
    if return_log_prob and not step.has_density:
        raise ValueError(f"return_log_prob needs std > 0 at every sample; the {step.kind} step has std == 0")
    # The backend serves both dtypes or neither: float64 on either side means torch.
    resolved = resolve_backend(backend, velocity if velocity.dtype == torch.float64 else latents)
    coefs = [coef.to(dtype).contiguous() for coef in (*step.mean_coefs, step.std)]
    if latents.shape[0] == 0:
        used = None if step.is_deterministic else torch.empty_like(latents, dtype=noise_dtype)
        return SdeStep(latents.clone(), used, coefs[2][:0] if return_log_prob else None)
    next_latents, used = sde_step_operator(latents, velocity, seeds, noise, *coefs, noise_dtype, resolved)
    log_prob = None
    if return_log_prob:
        energy = used.to(dtype).flatten(1).square().mean(1)
        log_prob = -energy / 2 - torch.log(coefs[2]) - math.log(2 * math.pi) / 2
    return SdeStep(next_latents, None if step.is_deterministic else used, log_prob)


def _draw(generator: torch.Generator | Sequence[torch.Generator], latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Standard normals of the latents' shape, moved to their device."""
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise TypeError("generator must be a torch.Generator, or a sequence with one per sample")
    shape = latents.shape
    if not isinstance(generator, torch.Generator):
        if len(generators) != len(latents):
            raise ValueError(
                f"generator has {len(generators)} generators, the batch {len(latents)} samples; pass one each"
            )
        shape = torch.Size((1, *latents.shape[1:]))
    drawn = [torch.randn(shape, generator=one, device=one.device, dtype=dtype) for one in generators]
    return torch.cat(drawn).to(latents.device)


def _check_seeds(seeds: Tensor | None, latents: Tensor) -> Tensor:
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64:
        came = seeds.dtype if isinstance(seeds, Tensor) else type(seeds).__name__
        raise TypeError(f"seeds must be an int64 tensor; got {came}")
    if seeds.shape != latents.shape[:1]:
        raise ValueError(f"seeds must have shape ({latents.shape[0]},), one per sample; got {tuple(seeds.shape)}")
    if seeds.device != latents.device:
        raise ValueError(f"seeds are on {seeds.device}, latents on {latents.device}; move them to one device")
    return seeds.contiguous()
