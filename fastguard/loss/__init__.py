"""The fused losses: policy objectives of Gaussian transitions, and of the forward process."""

from fastguard.loss.api import GuardLoss, Moments, guard_loss, guard_loss_from_means, transition_moments
from fastguard.loss.matching import matching_loss

__all__ = ["GuardLoss", "Moments", "guard_loss", "guard_loss_from_means", "matching_loss", "transition_moments"]
