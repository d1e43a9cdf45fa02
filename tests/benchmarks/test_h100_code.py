"""The checker of the machine code: that it compiles real variants, knows every kernel, and can find fault.

`make test` runs the checker over all variants; here it is shown that a bad kernel does not pass.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"

# A stride that may not be 1 (narrow loads), and a tile that is needed twice and that no register file holds (spills).
BAD_KERNEL = """
from dataclasses import replace
import triton, triton.language as tl

@triton.jit
def bad_kernel(velocity_ptr, grad_ptr, step, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    value = tl.load(velocity_ptr + step * lanes).to(tl.float32)
    tl.store(grad_ptr + lanes, value / tl.sum(value))

@triton.jit
def uneven_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), x * tl.sum(x * x))

for block in (32, 64):  # one element a thread, and two
    variant = h100_code.Variant(
        "uneven", uneven_kernel, {"x_ptr": "*fp32", "out_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": block}, 1
    )
    print(h100_code.faults(variant, h100_code.compile_variant(variant)))

variant = h100_code.Variant(
    "bad", bad_kernel, {"velocity_ptr": "*bf16", "grad_ptr": "*fp32", "step": "i32", "BLOCK": "constexpr"},
    {"BLOCK": 32768}, num_warps=4, tile=32768, scalars=0, least=6, stages=2,
)
print(h100_code.faults(variant, h100_code.compile_variant(variant)))
print(h100_code.faults(replace(variant, least=None), h100_code.compile_variant(variant, disassemble=False)))
for start in ("transition_bwd bf16", "adaln_bwd bf16"):
    good = next(variant for variant in variants if variant.name.startswith(start))
    print(h100_code.faults(good, h100_code.compile_variant(good)))
print(h100_code.faults(replace(good, scalars=1, once=0), h100_code.compile_variant(good)))
"""

COMPILED = """
print(h100_code.compile_variant(next(v for v in variants if v.name.startswith("guard_forward bf16"))).sass)
"""
KERNELS = r"print(*sorted({v.kernel.__name__ for v in variants}), sep='\n')"
PREAMBLE = "import h100_code\nvariants = h100_code.all_variants().values()\n"
SEPARATOR = "----"


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What BAD_KERNEL, KERNELS and COMPILED print, each in lines, from one script: to list all variants takes seconds.

    It compiles kernels, so it does not run in this process, where they may be interpreted.
    """
    script = tmp_path_factory.mktemp("h100") / "script.py"
    script.write_text(PREAMBLE + f"\nprint({SEPARATOR!r})\n".join([BAD_KERNEL, KERNELS, COMPILED]))
    environ = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environ["PYTHONPATH"] = str(BENCHMARKS)
    result = subprocess.run([sys.executable, script], env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [part.strip().splitlines() for part in result.stdout.split(f"\n{SEPARATOR}\n")]


def test_a_bad_kernel_is_found_and_a_good_one_passes(printed: list[list[str]]) -> None:
    uneven, even, bad, not_disassembled, *good, strict = printed[0]
    assert "lanes round a sum differently" in uneven
    assert even == "[]"
    for fault in ("spills", "narrow accesses", "bytes per element, 6 needed", "no load is staged"):
        assert fault in bad
    assert re.fullmatch(r"\['spills \(\d+\)'\]", not_disassembled)
    assert good == ["[]", "[]"]
    narrow = "'2 narrow accesses, 1 expected (values that serve many elements)'"
    assert strict == f"[{narrow}, '8 bytes per element, 6 needed']"


def test_every_kernel_is_in_the_list(printed: list[list[str]]) -> None:
    sources = "".join(path.read_text() for path in [*(ROOT / "kernels").glob("*.py"), BENCHMARKS / "candidates.py"])
    assert printed[1] == sorted(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))


def test_one_launch_reads_the_others_sums_after_they_were_written(printed: list[list[str]]) -> None:
    """In the machine code: stored, fenced, counted, the first-level cache dropped, a barrier, and only then loaded."""
    sass = "\n".join(printed[2])
    (counted,) = re.finditer(r"ATOMG\S*\.STRONG\.GPU", sass)
    before, after = sass[: counted.start()], sass[counted.end() :]
    stored, fenced = before.rindex("STG.E"), before.rindex("MEMBAR.ALL.GPU")
    assert stored < fenced
    assert after.index("CCTL.IVALL") < after.index("BAR.SYNC") < after.index("LDG.E")
    assert "LDG.E" not in before[fenced:]
    assert "CONSTANT" not in sass  # no load may go through the read-only cache
