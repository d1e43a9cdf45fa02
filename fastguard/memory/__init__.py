"""Predicts on any machine what fits on a GPU, by running the real program with fake tensors at full size.

`plan` predicts the peak memory of each phase, `choose_recompute` decides model.recompute = "auto", `kept_activations`
lists what waits for the backward pass; `update_flops` and `executed_flops` count what an update needs and does, and
`rollout_flops` what a step of a rollout does, and `update_bytes` what an update moves.
"""

from fastguard.extras import need

need("train")

from fastguard.memory.kept import KeptActivations, KeptTensor, compare_kept, kept_activations
from fastguard.memory.planner import (
    MemoryPlan,
    Phase,
    choose_recompute,
    executed_flops,
    plan,
    rollout_flops,
    update_bytes,
    update_flops,
)

__all__ = [
    "KeptActivations",
    "KeptTensor",
    "MemoryPlan",
    "Phase",
    "choose_recompute",
    "compare_kept",
    "executed_flops",
    "kept_activations",
    "plan",
    "rollout_flops",
    "update_bytes",
    "update_flops",
]
