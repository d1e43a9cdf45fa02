"""`fastguard report`: the page of a run."""

from __future__ import annotations

import sys
from pathlib import Path

from fastguard.report.run import write_run_report
from fastguard.utils.files import writing
from fastguard.utils.terminal import say


def report_run(run: Path) -> int:
    """Write `run`/report.html and print its path."""
    with writing(run):
        page = write_run_report(run)
    say(str(page), sys.stdout)
    return 0
