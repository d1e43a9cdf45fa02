"""From tensors to registered operators: dispatch to a backend, fake implementations, autograd Functions.

The operators are registered with `torch.library`, so that `torch.compile(fullgraph=True)`, fake tensors and
`opcheck` see one node each. The public functions in `fastguard.loss` validate first; nothing here does.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguard import torch_backend
from fastguard.torch_backend import compute_dtype

BACKENDS = ("auto", "triton", "torch")
# Looked up without importing triton, which takes a second.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Options(NamedTuple):
    """Validated options of a loss; the floats are runtime arguments of the kernels, never compiled in."""

    objective: str
    clip_low: float
    clip_high: float
    adv_clip: float
    kl_threshold: float
    kl_weight: float
    velocity_kl: bool
    invert_weight: bool
    reduction: str
    backend: str


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """'triton' or 'torch' for the latents at hand. A backend asked for by name is taken or refused, never replaced.

    `auto` takes Triton on CUDA where it is installed, and torch elsewhere and for float64.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "triton" if tensor.is_cuda and tensor.dtype in TRITON_DTYPES and TRITON_INSTALLED else "torch"
    if not TRITON_INSTALLED:
        raise ValueError("backend='triton' needs the package triton, which is not installed; use backend='torch'")
    if tensor.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"backend='triton' takes bfloat16, float16 and float32; got {tensor.dtype}; use backend='torch'"
        )
    if tensor.device.type == "cpu":
        from fastguard.kernels.common import interpreted

        if not interpreted():
            raise ValueError(
                "backend='triton' needs CUDA tensors; got CPU tensors. Use backend='torch', or set "
                "TRITON_INTERPRET=1 before triton is first imported to run the kernels in its interpreter"
            )
    return "triton"


def _transition(backend: str) -> ModuleType:
    if backend == "triton":
        from fastguard.kernels import transition

        return transition
    return torch_backend


def _sde_step(backend: str) -> ModuleType:
    if backend == "triton":
        from fastguard.kernels import sde_step

        return sde_step
    return torch_backend


def device_guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def refuse_double_backward(what: str) -> None:
    """Gradients are on in a backward pass only under create_graph=True; ours would enter that graph as constants."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} can be differentiated once; its backward pass does not support create_graph=True")


def refuse_transforms(what: str) -> None:
    """PyTorch's own message would ask the user to write a `setup_context` for our Functions."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{what} cannot run inside a transform of torch.func (grad, vmap, jvp and the like); differentiate it with "
            "loss.backward() or torch.autograd.grad"
        )


