"""A call of a loss: its arguments, checked once for each kind of call.

A kind is all that the checks ask for: types, shapes, dtypes and devices, options, whether a step has a density. What
was found for the first call of a kind holds for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fastguard.loss.checks import (
    check_advantages,
    check_factor,
    check_kl,
    check_latents,
    check_objective,
    check_reduction,
    check_reweight,
    check_step,
)
from fastguard.loss.objectives import OBJECTIVES, Objective
from fastguard.ops.registry import compute_dtype, modes_watch, refuse_transforms, resolve_backend
from fastguard.ops.transition import LossNumbers, epilogue, prepared_loss, transition_sums
from fastguard.sde import Transition

LATENTS = {
    False: ("velocity", "old_velocity", "noise", "ref_velocity"),
    True: ("prev_sample_mean", "old_prev_sample_mean", "prev_sample", "ref_prev_sample_mean"),
}
"""What the public functions call the latents of a `Call`, by `from_means`."""
MAX_KINDS = 256


class Call(NamedTuple):
    """The arguments of a loss as `guard_loss` documents them. From means, the latents are those of `LATENTS[True]`."""

    from_means: bool
    velocity: Tensor
    old: Tensor
    noise: Tensor
    ref: Tensor | None
    advantages: Tensor
    step: Transition
    objective: str | Objective
    options: dict[str, Any]
    reweight: str | float | Tensor
    sample_weight: float | Tensor | None
    kl_weight: float | Tensor
    kl_type: str
    reduction: str
    backend: str


class Checked(NamedTuple):
    """What was found of a kind of call, and worked out for all calls of it."""

    dtype: torch.dtype
    """of the arithmetic"""
    backend: str
    """triton or torch"""
    has_drift: bool
    """whether the policy's gradient has a part along the drift"""
    kl_weight: float
    """1 where the factors on the KL are a tensor"""
    as_given: bool
    """whether the operators take all tensors as they stand, but for the velocity's graph"""
    loss: Callable[..., LossNumbers]
    """from velocity, old, noise, ref, advantages, velocity_coef, std, weight and kl_weights to the loss's numbers"""


def checked(call: Call) -> Checked:
    """Check the arguments. Raises ValueError or TypeError, with what came and what was expected."""
    kind = None if modes_watch() else _kind(call)
    if kind is None:
        return _check(call)
    found = _CHECKED.get(kind)
    if found is None:
        if len(_CHECKED) >= MAX_KINDS:  # a number that changes from call to call
            _CHECKED.clear()
        found = _CHECKED[kind] = _check(call, direct=True)
    return found


_CHECKED: dict[tuple[Any, ...], Checked] = {}
_NUMBERS_AND_NAMES = frozenset({str, float, int, bool, type(None)})


def _kind(call: Call) -> tuple[Any, ...] | None:
    """What the checks ask for, or None for a call that is checked each time.

    The type of a value is a part: True is not 1, which it equals. An instance of an objective may be changed, and then
    it answers otherwise, so it is asked each time.
    """
    velocity, step, objective, options = call.velocity, call.step, call.objective, call.options
    if type(step) is not Transition:
        return None
    if type(objective) is str:
        kind: list[Any] = [OBJECTIVES.get(objective), step.has_density]
    elif isinstance(objective, Objective) and (fused := objective.fused()) is not None:
        kind = [fused, objective.log_ratio, objective.moves_drift, step.has_density]
    else:
        return None
    for value in (*call, *options, *options.values(), step.velocity_coef, step.std, step.dt):
        form = type(value)
        if form is Tensor or form is Parameter:
            kind += (form, value.shape, value.dtype, value.device, value.requires_grad, value.is_neg())
        elif form in _NUMBERS_AND_NAMES:
            kind += (form, value)
        elif form is tuple:
            if not _NUMBERS_AND_NAMES.issuperset(map(type, value)):
                return None
            kind += (form, value, *map(type, value))
        elif value is not step and value is not options and value is not objective:
            return None
    try:
        kind.append(resolve_backend(call.backend, velocity))
    except (AttributeError, ValueError):
        return None
    return tuple(kind)


