"""Training runs as processes: each has its own, so that its memory is its own and a crash ends no other."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from fastguard.config import Recipe
from fastguard.errors import UserError
from fastguard.utils.rows import read_rows
from fastguard.utils.signals import ENDING, INTERRUPTED, handled_by, when_parent_ends
from fastguard.utils.terminal import say

Train = Callable[[Recipe, str], int]
"""what trains: a recipe and how to resume -> exit code; a function of a module, for other processes to import"""
LOG, COSTS = "train.log", "processes.jsonl"
"""In the folder of a run: what it said, and what each of its processes took (several, if it was resumed)."""


@dataclass(frozen=True)
class Cost:
    """What a run took."""

    seconds: float
    """wall time, with the loading of models, evaluations and checkpoints"""
    peak_bytes: int
    """largest resident set of a process, with its libraries"""


@dataclass(frozen=True)
class Run:
    """A run whose process is there."""

    recipe: Recipe
    said: int
    """bytes of its log before this process"""


@dataclass(frozen=True)
class Ended(Run):
    """A run whose process has ended."""

    exit_code: int

    @property
    def last_words(self) -> str:
        """How it ended, and the last line of what it said."""
        log = self.recipe.run.dir / LOG
        said = log.read_bytes()[self.said :].decode(errors="replace").strip() if log.is_file() else ""
        how = f"exit code {self.exit_code}" if self.exit_code >= 0 else f"killed by signal {-self.exit_code}"
        return f"{how}: {said.splitlines()[-1] if said else 'it said nothing'}"


def run_all(recipes: Sequence[Recipe], workers: int, train: Train) -> Generator[Ended, None, None]:
    """Train the recipes in order, at most `workers` at once; each is given as its process ends.

    The first one is alone until it trains: what it makes on its way there (a cache of weights, of encoded prompts) is
    there for the others. Closing the generator, as a KeyboardInterrupt here does, asks the runs to save and to stop,
    and waits for that; a second interrupt ends them at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastguard.compare.server", __name__, train.__module__])
    waiting, running = deque(recipes), dict[Any, Run]()
    heard = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
    alone, caught = True, list[int]()
    try:
        while waiting or running:
            while waiting and len(running) < (1 if alone else workers):
                recipe = waiting.popleft()
                process = context.Process(target=_work, args=(train, recipe, os.getcwd(), dict(os.environ), heard))
                # The first start waits for the server's imports. A signal meanwhile ends all once this run is known.
                with handled_by(lambda number, frame: caught.append(number)):
                    said = _size(recipe.run.dir / LOG)
                    try:
                        process.start()
                        running[process] = Run(recipe, said)
                    except (EOFError, OSError):  # the server has heard the signal, too, before it could ignore it
                        if not caught:
                            raise
                if caught:
                    raise KeyboardInterrupt
            connection.wait([process.sentinel for process in running], timeout=1.0)
            over = [process for process in running if not process.is_alive()]
            alone = alone and not over and not any(trains(run.recipe) for run in running.values())
            for process in over:
                run = running.pop(process)
                yield Ended(run.recipe, run.said, process.exitcode)
    finally:
        _stop(list(running))


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


def trains(recipe: Recipe) -> bool:
    """Whether a run has done its first epoch."""
    metrics = recipe.run.dir / "metrics.jsonl"
    return metrics.is_file() and metrics.stat().st_size > 0


def _stop(processes: Sequence[Any]) -> None:
    try:
        while alive := [process for process in processes if process.is_alive()]:
            for process in alive:
                process.terminate()  # again, as one that only starts may not have heard it
            alive[0].join(1.0)
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise


def _work(train: Train, recipe: Recipe, folder: str, environment: dict[str, str], heard: Sequence[int]) -> None:
    """The life of a run's process, which hears these signals; what it says goes to the log in the run's folder."""
    for number in heard:
        signal.signal(number, signal.default_int_handler)
    when_parent_ends(lambda: os.kill(os.getpid(), signal.SIGTERM))
    os.chdir(folder)  # the server may have another one, and another environment
    os.environ.clear()
    os.environ.update(environment)
    log = os.open(recipe.run.dir / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    sys.exit(_train(train, recipe))


def _train(train: Train, recipe: Recipe) -> int:
    """The exit code, as that of `fastguard train`."""
    start = time.monotonic()
    _note(recipe, {"began": time.time()})
    try:
        return train(recipe, "auto")
    except UserError as error:
        say(f"fastguard: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        say(traceback.format_exc())
        return 1
    finally:
        # Linux counts in KiB.
        cost = Cost(time.monotonic() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        _note(recipe, dataclasses.asdict(cost))


def _note(recipe: Recipe, row: dict[str, float]) -> None:
    with (recipe.run.dir / COSTS).open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def cost_of(folder: Path) -> Cost | None:
    """What the processes of a run took together; None where one of them was killed before it could write that down."""
    rows = read_rows(folder / COSTS)
    ends = [row for row in rows if "seconds" in row and "peak_bytes" in row]
    if not ends or len(rows) != 2 * len(ends):
        return None
    return Cost(sum(row["seconds"] for row in ends), max(row["peak_bytes"] for row in ends))
