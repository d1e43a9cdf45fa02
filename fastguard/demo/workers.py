"""Runs the demo's training runs in several worker processes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import traceback
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from fastguard.demo.config import DemoConfig
from fastguard.utils.quiet import quiet_libraries
from fastguard.utils.signals import ENDING, handled_by, when_parent_ends

if TYPE_CHECKING:  # a worker imports this file before it can be quiet
    from fastguard.demo.experiment import DemoRun, Task, Tick

FOR_THE_PARENT = [number for number in ENDING if number != signal.SIGTERM]
"""Signals that workers leave to their parent, which ends them by SIGTERM."""


def run_in_workers(config: DemoConfig, tasks: list[Task], workers: int, tick: Tick) -> Generator[DemoRun, None, None]:
    """`workers` CPU processes of one thread each take the tasks in order; runs arrive as they finish.

    The models must be in the cache already: every worker loads them from there. Workers ignore Ctrl-C and what a
    scheduler sends, which reach the whole process group; closing the generator (as a KeyboardInterrupt here does)
    ends them.
    """
    context = multiprocessing.get_context("spawn")
    todo, done = context.Queue(), context.Queue()
    for item in [*tasks, *[None] * workers]:
        todo.put(item)
    processes = [context.Process(target=_work, args=(config, todo, done), daemon=True) for _ in range(workers)]
    try:
        with handled_by(signal.SIG_IGN, FOR_THE_PARENT):  # inherited by the children from their first instruction
            for process in processes:
                process.start()
        remaining = len(tasks)
        while remaining:
            kind, content = _receive(done, processes)
            if kind == "error":
                raise RuntimeError(f"a worker process failed:\n{content}")
            if kind == "tick":
                tick(*content)
            else:
                remaining -= 1
                yield content
    finally:
        for process in processes:
            if process.pid is not None:
                process.terminate()
                process.join()


def _receive(done: Any, processes: list[Any]) -> tuple[str, Any]:
    """The next message; RuntimeError if a worker died without one (killed for memory, say)."""
    while True:
        try:
            return done.get(timeout=1.0)
        except queue.Empty:
            dead = [p.exitcode for p in processes if p.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"a worker process ended with exit code {dead[0]}") from None


def _work(config: DemoConfig, todo: Any, done: Any) -> None:
    """A worker's life: tasks until the sentinel; messages are ("tick" | "run" | "error", content)."""
    when_parent_ends(lambda: os._exit(1))  # nobody would read its results
    quiet_libraries()
    try:
        import torch

        from fastguard.demo.backbone import prepare
        from fastguard.demo.experiment import run_here

        torch.set_num_threads(1)
        models = prepare(config, torch.device("cpu"))
        for task in iter(todo.get, None):
            for run in run_here(config, models, [task], lambda *progress: done.put(("tick", progress))):
                done.put(("run", run))
    except Exception:
        done.put(("error", traceback.format_exc()))
