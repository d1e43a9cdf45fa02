"""Rewards: what scores images, by protocol, by name, in threads and over HTTP.

A reward is any callable `reward(images, prompts, metadata) -> scores`:

- `images`: uint8 tensor in host memory, (B, 3, H, W), or (B, 1, H, W) for grey; shared between rewards, so not to be
  changed;
- `prompts`: the B texts that the images were drawn from;
- `metadata`: for each image a dict with the further keys of its prompt's JSON line, empty for prompts from a text file;
- `scores`: B real numbers, finite in float32, larger is better, as a tensor (any device), a numpy array or a list.

It may be called from several threads at once: one that cannot take that holds a lock. It shares its process with the
rollout: settings of the whole process (`rewards.settings`) are put back after it was built and after scores were
collected, but it should change none while it scores. What it raises is reported with
its name and the prompts concerned. `build_reward` makes one from a `RewardConfig`; `RewardPool` runs several in threads
while the next images are sampled. `fastguard.rewards.server` answers for a reward over HTTP.
"""

from fastguard.extras import need

need("train")

from fastguard.rewards.base import Reward, RewardError
from fastguard.rewards.build import BUILT_IN, build_reward
from fastguard.rewards.pool import RewardFailure, RewardPool, Scores

__all__ = [
    "BUILT_IN",
    "Reward",
    "RewardError",
    "RewardFailure",
    "RewardPool",
    "Scores",
    "build_reward",
]