def savable(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as `save_for_backward` takes them: one made under `torch.inference_mode` becomes an ordinary tensor.

    A rollout under `inference_mode` makes tensors that autograd refuses to save. The ordinary tensor shares their
    memory, so nothing is copied, and hooks of saved tensors see it as they see any other. As for every tensor of
    `inference_mode`, autograd cannot notice that its values were changed before the backward pass.

    Compiled code has to go without: dynamo cannot ask whether a tensor was made under `inference_mode`.
    """
    return tuple(_ordinary(tensor) for tensor in tensors)


def _ordinary(tensor: Tensor | None) -> Tensor | None:
    if tensor is None or torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return tensor  # a subclass may keep its values elsewhere than in its own storage
    layout = (tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*layout)


def operator(function: Callable[..., Any], mutates: tuple[str, ...] = ()) -> torch._ops.OpOverload:
    """Register a function as `fastguard::<its name>`. `torch.library.custom_op` does the same at 5 us more a call."""
    name = f"fastguard::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "CompositeExplicitAutograd", function)
    return getattr(torch.ops.fastguard, function.__name__).default


# --- sums: the moments of a transition, up to their scale -----------------------------------------------------------


@operator
def transition_sums(
    velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, from_means: bool, backend: str
) -> Tensor:
    """(2, B), or (3, B) with a reference: `<noise, v - v_old>`, `|v - v_old|^2`, `|v - v_ref|^2`."""
    with device_guard(velocity):
        return _transition(backend).transition_partials(velocity, old, noise, ref, from_means=from_means).sum(-1)


@torch.library.register_fake("fastguard::transition_sums")
def _(velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, from_means: bool, backend: str) -> Tensor:
    return velocity.new_empty((2 if ref is None else 3, velocity.shape[0]), dtype=compute_dtype(velocity.dtype))


class TransitionSumsFunction(torch.autograd.Function):
    """Sums differentiable with respect to the velocity; keeps nothing but references to the caller's tensors."""

    @staticmethod
    def forward(ctx: Any, velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(*savable(velocity, old, noise, ref))
        ctx.backend = backend
        return transition_sums(velocity, old, noise, ref, False, backend)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("transition_moments")
        velocity, old, noise, ref = ctx.saved_tensors
        alpha, beta = grad_sums[0], 2 * grad_sums[1]
        gamma = torch.zeros_like(alpha) if ref is None else 2 * grad_sums[2]
        coefs, one = torch.stack([alpha, beta, gamma]), torch.ones_like(alpha)
        grad = transition_bwd(one, coefs, noise, velocity, old, ref, velocity.dtype, False, True, ctx.backend)
        return grad, None, None, None, None


# --- the loss -------------------------------------------------------------------------------------------------------


@operator
def guard_loss(
    velocity: Tensor,
    old: Tensor,
    noise: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    velocity_coef: Tensor | None,
    std: Tensor,
    weight: Tensor | None,
    objective: str,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    kl_threshold: float,
    kl_weight: float,
    velocity_kl: bool,
    invert_weight: bool,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss () or (B,); stats (5, B) rows log_ratio, ratio, cross, drift, kl; coefs (3, B) rows alpha, beta, gamma of
    the gradient; clipped (B,) bool.

    Without velocity_coef the inputs are means (see `fastguard.kernels.transition`). Per-sample inputs are (B,).
    """
    module = _transition(backend)
    with device_guard(velocity):
        partials = module.transition_partials(velocity, old, noise, ref, from_means=velocity_coef is None)
        return module.guard_epilogue(
            partials,
            advantages,
            velocity_coef,
            std,
            weight,
            velocity[0].numel(),
            invert_weight=invert_weight,
            objective=objective,
            log_clip=(math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)),
            adv_clip=adv_clip,
            kl_threshold=kl_threshold,
            kl_weight=kl_weight,
            velocity_kl=velocity_kl,
            reduction=reduction,
        )


@torch.library.register_fake("fastguard::guard_loss")
def _(velocity: Tensor, old: Tensor, noise: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_samples, reduction = velocity.shape[0], rest[-2]
    stats = velocity.new_empty((5, n_samples), dtype=compute_dtype(velocity.dtype))
    loss = stats.new_empty((n_samples,) if reduction == "none" else ())
    return loss, stats, stats.new_empty((3, n_samples)), velocity.new_empty((n_samples,), dtype=torch.bool)


def _limits_change(options: Options) -> bool:
    """Whether torch.compile has made a symbol of one of the floats, because their values change between calls."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value

    limits = (options.clip_low, options.clip_high, options.adv_clip, options.kl_threshold, options.kl_weight)
    return not all(has_static_value(limit) for limit in limits)


def _guard_loss_of_changing_limits(
    velocity: Tensor,
    old: Tensor,
    noise: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    velocity_coef: Tensor | None,
    std: Tensor,
    weight: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`guard_loss` for a compiler, which would make a new graph for every value of an operator's float.

    It makes one graph for all factors of a tensor. So the limits become 0-d tensors, and all that follows the pass over
    the latents is left to the compiler.
    """
    one = torch.ones((), dtype=torch.float64, device=std.device)
    log_clip = torch.log1p(-(options.clip_low * one).clamp(max=1)), torch.log1p(options.clip_high * one)
    sums = transition_sums(velocity, old, noise, ref, velocity_coef is None, options.backend)
    return torch_backend.guard_epilogue(
        sums[..., None],
        advantages,
        velocity_coef,
        std,
        weight,
        velocity[0].numel(),
        invert_weight=options.invert_weight,
        objective=options.objective,
        log_clip=log_clip,
        adv_clip=options.adv_clip * one,
        kl_threshold=options.kl_threshold,
        kl_weight=options.kl_weight,
        velocity_kl=options.velocity_kl,
        reduction=options.reduction,
    )


class GuardLossFunction(torch.autograd.Function):
    """The loss, differentiable with respect to the velocity; keeps 3 scalars per sample and what backward reads."""

    @staticmethod
    def forward(
        ctx: Any,
        velocity: Tensor,
        old: Tensor,
        noise: Tensor,
        ref: Tensor | None,
        advantages: Tensor,
        velocity_coef: Tensor | None,
        std: Tensor,
        weight: Tensor | None,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (velocity, old, noise, ref, advantages, velocity_coef, std, weight)
        if _limits_change(options):
            loss, stats, coefs, clipped = _guard_loss_of_changing_limits(*inputs, options)
        else:
            loss, stats, coefs, clipped = guard_loss(*inputs, *options)
        ctx.mark_non_differentiable(stats, clipped)
        ctx.from_means = velocity_coef is None
        ctx.has_drift = options.objective != "grpo_guard"
        ctx.dtype, ctx.backend = velocity.dtype, options.backend
        ref = ref if options.kl_weight != 0 else None
        velocity_or_none = velocity if ctx.has_drift or ref is not None else None
        old_or_none = old if ctx.has_drift or ctx.from_means else None
        ctx.save_for_backward(*savable(coefs, noise, velocity_or_none, old_or_none, ref))
        return loss, stats, clipped

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("the loss")
        coefs, noise, velocity, old, ref = ctx.saved_tensors
        grad = transition_bwd(
            grad_loss,
            coefs,
            noise,
            velocity,
            old,
            ref,
            ctx.dtype,
            ctx.from_means,
            ctx.has_drift,
            ctx.backend,
        )
        return grad, None, None, None, None, None, None, None, None


@operator
def transition_bwd(
    grad_loss: Tensor,
    coefs: Tensor,
    noise: Tensor,
    velocity: Tensor | None,
    old: Tensor | None,
    ref: Tensor | None,
    dtype: torch.dtype,
    from_means: bool,
    has_drift: bool,
    backend: str,
) -> Tensor:
    """`g (alpha noise + beta (v - v_old) + gamma (v - v_ref))`, of noise's shape, in `dtype`, contiguous."""
    with device_guard(noise):
        return _transition(backend).transition_bwd(
            grad_loss, coefs, noise, velocity, old, ref, dtype, from_means=from_means, has_drift=has_drift
        )


@torch.library.register_fake("fastguard::transition_bwd")
def _(grad_loss: Tensor, coefs: Tensor, noise: Tensor, *rest: Any) -> Tensor:
    return torch.empty(noise.shape, dtype=rest[3], device=noise.device)


# --- the rollout step -----------------------------------------------------------------------------------------------


@operator
def sde_step(
    latents: Tensor,
    velocity: Tensor,
    seeds: Tensor | None,
    latents_coef: Tensor,
    velocity_coef: Tensor,
    std: Tensor,
    noise_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Next latents (dtype of `latents`) and noise (`noise_dtype`; empty without seeds), both contiguous."""
    with device_guard(latents):
        return _sde_step(backend).sde_step(latents, velocity, seeds, latents_coef, velocity_coef, std, noise_dtype)


@torch.library.register_fake("fastguard::sde_step")
def _(latents: Tensor, velocity: Tensor, seeds: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    noise_shape = latents.shape if seeds is not None else (0,)
    next_latents = torch.empty(latents.shape, dtype=latents.dtype, device=latents.device)
    return next_latents, torch.empty(noise_shape, dtype=rest[3], device=latents.device)
