"""Over-optimization monitor: gold rewards that are never trained on, on fixed prompts and seeds.

Axes: R reward, B image.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from fastguard.backbones import Backbone
from fastguard.config import Recipe
from fastguard.prompts import fingerprint
from fastguard.recipe import as_dict
from fastguard.rewards import RewardPool
from fastguard.rewards.collect import collect_scores
from fastguard.train.advantages import combine_rewards
from fastguard.train.diversity import diversity, reduced
from fastguard.train.rollout import Policy, evaluation_images, ode_schedule, rollout
from fastguard.utils.processes import on_all
from fastguard.utils.sealed import DamagedError


@dataclass(frozen=True)
class EvaluationLog:
    """One evaluation; plain numbers, for JSON."""

    epoch: int
    """epochs done before it"""
    proxy: float
    """mean weighted training reward of the evaluation's images"""
    gold: float
    """mean weighted gold reward of the same images"""
    rewards: dict[str, float]
    """mean of each reward by its name"""
    gold_change_in_errors: float
    """gold minus its best so far, in standard errors of the paired difference over the images; 0 for a new best"""
    warning: str = ""
    """what the monitor has to say, if anything"""
    diversity: float | None = None
    """mean difference between two images of a prompt, see `diversity`; None for one image a prompt, and in old logs"""


@dataclass(frozen=True)
class Verdict:
    """What the trainer does about an evaluation."""

    log: EvaluationLog
    is_best: bool
    """whether no evaluation had a higher gold score"""
    stop: bool
    images: Tensor
    """uint8 (B, C, H, W): this process's first images"""


