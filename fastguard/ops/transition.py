"""The transition: from velocities (or means) and the rollout's noise to a loss and its gradient.

Axes: B sample; all further axes are elements, D of them per sample. With `eps` the rollout's noise and
`w = (mu_new - mu_old) / s = B (v - v_old) / s` the whitened drift, two numbers per sample carry everything
(docs/math.md):

    cross = <eps, w> / D          drift = <w, w> / D

Forward is two or three inner products, backward one scaled sum of latents: no autograd graph of temporaries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastguard.ops.registry import (
    compute_dtype,
    device_guard,
    kernels,
    operator,
    refuse_double_backward,
    savable,
)
from fastguard.sde import Transition

# Elements of a sample that are worked on at once: the difference of two velocities, 1 MB in float32, stays in cache.
CHUNK = 2**18
# Up to this many elements a sample, all samples are worked on at once.
SMALL = 2**14

# --- formulas: differentiable by autograd, not fast; in float64 they are the truth that the kernels answer to --------


def per_sample(coef: Tensor, like: Tensor) -> Tensor:
    """Shape (B,) -> (B, 1, ..., 1), to multiply a tensor of `like`'s rank."""
    return coef.reshape(-1, *([1] * (like.ndim - 1)))


def mean_over_elements(value: Tensor) -> Tensor:
    """(B, ...) -> (B,)."""
    return value.flatten(1).mean(1)


def transition_mean(latents: Tensor, velocity: Tensor, step: Transition) -> Tensor:
    """`mu = A x + B v`, (B, ...)."""
    latents_coef, velocity_coef = step.mean_coefs
    return per_sample(latents_coef, latents) * latents + per_sample(velocity_coef, latents) * velocity


def log_prob(sample: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Gaussian log-density averaged over the elements, (B,)."""
    whitened = (sample - mean) / per_sample(std, sample)
    return mean_over_elements(-0.5 * whitened**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)


def log_ratio_by_subtraction(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """`log p_new - log p_old`, what public trainers clip, (B,)."""
    return log_prob(sample, mean, std) - log_prob(sample, old_mean, std)


def ratio_norm_by_subtraction(sample: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """RatioNorm as published: `s (log r + |mu_new - mu_old|^2 / (2 s^2 D))` (arXiv 2510.22319, Eq. 8), (B,)."""
    bias = mean_over_elements((mean - old_mean) ** 2) / (2 * std**2)
    return std * (log_ratio_by_subtraction(sample, mean, old_mean, std) + bias)


def moments_from_means(
    prev_sample: Tensor, prev_sample_mean: Tensor, old_prev_sample_mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    """(cross, drift), each (B,), from the rolled-out sample and the two means."""
    scale = per_sample(std, prev_sample)
    noise = (prev_sample - old_prev_sample_mean) / scale
    whitened = (prev_sample_mean - old_prev_sample_mean) / scale
    return mean_over_elements(noise * whitened), mean_over_elements(whitened**2)


def moments(velocity: Tensor, old_velocity: Tensor, noise: Tensor, step: Transition) -> tuple[Tensor, Tensor]:
    """(cross, drift), each (B,), from the velocities and the rollout's noise: `w = B (v_new - v_old) / s`."""
    whitened = per_sample(step.mean_coefs[1] / step.std, velocity) * (velocity - old_velocity)
    return mean_over_elements(noise * whitened), mean_over_elements(whitened**2)


def log_ratio(cross: Tensor, drift: Tensor) -> Tensor:
    """`log p_new - log p_old = cross - drift / 2`, averaged over the elements."""
    return cross - drift / 2


def ratio_norm(cross: Tensor, std: Tensor) -> Tensor:
    """RatioNorm: `s (log r + drift / 2) = s cross`."""
    return std * cross


def clip_advantages(advantages: Tensor, adv_clip: float | None) -> Tensor:
    return advantages if adv_clip is None else advantages.clamp(-adv_clip, adv_clip)


def clipped_surrogate(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """PPO's loss, `max(-a r, -a clip(r, 1 - low, 1 + high))`, (B,)."""
    ratio = torch.exp(log_ratio)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))


