"""`fastguard compare`: check all arms, train what is not yet trained, write the page whatever happens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from fastguard.backbones import family_of
from fastguard.compare.arms import Arm
from fastguard.compare.page import write_comparison
from fastguard.compare.processes import Train, run_all
from fastguard.compare.results import Results, read_finished
from fastguard.config import Recipe
from fastguard.errors import UserError
from fastguard.recipe import as_dict, differences
from fastguard.train.build import gather_prompts
from fastguard.train.checkpoint import checkpoint_name, checkpoints_in
from fastguard.train.state import for_processes
from fastguard.utils.files import parse_json, read_text, write_text, writing
from fastguard.utils.rows import read_rows
from fastguard.utils.signals import INTERRUPTED
from fastguard.utils.terminal import say

RECIPE = "compared.json"
"""In the folder of a run: the recipe that it was started with."""
MOST_SEEDS = 1000


def compare(arms: Sequence[Arm], seeds: int, out: Path, train: Train, workers: int | None = None) -> int:
    """Train every arm with every seed in `out`/ARM/seed_N, and write `out`/report.html and `out`/results.json.

    Runs that are finished there are not repeated, and others resume.

    Args:
        train: trains one recipe, see `processes.Train`.
        workers: processes that train at once; None takes 2, or 1 on a GPU or a single-core machine. On a CPU each has
            one thread.

    Returns the exit code: 0, 1 if a run failed, or 130 after Ctrl-C, which leaves a page of the finished runs.
    Raises UserError before anything is trained if an arm cannot be trained or compared, or a folder holds other runs.
    """
    arms = [Arm(arm.name, for_processes(arm.recipe, 1)) for arm in arms]
    workers = _checked(arms, seeds, workers)
    runs = {(arm.name, recipe.run.seed): recipe for i in range(seeds) for arm in arms for recipe in [arm.run(out, i)]}
    for recipe in runs.values():
        refuse_other_runs(recipe)
    open_ = {key: recipe for key, recipe in runs.items() if not is_finished(recipe)}
    if len(open_) < len(runs):
        say(f"{len(runs) - len(open_)} of {len(runs)} runs are finished already")
    failures: dict[tuple[str, int], str] = {}
    interrupted = False
    try:
        _train_all(runs, open_, workers, train, failures)
    except KeyboardInterrupt:
        interrupted = True
    found = [read_finished(*key, recipe.run.dir) for key, recipe in runs.items() if is_finished(recipe)]
    seen = list(dict.fromkeys(seed for _, seed in runs))
    results = Results(_title(arms[0].recipe), arms, seen, found, failures, workers)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        page = write_comparison(results, out)
    if interrupted:
        print(f"\ninterrupted: {len(found)} of {len(runs)} runs are finished, see {page}; the same command resumes")
        return INTERRUPTED
    print(f"report: {page.resolve()}")
    return 1 if failures else 0


def _checked(arms: Sequence[Arm], seeds: int, workers: int | None) -> int:
    """The number of workers. Raises UserError for what cannot be trained or compared."""
    gpu, recipe = torch.cuda.is_available(), arms[0].recipe
    if not 1 <= seeds <= MOST_SEEDS:
        raise UserError(f"--seeds must lie in [1, {MOST_SEEDS}], got {seeds}")
    if recipe.run.seed + seeds > 2**32:
        raise UserError(f"run.seed + --seeds must be at most 2**32, got {recipe.run.seed} + {seeds}")
    most = 1 if gpu else 256
    workers = (1 if gpu else min(2, os.cpu_count() or 1)) if workers is None else workers
    if not 1 <= workers <= most:
        raise UserError(f"--workers must be 1 on a GPU and lie in [1, 256] elsewhere, got {workers}")
    if not recipe.monitor.every:
        raise UserError(
            "monitor.every = 0: proxy, gold and diversity come from the monitor's evaluations. Set monitor.every, and "
            "a reward in [[monitor.gold]]"
        )
    if recipe.monitor.every > recipe.run.epochs:
        raise UserError(
            f"monitor.every = {recipe.monitor.every} is more than run.epochs = {recipe.run.epochs}: nothing would be "
            "evaluated after training; lower monitor.every"
        )
    for arm in arms:
        try:
            gather_prompts(arm.recipe)
        except UserError as error:
            raise UserError(f"arm {arm.name}: {error}") from None
    return workers


def refuse_other_runs(recipe: Recipe) -> None:
    """Raise UserError if the run's folder holds a run of other settings, or one that no comparison started."""
    folder = recipe.run.dir
    if not checkpoints_in(folder / "checkpoints"):
        return
    if not (folder / RECIPE).is_file():
        raise UserError(f"{folder} holds a run that `fastguard compare` did not start: choose another --out")
    try:
        before = parse_json(read_text(folder / RECIPE))
    except ValueError as error:
        raise UserError(f"{folder / RECIPE} is damaged ({error}): remove {folder}, or choose another --out") from None
    if not isinstance(before, dict):
        raise UserError(f"{folder / RECIPE} is damaged: remove {folder}, or choose another --out")
    changed = differences(before, _settings(recipe))
    if changed:
        raise UserError(f"{folder} holds a run of other settings ({', '.join(changed)}): choose another --out")


def _settings(recipe: Recipe) -> dict[str, object]:
    """The recipe as JSON values, without its folder, which may have been moved."""
    content = as_dict(recipe)
    content["run"].pop("dir")
    return content


def is_finished(recipe: Recipe) -> bool:
    """Whether the run has a checkpoint of its last epoch, or of the one that its monitor stopped it at."""
    there = checkpoints_in(recipe.run.dir / "checkpoints")
    if not there:
        return False
    if there[0].name == checkpoint_name(recipe.run.epochs):
        return True
    evaluations = read_rows(recipe.run.dir / "evaluations.jsonl")
    stopped = recipe.monitor.on_hacking == "stop" and evaluations and evaluations[-1].get("warning")
    return bool(stopped) and there[0].name == checkpoint_name(evaluations[-1]["epoch"])


def _train_all(
    runs: dict[tuple[str, int], Recipe],
    open_: dict[tuple[str, int], Recipe],
    workers: int,
    train: Train,
    failures: dict[tuple[str, int], str],
) -> None:
    """Train the open runs; those that fail are added to `failures`."""
    for recipe in open_.values():
        with writing(recipe.run.dir):
            recipe.run.dir.mkdir(parents=True, exist_ok=True)
            write_text(recipe.run.dir / RECIPE, json.dumps(_settings(recipe), indent=1))
    keys, done = {recipe.run.dir: key for key, recipe in open_.items()}, len(runs) - len(open_)
    with closing(run_all(list(open_.values()), workers, train)) as ended:
        for run in ended:
            arm, seed = keys[run.recipe.run.dir]
            done += 1
            if is_finished(run.recipe):
                evaluations = read_finished(arm, seed, run.recipe.run.dir).evaluations
                what = "".join(f"proxy {last.proxy:.4g}, gold {last.gold:.4g}" for last in evaluations[-1:])
            else:
                failures[arm, seed] = run.last_words
                what = f"not finished, {run.last_words}"
            say(f"{done} of {len(runs)} runs: {arm}, seed {seed}: {what}")


def _title(recipe: Recipe) -> str:
    return family_of(recipe.model.kind).describe(recipe.model)
