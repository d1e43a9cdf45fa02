"""Predicts on any machine what fits on a GPU, by running the real program with fake tensors at full size.

`plan` predicts the peak memory of each phase, `propose` finds changes that make a recipe fit, `choose_recompute`
decides model.recompute = "auto", `kept_activations` lists what waits for the backward pass. `run_flops` counts what an
epoch and a run do, and `hours` turns it into time; `update_flops` and `executed_flops` count what an update needs and
does, `rollout_flops` what a step of a rollout does, and `update_bytes` what an update moves.
"""

from fastguard.extras import need

need("train")

from fastguard.memory.flops import EpochFlops, RunFlops, hours, run_flops
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
from fastguard.memory.proposals import Proposal, Tried, propose

__all__ = [
    "EpochFlops",
    "KeptActivations",
    "KeptTensor",
    "MemoryPlan",
    "Phase",
    "Proposal",
    "RunFlops",
    "Tried",
    "choose_recompute",
    "compare_kept",
    "executed_flops",
    "hours",
    "kept_activations",
    "plan",
    "propose",
    "rollout_flops",
    "run_flops",
    "update_bytes",
    "update_flops",
]