def divergence_masked(log_ratio: Tensor, kl_old: Tensor, advantages: Tensor, kl_threshold: float) -> Tensor:
    """Flow-DPPO's loss: `-a r`, dropped where KL(new || old) has reached the threshold and the step moves away.

    It asks for the sign of the log-ratio, since a float32 ratio rounds to 1 below 6e-8. Advantages are not clipped.
    """
    moves_away = ((log_ratio > 0) & (advantages > 0)) | ((log_ratio < 0) & (advantages < 0))
    dropped = (kl_old >= kl_threshold) & moves_away
    return torch.where(dropped, 0.0, -advantages * torch.exp(log_ratio))


def gaussian_kl(drift: Tensor) -> Tensor:
    """KL between two Gaussians of one std, per element: `drift / 2`. With the reference's drift, KL to it."""
    return drift / 2


def total_variation(drift: Tensor, n_elements: int) -> Tensor:
    """Total variation distance between two Gaussians of one std and D elements: `erf(sqrt(D drift / 8))`."""
    return torch.erf(torch.sqrt(n_elements / 8 * drift))


def velocity_kl(velocity: Tensor, ref_velocity: Tensor) -> Tensor:
    """Mean squared velocity difference, (B,): the Gaussian KL without its step-dependent factor B^2 / (2 s^2)."""
    return mean_over_elements((velocity - ref_velocity) ** 2)


# --- sums: the moments of a transition, up to their scale -----------------------------------------------------------


def _triton_sums(
    velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, from_means: bool, spread: float | None
) -> Tensor:
    sums = kernels("transition").transition_partials(velocity, old, noise, ref, from_means, spread).sum(-1)
    return sums if spread is None or ref is not None else torch.cat([sums[:2], sums[3:]])


def _fake_sums(
    velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, from_means: bool, spread: float | None
) -> Tensor:
    rows = 2 + (ref is not None) + 3 * (spread is not None)
    return velocity.new_empty((rows, velocity.shape[0]), dtype=compute_dtype(velocity.dtype))


@operator(triton=_triton_sums, fake=_fake_sums)
def transition_sums(
    velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, from_means: bool, spread: float | None
) -> Tensor:
    """`<noise, v - v_old>`, `<v - v_old, v - v_old>` and, with a reference, `<v - v_ref, v - v_ref>`: (2 or 3, B).

    With `from_means` the inputs are means and the rolled-out sample, and noise is `sample - mean_old`. With a spread
    there are three more rows: `noise^2`, `|noise - spread (v - v_old)|` and `|noise + spread (v - v_old)|`.
    """
    sums = _sums(velocity, old, noise, ref, from_means)
    if spread is not None:
        sums += _error_sums(velocity, old, noise, from_means, spread)
    return torch.stack(sums)


def _error_sums(velocity: Tensor, old: Tensor, noise: Tensor, from_means: bool, spread: float) -> list[Tensor]:
    v, v_old, eps = (_as_rows(tensor).to(compute_dtype(velocity.dtype)) for tensor in (velocity, old, noise))
    eps = eps - v_old if from_means else eps
    change = spread * (v - v_old)
    return [eps.square().sum(1), (eps - change).abs_().sum(1), (eps + change).abs_().sum(1)]


def _sums(velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, from_means: bool) -> list[Tensor]:
    rows = [_as_rows(tensor) for tensor in (velocity, old, noise, ref) if tensor is not None]
    if rows[0].shape[1] <= SMALL:
        return _sums_at_once(rows, from_means)
    return _sums_by_sample(rows, from_means)


def _sums_at_once(rows: list[Tensor], from_means: bool) -> list[Tensor]:
    """Of small samples, where the number of operations counts."""
    dtype = compute_dtype(rows[0].dtype)
    v, v_old, eps, *v_ref = rows if rows[0].dtype == rows[2].dtype == dtype else [row.to(dtype) for row in rows]
    change = v - v_old
    if from_means:
        eps = eps - v_old
    sums = [(eps * change).sum(1), change.square_().sum(1)]
    return [*sums, (v - v_ref[0]).square_().sum(1)] if v_ref else sums


