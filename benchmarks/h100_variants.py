"""Every variant of every kernel at the sizes of Flux, and what its code may cost: the list for h100_code.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import candidates
import torch

from fastguard.kernels import adaln, gated_residual, gelu, qk_norm_rope, sde_step, transition
from fastguard.kernels.common import BLOCK_C, BLOCK_S, LAUNCH

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MIXED = "bf16,fp32"
DTYPES = (*BYTES, MIXED)
# What holds latents; and what is float32 beside a bf16 velocity: latents, or a drawn sample beside its means.
LATENTS = {"velocity_ptr", "old_ptr", "noise_ptr", "ref_ptr", "grad_ptr", "latents_ptr", "next_ptr"}
STORED_WIDE = {"latents_ptr", "next_ptr", "noise_ptr"}
SPECIAL = {"seeds_ptr": "*i64", "clipped_ptr": "*i1", "ticket_ptr": "*i32"}
# Of the Flux kernels: rows of a sample or a layer, which may be float32 beside bf16 activations, and what always is.
WEIGHTS = {
    "scale_ptr", "shift_ptr", "gate_ptr", "bias_ptr",
    "query_norm_ptr", "key_norm_ptr", "text_query_norm_ptr", "text_key_norm_ptr",
}  # fmt: skip
STATISTICS = {"mean_ptr", "rstd_ptr", "partials_ptr", "cos_ptr", "sin_ptr"}
# What is a multiple of 16 beside the strides of Flux's tensors, and the one stride that is not.
ALIGNED = {"n_elements", "n_channels", "n_prefix"}
NOT_ALIGNED = {"stride_grad_loss"}
CHANNELS, HEADS, HEAD_SIZE = 3072, 24, 128


@dataclass(frozen=True)
class Variant:
    """One kernel with its types and flags.

    tile: elements that a program handles in one iteration. least: bytes that an element must cost; None where nothing
    of that size is touched, and widths do not matter. once: bytes per element of the tile, in wide accesses, for what
    a program reads or writes only once. scalars: narrow accesses, to values that serve many elements. stages: how often
    a load that is staged in shared memory stands in the code: in the loop, and before it for the first iterations.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    tile: int = 1
    least: int | None = None
    once: int = 0
    scalars: int = 0
    stages: int = 1

    @property
    def aligned(self) -> Iterator[int]:
        """The arguments that are multiples of 16, counted in bytes for pointers."""
        for index, (arg, kind) in enumerate(self.signature.items()):
            strides = arg in ALIGNED or (arg.startswith("stride_") and arg not in NOT_ALIGNED)
            if kind.startswith("*") or (kind == "i32" and strides):
                yield index


def all_variants() -> list[Variant]:
    """The variants, and each kernel once more with every size 1."""
    lists = (_transition, _epilogue, _sde_step, _adaln, _gated_residual, _gelu, _qk_norm_rope, _candidates)
    everything = [variant for variants in lists for variant in variants()]
    widest = {variant.kernel: variant for variant in everything}  # the last of each kernel has every flag
    return everything + [_with_sizes_of_one(variant) for variant in widest.values()]


def _with_sizes_of_one(variant: Variant) -> Variant:
    """The same kernel where every size and stride is 1: Triton makes constants of those, its interpreter does not."""
    sizes = [arg for arg, kind in variant.signature.items() if kind == "i32"]
    signature = {**variant.signature, **dict.fromkeys(sizes, "constexpr")}
    constexprs = {**variant.constexprs, **dict.fromkeys(sizes, 1)}
    return replace(variant, name=f"{variant.name} sizes=1", signature=signature, constexprs=constexprs, least=None)


def _flags(*names: str) -> Iterator[dict[str, bool]]:
    """Every combination, with all flags set in the last."""
    for values in itertools.product((False, True), repeat=len(names)):
        yield dict(zip(names, values, strict=True))


