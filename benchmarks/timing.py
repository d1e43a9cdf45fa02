"""How a GPU is measured: CUDA graphs of many launches, percentiles, bandwidth from a count of bytes, peak memory."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# Twice the L2 of an H100 or H200 (50 to 60 MB), in all sets of inputs together: every launch finds its own cold.
ROTATED_BYTES = 120 * 2**20
REPLAYS = 25
CALL_ROUNDS, CALLS = 10, 10


def rotations(set_bytes: int, cuda: bool) -> int:
    """How many sets of inputs of this size to launch over in turn."""
    return max(1, math.ceil(ROTATED_BYTES / set_bytes)) if cuda else 2


def percentiles(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {"p20_us": deciles[1], "p50_us": deciles[4], "p80_us": deciles[7]}


def graph_times(runs: Sequence[Callable[[], Any]], cuda: bool) -> dict[str, float]:
    """Time per run in microseconds: one CUDA graph holds all runs, and each replay gives one sample."""
    if not cuda:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for run in runs:
                run()
            times.append(1e6 * (time.perf_counter() - start) / len(runs))
        return percentiles(times)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile, and fill the allocator, before capture
        for _ in range(2):
            for run in runs:
                run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [run() for run in runs]  # all kept, or the graph would write each result over the last one, in L2
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPLAYS)]
    for _ in range(3):
        graph.replay()
    for before, after in events:
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    del outputs
    return percentiles([1e3 * before.elapsed_time(after) / len(runs) for before, after in events])


def call_times(runs: Mapping[Any, Callable[[], Any]], cuda: bool) -> dict[Any, dict[str, float]]:
    """Time of a plain call from Python, launches included, in microseconds.

    In blocks by turns, so that a drift of the machine meets all alike.
    """
    wait = torch.cuda.synchronize if cuda else lambda: None
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for _ in range(CALL_ROUNDS):
        for name, run in runs.items():
            time.sleep(0.05)  # until the threads of the block before have stopped spinning
            for index in range(-5, CALLS):
                wait()
                start = time.perf_counter()
                run()
                wait()
                if index >= 0:
                    times[name].append(1e6 * (time.perf_counter() - start))
    return {name: percentiles(found) for name, found in times.items()}


def call_time(run: Callable[[], Any], cuda: bool) -> dict[str, float]:
    return call_times({"": run}, cuda)[""]


def attempt(measure: Callable[..., Mapping[str, Any]], *args: Any) -> Mapping[str, Any]:
    """Numbers, or that there was no room for them."""
    try:
        return measure(*args)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return {"out of memory": str(error).splitlines()[0]}


def with_bandwidth(times: dict[str, float], moved_bytes: int) -> dict[str, float]:
    return {**times, "moved_bytes": moved_bytes, "bandwidth_gb_per_s": moved_bytes / times["p50_us"] / 1e3}


def copy_times(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, float]:
    """The bandwidth to compare with: of the driver's copy or of a kernel that reads and writes alike, the faster."""
    cuda, n_bytes = device == "cuda", math.prod(shape) * dtype.itemsize
    sources = [torch.randn(shape, device=device).to(dtype) for _ in range(rotations(n_bytes, cuda))]
    pairs = [(source, torch.empty_like(source)) for source in sources]
    ways = [
        graph_times([partial(target.copy_, source) for source, target in pairs], cuda),
        graph_times([partial(torch.neg, source, out=target) for source, target in pairs], cuda),
    ]
    return with_bandwidth(min(ways, key=lambda times: times["p50_us"]), 2 * n_bytes)


def kept_bytes(run: Callable[[], Any], held: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that a forward pass saves for backward, beyond those of the tensors `held` anyway."""
    known = {tensor.untyped_storage().data_ptr() for tensor in held}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its graph alive, and itself with it

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()  # alive while counting: a freed storage's address could come again
    del outputs
    return sum(kept.values())


def peak_bytes(run: Callable[[], Any], cuda: bool) -> int:
    """Largest number of bytes that `run` holds at once beyond what was there before."""
    run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = top = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top