def _sums_by_sample(rows: list[Tensor], from_means: bool) -> list[Tensor]:
    """Of large samples, where the reads of memory count: each chunk of a sample is worked on while it is in cache."""
    dtype = compute_dtype(rows[0].dtype)
    sums: list[list[Tensor]] = [[] for _ in rows[1:]]
    room = torch.empty(min(rows[0].shape[1], CHUNK), dtype=dtype, device=rows[0].device)

    def difference(a: Tensor, b: Tensor) -> Tensor:
        return torch.sub(a, b, out=room if len(a) == len(room) else room[: len(a)])

    def samples(block: Tensor) -> Iterable[Tensor]:
        return block.unbind() if block.dtype == dtype else (row.to(dtype) for row in block.unbind())

    for blocks in zip(*(tensor.split(CHUNK, dim=1) for tensor in rows), strict=True):
        for v, v_old, eps, *v_ref in zip(*map(samples, blocks), strict=True):
            change = difference(v, v_old)
            # torch.dot, unlike matmul, never goes down to tf32 or bf16.
            sums[0].append(torch.dot(eps - v_old if from_means else eps, change))
            sums[1].append(torch.dot(change, change))
            if v_ref:
                change = difference(v, v_ref[0])
                sums[2].append(torch.dot(change, change))
    if rows[0].shape[1] <= CHUNK:
        return [torch.stack(row) for row in sums]
    partials = torch.stack([value for row in sums for value in row]).view(len(sums), -1, len(rows[0]))
    return list(partials.transpose(1, 2).contiguous().sum(-1).unbind())


def _as_rows(tensor: Tensor) -> Tensor:
    """(B, ...) as (B, D) with contiguous rows: a view where there is one."""
    rows = tensor if tensor.ndim == 2 else tensor.flatten(1)
    return rows if rows.is_contiguous() or rows.stride(1) == 1 else rows.contiguous()


