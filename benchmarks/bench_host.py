"""What a call of the loss costs the host: its Python, without the kernels, and the CPU backend on small samples.

    python benchmarks/bench_host.py

"host" is the Triton backend with launches that do nothing: what Python costs beside a GPU's kernels, except for
Triton's own launcher. The other contenders are CPU backends, in the same run and by turns.
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
from naive import Inputs
from operator_calls import FP32
from rows import Measured
from timing import call_times

import fastguard as fg

BATCHES, ELEMENTS = (1, 8, 64), (16, 4096, 65_536)


def host_loss(inputs: Inputs) -> Any:
    """The package's loss on the Triton backend."""
    with_options = {"clip_range": naive.CLIP_RANGE, "backend": "triton"}
    return fg.guard_loss(
        inputs.velocity, inputs.old_velocity, inputs.noise, inputs.advantages, inputs.step, **with_options
    ).loss


def measure(batch: int, elements: int, backend: str = "inductor") -> Measured:
    inputs, losses = naive.make_inputs((batch, elements), FP32), loss_forms(backend)
    assert_correct(inputs, losses)
    phases: dict[str, Callable[..., Any]] = {"forward": lambda loss, inputs: loss(inputs), "both": both}
    runs = {(name, phase): partial(run, loss, inputs) for name, loss in losses.items() for phase, run in phases.items()}
    with without_launches():
        host = {("host", phase): partial(run, host_loss, inputs) for phase, run in phases.items()}
        for (name, phase), times in call_times(runs | host, False).items():
            yield name, f"{phase} from Python", times


def cases(toy: bool) -> rows.Cases:
    if toy:
        return {"2x16 fp32": partial(measure, 2, 16, "eager")}
    return {f"{b}x{d} fp32": partial(measure, b, d) for d in ELEMENTS for b in BATCHES}


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    rows.main(__doc__, lambda args: ("host", cases(args.toy)), needs_gpu=False)
