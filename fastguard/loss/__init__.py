"""The fused losses: per-step policy-gradient objectives of the Gaussian transition."""

from fastguard.loss.api import GuardLoss, Moments, guard_loss, guard_loss_from_means, transition_moments

__all__ = ["GuardLoss", "Moments", "guard_loss", "guard_loss_from_means", "transition_moments"]
