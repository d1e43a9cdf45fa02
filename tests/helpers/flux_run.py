"""`fastguard` with CPU processes that accelerate takes for GPUs, so that it shards: flux_run.py train RECIPE ..."""

from __future__ import annotations

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from fastguard.cli import main

if __name__ == "__main__":
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # as in toy_run.py
