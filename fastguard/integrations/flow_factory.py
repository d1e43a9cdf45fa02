"""Flow-Factory's trainers `grpo` and `grpo-guard` with the fused loss (docs/integrations/flow_factory.md).

    accelerate launch -m fastguard.integrations.flow_factory config.yaml

Flow-Factory finds trainers and their arguments by name in two tables. `register` puts ours there under the same names,
so a configuration stays as it is. It gains one option, `train.reweight`.

Axes: B sample, T denoising step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastguard.integrations.kl import kl_weight
from fastguard.loss import guard_loss_from_means
from fastguard.loss.checks import KlType, Reweight
from fastguard.sde import Transition, gaussian_step

TRAINERS = {"grpo": "FusedGRPOTrainer", "grpo-guard": "FusedGRPOGuardTrainer"}
OBJECTIVES = {"FusedGRPOTrainer": "flow_grpo", "FusedGRPOGuardTrainer": "grpo_guard"}
KL_TYPES: dict[str, KlType] = {"x-based": "gaussian", "v-based": "velocity"}


def main() -> None:
    """Flow-Factory's training program, with our trainers."""
    from flow_factory import train

    register()
    train.main()


def register() -> None:
    """Put the trainers and their arguments into Flow-Factory's tables, in this process."""
    from flow_factory.hparams import training_args
    from flow_factory.trainers import registry

    @dataclass
    class FusedGRPOTrainingArguments(training_args.GRPOTrainingArguments):
        reweight: str = "none"
        """factor on the policy loss of each step, as in `guard_loss`; "none" is Flow-Factory's objective"""

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.reweight not in get_args(Reweight):
                raise ValueError(f"train.reweight must be one of {get_args(Reweight)}; got {self.reweight!r}")

    for name, trainer in TRAINERS.items():
        registry._TRAINER_REGISTRY[name] = f"fastguard.integrations.flow_factory.{trainer}"
        training_args._TRAINING_ARGS_REGISTRY[name] = FusedGRPOTrainingArguments


def __getattr__(name: str) -> Any:
    """Make a trainer when the table's reader asks for it, because its base class is Flow-Factory's."""
    if name not in OBJECTIVES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flow_factory.trainers.grpo import GRPOGuardTrainer  # its rollout stores the means

    members = {"objective": OBJECTIVES[name], "optimize": optimize, "__module__": __name__}
    return type(name, (GRPOGuardTrainer,), members)


def optimize(trainer: Any, samples: list[Any]) -> None:
    """The update of an epoch: per inner epoch one pass over the samples in random order, at every trained step."""
    from flow_factory.samples import BaseSample
    from flow_factory.utils.base import create_generator
    from tqdm import tqdm

    args, accelerator, adapter = trainer.training_args, trainer.accelerator, trainer.adapter
    for inner_epoch in range(args.num_inner_epochs):
        adapter.train()
        metrics = defaultdict(list)
        # Their seed, so that a run sees its samples in the order that it had without us.
        order = torch.randperm(len(samples), generator=create_generator(args.seed, trainer.epoch, inner_epoch))
        batches = tqdm(
            order.split(args.per_device_batch_size), f"Epoch {trainer.epoch}", disable=not trainer.show_progress_bar
        )
        with trainer.autocast():
            for picked in batches:
                batch = BaseSample.stack([samples[i].to(accelerator.device) for i in picked])
                for index in adapter.scheduler.train_timesteps.tolist():
                    with accelerator.accumulate(*adapter.trainable_components):
                        loss, measured = step_loss(trainer, batch, index)
                        for name, value in measured.items():
                            metrics[name].append(value)
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            update(trainer, metrics)
                            metrics.clear()


