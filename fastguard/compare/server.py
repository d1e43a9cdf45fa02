"""Imported once by the server that the processes of runs are forked from, so that a run does not wait for imports.

From then on it ignores signals to all processes of a command: its end would look like that of the runs. They listen.
"""

from __future__ import annotations

import signal

from fastguard.utils.signals import ENDING

for number in ENDING:
    signal.signal(number, signal.SIG_IGN)

from fastguard.utils.quiet import quiet_libraries

quiet_libraries()  # before the imports below, whose libraries would talk

import fastguard.rewards
import fastguard.train.build
import fastguard.train.monitor
import fastguard.train.run_folder
import fastguard.train.trainer  # noqa: F401