def _variant(
    name: str,
    kernel: Any,
    dtype: str,
    types: dict[str, str],
    flags: dict[str, Any],
    unused: dict[str, bool],
    num_warps: int = LAUNCH.num_warps,
    **costs: Any,
) -> Variant:
    """Types by the naming rule of the kernels: *_ptr, stride_*, n_*, *_per_*, and float scalars.

    types: of the pointers that are not float32. unused: the pointers that some flag switches off, and whether it does.
    """
    signature: dict[str, str] = {}
    constexprs = dict(flags)
    for arg in kernel.arg_names:
        if arg in flags or unused.get(arg):
            signature[arg] = "constexpr"
            constexprs.setdefault(arg, None)
        elif arg.endswith("_ptr"):
            signature[arg] = types.get(arg, "*fp32")
        else:
            signature[arg] = "i32" if arg.startswith(("stride_", "n_")) or "_per_" in arg else "fp32"
    label = "+".join(key.lower() for key, value in flags.items() if value is True)
    numbers = "".join(f" {key.lower()}={flags[key]}" for key in ("OBJECTIVE", "REDUCTION", "BLOCK_P") if key in flags)
    return Variant(f"{name} {dtype} {label}{numbers}", kernel, signature, constexprs, num_warps, **costs)


def _latents_variant(
    name: str, kernel: Any, dtype: str, flags: dict[str, Any], unused: dict[str, bool], scalars: int
) -> Variant:
    """A kernel over latents, each of which is read or written once."""
    stored = {arg: ("fp32" if arg in STORED_WIDE else "bf16") if dtype == MIXED else dtype for arg in LATENTS}
    types = {**{arg: f"*{kind}" for arg, kind in stored.items()}, **SPECIAL}
    flags = {**flags, "BLOCK": LAUNCH.block}
    least = sum(BYTES[stored[arg]] for arg in kernel.arg_names if arg in LATENTS and not unused.get(arg))
    return _variant(name, kernel, dtype, types, flags, unused, tile=LAUNCH.block, least=least, scalars=scalars)


def _transition() -> Iterator[Variant]:
    for dtype, flags in itertools.product(DTYPES, _flags("FROM_MEANS", "HAS_REF")):
        has_ref = flags["HAS_REF"]
        kernel = transition._transition_sums_kernel
        yield _latents_variant("transition_sums", kernel, dtype, flags, {"ref_ptr": not has_ref}, scalars=2 + has_ref)
    for dtype, flags in itertools.product(DTYPES, _flags("FROM_MEANS", "HAS_DRIFT", "HAS_REF")):
        from_means, has_drift, has_ref = flags.values()
        unused = {"velocity_ptr": not (has_drift or has_ref), "old_ptr": not (from_means or has_drift)}
        unused["ref_ptr"] = not has_ref
        kernel = transition._transition_bwd_kernel
        yield _latents_variant("transition_bwd", kernel, dtype, flags, unused, scalars=2 + has_drift + has_ref)


