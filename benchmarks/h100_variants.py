"""Every variant of every kernel at the sizes of Flux, and what its code may cost: the list for h100_code.py.

The variants are what the operator calls launch, each with every combination of options.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import candidates
import torch
from launches import Launched, recorded
from operator_calls import BF16, FP16, FP32, NAMES, Size, calls, compiled_calls
from torch import Tensor

KINDS = {**NAMES, torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1"}
# float32 beside bf16: latents, or a drawn sample beside its means; weights beside activations. First float32, the dtype
# of those kernels that know no other.
DTYPES = ((FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32))
TINY = Size(samples=1, image=2, text=1, heads=1, head=2)
LATENTS = {
    "velocity_ptr", "old_ptr", "noise_ptr", "ref_ptr", "grad_ptr", "latents_ptr", "next_ptr", "given_ptr",
}  # fmt: skip
# Of the kernels of blocks: what is not an activation.
WEIGHTS = {
    "scale_ptr", "shift_ptr", "gate_ptr", "bias_ptr",
    "query_norm_ptr", "key_norm_ptr", "text_query_norm_ptr", "text_key_norm_ptr",
}  # fmt: skip
STATISTICS = {"mean_ptr", "rstd_ptr", "partials_ptr", "cos_ptr", "sin_ptr"}
# What is a multiple of 16 beside the strides of Flux's tensors, and the one stride that is not.
ALIGNED = {"n_elements", "n_channels", "n_prefix"}
NOT_ALIGNED = {"stride_grad_loss"}


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


@functools.cache
def all_variants() -> dict[str, Variant]:
    """The variants by name, each kernel once more with every size 1, and those whose tile depends on the size with
    the least of channels."""
    found: dict[Any, Variant] = {}
    for kinds in DTYPES:
        dtype = ",".join(KINDS[kind] for kind in dict.fromkeys(kinds))
        with recorded() as launches:
            for call in compiled_calls(*kinds):
                call.run()
            _launch_candidates(*kinds)
        for launch in launches:
            variant = _variant(launch, dtype)
            found.setdefault((variant.kernel, *variant.signature.items(), *variant.constexprs.items()), variant)
    widest = {variant.kernel: variant for variant in sorted(found.values(), key=_n_used)}
    with recorded() as launches:
        for call in calls(FP32, "cpu", TINY):
            call.run()
    for launch in launches:
        variant = _variant(launch, KINDS[FP32])
        variant = replace(variant, name=f"{variant.name} {TINY.width} channels", least=None)
        found.setdefault((variant.kernel, *variant.signature.items(), *variant.constexprs.items()), variant)
    return {variant.name: variant for variant in (*found.values(), *map(_with_sizes_of_one, widest.values()))}


def _n_used(variant: Variant) -> int:
    """Flags that are set, and pointers."""
    flags = sum(value is True for value in variant.constexprs.values())
    return flags + sum(kind.startswith("*") for kind in variant.signature.values())


def _with_sizes_of_one(variant: Variant) -> Variant:
    """The same kernel where every size and stride is 1: Triton makes constants of those, its interpreter does not."""
    sizes = [arg for arg, kind in variant.signature.items() if kind == "i32"]
    signature = {**variant.signature, **dict.fromkeys(sizes, "constexpr")}
    constexprs = {**variant.constexprs, **dict.fromkeys(sizes, 1)}
    return replace(variant, name=f"{variant.name} sizes=1", signature=signature, constexprs=constexprs, least=None)


def _launch_candidates(dtype: torch.dtype, beside: torch.dtype) -> None:
    """The kernels of candidates.py, with each tile of the epilogue."""
    for tokens in (1024, 4096):
        velocity, noise, one = torch.empty(2, 64 * tokens, dtype=dtype), torch.empty(2, 64 * tokens), torch.empty(2)
        for ref in (None, velocity):
            args = (velocity, velocity, noise.to(beside), ref, one, one, one, one)
            options = candidates.OPTIONS | {"velocity_kl": ref is not None}
            candidates.guard_forward_one_launch(*args, **options)
            with candidates.early_epilogue():
                candidates.two_launches(*args, **options)


def _variant(launch: Launched, dtype: str) -> Variant:
    """Types as launched."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for arg in launch.kernel.arg_names:
        value = launch.args[arg]
        if arg.isupper() or value is None:
            signature[arg], constexprs[arg] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[arg] = f"*{KINDS[value.dtype]}"
        else:
            signature[arg] = "fp32" if isinstance(value, float) else "i32"
    flags = {arg: value for arg, value in constexprs.items() if arg.isupper()}
    stem = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    label = "+".join(key.lower() for key, value in flags.items() if value is True)
    numbers = "".join(f" {key.lower()}={flags[key]}" for key in ("OBJECTIVE", "REDUCTION", "BLOCK_P") if key in flags)
    costs = _costs(stem, flags, launch)
    return Variant(f"{stem} {dtype} {label}{numbers}", launch.kernel, signature, constexprs, launch.num_warps, **costs)


