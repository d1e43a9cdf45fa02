"""A few updates of Flow-Factory's own training on the tiny Flux, as its program runs them. Needs Flow-Factory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from flow_factory.hparams import Arguments
from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput
from flow_factory.trainers import load_trainer
from torch import Tensor

from helpers.tiny_pipelines import make_tiny_flux


class Redness(PointwiseRewardModel):
    """The mean of the red channel."""

    required_fields = ("prompt", "image")

    def __call__(self, prompt: list[str], image: list[Any], **others: Any) -> RewardModelOutput:
        return RewardModelOutput(rewards=torch.tensor([float(np.asarray(one)[..., 0].mean()) for one in image]))


@dataclass
class Run:
    """What a run did, one entry per optimizer step; gradients (P,) and weights (P,) of all P trained parameters."""

    trainer: Any
    logs: list[dict[str, Any]]
    gradients: list[Tensor]
    weights: list[Tensor]


def configuration(folder: Path, trainer_type: str, **train: Any) -> dict[str, Any]:
    """Two epochs of two optimizer steps: 2 prompts, 4 images each of 32 x 32 pixels, 2 trained steps of 4."""
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    (folder / "prompts" / "train.txt").write_text("\n".join(f"prompt {i}" for i in range(4)))
    training = {
        "trainer_type": trainer_type, "resolution": 32, "num_inference_steps": 4, "max_epochs": 2,
        "per_device_batch_size": 2, "group_size": 4, "unique_sample_num_per_epoch": 2, "gradient_step_per_epoch": 2,
        "learning_rate": 1e-3, "clip_range": 1e-2, "seed": 7, "ema_decay": 0, "ema_device": "cpu",
        "ref_param_device": "cpu",
        # Under autocast to bf16, which Flow-Factory always uses, torch's CPU operators take no fp16.
        "latent_storage_dtype": "bf16",
    }  # fmt: skip
    return {
        "mixed_precision": "no",
        "data": {
            "dataset_dir": str(folder / "prompts"), "cache_dir": str(folder / "cache"), "dataloader_num_workers": 0,
            "preprocessing_batch_size": 4,
        },
        "model": {
            "model_name_or_path": str(make_tiny_flux(folder / "tiny")), "model_type": "flux1", "finetune_type": "full",
            "master_weight_dtype": "float32", "target_modules": "all",
        },
        "log": {
            "run_name": "run", "logging_backend": "none", "save_dir": str(folder / "save"), "save_freq": 0,
            "verbose": False,
        },
        "train": training | train,
        "scheduler": {"dynamics_type": "Flow-SDE", "noise_level": 0.7, "num_sde_steps": 2, "sde_steps": [0, 1, 2]},
        "eval": {"eval_freq": 0},
        "rewards": [
            {"name": "red", "reward_model": f"{__name__}.Redness", "batch_size": 4, "device": "cpu", "dtype": "float32"}
        ],
    }  # fmt: skip


def train(config: dict[str, Any]) -> Run:
    """As `flow_factory.train.main` does, with records of every optimizer step."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    trainer = load_trainer(Arguments.from_dict(config))
    run = Run(trainer, [], [], [])
    step, log = trainer.optimizer.step, trainer.log_data

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().flatten() for tensor in tensors])

    def recorded_step() -> None:
        parameters = trainer.adapter.get_trainable_parameters()
        run.gradients.append(flat([parameter.grad for parameter in parameters]))
        step()
        run.weights.append(flat(parameters))

    def recorded_log(data: dict[str, Any], step: int) -> None:
        if "train/loss" in data:
            run.logs.append(data)
        log(data, step=step)

    trainer.optimizer.step, trainer.log_data = recorded_step, recorded_log
    trainer.start()
    return run
