"""What a check of `fastguard doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "info", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    level: Level
    text: str