def _epilogue() -> Iterator[Variant]:
    names = ("FROM_MEANS", "HAS_WEIGHT", "INVERT_WEIGHT", "HAS_REF", "VELOCITY_KL")
    for objective, reduction, chosen in itertools.product(range(3), range(3), _flags(*names)):
        from_means, has_weight, invert, has_ref, velocity_kl = chosen.values()
        if (invert and not has_weight) or (velocity_kl and (from_means or not has_ref)):
            continue  # the launcher never asks for these
        unused = {"velocity_coef_ptr": from_means, "weight_ptr": not has_weight}
        for partials in transition.EPILOGUE_PARTIALS:
            tile = {"BLOCK_B": transition.EPILOGUE_TILE // partials, "BLOCK_P": partials}
            flags = {"OBJECTIVE": objective, "REDUCTION": reduction, **chosen, **tile}
            kernel = transition._guard_epilogue_kernel
            yield _variant("guard_epilogue", kernel, "fp32", SPECIAL, flags, unused, transition.EPILOGUE_WARPS)


def _sde_step() -> Iterator[Variant]:
    for dtype, flags in itertools.product(DTYPES, _flags("HAS_NOISE")):
        has_noise = flags["HAS_NOISE"]
        unused = dict.fromkeys(("seeds_ptr", "std_ptr", "noise_ptr"), not has_noise)
        scalars = 4 if has_noise else 2
        yield _latents_variant("sde_step", sde_step._sde_step_kernel, dtype, flags, unused, scalars)


def _flux_variant(
    name: str, kernel: Any, dtype: str, flags: dict[str, Any], unused: dict[str, bool], *, moved: int, **costs: Any
) -> Variant:
    """A kernel over activations. moved: how many of them are read or written per element."""
    activations, weights = _kinds(dtype)
    pointers = {arg for arg in kernel.arg_names if arg.endswith("_ptr")} - STATISTICS
    types = {arg: f"*{weights if arg in WEIGHTS else activations}" for arg in pointers}
    return _variant(name, kernel, dtype, types, flags, unused, least=moved * BYTES[activations], **costs)


def _kinds(dtype: str) -> tuple[str, str]:
    """Of activations, and of weights."""
    activations, _, weights = dtype.partition(",")
    return activations, weights or activations


def _adaln() -> Iterator[Variant]:
    for dtype, flags in itertools.product(DTYPES, _flags("HAS_RESIDUAL", "HAS_STATS")):
        has_residual, has_stats = flags.values()
        if has_residual and has_stats:
            continue  # the launcher never asks for it
        unused = dict.fromkeys(("residual_ptr", "gate_ptr", "summed_ptr"), not has_residual)
        tensors = 1 + has_residual
        kernel = adaln._adaln_fwd_kernel
        yield _adaln_variant("adaln_fwd", kernel, dtype, flags, unused, tensors, tensors, rows=2 + has_residual)
    names = ("HAS_GRAD_SUMMED", "HAS_GATE", "HAS_RESIDUAL", "NEED_MODULATION")
    for dtype, flags in itertools.product(DTYPES, _flags(*names)):
        has_summed, has_gate, has_residual, need_modulation = flags.values()
        if has_residual and not has_gate:
            continue
        unused = {"grad_summed_ptr": not has_summed, "residual_ptr": not has_residual}
        unused |= {"gate_ptr": not has_gate, "grad_residual_ptr": not has_gate}
        sums = 2 * need_modulation + has_residual
        unused["partials_ptr"] = sums == 0
        kernel, read, written = adaln._adaln_bwd_kernel, 2 + has_summed + has_residual, 1 + has_gate
        yield _adaln_variant("adaln_bwd", kernel, dtype, flags, unused, read, written, rows=1 + has_gate, sums=sums)


def _adaln_variant(
    name: str,
    kernel: Any,
    dtype: str,
    flags: dict[str, Any],
    unused: dict[str, bool],
    read: int,
    written: int,
    rows: int,
    sums: int = 0,
) -> Variant:
    """Once, and wide: rows of scale, shift and gate read, rows of sums written. Narrow: mean and rstd."""
    activations, weights = _kinds(dtype)
    streamed: list[torch.Tensor | None] = [torch.empty(0, dtype=TORCH[activations])] * read
    tiling = adaln._tile(CHANNELS, streamed, sums > 0)
    costs = {"num_warps": tiling.pop("num_warps"), "tile": tiling["BLOCK"], "scalars": 2}
    costs |= {"once": rows * BYTES[weights] + 4 * sums, "stages": tiling["STAGES"]}
    return _flux_variant(name, kernel, dtype, flags | tiling, unused, moved=read + written, **costs)


def _gated_residual() -> Iterator[Variant]:
    """Narrow: one row of the gate, and of sums, for many tokens."""
    tiling = {"BLOCK_S": BLOCK_S, "BLOCK_C": BLOCK_C}
    tile = BLOCK_S * BLOCK_C
    for dtype in DTYPES:
        kernel = gated_residual._gated_residual_fwd_kernel
        yield _flux_variant("gated_residual_fwd", kernel, dtype, tiling, {}, moved=3, tile=tile, scalars=1)
    for dtype, flags in itertools.product(DTYPES, _flags("HAS_Y")):
        has_y = flags["HAS_Y"]
        unused = {"y_ptr": not has_y, "partials_ptr": not has_y}
        kernel, costs = gated_residual._gated_residual_bwd_kernel, {"moved": 2 + has_y, "scalars": 1 + has_y}
        yield _flux_variant("gated_residual_bwd", kernel, dtype, flags | tiling, unused, tile=tile, **costs)


def _gelu() -> Iterator[Variant]:
    """Narrow: one row of the bias for many tokens. A tile of the prefix is copied by the code that reads x."""
    tiling = {"BLOCK_S": gelu.BLOCK_S, "BLOCK_C": gelu.BLOCK_C}
    tile = gelu.BLOCK_S * gelu.BLOCK_C
    for dtype, flags in itertools.product(DTYPES, _flags("HAS_BIAS", "HAS_PREFIX")):
        has_bias, has_prefix = flags.values()
        unused = {"bias_ptr": not has_bias, "prefix_ptr": not has_prefix}
        kernel, costs = gelu._bias_gelu_fwd_kernel, {"tile": tile, "scalars": has_bias}
        yield _flux_variant("bias_gelu_fwd", kernel, dtype, flags | tiling, unused, moved=2, **costs)
    for dtype, flags in itertools.product(DTYPES, _flags("HAS_BIAS", "NEED_OUTPUT")):
        has_bias, need_output = flags.values()
        unused = {"bias_ptr": not has_bias, "output_ptr": not need_output}
        kernel, costs = gelu._bias_gelu_bwd_kernel, {"tile": tile, "scalars": has_bias}
        yield _flux_variant("bias_gelu_bwd", kernel, dtype, flags | tiling, unused, moved=3 + need_output, **costs)


def _qk_norm_rope() -> Iterator[Variant]:
    """Narrow: cos and sin of a pair, for many heads; weights of query and key; their rstd, of two heads; their sums."""
    _, _, tiling = qk_norm_rope._tiles(HEADS, HEAD_SIZE)
    tiling = {"HEAD_SIZE": HEAD_SIZE, **tiling}
    block, num_warps = qk_norm_rope.LAUNCH.block, qk_norm_rope.LAUNCH.num_warps
    scalars = block // (32 * num_warps) + 6
    launch = {"num_warps": num_warps, "tile": block}
    kernel = qk_norm_rope._qk_norm_rope_fwd_kernel
    for dtype, flags in itertools.product(DTYPES, _flags("HAS_TEXT")):
        has_text = flags["HAS_TEXT"]
        unused = {arg: not has_text for arg in kernel.arg_names if arg.startswith("text_")}
        costs = {"moved": 6 if has_text else 4, "scalars": scalars, **launch}
        yield _flux_variant("qk_norm_rope_fwd", kernel, dtype, flags | tiling, unused, **costs)
    kernel = qk_norm_rope._qk_norm_rope_bwd_kernel
    for dtype, flags in itertools.product(DTYPES, _flags("HAS_TEXT", "NEED_NORMS", "ROTATED")):
        has_text, need_norms, rotated = flags.values()
        if need_norms and rotated:
            continue  # the caller divides by the weights only where they are frozen
        unused = {arg: not has_text for arg in kernel.arg_names if arg.startswith("text_")}
        unused |= {"grad_v_ptr": not has_text}
        costs = {"moved": 8 if has_text else 6, "scalars": scalars + 2 * need_norms, "stages": 2, **launch}
        yield _flux_variant("qk_norm_rope_bwd", kernel, dtype, flags | tiling, unused, **costs)


def _candidates() -> Iterator[Variant]:
    """Without a limit on narrow accesses: most are the epilogue's, which one program makes."""
    shared = {"OBJECTIVE": 0, "REDUCTION": 2, "FROM_MEANS": False, "HAS_WEIGHT": True, "INVERT_WEIGHT": True}
    for dtype, flags in itertools.product(DTYPES, _flags("HAS_REF")):
        unused = {"ref_ptr": not flags["HAS_REF"]}
        stored = {arg: ("fp32" if arg in STORED_WIDE else "bf16") if dtype == MIXED else dtype for arg in LATENTS}
        types = {**{arg: f"*{kind}" for arg, kind in stored.items()}, **SPECIAL}
        sums = {"FROM_MEANS": False, **flags, "BLOCK": LAUNCH.block}
        yield _variant("early_sums", candidates._early_sums_kernel, dtype, types, sums, unused)
        for partials in transition.EPILOGUE_PARTIALS:
            tile = {"BLOCK_B": transition.EPILOGUE_TILE // partials, "BLOCK_P": partials}
            every = {**shared, **flags, "VELOCITY_KL": flags["HAS_REF"], **tile}
            kernel = candidates._guard_forward_kernel
            yield _variant("guard_forward", kernel, dtype, types, every | {"BLOCK": LAUNCH.block}, unused)
            if dtype == "fp32":
                kernel = candidates._waiting_epilogue_kernel
                yield _variant("waiting_epilogue", kernel, dtype, SPECIAL, every, {}, transition.EPILOGUE_WARPS)
