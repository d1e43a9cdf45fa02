"""Predicts on any machine what fits on a GPU, by running the real program with fake tensors at full size.

`plan` predicts the peak memory of each phase, `choose_checkpointing` decides model.checkpointing = "auto", and
`update_flops` counts what an update has to compute.
"""

from fastguard.memory.planner import MemoryPlan, Phase, choose_checkpointing, plan, update_flops

__all__ = ["MemoryPlan", "Phase", "choose_checkpointing", "plan", "update_flops"]
