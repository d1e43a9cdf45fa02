"""Stochastic samplers of flow matching as Gaussian transitions.

Axes: B sample. `sigma` is the flow time in [0, 1] (1 = noise, 0 = image).

One denoising step from `t = sigma` to `t' = sigma_next` draws

    x' ~ N(A x + B v, s^2 I),        dt = t' - t < 0

where `v` is the model's velocity (noise - image). Every sampler here is a choice of (A, B, s); docs/math.md
derives them. Coefficients are computed on the host in float64, one set per sample, so a batch may mix times.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# From this flow time on, a step counts as the schedule's first: t / (1 - t) has no use there. An exact test for
# t == 1 would let 0.9999 (a rounded 1) through, with std 70 and A = -611.
FIRST_STEP = 0.999

COEFS = ("latents_coef", "velocity_coef", "std", "dt")


@dataclass(frozen=True)
class Transition:
    """The Gaussian of one denoising step, one entry per sample: `x' ~ N(latents_coef x + velocity_coef v, std^2)`.

    Build it with `flow_sde`, `dance_sde`, `wan_sde`, `cps` or `ode`, or with `gaussian_step` from coefficients of your
    own. They check the values, so the losses need not read them on the GPU. A transition of length 1 holds for any
    batch.

    Attributes:
        kind: the sampler's name.
        latents_coef: (B,) float32 (float64 if sigma was a float64 tensor), or None if only the means are known.
        velocity_coef: as latents_coef. Both are there, or neither.
        std: (B,), as latents_coef; the standard deviation, which includes sqrt(|dt|).
        dt: as std; the time step, which is negative.
        has_density: whether every std is positive, so that a log-ratio exists.
        is_deterministic: whether every std is zero, so that a step draws no noise. Left at None, these two are found
            from the values, which waits for the GPU.

    Raises:
        ValueError: shapes differ, coefficients are not finite, std < 0, or dt >= 0.
    """

    kind: str
    latents_coef: Tensor | None
    velocity_coef: Tensor | None
    std: Tensor
    dt: Tensor
    has_density: bool | None = None
    is_deterministic: bool | None = None

    def __post_init__(self) -> None:
        if (self.latents_coef is None) != (self.velocity_coef is None):
            missing = "latents_coef" if self.latents_coef is None else "velocity_coef"
            raise ValueError(f"a Transition has both latents_coef and velocity_coef, or neither; {missing} is None")
        coefs = {name: coef for name, coef in zip(COEFS, self._coefs(), strict=True) if coef is not None}
        if self.std.ndim != 1 or any(coef.shape != self.std.shape for coef in coefs.values()):
            shapes = sorted({tuple(coef.shape) for coef in coefs.values()})
            raise ValueError(f"Transition coefficients must share one shape (B,); got {shapes}")
        if self.has_density is None or self.is_deterministic is None:
            # One copy to the host, and so one wait for the GPU.
            values = torch.stack([coef.detach().to(torch.float64) for coef in coefs.values()]).cpu()
            for name, value in zip(coefs, values, strict=True):
                if not bool(torch.isfinite(value).all()):
                    raise ValueError(f"{name} of a Transition must be finite; got {value.tolist()}")
            std, dt = values[-2], values[-1]
            if bool((std < 0).any()) or bool((dt >= 0).any()):
                raise ValueError(
                    "a Transition needs std >= 0 and dt = sigma_next - sigma < 0; "
                    f"got std {std.tolist()}, dt {dt.tolist()}"
                )
            object.__setattr__(self, "has_density", bool((std > 0).all()))
            object.__setattr__(self, "is_deterministic", len(self) > 0 and not bool((std > 0).any()))

    def _coefs(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
        return self.latents_coef, self.velocity_coef, self.std, self.dt

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Transition:
        """Apply a function that keeps the set of values."""
        latents_coef = None if self.latents_coef is None else fn(self.latents_coef)
        velocity_coef = None if self.velocity_coef is None else fn(self.velocity_coef)
        known = (self.has_density, self.is_deterministic)
        return Transition(self.kind, latents_coef, velocity_coef, fn(self.std), fn(self.dt), *known)

    @property
    def mean_coefs(self) -> tuple[Tensor, Tensor]:
        """latents_coef and velocity_coef. Raises ValueError where only the means are known."""
        if self.latents_coef is None or self.velocity_coef is None:
            raise ValueError(
                f"the {self.kind} step has no latents_coef and velocity_coef, so it serves guard_loss_from_means "
                "alone; pass both to gaussian_step"
            )
        return self.latents_coef, self.velocity_coef

    def __len__(self) -> int:
        return self.std.shape[0]

    def to(self, device: torch.device | str) -> Transition:
        """The same transition on another device."""
        # Towards the host the copy must have arrived before anyone reads it.
        non_blocking = torch.device(device).type != "cpu"
        return self._map(lambda coef: coef.to(device, non_blocking=non_blocking))

    def expand(self, batch_size: int) -> Transition:
        """One entry per sample of a batch: repeats a transition of length 1, leaves one of length B as it is."""
        if len(self) == batch_size:
            return self
        if len(self) != 1:
            raise ValueError(
                f"the transition has {len(self)} entries, the batch {batch_size} samples; "
                "build it with one entry per sample, or with one for all"
            )
        return self._map(lambda coef: coef.expand(batch_size))

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> Transition:
        """The transition of some samples; `index` is a slice, a list, or a 1-D tensor."""
        if isinstance(index, int):
            raise TypeError(
                f"index a Transition with a slice or a list, which keep the batch axis: [{index}:{index + 1}]"
            )
        picked = self._map(lambda coef: coef[index])
        known = self.has_density or self.is_deterministic
        return picked if known else replace(picked, has_density=None, is_deterministic=None)

    @classmethod
    def cat(cls, steps: Sequence[Transition]) -> Transition:
        """Join the transitions of several batches, in order. They must come from one sampler."""
        kinds = {step.kind for step in steps}
        if len(kinds) != 1:
            raise ValueError(f"cat needs transitions of one sampler; got {sorted(kinds) or 'none'}")
        if len({step.velocity_coef is None for step in steps}) != 1:
            raise ValueError("cat needs transitions that all have a velocity_coef, or all have none")
        has_density = all(step.has_density for step in steps)
        is_deterministic = all(step.is_deterministic or len(step) == 0 for step in steps) and any(map(len, steps))
        latents_coef = velocity_coef = None
        if steps[0].velocity_coef is not None:
            latents_coef, velocity_coef = (torch.cat(c) for c in zip(*(step.mean_coefs for step in steps), strict=True))
        std, dt = torch.cat([step.std for step in steps]), torch.cat([step.dt for step in steps])
        return cls(steps[0].kind, latents_coef, velocity_coef, std, dt, has_density, is_deterministic)


def flow_sde(
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    noise_level: float = 0.7,
    sigma_max: float | Tensor | None = None,
) -> Transition:
    """Flow-GRPO's SDE (arXiv 2505.05470): diffusion `noise_level * sqrt(t / (1 - t))`.

    Args:
        sigma: flow time before the step: a float, or a tensor () or (B,). A tensor on a GPU is read back once, so pass
            the schedule from the host. A float, of Python or numpy, is used with all its digits and gives float32
            coefficients.
        sigma_next: flow time after the step, as sigma; 0 <= sigma_next < sigma <= 1.
        noise_level: eta >= 0; 0 makes the step deterministic.
        sigma_max: the schedule's second sigma (`sigmas[1]`). It replaces t where `1 - t` would vanish. It is needed
            when a sigma is above 0.999, which is the first step.

    Raises:
        ValueError: a value is out of range, or sigma_max is missing.
        TypeError: sigma is neither a number nor a tensor.
    """
    t, t_next, like = _schedule(sigma, sigma_next)
    noise_level = _check_noise_level(noise_level, upper=None)
    first = t > FIRST_STEP
    if sigma_max is None:
        if bool(first.any()):
            raise ValueError(
                f"flow_sde needs sigma_max at sigma = {t[first][0].item():g}, where 1 - sigma vanishes; "
                "pass sigma_max=sigmas[1], the schedule's second sigma"
            )
        regular_t = t
    else:
        regular_t = torch.where(first, torch.minimum(t, _second_sigma(sigma_max, t)), t)
    diffusion = noise_level * torch.sqrt(t / (1 - regular_t))
    return _euler_maruyama("flow_sde", t, t_next, diffusion, like)


def dance_sde(sigma: float | Tensor, sigma_next: float | Tensor, noise_level: float = 0.7) -> Transition:
    """DanceGRPO's SDE (arXiv 2505.07818): constant diffusion `noise_level`. Arguments and errors as in `flow_sde`."""
    t, t_next, like = _schedule(sigma, sigma_next)
    noise_level = _check_noise_level(noise_level, upper=None)
    return _euler_maruyama("dance_sde", t, t_next, torch.full_like(t, noise_level), like)


