"""`fastguard demo`: both objectives on handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Demo:
    """Compare Flow-GRPO and GRPO-Guard on handwritten digits, and write a report.

    Pretrains a tiny Flux model (kept in $FASTGUARD_CACHE or ~/.cache/fastguard), trains it with both objectives, and
    explains what is seen. A few minutes on two CPU cores. Ctrl-C leaves a report of the finished runs.
    """

    out: Path = Path("runs/demo")
    """folder for report.html, its pictures and results.json"""
    seeds: int | None = None
    """runs per objective (3 unless given, 1 with --quick)"""
    workers: int | None = None
    """processes for the training runs (2 unless given; 1 on a GPU)"""
    quick: bool = False
    """a smoke run of half a minute that exercises every stage; its numbers mean nothing"""

    def __call__(self) -> int:
        from fastguard.demo.config import DemoConfig, quick_demo
        from fastguard.demo.run import run_demo

        config = quick_demo() if self.quick else DemoConfig()
        if self.seeds is not None:
            config = replace(config, seeds=self.seeds)
        return run_demo(config, self.out, workers=1 if self.quick and self.workers is None else self.workers)
