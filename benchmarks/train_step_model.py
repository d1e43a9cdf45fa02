"""The trainer's own rollout and update on the real Flux with random weights; nothing is downloaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from train_step_cases import Case

from fastguard.backbones.flux.backbone import FluxBackbone, prepare_transformer
from fastguard.backbones.flux.skeleton import meta_transformer, meta_vae, pipeline_configs
from fastguard.prompts import EncodedPrompts, Prompt
from fastguard.train.collect import images_to_sample
from fastguard.train.rollout import RolloutBatch, rollout, training_schedule
from fastguard.train.state import TrainState, build_state
from fastguard.train.update import minibatches, policy_loss, update_weights


@dataclass(frozen=True)
class RandomPrompts(EncodedPrompts):
    """Embeddings of random numbers, made when they are asked for."""

    tokens: int
    channels: int
    pooled: int

    def load(self, indices: Sequence[int]) -> dict[str, Tensor]:
        n = len(indices)
        return {"embeds": torch.randn(n, self.tokens, self.channels), "pooled": torch.randn(n, self.pooled)}


class NoRun:
    """A run that leaves no traces; the trainer asks only this method of it here."""

    def skipped(self, epoch: int, message: str) -> None:
        raise FloatingPointError(message)


@torch.no_grad()
def fill(module: nn.Module, device: torch.device) -> None:
    """Give a meta module memory on the device and random matrices; biases are 0, scales 1."""
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, 0.02)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def build(case: Case, dry: bool) -> TrainState:
    """The trainer's state, as `FluxBackbone.load` and `train` build it, but for the values of the weights."""
    torch.manual_seed(0)
    recipe, accelerator = case.recipe(dry), Accelerator(cpu=dry)
    configs, dtype = pipeline_configs(recipe.model.path), getattr(torch, recipe.model.dtype)
    vae, transformer = meta_vae(configs, dtype), meta_transformer(configs, dtype)
    for module in (vae, transformer):
        fill(module, accelerator.device)
        module.eval()
    prepare_transformer(transformer, recipe.model, recipe.lora, case.recompute)
    if case.compile:
        torch._dynamo.config.recompile_limit = 32  # forms of a block, with and without gradients, share their code
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend="aot_eager" if dry else "inductor")
    if case.train == "lora":
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:  # as after some training: they begin at zero, and with them the gradients of lora_A
                nn.init.normal_(parameter, std=1e-3)
    prompts = RandomPrompts(
        [Prompt("random")],
        [],
        tokens=recipe.prompts.max_tokens,
        channels=transformer.config.joint_attention_dim,
        pooled=transformer.config.pooled_projection_dim,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)  # Flux.1-dev's
    backbone = FluxBackbone(transformer, vae, scheduler, prompts, len(prompts.prompts), recipe, accelerator.device)
    return build_state(backbone, recipe, accelerator, None)


def sample(state: TrainState) -> tuple[RolloutBatch, ...]:
    """The images of an epoch, as `sample_epoch` samples them, without decoding and rewards."""
    recipe, backbone, device = state.recipe, state.backbone, state.accelerator.device
    schedule = training_schedule(recipe.sampler, backbone.shift, recipe.run.seed, 0)
    prompt_indices, seeds = images_to_sample(state)
    transitions = []
    for first in range(0, len(prompt_indices), recipe.sampler.batch_size):
        part = slice(first, first + recipe.sampler.batch_size)
        on_device = prompt_indices[part].to(device)
        rolled = rollout(state.policy, on_device, seeds[part], backbone.latent_shape, schedule, backbone.dtype)
        batch = RolloutBatch.cat(rolled.transitions)
        transitions.append(replace(batch, sample=batch.sample + first).to(recipe.sampler.store))
    return tuple(transitions)


def update(state: TrainState, transitions: Sequence[RolloutBatch]) -> dict[str, float]:
    """One optimizer update on all transitions. Raises AssertionError unless it has a gradient and clips nothing."""
    recipe, index = state.recipe, next(minibatches(state))
    advantages = 1.0 - 2.0 * (torch.arange(recipe.images_per_epoch) % 2)
    done = update_weights(state, transitions, index, advantages, NoRun())  # type: ignore[arg-type]
    worst, norm = float(done.log_ratio.abs().max()), float(done.grad_norm)
    assert not done.clipped.any(), f"a log-ratio of {worst:.2e} before any weight has changed"
    assert 0 < norm < math.inf, f"gradient norm {norm}"
    return {"worst_log_ratio": worst, "grad_norm": norm}


def kept_bytes(state: TrainState, transitions: Sequence[RolloutBatch]) -> int:
    """What the forward pass of one micro-batch leaves on the device for its backward pass."""
    index = next(minibatches(state))[: state.recipe.micro_batch]
    batch = RolloutBatch.select(transitions, index).to(state.accelerator.device)
    advantages = torch.ones(len(batch), device=state.accelerator.device)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = policy_loss(state.policy, batch, advantages, state.recipe.objective)
    kept = torch.cuda.memory_allocated() - before
    del result
    return kept
