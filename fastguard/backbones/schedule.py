"""The schedule of a pipeline's scheduler."""

from __future__ import annotations

import math
from typing import Any

from diffusers.pipelines.flux.pipeline_flux import calculate_shift


def schedule_shift(scheduler_config: Any, tokens: int) -> float:
    """The factor s of the schedule s t / (1 + (s - 1) t) that diffusers would use for this many image tokens."""
    if not scheduler_config.use_dynamic_shifting:
        return float(scheduler_config.shift)
    mu = calculate_shift(
        tokens,
        scheduler_config.base_image_seq_len,
        scheduler_config.max_image_seq_len,
        scheduler_config.base_shift,
        scheduler_config.max_shift,
    )
    return math.exp(mu)