def step_loss(trainer: Any, batch: dict[str, Any], index: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss () of a batch of trajectories at one denoising step, and what Flow-Factory logs of it."""
    from flow_factory.utils.base import filter_kwargs

    args, adapter = trainer.training_args, trainer.adapter
    times = F.pad(batch["timesteps"], (0, 1))  # (B, T + 1): the last step ends at 0
    t, t_next = times[:, index], times[:, index + 1]
    latents, next_latents = (batch["all_latents"][:, batch["latent_index_map"][i]] for i in (index, index + 1))
    old_mean = batch["next_latents_mean"][:, batch["callback_index_map"][0][index]]

    inputs = {**args, **batch, "t": t, "t_next": t_next, "latents": latents, "next_latents": next_latents}
    # Without their log-probability there is no graph of it to keep.
    inputs |= {"noise_level": adapter.scheduler.noise_level, "compute_log_prob": False}
    inputs = filter_kwargs(adapter.forward, **inputs, return_kwargs=["next_latents_mean"])
    mean = adapter.forward(**inputs).next_latents_mean
    step = transition(adapter.scheduler, t, t_next)

    ref_mean, beta = None, args.kl_beta
    if trainer.enable_kl_loss:
        with torch.no_grad(), adapter.use_ref_parameters():
            ref_mean = adapter.forward(**inputs).next_latents_mean
        if args.kl_type == "x-based":
            beta = kl_weight("flow_factory", beta, step)

    advantages = batch["advantage"].flatten().clamp(*args.adv_clip_range)
    low, high = args.clip_range
    result = guard_loss_from_means(
        next_latents, mean, old_mean, advantages, step, objective=trainer.objective, reweight=args.reweight,
        clip_range=(-low, high), adv_clip=None, ref_prev_sample_mean=ref_mean, kl_weight=beta,
        kl_type=KL_TYPES[args.kl_type],
        # If their scheduler comes to mean something else by std_dev_t, the first update finds it.
        check_values=trainer.step == 0,
    )  # fmt: skip

    loss = result.loss.detach()
    measured = {"loss": loss, "policy_loss": loss, "ratio": result.ratio, "log_ratio": result.log_ratio}
    measured["unclipped_loss"] = -advantages * result.ratio
    measured["clipped_loss"] = -advantages * result.ratio.clamp(1 + low, 1 + high)
    change = torch.expm1(result.log_ratio)  # ratio - 1, of which a float32 ratio shows nothing below 6e-8
    measured["clip_frac_high"] = (change > high).float().mean()
    measured["clip_frac_low"] = (change < low).float().mean()
    measured["clip_frac_total"] = measured["clip_frac_high"] + measured["clip_frac_low"]
    if result.kl is not None:
        measured["kl_loss"] = (beta * result.kl).mean()
        measured["kl_div"] = measured["kl_loss"] / args.kl_beta
        measured["policy_loss"] = loss - measured["kl_loss"]
    return result.loss, measured


def transition(scheduler: Any, t: Tensor, t_next: Tensor) -> Transition:
    """The scheduler's step from the times t to t_next, (B,) in 0 to 1000, whatever its sampler.

    A step is linear in latents and velocity. So an element with latents 1 and velocity 0 has the one coefficient as its
    mean, and an element with 0 and 1 the other.
    """
    latents, velocity = torch.eye(2, device=t.device).expand(len(t), 2, 2).unbind(1)
    step = scheduler.step(
        velocity, t, latents, next_latents=latents, timestep_next=t_next, noise_level=scheduler.noise_level,
        compute_log_prob=False, return_kwargs=["next_latents_mean", "std_dev_t", "dt"],
    )  # fmt: skip
    # Only CPS returns the standard deviation of the draw. The others return it without sqrt(|dt|).
    std = step.std_dev_t if scheduler.dynamics_type == "CPS" else step.std_dev_t * torch.sqrt(-step.dt)
    return gaussian_step(std, step.dt, *step.next_latents_mean.unbind(1))


def update(trainer: Any, metrics: dict[str, list[Tensor]]) -> None:
    """Step the optimizer, and log what was measured since its last step."""
    from flow_factory.utils.dist import reduce_loss_info

    parameters = trainer.adapter.get_trainable_parameters()
    grad_norm = trainer.accelerator.clip_grad_norm_(parameters, trainer.training_args.max_grad_norm)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    reduced = reduce_loss_info(trainer.accelerator, metrics) | {"grad_norm": grad_norm}
    trainer.log_data({f"train/{name}": value for name, value in reduced.items()}, step=trainer.step)
    trainer.step += 1


if __name__ == "__main__":
    main()
