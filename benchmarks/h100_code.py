"""The machine code of every kernel variant on an H100, compiled on any machine and read back.

    python benchmarks/h100_code.py [--sass DIR] [--faults-only]

Prints, per variant: registers, spilled bytes, the global accesses by width, and the bytes each element costs beside
the least possible. Exits with 1 on a spill, on an access narrower than 16 bytes where latents or activations are read
or written, on more bytes than the least, or on a sum that the lanes of a warp round differently. Needs no GPU: ptxas,
cuobjdump and nvdisasm come with triton.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from h100_variants import Variant, all_variants
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """What the compiler made of a variant. sass, and the accesses in it, are empty where they were not asked for."""

    registers: int
    spilled_bytes: int
    uneven_sums: int
    """sums over a warp's lanes in which each lane contracts its own product, and so gets a result of its own"""
    accesses: Counter[str]
    sass: str

    def accesses_per_iteration(self, variant: Variant, *, wide: bool) -> float:
        """Accesses of 16 bytes, or of less; what is staged in shared memory stands in the code once per stage."""
        return sum(
            count / (variant.stages if access.startswith("LDGSTS") else 1)
            for access, count in self.accesses.items()
            if access.endswith(".128") == wide
        )

    def bytes_per_element(self, variant: Variant) -> float:
        """Bytes in wide accesses, without those that a program makes once and not in each iteration."""
        threads = 32 * variant.num_warps
        return 16 * self.accesses_per_iteration(variant, wide=True) * threads / variant.tile - variant.once


def compile_variant(variant: Variant, disassemble: bool = True) -> Code:
    """Compile for sm_90 with the divisibility that Flux's sizes have, and read the machine code."""
    divisible = {(index,): [["tt.divisibility", 16]] for index in variant.aligned}
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, divisible)
    options = {"num_warps": variant.num_warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name) if disassemble else ""  # takes longer than most compilations
    (registers,) = re.findall(r"REG:(\d+)", usage)
    spilled_bytes = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    accesses: Counter[str] = Counter()
    for kind, modifiers in re.findall(r"\b(LDG|STG|LDGSTS)\b((?:\.\w+)*)", sass):
        width = re.search(r"\.(128|64|U16|U8|S8)\b", modifiers)
        accesses[f"{kind}.{width.group(1) if width else '32'}"] += 1
    return Code(int(registers), spilled_bytes, _uneven_sums(compiled.asm["ptx"]), accesses, sass)


def _uneven_sums(ptx: str) -> int:
    """`own * own + other`, where other came from another lane, whose product was rounded."""
    others = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", ptx))
    addends = re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx)
    return sum(addend in others for addend in addends)


def _tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


def faults(variant: Variant, code: Code) -> list[str]:
    """What is wrong with a variant's code, in words."""
    found = []
    if code.spilled_bytes:
        found.append(f"spills ({code.spilled_bytes})")
    if code.uneven_sums:
        found.append(f"lanes round a sum differently ({code.uneven_sums})")
    if variant.least is None:
        return found
    narrow = code.accesses_per_iteration(variant, wide=False)
    if narrow > variant.scalars:
        found.append(f"{narrow:g} narrow accesses, {variant.scalars} expected (values that serve many elements)")
    if code.bytes_per_element(variant) != variant.least:
        found.append(f"{code.bytes_per_element(variant):g} bytes per element, {variant.least} needed")
    if variant.stages > 1 and "LDGSTS.128" not in code.accesses:
        found.append("no load is staged")
    return found


def report(variant: Variant, code: Code, faults_only: bool) -> bool:
    """Print a variant's line and its faults; whether it has any."""
    found = faults(variant, code)
    if found or not faults_only:
        accesses = " ".join(f"{access}x{count}" for access, count in sorted(code.accesses.items()))
        cost = f"{'-':>10} {'-':>5}"
        if variant.least is not None:
            cost = f"{code.bytes_per_element(variant):10g} {variant.least:5d}"
        print(f"{variant.name:80} {code.registers:4d} {code.spilled_bytes:6d} {cost}  {accesses}", flush=True)
    for fault in found:
        print(f"    FAULT: {fault}")
    return bool(found)


def _compile_by_name(name: str, everything: bool) -> Code:
    """For worker processes: kernels do not pickle, names do."""
    variant = all_variants()[name]
    return compile_variant(variant, everything or variant.least is not None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sass", type=Path, metavar="DIR", help="keep the disassembly of each variant here")
    parser.add_argument("--faults-only", action="store_true", help="print only variants with faults, and the verdict")
    args = parser.parse_args()
    print(f"triton {triton.__version__}, sm_90, {len(all_variants())} variants")
    if not args.faults_only:
        print(f"{'kernel, dtype, flags':80} regs spills bytes/elem least  accesses")
    failed = 0
    read_all = functools.partial(_compile_by_name, everything=bool(args.sass) or not args.faults_only)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        codes = pool.map(read_all, all_variants())
        for variant, code in zip(all_variants().values(), codes, strict=True):
            failed += report(variant, code, args.faults_only)
            if args.sass:
                args.sass.mkdir(parents=True, exist_ok=True)
                (args.sass / f"{variant.name.replace(' ', '_')}.sass").write_text(code.sass)
    verdict = "no spills, no narrow access where many elements are, no byte too many, no uneven sum"
    print(f"{failed} variants with faults" if failed else verdict)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