class TransitionSumsFunction(torch.autograd.Function):
    """Sums differentiable with respect to the velocity; keeps nothing but references to the caller's tensors."""

    @staticmethod
    def forward(ctx: Any, velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(*savable(velocity, old, noise, ref))
        ctx.backend = backend
        return transition_sums(velocity, old, noise, ref, False, None, backend)

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


class Terms(NamedTuple):
    """An objective's loss per transition and its derivatives, (N,) each."""

    loss: Tensor
    by_log_ratio: Tensor
    """d sum(loss) / d log_ratio"""
    by_drift: Tensor
    """d sum(loss) / d drift, with log_ratio held"""
    clipped: Tensor
    """bool: whether the transition has no gradient, because it has moved too far"""


class FusedEpilogue(NamedTuple):
    """What the fused kernel needs of an objective that it knows; floats are runtime arguments, never compiled in."""

    code: int
    """0: clipped, on the normalized log-ratio `s cross`; 1: clipped, on `cross - drift / 2`; 2: masked by KL, on it"""
    clip_low: float = math.inf
    clip_high: float = math.inf
    adv_clip: float = math.inf
    kl_threshold: float = 0.0


def clipped_terms(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, adv_clip: float) -> Terms:
    """PPO's clipped surrogate, `max(-a r, -a clip(r, 1 - low, 1 + high))`, with a in +-adv_clip (arXiv 1707.06347)."""
    limit, zero = _limit(adv_clip, log_ratio), torch.zeros_like(log_ratio)
    advantages = advantages.clamp(-limit, limit)
    # Decided in log space: a float32 ratio holds a clip range of 2e-6 to two digits only.
    within = log_ratio.clamp(log1p_of(-1, clip_low, log_ratio), log1p_of(1, clip_high, log_ratio))
    beyond = advantages * (log_ratio - within)
    clipped = torch.gt(beyond, zero)
    # Without an advantage the clipped ratio too: a ratio that overflows would make 0 * inf.
    loss = -advantages * torch.exp(torch.where(torch.lt(beyond, zero), log_ratio, within))
    return Terms(loss, loss.masked_fill(clipped, 0.0), zero, clipped)


def masked_terms(log_ratio: Tensor, drift: Tensor, advantages: Tensor, kl_threshold: float) -> Terms:
    """`-a r`, or 0 where KL(new || old) = drift / 2 has reached the threshold and the transition moves away."""
    clipped = (advantages * log_ratio.sign() > 0) & (drift / 2 >= kl_threshold)
    loss = -advantages * torch.where(clipped, 0.0, torch.exp(log_ratio))
    # No advantage, no loss, even where the ratio overflows (0 * inf is NaN); a NaN in log_ratio stays.
    loss = torch.where(advantages.bool(), loss, log_ratio - log_ratio)
    return Terms(loss, loss.masked_fill(clipped, 0.0), torch.zeros_like(loss), clipped)


def _limit(value: float, like: Tensor) -> Any:
    """A float, or for torch.compile a 0-d tensor: it makes one graph for all factors of a tensor, but a new graph for
    every value of an operator's float."""
    if not torch.compiler.is_compiling():
        return value
    return value * torch.ones((), dtype=torch.float64, device=like.device)


def log1p_of(sign: int, value: float, like: Tensor) -> Any:
    """`log(1 + sign value)`, as `_limit` has it; -inf below 0."""
    if not torch.compiler.is_compiling():
        return math.log1p(sign * value) if sign * value > -1 else -math.inf
    return torch.log1p((sign * _limit(value, like)).clamp(min=-1))


LossNumbers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def epilogue(
    sums: Sequence[Tensor] | Tensor,
    terms: Callable[[Tensor, Tensor], Terms],
    velocity_coef: Tensor | None,
    std: Tensor,
    weight: Tensor | None,
    kl_weights: Tensor | None,
    n_elements: int,
    *,
    normalized: bool,
    moves_drift: bool,
    from_means: bool,
    kl_weight: float,
    velocity_kl: bool,
    invert_weight: bool,
    reduction: str,
    smooth: Tensor | None = None,
) -> LossNumbers:
    """From sums (2 or 3, B) to the numbers of the loss, as `guard_loss` has them.

    What is of the step or a factor may have one entry for all samples, (1,).

    Args:
        terms: (log_ratio, drift) -> Terms, the objective with its advantages.
        normalized: whether the log-ratio is RatioNorm's, `s cross`, rather than `cross - drift / 2`.
        moves_drift: whether `terms.by_drift` can differ from 0.
        smooth: factor on the moments that `terms` gets, or None: `std^2 / (std^2 + h^2)` for policies that a kernel of
            width h has smoothed. RatioNorm's log-ratio gets its root, since it has a smoothed std before it.
    """
    # On the host each operation on these few numbers costs more than its arithmetic, and one with a Python number more
    # than one with a tensor. So they are kept few: addcmul and addcdiv take the number along.
    zero = torch.zeros_like(sums[0])
    if from_means or velocity_coef is None:
        cross_scale = drift_scale = (std * std).reciprocal() / n_elements
    else:
        cross_scale = torch.addcdiv(zero, velocity_coef, std, value=1 / n_elements)
        drift_scale = torch.addcmul(zero, cross_scale, cross_scale, value=n_elements)
    cross = cross_scale * sums[0]
    drift = drift_scale * sums[1]

    if normalized:
        log_ratio, noise_slope = std * cross, std * cross_scale
    else:
        log_ratio, noise_slope = torch.sub(cross, drift, alpha=0.5), cross_scale
    # A sum that is not finite must not end in a clipped, plausible loss: 0 * inf is NaN.
    log_ratio = torch.addcmul(log_ratio, cross, drift, value=0)
    drift_slope = None
    if smooth is None:
        loss, slope, by_drift, clipped = terms(log_ratio, drift)
    else:
        factor = smooth.sqrt() if normalized else smooth
        log_ratio, noise_slope, drift_slope = factor * log_ratio, factor * noise_slope, factor
        loss, slope, by_drift, clipped = terms(log_ratio, smooth * drift)
        by_drift = smooth * by_drift
    if weight is not None:
        scaled = torch.div if invert_weight else torch.mul
        factor = weight.abs() if invert_weight else weight
        loss, slope = scaled(loss, factor), scaled(slope, factor)
        by_drift = scaled(by_drift, factor) if moves_drift else by_drift

    share = 1 / len(loss) if reduction == "mean" else 1.0
    kl, coefs = zero, [torch.addcmul(zero, slope, noise_slope, value=share)]
    if not normalized or moves_drift or len(sums) == 3:
        beta = zero if normalized else -slope  # the drift is in the log-ratio
        beta = beta if drift_slope is None else drift_slope * beta
        beta = beta + 2 * by_drift if moves_drift else beta
        coefs += [torch.addcmul(zero, beta, drift_scale, value=share), zero]
    if len(sums) == 3:
        kl_scale = drift_scale / 2
        if velocity_kl:
            kl_scale = torch.ones_like(std) / n_elements
            if from_means and velocity_coef is not None:  # the means differ by B (v - v_ref)
                kl_scale = kl_scale / velocity_coef**2
        kl = kl_scale * sums[2]
        if kl_weights is not None:
            loss = loss + kl_weights * kl
            coefs[2] = torch.addcmul(zero, kl_weights, kl_scale, value=2 * share)
        elif kl_weight != 0:  # a KL that is only reported may be NaN
            loss = loss + kl_weight * kl
            coefs[2] = zero + 2 * share * kl_weight * kl_scale

    if reduction == "mean":
        loss = loss.mean()
    elif reduction == "sum":
        loss = loss.sum()
    return loss, log_ratio, torch.exp(log_ratio), cross, drift, kl, torch.stack(coefs), clipped


def _triton_loss(*args: Any) -> LossNumbers:
    tensors, options = args[:N_TENSORS], args[N_TENSORS:]
    return _launches(*options)(*tensors)


def _launches(*options: Any) -> Callable[..., LossNumbers]:
    """The loss on Triton, as a function of its tensors."""
    launchers = kernels("transition")
    epilogue = launchers.Epilogue(*options)

    def launch(
        velocity: Tensor, old: Tensor, noise: Tensor, ref: Tensor | None, *per_sample: Tensor | None
    ) -> LossNumbers:
        with device_guard(velocity):
            partials = launchers.transition_partials(velocity, old, noise, ref, epilogue.from_means)
            return launchers.guard_epilogue(partials, *per_sample, velocity.numel() // velocity.shape[0], epilogue)

    return launch


def _fake_loss(velocity: Tensor, *args: Any) -> LossNumbers:
    n_samples, dtype = velocity.shape[0], compute_dtype(velocity.dtype)
    loss = velocity.new_empty((n_samples,) if args[-1] == "none" else (), dtype=dtype)
    ref, code = args[2], args[N_TENSORS - 1]
    log_ratio, ratio, cross, drift, kl = (velocity.new_empty((n_samples,), dtype=dtype) for _ in range(5))
    # RatioNorm without a reference moves along the noise alone.
    coefs = velocity.new_empty((1 if code == 0 and ref is None else 3, n_samples), dtype=dtype)
    return loss, log_ratio, ratio, cross, drift, kl, coefs, velocity.new_empty((n_samples,), dtype=torch.bool)


@operator(triton=_triton_loss, fake=_fake_loss)
def guard_loss(
    velocity: Tensor,
    old: Tensor,
    noise: Tensor,
    ref: Tensor | None,
    advantages: Tensor,
    velocity_coef: Tensor | None,
    std: Tensor,
    weight: Tensor | None,
    kl_weights: Tensor | None,
    code: int,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    kl_threshold: float,
    from_means: bool,
    kl_weight: float,
    velocity_kl: bool,
    invert_weight: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss () or (B,); log_ratio, ratio, cross, drift and kl, (B,) each; coefs (3, B) rows alpha, beta, gamma of the
    gradient, or (1, B) where it has alpha alone; clipped (B,) bool.

    Per-sample inputs are (B,) or (1,). velocity_coef may be None from means, for which only the velocity KL needs it.
    kl_weights, if there, takes the place of kl_weight. `code` and the limits are those of `FusedEpilogue`.
    """

    def terms(log_ratio: Tensor, drift: Tensor) -> Terms:
        if code == 2:
            return masked_terms(log_ratio, drift, advantages, kl_threshold)
        return clipped_terms(log_ratio, advantages, clip_low, clip_high, adv_clip)

    return epilogue(
        _sums(velocity, old, noise, ref, from_means),
        terms,
        velocity_coef,
        std,
        weight,
        kl_weights,
        velocity.numel() // velocity.shape[0],
        normalized=code == 0,
        moves_drift=False,
        from_means=from_means,
        kl_weight=kl_weight,
        velocity_kl=velocity_kl,
        invert_weight=invert_weight,
        reduction=reduction,
    )


N_TENSORS = 9
"""The arguments of `guard_loss` begin with so many tensors; the rest are its options."""


def prepared_loss(*options: Any, backend: str, direct: bool) -> Callable[..., LossNumbers]:
    """`guard_loss` with these options, as a function of its tensors.

    direct: past PyTorch's dispatcher, for a caller who knows that nothing watches.
    """
    if not direct:
        return lambda *tensors: guard_loss(*tensors, *options, backend)
    if backend == "triton":
        return _launches(*options)
    return lambda *tensors: guard_loss.torch(*tensors, *options)


# --- its gradient ---------------------------------------------------------------------------------------------------


@operator(triton="transition")
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
) -> Tensor:
    """`g (alpha noise + beta (v - v_old) + gamma (v - v_ref))`, of noise's shape, in `dtype`, contiguous.

    coefs: rows alpha, beta, gamma; alpha alone, (1, B), without a drift and a reference.
    """
    one = [1] * (noise.ndim - 1)
    if not (from_means or has_drift or ref is not None):
        alpha = ((coefs if len(coefs) == 1 else coefs[0]) * grad_loss).view(-1, *one)
        if noise.dtype == alpha.dtype == dtype and noise.is_contiguous():
            return noise * alpha
        return torch.mul(noise, alpha, out=torch.empty(noise.shape, dtype=dtype, device=noise.device))
    scaled = (coefs * grad_loss).view(len(coefs), -1, *one)
    grad = torch.empty(noise.shape, dtype=dtype, device=noise.device)
    acc = grad if dtype == scaled.dtype else torch.empty(noise.shape, dtype=scaled.dtype, device=noise.device)
    if from_means:
        assert old is not None
        torch.sub(noise, old, out=acc)
        acc *= scaled[0]
    else:
        torch.mul(noise, scaled[0], out=acc)
    if has_drift:
        assert velocity is not None
        assert old is not None
        acc += scaled[1] * (velocity.to(acc.dtype) - old.to(acc.dtype))
    if ref is not None:
        assert velocity is not None
        acc += scaled[2] * (velocity.to(acc.dtype) - ref.to(acc.dtype))
    return grad if acc is grad else grad.copy_(acc)


class TransitionLossFunction(torch.autograd.Function):
    """Attaches its gradient to a loss: keeps 3 scalars per sample and what backward reads of the caller's tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        velocity: Tensor,
        loss: Tensor,
        coefs: Tensor,
        noise: Tensor,
        old: Tensor,
        ref: Tensor | None,
        options: tuple[bool, bool, str],
    ) -> Tensor:
        """options: from_means, has_drift, backend. No tensor is in a tuple, which torch 2.6 could not compile."""
        from_means, has_drift, _ = options
        ctx.dtype, ctx.options = velocity.dtype, options
        velocity_or_none = velocity if has_drift or ref is not None else None
        old_or_none = old if has_drift or from_means else None
        ctx.save_for_backward(*savable(coefs, noise, velocity_or_none, old_or_none, ref))
        return loss.detach()  # a view would refuse `loss += kl`

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("the loss")
        coefs, noise, velocity, old, ref = ctx.saved_tensors
        grad = transition_bwd(grad_loss, coefs, noise, velocity, old, ref, ctx.dtype, *ctx.options)
        return grad, None, None, None, None, None, None, None, None