def wan_sde(sigma: float | Tensor, sigma_next: float | Tensor, sigma_max: float | Tensor) -> Transition:
    """The SDE of Flow-GRPO's trainer for Wan: diffusion `sigma_max * t`, where sigma_max is the schedule's `sigmas[1]`.

    Arguments and errors as in `flow_sde`. There is no noise level.
    """
    t, t_next, like = _schedule(sigma, sigma_next)
    return _euler_maruyama("wan_sde", t, t_next, _second_sigma(sigma_max, t) * t, like)


def cps(sigma: float | Tensor, sigma_next: float | Tensor, noise_level: float = 0.7) -> Transition:
    """Coefficients-preserving sampling (Flow-CPS, arXiv 2509.05952). Arguments and errors as in `flow_sde`.

    `noise_level` lies in [0, 1]. The last step (sigma_next == 0) is deterministic and has no density.
    """
    t, t_next, like = _schedule(sigma, sigma_next)
    noise_level = _check_noise_level(noise_level, upper=1.0)
    # t' cos(eta pi / 2) instead of sqrt(t'^2 - std^2), which loses all digits near eta = 1.
    kept = t_next * math.cos(noise_level * math.pi / 2)
    std = t_next * math.sin(noise_level * math.pi / 2)
    return _transition("cps", 1 - t_next + kept, kept * (1 - t) - t * (1 - t_next), std, t_next - t, like)


