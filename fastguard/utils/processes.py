"""What the processes of a launch do together: every function is called by all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

Result = TypeVar("Result")


def on_all(accelerator: Accelerator, failure: type[Exception], function: Callable[[], Result]) -> Result:
    """The function's result on this process. A `failure` that it raises on one process is raised on all of them."""
    try:
        result, problem = [function()], ""
    except failure as error:
        result, problem = [], str(error) or type(error).__name__
    problems = [p for p in gather_object([problem]) if p]
    if problems:
        raise failure(problems[0])
    return result[0]


def broadcast(values: list[Any], accelerator: Accelerator) -> list[Any]:
    """The first process's list of JSON values, on every process."""
    if accelerator.num_processes == 1:
        return values
    torch.distributed.broadcast_object_list(values, src=0)
    return values
