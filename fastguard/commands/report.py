"""`fastguard report`: the page of a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from fastguard.utils.files import writing
from fastguard.utils.terminal import say


@dataclass(frozen=True)
class Report:
    """Write RUN/report.html: metrics, ratio statistics, clip advice, images."""

    run: tyro.conf.Positional[Path]
    """folder of a run (run.dir of its recipe)"""

    def __call__(self) -> int:
        from fastguard.report.run import write_run_report

        with writing(self.run):
            page = write_run_report(self.run)
        say(str(page), sys.stdout)
        return 0