def ode(sigma: float | Tensor, sigma_next: float | Tensor) -> Transition:
    """The deterministic Euler step. It has no density, so it is for sampling only."""
    t, t_next, like = _schedule(sigma, sigma_next)
    return _transition("ode", torch.ones_like(t), t_next - t, torch.zeros_like(t), t_next - t, like)


def gaussian_step(
    std: float | Tensor,
    dt: float | Tensor,
    latents_coef: float | Tensor | None = None,
    velocity_coef: float | Tensor | None = None,
) -> Transition:
    """A Transition from coefficients of your own, for a sampler that is not here.

    With `std` and `dt` alone it serves `guard_loss_from_means`. With the two coefficients of the mean,
    `mu = latents_coef x + velocity_coef v`, it serves every function. The values are checked, which waits for the GPU.

    Args:
        std: standard deviation of the draw, *including* sqrt(|dt|), which some trainers keep apart: a float, or a
            floating tensor (), (B,) or (B, 1, ..., 1).
        dt: time step `sigma_next - sigma`, negative; as std.
        latents_coef: as std.
        velocity_coef: as std.

    Raises:
        ValueError: the sizes differ, a value is not finite, std < 0, or dt >= 0.
        TypeError: an argument is neither a number nor a floating tensor.
    """
    given = dict(zip(COEFS, (latents_coef, velocity_coef, std, dt), strict=True))
    known = {name: value for name, value in given.items() if value is not None or name in ("std", "dt")}
    tensors = [value for value in known.values() if isinstance(value, Tensor)]
    for name, value in known.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            if value.ndim > 1 and value.numel() != value.shape[0]:
                raise ValueError(f"{name} must have one entry per sample, (B,) or (B, 1, 1); got {tuple(value.shape)}")
        elif not isinstance(value, numbers.Real) or isinstance(value, bool):
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a number or a floating point tensor; got {came}")
    sizes = {name: value.numel() for name, value in known.items() if isinstance(value, Tensor)}
    size = max(sizes.values(), default=1)
    if not set(sizes.values()) <= {1, size}:
        raise ValueError(f"the coefficients must have one entry, or one per sample; got {sizes}")
    dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    device = tensors[0].device if tensors else torch.device("cpu")

    def vector(value: float | Tensor | None) -> Tensor | None:
        if value is None:
            return None
        if isinstance(value, Tensor):
            return value.detach().to(device, dtype, copy=True).reshape(-1).expand(size)  # the caller may reuse its own
        return torch.full((size,), float(value), dtype=torch.float64, device=device).to(dtype)

    columns = {name: vector(value) for name, value in given.items()}
    return Transition("gaussian", **columns)  # type: ignore[arg-type]


