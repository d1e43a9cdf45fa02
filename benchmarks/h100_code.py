"""The machine code of every kernel variant on an H100, compiled on any machine and read back.

    python benchmarks/h100_code.py [--sass DIR] [--faults-only]

Prints, per variant: registers, spilled bytes, the global accesses by width, and the bytes each element costs beside
the least possible. Exits with 1 on a spill, on an access narrower than 16 bytes where latents are read or written,
or on more bytes than the least. Needs no GPU: ptxas, cuobjdump and nvdisasm come with triton.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastguard.kernels import sde_step, transition
from fastguard.kernels.common import LAUNCH

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
MIXED = "bf16,fp32"
DTYPES = (*BYTES, MIXED)
# What holds latents; and what is float32 beside a bf16 velocity: latents, or a drawn sample beside its means.
LATENTS = {"velocity_ptr", "old_ptr", "noise_ptr", "ref_ptr", "grad_ptr", "latents_ptr", "next_ptr"}
STORED_WIDE = {"latents_ptr", "next_ptr", "noise_ptr"}
SPECIAL = {"seeds_ptr": "*i64", "clipped_ptr": "*i1"}


@dataclass(frozen=True)
class Variant:
    """One kernel with its types and flags.

    scalars: accesses to per-sample values (coefficients, seeds, sums), which are narrow by nature.
    least: bytes of latents that an element must cost; 0 for kernels that touch no latents.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    scalars: int
    least: int


@dataclass(frozen=True)
class Code:
    """What the compiler made of a variant."""

    registers: int
    spilled_bytes: int
    accesses: Counter[str]
    bytes_per_element: float
    sass: str


