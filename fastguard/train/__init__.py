"""The trainer: rollouts, rewards to advantages, updates, checkpoints."""