def _costs(stem: str, flags: dict[str, Any], launch: Launched) -> dict[str, int]:
    """Nothing for an epilogue, which one program makes, and for the candidates, whose accesses are mostly its."""
    tensors = {arg: value for arg, value in launch.args.items() if isinstance(value, Tensor) and value.numel()}
    sizes = {arg: tensor.element_size() for arg, tensor in tensors.items()}
    activations = [size for arg, size in sizes.items() if arg not in WEIGHTS | STATISTICS]
    if stem in ("transition_sums", "transition_bwd", "sde_step"):
        least = sum(size for arg, size in sizes.items() if arg in LATENTS)
        used = flags.get("HAS_DRIFT", False) + flags.get("HAS_REF", False) + 3 * flags.get("HAS_ERRORS", False)
        scalars = 2 + (2 * flags["HAS_NOISE"] if stem == "sde_step" else used)
        return {"tile": flags["BLOCK"], "least": least, "scalars": scalars}
    if stem.startswith("adaln"):  # once: rows of scale, shift and gate read, rows of sums written; narrow: mean, rstd
        rows = sum(size for arg, size in sizes.items() if arg in WEIGHTS)
        sums = 2 * flags.get("NEED_MODULATION", False) + (stem == "adaln_bwd" and flags["HAS_RESIDUAL"])
        return {
            "tile": flags["BLOCK"], "least": sum(activations), "once": rows + 4 * sums, "scalars": 2,
            "stages": flags["STAGES"],
        }  # fmt: skip
    if stem.startswith("gated_residual"):  # narrow: one row of the gate, and of sums, for many tokens
        scalars = 1 + flags.get("HAS_Y", False)
        return {"tile": flags["BLOCK_S"] * flags["BLOCK_C"], "least": sum(activations), "scalars": scalars}
    if stem.startswith("bias_gelu"):  # narrow: one row of the bias for many tokens
        # The code that reads x copies the prefix; the gradient is both read and written.
        moved = 2 if stem == "bias_gelu_fwd" else 3 + flags["NEED_OUTPUT"]
        tile = flags["BLOCK_S"] * flags["BLOCK_C"]
        return {"tile": tile, "least": moved * activations[0], "scalars": int(flags["HAS_BIAS"])}
    if stem.startswith("swiglu"):  # the code that reads the activated half of x copies the prefix
        moved = 3 if stem == "swiglu_fwd" else 5 + flags["NEED_OUTPUT"]
        return {"tile": flags["BLOCK_S"] * flags["BLOCK_C"], "least": moved * activations[0]}
    if stem == "dequantize_rows":  # narrow: a scale per row
        return {
            "tile": flags["BLOCK_N"] * flags["BLOCK_C"],
            "least": sizes["codes_ptr"] + sizes["out_ptr"],
            "scalars": 4,
        }
    if stem == "dequantize_blocks":  # a tile is of bytes, with two weights each, which are looked up in a table
        tile = flags["BLOCKS"] * flags["HALF_BLOCK"]
        return {"tile": tile, "least": 1 + 2 * sizes["out_ptr"], "scalars": 2 * tile // (32 * launch.num_warps) + 8}
    if stem.startswith("qk_norm_rope"):
        # Narrow: cos and sin of a pair, for many heads; weights of query and key; their rstd, of two heads; their sums.
        # A program takes tokens of one stream; the value of a single stream is not moved.
        backward = stem == "qk_norm_rope_bwd"
        tile = flags["BLOCK_S"] * flags["BLOCK_H"] * flags["BLOCK_D"]
        moved = (8 if flags["HAS_TEXT"] else 6) if backward else (6 if flags["HAS_TEXT"] else 4)
        scalars = tile // (32 * launch.num_warps) + 6 + 2 * (backward and flags["NEED_NORMS"])
        return {"tile": tile, "least": moved * activations[0], "scalars": scalars, "stages": 1 + backward}
    return {}
