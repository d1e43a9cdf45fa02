"""A toy training run with a run folder, as a process of its own: python toy_run.py DIR EPOCHS [--resume auto] [...].

With --slow SECONDS every reward waits, so that a test can hit the run at work; --optimizer NAME; --fsdp2 pretends that
CPU processes are GPUs, which is what accelerate asks before it shards; --out FILE gets what a test compares, and the
environment. With TOY_DIE_AT=N in the environment it kills itself at its N-th operation on files in DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, set_seed
from safetensors.torch import save_file
from torch import Tensor, nn

from fastguard.config import MonitorConfig, Recipe, RewardConfig, advantages_config, objective_config
from fastguard.rewards import RewardPool
from fastguard.train import checkpoint
from fastguard.train.monitor import Monitor
from fastguard.train.optim import AdamW
from fastguard.train.run_folder import RunFolder
from fastguard.train.state import for_processes
from fastguard.train.trainer import train
from fastguard.utils.sharding import full_tensor, local_shard
from fastguard.utils.terminal import unfailing_output
from helpers import toys
from helpers.toys import RECIPE, ToyBackbone, towards


class Layer(nn.Linear):
    """The class that FSDP2 shards in these tests."""


class SharedPolicy(nn.Module):
    """A small network, so that sharding has something to shard."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = Layer(8, 16), Layer(16, 8)
        self.inside.requires_grad_(False)  # as a LoRA's base
        self.image = nn.Embedding(2, 8)
        self.poisoned = False

    def forward(self, latents: Tensor, sigma: Tensor, prompt_indices: Tensor) -> Tensor:
        shift = 0.1 * self.outside(torch.tanh(self.inside(latents))) + self.image(prompt_indices)[:, None]
        velocity = (0.7 * latents - shift) / sigma[:, None, None]
        if self.poisoned and torch.is_grad_enabled():
            self.poisoned = len(latents) > 1  # until the transitions to blame have been looked for
            return velocity * torch.inf
        return velocity


LIMITED = {"clip_range": 1e-2}
OBJECTIVES: dict[str, Any] = {
    "rpg": {"window": 3}, "op_grpo": {**LIMITED, "window": 3, "replayed": 0.2, "keep": 0.75}, "diffusion_nft": {},
    "dgpo": {},
}  # fmt: skip
"""Options by the objective's name; of others, LIMITED. Six replayed images of three steps do not share out evenly."""


def recipe_for(arguments: argparse.Namespace) -> Recipe:
    return replace(
        RECIPE,
        run=replace(RECIPE.run, dir=Path(arguments.dir), epochs=arguments.epochs, save_every=1, images_every=2),
        prompts=replace(RECIPE.prompts, per_epoch=arguments.per_epoch),
        sampler=replace(RECIPE.sampler, batch_size=8),
        objective=objective_config(
            arguments.objective,
            kl_weight=0.1,
            reweight=arguments.reweight,
            **OBJECTIVES.get(arguments.objective, LIMITED),
        ),
        advantages=advantages_config(**json.loads(arguments.advantages)),
        update=replace(
            RECIPE.update,
            optimizer=arguments.optimizer,
            ema_decay=0.5,
            ema_every=2,
            micro_batch=arguments.micro_batch,
            parity=0.5 if arguments.poison_on is None else 0.0,
            stop="none" if arguments.stop_at is None else "espo",
            stop_at=arguments.stop_at or RECIPE.update.stop_at,
        ),
        monitor=MonitorConfig(
            every=2, prompts=2, images_per_prompt=3, num_steps=4, gold=(RewardConfig("g", name="g"),)
        ),
        hardware=replace(RECIPE.hardware, sharding="fsdp2" if arguments.fsdp2 else "none"),
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("dir")
    parser.add_argument("epochs", type=int)
    parser.add_argument("--resume", default="never")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--micro-batch", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--fail-on", type=int, help="the process whose reward raises")
    parser.add_argument("--poison-on", type=int, help="the process whose first update is not finite")
    parser.add_argument("--ruin-on", type=int, help="the process whose optimizer state the first update ruins")
    parser.add_argument("--objective", default="grpo_guard")
    parser.add_argument("--per-epoch", type=int, default=2)
    parser.add_argument("--reweight", default="inverse_dt")
    parser.add_argument("--advantages", default="{}", help="the section as JSON")
    parser.add_argument("--stop-at", type=float, help="where the updates of a rollout end")
    parser.add_argument("--fsdp2", action="store_true")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    if "TOY_DIE_AT" in os.environ:
        die_at(int(os.environ["TOY_DIE_AT"]), os.path.abspath(arguments.dir))
    torch.set_num_threads(1)
    if arguments.fsdp2:
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = Accelerator() if arguments.fsdp2 else Accelerator(cpu=True)
    recipe = for_processes(recipe_for(arguments), accelerator.num_processes)
    set_seed(0)
    policy = SharedPolicy().to(getattr(torch, arguments.dtype))
    backbone = ToyBackbone(policy)
    backbone.dtype = getattr(torch, arguments.dtype)

    policy.poisoned = arguments.poison_on == accelerator.process_index
    if arguments.ruin_on == accelerator.process_index:
        ruin(AdamW)

    def slow(*batch: Any) -> Tensor:
        if arguments.fail_on == accelerator.process_index:
            raise OSError("failed on purpose")
        time.sleep(arguments.slow)
        return towards(*batch)

    run = RunFolder(recipe, accelerator, arguments.resume)
    with (
        run.catching_signals(),
        RewardPool([(recipe.rewards[0], slow)], recipe.scoring, backbone.prompts) as rewards,
        RewardPool(
            [(recipe.rewards[0], towards), (recipe.monitor.gold[0], towards)], recipe.scoring, backbone.prompts
        ) as judges,
    ):
        monitor = Monitor(recipe, judges, 0)
        seen: dict[str, Tensor] = {}
        if arguments.out:
            watch(seen, accelerator)
        train(backbone, recipe, rewards, run, accelerator, monitor)
    if arguments.out:
        Path(f"{arguments.out}.{accelerator.process_index}.json").write_text(json.dumps(dict(os.environ)))
        state_dict = {f"weights.{n}": full_tensor(p) for n, p in last_state.parameters.items()}
        save_file(seen | state_dict, f"{arguments.out}.{accelerator.process_index}")
    print(json.dumps({"stopped": run.was_stopped}))
    accelerator.end_training()
    return 0