def _second_sigma(sigma_max: float | Tensor, t: Tensor) -> Tensor:
    """The schedule's second sigma, one per sample."""
    second = _host(sigma_max, "sigma_max")
    if len(second) not in (1, len(t)):
        raise ValueError(f"sigma_max has {len(second)} entries, sigma {len(t)}; pass one, or one per sample")
    if not bool(((second > 0) & (second < 1)).all()):
        raise ValueError(
            f"sigma_max must lie strictly between 0 and 1; got {second.tolist()}. It is sigmas[1], the second "
            "sigma of the schedule; a schedule that stays at 1 has no usable first step"
        )
    return second.expand(t.shape)


def _euler_maruyama(kind: str, t: Tensor, t_next: Tensor, diffusion: Tensor, like: Tensor | None) -> Transition:
    """Euler-Maruyama step of the reverse SDE that keeps the marginals of the flow, for any diffusion sigma_t."""
    dt = t_next - t
    latents_coef = 1 + diffusion**2 * dt / (2 * t)
    velocity_coef = dt * (1 + diffusion**2 * (1 - t) / (2 * t))
    return _transition(kind, latents_coef, velocity_coef, diffusion * torch.sqrt(-dt), dt, like)


def _transition(
    kind: str, latents_coef: Tensor, velocity_coef: Tensor, std: Tensor, dt: Tensor, like: Tensor | None
) -> Transition:
    """Hand the float64 coefficients on in float32 (float64 stays float64), on the device that sigma came from."""
    dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
    device = torch.device("cpu") if like is None else like.device
    step = Transition(kind, latents_coef.to(dtype), velocity_coef.to(dtype), std.to(dtype), dt.to(dtype))
    return step.to(device)  # built on the host, where its values are checked


def _host(value: float | Tensor, name: str) -> Tensor:
    """A float64 vector on the host, of length 1 for scalars."""
    try:
        # Not left to the default dtype: dt = -0.001 from sigmas that were rounded to float32 is off by 1e-5.
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")
        tensor = tensor.detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a float or a tensor of shape () or (B,); got {value!r}") from None
    if tensor.ndim > 1:
        raise ValueError(f"{name} must be a float or a tensor of shape () or (B,); got shape {tuple(tensor.shape)}")
    return tensor.reshape(-1)


def _schedule(sigma: float | Tensor, sigma_next: float | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check one step of a schedule; returns t, t_next as float64 (B,) and the tensor whose dtype and device count."""
    t, t_next = _host(sigma, "sigma"), _host(sigma_next, "sigma_next")
    if len(t) != len(t_next) and 1 not in (len(t), len(t_next)):
        raise ValueError(f"sigma has {len(t)} entries, sigma_next {len(t_next)}; they must match")
    t, t_next = torch.broadcast_tensors(t, t_next)
    for name, value in (("sigma", t), ("sigma_next", t_next)):
        outside = ~((value >= 0) & (value <= 1))  # catches NaN as well
        if bool(outside.any()):
            index = int(outside.nonzero()[0])
            raise ValueError(
                f"{name} must lie in [0, 1]; got {value[index].item():g} at sample {index}. "
                "A timestep of 0 to 1000 has to be divided by 1000"
            )
    rising = t_next >= t
    if bool(rising.any()):
        index = int(rising.nonzero()[0])
        raise ValueError(
            f"sigma_next must be below sigma (sampling runs from 1, noise, to 0, image); "
            f"got sigma = {t[index].item():g}, sigma_next = {t_next[index].item():g} at sample {index}"
        )
    like = next((value for value in (sigma, sigma_next) if isinstance(value, Tensor)), None)
    return t, t_next, like


def _check_noise_level(noise_level: float, upper: float | None) -> float:
    if not isinstance(noise_level, numbers.Real):
        raise TypeError(f"noise_level must be a number; got {noise_level!r}")
    limit = math.inf if upper is None else upper
    if not (0 <= noise_level <= limit and math.isfinite(noise_level)):
        expected = "a finite number >= 0" if upper is None else f"between 0 and {upper:g}"
        raise ValueError(f"noise_level must be {expected}; got {noise_level}")
    return float(noise_level)  # a numpy float32 would pull the arithmetic down to its own precision
