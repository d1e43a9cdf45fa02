"""`fastguard demo`: prepare the models, run both objectives, write the report whatever happens."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from fastguard.demo import text
from fastguard.demo.backbone import Models, prepare
from fastguard.demo.config import GUARDED, PLAIN, DemoConfig
from fastguard.demo.experiment import Results, Task, look, measure_reference, run_here
from fastguard.demo.page import PICTURE_KINDS, write_demo_page
from fastguard.demo.workers import run_in_workers
from fastguard.errors import UserError
from fastguard.report.page import write_page
from fastguard.utils.files import write_text, writing
from fastguard.utils.signals import INTERRUPTED
from fastguard.utils.terminal import say


def run_demo(config: DemoConfig, out: Path, workers: int | None = None) -> int:
    """Run the comparison and write `out/report.html`, PNGs and `out/results.json`.

    Args:
        workers: processes of one CPU thread each for the training runs; None takes 2, or 1 on a GPU or a
            single-core machine. 1 stays in this process.

    Returns the exit code: 0, or 130 after Ctrl-C, which leaves a report of the runs that were finished.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if workers is None:
        workers = 1 if device.type == "cuda" else min(2, os.cpu_count() or 1)
    if not 1 <= workers <= (1 if device.type == "cuda" else 256):
        raise UserError(f"workers must be 1 on a GPU and lie in [1, 256] elsewhere, got {workers}")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    results: Results | None = None
    start = time.perf_counter()
    try:
        models = prepare(config, device)
        before = look(models.policy, models, config)
        results = Results(config, measure_reference(models), before, [], {})
        stage = "loading (weights were cached)" if models.pretraining_cached else "pretraining and judges"
        results.seconds[stage] = time.perf_counter() - start
        print(
            f"pretrained model: gold accuracy {before.metrics.accuracy:.3f}, "
            f"Fréchet distance {before.metrics.frechet:.1f}, proxy {before.metrics.proxy:.2f}"
        )
        train_all(results, models, workers)
        results.seconds["all"] = time.perf_counter() - start
    except KeyboardInterrupt:
        with writing(out):
            report = write_partial(results, out)
        finished = len(results.runs) if results is not None else 0
        print(f"\ninterrupted: {finished} of {2 * config.seeds} runs were finished, see {report}")
        return INTERRUPTED
    with writing(out):
        clear(out)
        write_numbers(results, out)
        report = write_demo_page(results, out, partial=False)
    for point in text.short_text(results):
        print(f"- {point}")
    print(f"{results.seconds['all']:.0f} s in all; report: {report.resolve()}")
    return 0


def train_all(results: Results, models: Models, workers: int) -> None:
    """Append every run to `results.runs` as it finishes."""
    config = results.config
    tasks: list[Task] = [(objective, seed) for seed in range(config.seeds) for objective in (PLAIN, GUARDED)]
    start = time.perf_counter()
    with tqdm(total=len(tasks) * config.train.run.epochs, desc="training runs", unit="it", disable=None) as bar:
        tick = _tick(bar)
        if workers == 1:
            runs = run_here(config, models, tasks, tick)
        else:
            runs = run_in_workers(config, tasks, workers, tick)
        with closing(runs):
            for run in runs:
                results.runs.append(run)
                bar.update(config.train.run.epochs - len(run.logs))  # what it saved by reaching its target early
                if bar.disable:  # stderr is a file or a pipe
                    say(f"{len(results.runs)} of {len(tasks)} runs: {run.objective}, seed {run.seed}")
    results.runs.sort(key=lambda run: (run.objective, run.seed))
    results.seconds["training runs"] = time.perf_counter() - start


def _tick(bar: tqdm) -> Callable[[Task, float], None]:
    def tick(task: Task, proxy: float) -> None:
        bar.set_postfix_str(f"{task[0]} seed {task[1]}: proxy {proxy:.1f}", refresh=False)
        bar.update()

    return tick


def clear(out: Path) -> None:
    """Remove what an earlier demo wrote to this folder, so that nothing stale stands beside a new report."""
    for pattern in ("report.html", "results.json", *(f"{kind}_*.png" for kind in PICTURE_KINDS)):
        for path in out.glob(pattern):
            path.unlink()


def write_partial(results: Results | None, out: Path) -> Path:
    """The report of an interrupted demo, also if nothing was measured yet."""
    clear(out)
    if results is None:
        notice = "Partial report: interrupted during pretraining, before anything was measured."
        return write_page(out / "report.html", text.TITLE, "Run `fastguard demo` again.", [], notice)
    write_numbers(results, out)
    return write_demo_page(results, out, partial=True)


def write_numbers(results: Results, out: Path) -> None:
    """Everything that the report plots, as JSON."""
    runs = [
        {
            "objective": run.objective,
            "seed": run.seed,
            "metrics": [dataclasses.asdict(evaluation.metrics) for evaluation in run.evaluations],
            "epochs": [dataclasses.asdict(log) for log in run.logs],
            "probe": dataclasses.asdict(run.probe),
        }
        for run in results.runs
    ]
    reference = {k: v for k, v in vars(results.reference).items() if k != "tiles"}
    content = {
        "config": json.loads(json.dumps(dataclasses.asdict(results.config), default=str)),
        "torch": torch.__version__,
        "reference": reference,
        "before": dataclasses.asdict(results.before.metrics),
        "runs": runs,
        "seconds": results.seconds,
    }
    write_text(out / "results.json", json.dumps(content, indent=1))