def variants() -> Iterator[Variant]:
    """Every combination of flags, for one dtype throughout and for the mixture that is stored most often."""
    both = (False, True)
    for dtype, from_means, has_ref in itertools.product(DTYPES, both, both):
        flags: dict[str, Any] = {"FROM_MEANS": from_means, "HAS_REF": has_ref, "BLOCK": LAUNCH.block}
        unused: tuple[str, ...] = () if has_ref else ("ref_ptr",)
        yield _variant("sums", transition._transition_sums_kernel, dtype, flags, scalars=2 + has_ref, unused=unused)
    for dtype, from_means, has_drift, has_ref in itertools.product(DTYPES, both, both, both):
        flags = {"FROM_MEANS": from_means, "HAS_DRIFT": has_drift, "HAS_REF": has_ref, "BLOCK": LAUNCH.block}
        reads = {"velocity_ptr": has_drift or has_ref, "old_ptr": from_means or has_drift, "ref_ptr": has_ref}
        unused = tuple(name for name, read in reads.items() if not read)
        scalars = 2 + has_drift + has_ref
        yield _variant("bwd", transition._transition_bwd_kernel, dtype, flags, scalars=scalars, unused=unused)
    for dtype, has_noise in itertools.product(DTYPES, both):
        flags = {"HAS_NOISE": has_noise, "BLOCK": LAUNCH.block}
        unused = () if has_noise else ("seeds_ptr", "std_ptr", "noise_ptr")
        scalars = 4 if has_noise else 2
        yield _variant("sde_step", sde_step._sde_step_kernel, dtype, flags, scalars=scalars, unused=unused)
    for objective, reduction, flag_values in itertools.product(range(3), range(3), itertools.product(both, repeat=5)):
        from_means, has_weight, invert, has_ref, velocity_kl = flag_values
        if (invert and not has_weight) or (velocity_kl and (from_means or not has_ref)):
            continue  # the launcher never asks for these
        flags = {
            "OBJECTIVE": objective, "REDUCTION": reduction, "FROM_MEANS": from_means, "HAS_WEIGHT": has_weight,
            "INVERT_WEIGHT": invert, "HAS_REF": has_ref, "VELOCITY_KL": velocity_kl,
        }  # fmt: skip
        absent = {"velocity_coef_ptr": from_means, "weight_ptr": not has_weight}
        unused = tuple(name for name, is_absent in absent.items() if is_absent)
        for partials in transition.EPILOGUE_PARTIALS:
            tile = {"BLOCK_B": transition.EPILOGUE_TILE // partials, "BLOCK_P": partials}
            yield _variant("epilogue", transition._guard_epilogue_kernel, "fp32", {**flags, **tile}, unused=unused)


def with_sizes_of_one(variant: Variant) -> Variant:
    """The same kernel where every size and stride is 1: Triton makes constants of those, its interpreter does not."""
    sizes = [arg for arg, kind in variant.signature.items() if kind == "i32"]
    signature = {**variant.signature, **dict.fromkeys(sizes, "constexpr")}
    constexprs = {**variant.constexprs, **dict.fromkeys(sizes, 1)}
    return replace(variant, name=f"{variant.name} sizes=1", signature=signature, constexprs=constexprs, least=0)


def _variant(
    name: str,
    kernel: Any,
    dtype: str,
    flags: dict[str, Any],
    *,
    scalars: int = 0,
    unused: tuple[str, ...] = (),
) -> Variant:
    """Types by the naming rule of the kernels: *_ptr, stride_*, n_*, and float scalars."""
    signature = {}
    constexprs = dict(flags)
    least = 0
    for arg in kernel.arg_names:
        if arg in flags or arg in unused:
            signature[arg] = "constexpr"
            constexprs.setdefault(arg, None)
        elif arg in LATENTS:
            stored = ("fp32" if arg in STORED_WIDE else "bf16") if dtype == MIXED else dtype
            signature[arg] = f"*{stored}"
            least += BYTES[stored]
        elif arg in SPECIAL:
            signature[arg] = SPECIAL[arg]
        elif arg.endswith("_ptr"):
            signature[arg] = "*fp32"
        elif arg.startswith(("stride_", "n_")):
            signature[arg] = "i32"
        else:
            signature[arg] = "fp32"
    label = "+".join(key.lower() for key, value in flags.items() if value is True)
    numbers = "".join(f" {key.lower()}={flags[key]}" for key in ("OBJECTIVE", "REDUCTION", "BLOCK_P") if key in flags)
    warps = transition.EPILOGUE_WARPS if name == "epilogue" else LAUNCH.num_warps
    return Variant(f"{name} {dtype} {label}{numbers}", kernel, signature, constexprs, warps, scalars, least)


def compile_variant(variant: Variant) -> Code:
    """Compile for sm_90 with the divisibility that Flux latents have, and read the machine code."""
    aligned = {"n_elements", "stride_velocity", "stride_old", "stride_noise", "stride_ref", "stride_latents"}
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, (arg, kind) in enumerate(variant.signature.items())
        if kind.startswith("*") or (kind == "i32" and arg in aligned)
    }
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, divisible)
    options = {"num_warps": variant.num_warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    # The report leaves out stack slots that ptxas spills to, so count the instructions as well.
    spilled = int(re.findall(r"LOCAL:(\d+)", usage)[0]) + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    accesses: Counter[str] = Counter()
    for kind, modifiers in re.findall(r"\b(LDG|STG|LDGSTS)((?:\.\w+)*)", sass):
        width = re.search(r"\.(128|64|U16|U8|S8)\b", modifiers)
        accesses[f"{kind}.{width.group(1) if width else '32'}"] += 1
    wide_bytes = 16 * sum(count for access, count in accesses.items() if access.endswith(".128"))
    per_element = wide_bytes * 32 * variant.num_warps / LAUNCH.block
    return Code(registers, spilled, accesses, per_element, sass)


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


def faults(variant: Variant, code: Code) -> list[str]:
    """What is wrong with a variant's code, in words."""
    found = []
    if code.spilled_bytes:
        found.append(f"spills ({code.spilled_bytes})")
    narrow = sum(count for access, count in code.accesses.items() if not access.endswith(".128"))
    if variant.least and narrow > variant.scalars:
        found.append(f"{narrow} narrow accesses, {variant.scalars} expected (per-sample values)")
    if variant.least and code.bytes_per_element != variant.least:
        found.append(f"{code.bytes_per_element:g} bytes per element, {variant.least} needed")
    return found


def report(variant: Variant, code: Code, sass_dir: Path | None, faults_only: bool) -> list[str]:
    """Print a variant's line, keep its machine code if asked to, and return its faults."""
    if sass_dir:
        sass_dir.mkdir(parents=True, exist_ok=True)
        (sass_dir / f"{variant.name.replace(' ', '_')}.sass").write_text(code.sass)
    found = faults(variant, code)
    if faults_only and not found:
        return found
    accesses = " ".join(f"{access}x{count}" for access, count in sorted(code.accesses.items()))
    cost = f"{code.bytes_per_element:10g} {variant.least:5d}" if variant.least else f"{'-':>10} {'-':>5}"
    print(f"{variant.name:58} {code.registers:4d} {code.spilled_bytes:6d} {cost}  {accesses}", flush=True)
    for fault in found:
        print(f"    FAULT: {fault}")
    return found


def _compile_by_name(name: str) -> Code:
    """For worker processes: kernels do not pickle, names do."""
    return compile_variant(next(variant for variant in all_variants() if variant.name == name))


def all_variants() -> list[Variant]:
    """The variants, and each kernel once more with every size 1."""
    everything = list(variants())
    widest = {variant.kernel: variant for variant in everything}  # the last of each kernel has every flag
    return everything + [with_sizes_of_one(variant) for variant in widest.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Machine code of every kernel variant on an H100; needs no GPU.")
    parser.add_argument("--sass", type=Path, metavar="DIR", help="keep the disassembly of each variant here")
    parser.add_argument("--faults-only", action="store_true", help="print only variants with faults, and the verdict")
    args = parser.parse_args()
    everything = all_variants()
    print(f"triton {triton.__version__}, sm_90, {len(everything)} variants")
    if not args.faults_only:
        print(f"{'kernel, dtype, flags':58} regs spills bytes/elem least  accesses")
    failed = 0
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        codes = pool.map(_compile_by_name, [variant.name for variant in everything])
        for variant, code in zip(everything, codes, strict=True):
            failed += bool(report(variant, code, args.sass, args.faults_only))
    print(f"{failed} variants with faults" if failed else "no spills, no narrow access to latents, no byte too many")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