class Monitor:
    """Evaluates the policy and keeps the history that its warnings need.

    Args:
        recipe: its [monitor] section says what and how often.
        rewards: scores with recipe.rewards and then recipe.monitor.gold; its prompts are the backbone's.
        first_prompt: index of the evaluation's first prompt among the backbone's.
    """

    def __init__(self, recipe: Recipe, rewards: RewardPool, first_prompt: int) -> None:
        self._recipe, self._rewards, self._first_prompt = recipe, rewards, first_prompt
        self.history: list[EvaluationLog] = []
        self.best: EvaluationLog | None = None
        self._best_scores: list[float] = []
        self._falling = 0

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {
            "history": [dataclasses.asdict(log) for log in self.history],
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "best_scores": self._best_scores,
            "falling": self._falling,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.history = [EvaluationLog(**log) for log in state["history"]]
        self.best = None if state["best"] is None else EvaluationLog(**state["best"])
        self._best_scores, self._falling = state["best_scores"], state["falling"]

    def conditions(self, backbone: Backbone) -> dict[str, Any]:
        """What the scores of an evaluation depend on besides the weights, as JSON values by field of the recipe.

        Scores under other conditions do not compare: not with the best, and not image by image.
        """
        recipe, watched = as_dict(self._recipe), self._recipe.monitor
        chosen = backbone.prompts[self._first_prompt :][: watched.prompts]
        return {
            "monitor": {name: recipe["monitor"][name] for name in ("images_per_prompt", "num_steps")}
            | {"prompts": f"{watched.prompts} ({fingerprint(chosen)})"},
            "monitor.gold": [_scored_by(reward) for reward in recipe["monitor"]["gold"]],
            "rewards": [_scored_by(reward) for reward in recipe["rewards"]],
            "sampler.shift": recipe["sampler"]["shift"],
            "sampler.decode_tiled": recipe["sampler"]["decode_tiled"],
            "prompts.max_tokens": recipe["prompts"]["max_tokens"],
            "prompts.encoders": recipe["prompts"]["encoders"],
            "model": {
                name: recipe["model"][name]
                for name in ("dtype", "quantize", "height", "width", "guidance", "negative_prompt")
            },
        }

    def has_seen(self, epoch: int) -> bool:
        """Whether the policy after this many epochs was evaluated (before a resume, say)."""
        return bool(self.history) and self.history[-1].epoch == epoch

    def evaluate(self, policy: Policy, backbone: Backbone, accelerator: Accelerator, epoch: int) -> Verdict:
        """Sample, score with all rewards, and compare with the history; collective."""
        scores, images, spread = self._score(policy, backbone, accelerator)
        return self.judge(scores, epoch, images, spread)

    def _score(
        self, policy: Policy, backbone: Backbone, accelerator: Accelerator
    ) -> tuple[Tensor, Tensor, float | None]:
        """Scores (R, B) and diversity of all images, and this process's first images."""
        config, size = self._recipe.monitor, self._recipe.sampler.batch_size
        prompts, seeds = evaluation_images(config.prompts, config.images_per_prompt, config.num_steps)
        prompts = prompts + self._first_prompt
        total = len(prompts)
        # Whole batches for every process, as sharded weights need the same number of passes on all of them.
        padded = -(-total // (accelerator.num_processes * size)) * accelerator.num_processes * size
        index = torch.arange(padded, device="cpu").clamp(max=total - 1)
        index = index.view(accelerator.num_processes, -1)[accelerator.process_index]
        schedule = ode_schedule(self._recipe.sampler, backbone.sigmas, config.num_steps)
        on_all(accelerator, DamagedError, lambda: backbone.load_prompts(prompts.tolist()))
        first, small = None, []
        for part in index.split(size):
            on_device = prompts[part].to(accelerator.device)
            rolled = rollout(policy, on_device, seeds[part], backbone.latent_shape, schedule, backbone.dtype)
            images = backbone.decode(rolled.latents)
            self._rewards.submit(images, prompts[part])
            small.append(reduced(images).to(accelerator.device))
            first = images if first is None else first
        assert first is not None
        values = collect_scores(self._rewards, accelerator).values.T.contiguous().to(accelerator.device)  # (B, R)
        everyone = accelerator.gather(torch.cat(small))[:total].cpu()
        return accelerator.gather(values)[:total].T.cpu(), first, diversity(everyone, config.images_per_prompt)

    def judge(self, scores: Tensor, epoch: int, images: Tensor, diversity: float | None = None) -> Verdict:
        """Compare (R, B) scores with the history: does the proxy rise while the gold score falls?"""
        config, trained = self._recipe.monitor, len(self._recipe.rewards)
        proxy = combine_rewards(scores[:trained], [r.weight for r in self._recipe.rewards])
        gold = combine_rewards(scores[trained:], [r.weight for r in config.gold])
        labels = [r.label for r in (*self._recipe.rewards, *config.gold)]
        log = EvaluationLog(
            epoch=epoch,
            proxy=proxy.nanmean().item(),
            gold=gold.nanmean().item(),
            rewards={label: row.nanmean().item() for label, row in zip(labels, scores, strict=True)},
            gold_change_in_errors=0.0,
            diversity=diversity,
        )
        is_best = math.isfinite(log.gold) and (self.best is None or log.gold > self.best.gold)
        if is_best:
            self.best, self._best_scores, self._falling = log, gold.tolist(), 0
        elif self.best is not None and math.isfinite(log.gold):
            change = _in_standard_errors(gold - gold.new_tensor(self._best_scores))
            fallen = change < -config.drop and log.proxy > self.best.proxy
            self._falling = self._falling + 1 if fallen else 0
            log = dataclasses.replace(log, gold_change_in_errors=change)
        hacked = self._falling >= config.patience
        if hacked:
            assert self.best is not None
            log = dataclasses.replace(
                log,
                warning=f"the reward is being hacked: since epoch {self.best.epoch} the proxy rose from "
                f"{self.best.proxy:.4g} to {log.proxy:.4g} while the gold score fell from {self.best.gold:.4g} to "
                f"{log.gold:.4g} ({-log.gold_change_in_errors:.1f} standard errors), in {self._falling} evaluations in "
                "a row. The best checkpoint is kept; lower the learning rate, add objective.kl_weight, or stop",
            )
        self.history.append(log)
        return Verdict(log, is_best, hacked and config.on_hacking == "stop", images)


def _scored_by(reward: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in reward.items() if name != "name"}


def _in_standard_errors(difference: Tensor) -> float:
    """Mean of paired differences over its standard error; images that a reward failed on are left out."""
    difference = difference[~torch.isnan(difference)]
    error = difference.std(correction=1) / len(difference) ** 0.5 if len(difference) > 1 else difference.new_tensor(0.0)
    mean = difference.mean()
    return (mean / error).item() if error > 0 else float(torch.sign(mean).item()) * 1e9 * float(mean != 0)
