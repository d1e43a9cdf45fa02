"""The checker of the machine code: that it compiles real variants, and that it can find fault.

`make test` runs the checker over all variants; here it is shown that a bad kernel does not pass.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A stride that may not be 1 (narrow loads), and a tile that is needed twice and that no register file holds (spills).
BAD_KERNEL = """
import sys
sys.path.insert(0, {benchmarks!r})
import triton, triton.language as tl
import h100_code

@triton.jit
def bad_kernel(velocity_ptr, grad_ptr, step, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    value = tl.load(velocity_ptr + step * lanes).to(tl.float32)
    tl.store(grad_ptr + lanes, value / tl.sum(value))

variant = h100_code.Variant(
    "bad", bad_kernel, {{"velocity_ptr": "*bf16", "grad_ptr": "*fp32", "step": "i32", "BLOCK": "constexpr"}},
    {{"BLOCK": 32768}}, num_warps=4, scalars=0, least=6,
)
print(h100_code.faults(variant, h100_code.compile_variant(variant)))
good = next(variant for variant in h100_code.variants() if variant.name.startswith("bwd bf16"))
print(h100_code.faults(good, h100_code.compile_variant(good)))
"""


def test_a_bad_kernel_is_found_and_a_good_one_passes(tmp_path: Path) -> None:
    script = tmp_path / "bad.py"
    script.write_text(BAD_KERNEL.format(benchmarks=str(ROOT / "benchmarks")))
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    bad, good = result.stdout.splitlines()
    assert "spills" in bad
    assert "narrow accesses" in bad
    assert "bytes per element, 6 needed" in bad
    assert good == "[]"
