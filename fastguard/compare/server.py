"""Imported once by the server that the processes of runs are forked from, so that a run does not wait for imports."""

from __future__ import annotations

from fastguard.utils.quiet import quiet_libraries

quiet_libraries()  # before the imports below, whose libraries would talk

import fastguard.rewards
import fastguard.train.build
import fastguard.train.monitor
import fastguard.train.run_folder
import fastguard.train.trainer  # noqa: F401
