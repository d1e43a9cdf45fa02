"""The trainer: rollouts, rewards to advantages, updates, checkpoints."""

from fastguard.extras import need

need("train")