def ruin(optimizer: type[AdamW]) -> None:
    """Have every step leave NaN in this process's part of a moment."""
    step = optimizer.step

    def ruining(self: AdamW) -> None:
        step(self)
        parameter = next(iter(self._optimizers))
        local_shard(self.state_of(parameter)["exp_avg"])[0] = torch.nan

    optimizer.step = ruining  # type: ignore[method-assign]


def die_at(last: int, folder: str) -> None:
    """SIGKILL at operation `last` (from 1): before a file is opened, flushed, renamed or removed, or a folder made."""
    operations = itertools.count(1)

    def count() -> None:
        if next(operations) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            count()
            return function(*args, **kwargs)

        return counted

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in ("os.remove", "os.rmdir") and args[1] != -1:
            count()  # shutil.rmtree removes by descriptor and name
        elif event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(args[0]).startswith(folder):
            count()

    sys.addaudithook(audit)
    os.fsync = counting(os.fsync)
    for module in (checkpoint, toys):  # safetensors writes without Python
        module.save_file = counting(module.save_file)


last_state: Any = None


def watch(seen: dict[str, Tensor], accelerator: Accelerator) -> None:
    """Keep the first epoch's samples and advantages, and the first update's gradients, of this process."""
    import fastguard.train.trainer as trainer

    sample_epoch, clip = trainer.sample_epoch, accelerator.clip_grad_norm_

    def sampled(state: Any, *rest: Any) -> Any:
        global last_state
        last_state = state
        rolled = sample_epoch(state, *rest)
        if "latents" not in seen:
            seen["latents"] = torch.cat([t.latents for t in rolled.transitions])
            seen["noise"] = torch.cat([t.noise for t in rolled.transitions])
            seen["advantages"] = rolled.advantages.values
        return rolled

    def clipped(parameters: Any, norm: float) -> Any:
        if not any(name.startswith("gradient") for name in seen):
            for name, parameter in last_state.parameters.items():
                seen[f"gradient.{name}"] = full_tensor(parameter.grad).clone()
        return clip(parameters, norm)

    trainer.sample_epoch = sampled
    accelerator.clip_grad_norm_ = clipped  # type: ignore[method-assign]


def run_and_exit() -> None:
    with unfailing_output():  # as every command has it
        code = main()
    os._exit(code)  # gloo's threads now and then abort an interpreter that shuts down; GPUs talk through NCCL


if __name__ == "__main__":
    run_and_exit()