def _check(call: Call, direct: bool = False) -> Checked:
    velocity, old, noise, ref, step = call.velocity, call.old, call.noise, call.ref, call.step
    name, old_name, noise_name, ref_name = LATENTS[call.from_means]
    latents = {name: velocity, old_name: old, noise_name: noise}
    if ref is not None:
        latents[ref_name] = ref
    check_latents(latents, same_dtype=(name, old_name, ref_name))
    check_step(step, name, velocity, needs_coefs=not call.from_means)
    check_reweight(call.reweight, velocity, step)
    if call.sample_weight is not None:
        check_factor("sample_weight", call.sample_weight, velocity)
    objective = check_objective(call.objective, call.options)
    check_kl(call.kl_weight, call.kl_type, step, velocity, ref, ref_name)
    check_reduction(call.reduction)
    check_advantages(call.advantages, velocity)
    refuse_transforms("the loss")

    backend, dtype = resolve_backend(call.backend, velocity), compute_dtype(velocity.dtype)
    invert_weight = isinstance(call.reweight, str) and call.reweight != "none" and call.sample_weight is None
    kl_weight = 1.0 if isinstance(call.kl_weight, Tensor) else float(call.kl_weight)
    options = (call.from_means, kl_weight, call.kl_type == "velocity", invert_weight, call.reduction)
    fused = objective.fused()
    if fused is None or _change((*fused, kl_weight)):
        loss = _general_loss(objective, *options, backend)
    else:
        loss = prepared_loss(*fused, *options, backend=backend, direct=direct)
    factors = (step.velocity_coef, step.std, step.dt, call.reweight, call.sample_weight, call.kl_weight)
    per_sample = [call.advantages, *(factor for factor in factors if isinstance(factor, Tensor))]
    constants = [*per_sample, old, noise, *([] if ref is None else [ref])]
    return Checked(
        dtype,
        backend,
        has_drift=objective.log_ratio != "normalized" or objective.moves_drift,
        kl_weight=kl_weight,
        as_given=direct
        and not any(tensor.requires_grad for tensor in constants)
        and not any(tensor.is_neg() for tensor in (velocity, *constants))
        and all(tensor.dtype == dtype for tensor in per_sample),
        loss=loss,
    )


def _general_loss(
    objective: Objective, from_means: bool, kl_weight: float, velocity_kl: bool, invert_weight: bool, reduction: str,
    backend: str,
) -> Callable[..., LossNumbers]:  # fmt: skip
    """The loss of any objective, as a function of the tensors: its `terms` in PyTorch, between the fused passes."""

    def loss(
        velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, advantages: Tensor,
        velocity_coef: Tensor | None, std: Tensor, weight: Tensor | None, kl_weights: Tensor | None,
    ) -> LossNumbers:  # fmt: skip
        n_elements = math.prod(velocity.shape[1:])
        return epilogue(
            transition_sums(velocity, old, noise, ref, from_means, None, backend),
            lambda log_ratio, drift: objective.terms(log_ratio, drift, advantages, n_elements=n_elements),
            velocity_coef,
            std,
            weight,
            kl_weights,
            n_elements,
            normalized=objective.log_ratio == "normalized",
            moves_drift=objective.moves_drift,
            from_means=from_means,
            kl_weight=kl_weight,
            velocity_kl=velocity_kl,
            invert_weight=invert_weight,
            reduction=reduction,
            smooth=std * std / (std * std + objective.bandwidth**2) if objective.bandwidth else None,
        )

    return loss


def _change(limits: Sequence[float]) -> bool:
    """Whether torch.compile has made a symbol of one of the floats, because its values change between calls.

    An operator's float makes a new graph for each value, so then the compiler gets the objective's own terms.
    """
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental import symbolic_shapes

    # Older compilers, such as torch 2.6's, cannot be asked. There each float counts as one whose values change.
    has_static_value = getattr(symbolic_shapes, "has_static_value", None)
    return has_static_value is None or not all(has_static_value(limit) for limit in limits)
