"""Kernels that might replace one of the product's: written, tested and compiled, but not yet measured on a GPU.

The product's forward pass of the loss is two launches: partial sums, and an epilogue of one program. Here are two ways
to do with one launch, or to hide the second. They run the same code; in one launch, the epilogue has the warps of the
sums, 8 instead of 4, and so adds in another order. `tune.py` measures them. What wins moves into kernels/transition.py,
what loses is deleted: docs/hopper.md.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc

from fastguard.kernels import transition
from fastguard.kernels.common import LAUNCH, MAX_PARTIALS, as_rows

_transition_sums_kernel = transition._transition_sums_kernel
_guard_epilogue_kernel = transition._guard_epilogue_kernel
OPTIONS: dict[str, Any] = {
    "invert_weight": True, "objective": 0, "clip_low": 2e-6, "clip_high": 2e-6, "adv_clip": 5.0, "kl_threshold": 0.0,
    "kl_weight": 0.0, "velocity_kl": False, "reduction": "mean",
}  # fmt: skip
"""of the usual loss"""


@triton.jit
def _guard_forward_kernel(
    velocity_ptr, old_ptr, noise_ptr, ref_ptr, advantages_ptr, velocity_coef_ptr, std_ptr, weight_ptr, partials_ptr,
    ticket_ptr, loss_ptr, log_ratio_ptr, ratio_ptr, cross_ptr, drift_ptr, kl_ptr, coefs_ptr, clipped_ptr,
    stride_velocity, stride_old, stride_noise, stride_ref,
    log_clip_low, log_clip_high, adv_clip, kl_threshold, kl_weight, n_samples, n_elements, n_partials,
    OBJECTIVE: tl.constexpr, REDUCTION: tl.constexpr, FROM_MEANS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    INVERT_WEIGHT: tl.constexpr, HAS_REF: tl.constexpr, VELOCITY_KL: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums and epilogue in one launch: the program that takes the last ticket finds all partial sums written.

    Taking a ticket releases a program's sums and acquires those of the programs before it, for the whole GPU; the
    barriers hand that on between the program's own threads. The last one puts the ticket back to 0.
    """
    _transition_sums_kernel(
        velocity_ptr, old_ptr, noise_ptr, ref_ptr, partials_ptr,
        stride_velocity, stride_old, stride_noise, stride_ref, 0.0, n_samples, n_elements, n_partials,
        FROM_MEANS, HAS_REF, False, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        tl.debug_barrier()
        _guard_epilogue_kernel(
            partials_ptr, advantages_ptr, velocity_coef_ptr, std_ptr, weight_ptr, None,
            loss_ptr, log_ratio_ptr, ratio_ptr, cross_ptr, drift_ptr, kl_ptr, coefs_ptr, clipped_ptr, 1, 1, 1, 1, 1,
            log_clip_low, log_clip_high, adv_clip, kl_threshold, kl_weight, n_samples, n_elements, n_partials,
            OBJECTIVE, REDUCTION, FROM_MEANS, HAS_WEIGHT, INVERT_WEIGHT, HAS_REF, False, VELOCITY_KL, BLOCK_B, BLOCK_P,
        )  # fmt: skip
        tl.store(ticket_ptr, 0)


@triton.jit
def _early_sums_kernel(
    velocity_ptr, old_ptr, noise_ptr, ref_ptr, partials_ptr, stride_velocity, stride_old, stride_noise, stride_ref,
    spread, n_samples, n_elements, n_partials,
    FROM_MEANS: tl.constexpr, HAS_REF: tl.constexpr, HAS_ERRORS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The product's sums, which let the epilogue be launched while they run."""
    gdc.gdc_launch_dependents()
    _transition_sums_kernel(
        velocity_ptr, old_ptr, noise_ptr, ref_ptr, partials_ptr,
        stride_velocity, stride_old, stride_noise, stride_ref, spread, n_samples, n_elements, n_partials,
        FROM_MEANS, HAS_REF, HAS_ERRORS, BLOCK,
    )  # fmt: skip


@triton.jit
def _waiting_epilogue_kernel(
    partials_ptr, advantages_ptr, velocity_coef_ptr, std_ptr, weight_ptr, kl_weights_ptr, loss_ptr,
    log_ratio_ptr, ratio_ptr, cross_ptr, drift_ptr, kl_ptr, coefs_ptr, clipped_ptr,
    stride_advantages, stride_velocity_coef, stride_std, stride_weight, stride_kl_weights,
    log_clip_low, log_clip_high, adv_clip, kl_threshold, kl_weight, n_samples, n_elements, n_partials,
    OBJECTIVE: tl.constexpr, REDUCTION: tl.constexpr, FROM_MEANS: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    INVERT_WEIGHT: tl.constexpr, HAS_REF: tl.constexpr, HAS_KL_WEIGHTS: tl.constexpr, VELOCITY_KL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The product's epilogue, launched early: it waits here until the sums are complete and can be seen."""
    gdc.gdc_wait()
    _guard_epilogue_kernel(
        partials_ptr, advantages_ptr, velocity_coef_ptr, std_ptr, weight_ptr, kl_weights_ptr,
        loss_ptr, log_ratio_ptr, ratio_ptr, cross_ptr, drift_ptr, kl_ptr, coefs_ptr, clipped_ptr,
        stride_advantages, stride_velocity_coef, stride_std, stride_weight, stride_kl_weights,
        log_clip_low, log_clip_high, adv_clip, kl_threshold, kl_weight, n_samples, n_elements, n_partials, OBJECTIVE,
        REDUCTION, FROM_MEANS, HAS_WEIGHT, INVERT_WEIGHT, HAS_REF, HAS_KL_WEIGHTS, VELOCITY_KL, BLOCK_B, BLOCK_P,
    )  # fmt: skip


class _Early:
    """Launches a kernel as a programmatic dependent of the one before it (Hopper and later)."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        return partial(self._kernel[grid], launch_pdl=True)


def guard_forward_one_launch(
    velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, advantages: Tensor,
    velocity_coef: Tensor | None, std: Tensor, weight: Tensor | None, ticket: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `transition_partials` and `guard_epilogue` give together: the loss and its numbers.

    ticket: int32 at 0, of nobody else's; None makes one, which costs the launch that fills it.
    """
    velocity, stride_velocity = as_rows(velocity)
    old, stride_old = as_rows(old)
    noise, stride_noise = as_rows(noise)
    ref_rows, stride_ref = (None, 0) if ref is None else as_rows(ref)
    n_samples = velocity.shape[0]
    n_elements = velocity.numel() // n_samples
    n_partials = min(triton.cdiv(n_elements, LAUNCH.block), MAX_PARTIALS)
    partials = torch.empty((3, n_samples, n_partials), dtype=torch.float32, device=velocity.device)
    epilogue = transition.Epilogue(from_means=velocity_coef is None, **options)
    loss = partials.new_empty(() if epilogue.reduced else n_samples)
    n_coefs = 1 if epilogue.follows_noise and ref is None else 3
    stats, coefs = [partials.new_empty(n_samples) for _ in range(5)], partials.new_empty(n_coefs, n_samples)
    clipped = torch.empty((n_samples,), dtype=torch.bool, device=partials.device)
    if ticket is None:
        ticket = torch.zeros((), dtype=torch.int32, device=velocity.device)
    columns = [
        None if column is None else column.expand(n_samples).contiguous()
        for column in (advantages, velocity_coef, std, weight)
    ]
    block = transition.EPILOGUE_PARTIALS[n_partials <= transition.EPILOGUE_PARTIALS[1]]
    _guard_forward_kernel[(n_samples * n_partials,)](
        velocity, old, noise, ref_rows, *columns, partials, ticket,
        loss, *stats, coefs, clipped,
        stride_velocity, stride_old, stride_noise, stride_ref,
        *epilogue.limits, n_samples, n_elements, n_partials, HAS_WEIGHT=weight is not None, HAS_REF=ref is not None,
        BLOCK=LAUNCH.block, BLOCK_B=transition.EPILOGUE_TILE // block, BLOCK_P=block,
        **(epilogue.flags | {"num_warps": LAUNCH.num_warps}),
    )  # fmt: skip
    return loss, *stats, coefs, clipped


def two_launches(
    velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, *per_sample: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """The product's forward pass, from the same arguments."""
    partials = transition.transition_partials(velocity, old, noise, ref, False)
    epilogue = transition.Epilogue(from_means=False, **options)
    return transition.guard_epilogue(partials, *per_sample, None, velocity[0].numel(), epilogue)


def early_epilogue() -> AbstractContextManager[Any]:
    """Inside, the product's forward pass launches its epilogue early (programmatic dependent launch)."""
    epilogue = _Early(_waiting_epilogue_kernel)
    return patch.multiple(transition, _transition_sums_kernel=_early_sums_kernel, _guard_epilogue_kernel=epilogue)
