"""What a call of the loss costs the host: its Python, without the kernels, and the CPU backend on small samples.

    python benchmarks/bench_host.py

"python" is the Triton backend with launches that do nothing. "launched" has Triton's own part of each launch too, but
not the driver's. A GPU's kernels run beside this. The others are CPU backends, in the same run and by turns.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import naive
import rows
import torch
from bench_loss import assert_correct, both, loss_forms
from launches import without_launches
from operator_calls import FP32
from rows import Measured
from stub_driver import stub_driver
from timing import call_times
from torch import Tensor

from fastguard.kernels.common import interpreted

BATCHES, ELEMENTS = (1, 8, 64), (16, 4096, 65_536)


def measure(batch: int, elements: int, backend: str = "inductor") -> Measured:
    inputs, losses = naive.make_inputs((batch, elements), FP32), loss_forms(backend)
    assert_correct(inputs, losses)
    yield from _times(losses, inputs, "{} from Python")
    on_triton = partial(naive.fused_guard_loss, backend="triton")
    with without_launches():
        yield from _times({"python": on_triton}, inputs, "{} on the host")
    if not interpreted():
        with stub_driver():
            yield from _times({"launched": on_triton}, inputs, "{} on the host")


def _times(losses: dict[str, Callable[[naive.Inputs], Tensor]], inputs: naive.Inputs, phase: str) -> Measured:
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, loss in losses.items():
        runs[name, phase.format("forward")] = partial(loss, inputs)
        runs[name, phase.format("both")] = partial(both, loss, inputs)
    for (name, of), times in call_times(runs, False).items():
        yield name, of, times


def cases(toy: bool) -> rows.Cases:
    if toy:
        return {"2x16 fp32": partial(measure, 2, 16, "eager")}
    return {f"{b}x{d} fp32": partial(measure, b, d) for d in ELEMENTS for b in BATCHES}


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows.main(__doc__, lambda args: ("host", cases(args.toy)), needs_gpu=False)
