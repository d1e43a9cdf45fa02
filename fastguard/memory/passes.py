"""The program's own phases on fake tensors: encode, rollout, decode, update. Results are kept for the process's life.

The model family makes the modules; nothing here knows one. Axes: N image or transition, S image token, C channel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastguard.backbones import Backbone, Skeleton, family_of
from fastguard.backbones.folder import described_by
from fastguard.blocks import FuseReport
from fastguard.blocks.offload import host_memory_inside
from fastguard.config import Encoders, LoraConfig, ModelConfig, ObjectiveConfig, Recompute
from fastguard.memory.counter import Flops, MovedBytes
from fastguard.memory.live import Kind, Label, LiveBytes, allocated, use_cuda_kernels
from fastguard.prompts import ENCODE_BATCH
from fastguard.sde import Transition
from fastguard.step import sde_step
from fastguard.train.policy_loss import policy_loss
from fastguard.train.rollout import RolloutBatch, predict_velocity


@dataclass(frozen=True)
class Sizes:
    """Bytes of a set of parameters, and what of it FSDP2 shards."""

    count: int
    """parameters"""
    n_bytes: int
    block_bytes: int
    """in the transformer blocks, all together"""
    largest_block: int
    """bytes of the largest block"""
    largest: int
    """elements of the largest parameter"""


@dataclass(frozen=True)
class Weights:
    """What the modules of a training run hold."""

    transformer: Sizes
    """all of its parameters, with adapters"""
    trained: Sizes
    low_precision: bool
    """whether trained weights are narrower than float32"""
    decoder: int
    """bytes"""
    text: tuple[int, int]
    """elements of an encoded prompt: of each of prompts.max_tokens tokens, and of the rest"""
    latent_shape: tuple[int, ...]
    """of one image"""
    tokens: int
    """of one image, in the transformer"""
    branches: int
    """passes with a gradient for one image"""
    width: int
    """channels of a token in the transformer"""
    blocks: dict[str, int]
    """number of blocks of each kind"""
    fused: FuseReport | None
    """what is fused of them"""


@dataclass(frozen=True)
class Pass:
    """Live bytes and FLOPs of one fake run."""

    kept: int
    """activations after the forward pass, alive for the backward pass (0 without one)"""
    peak: int
    at_peak: dict[Kind, int]
    """the peak, split"""
    kept_tensors: tuple[Label, ...] = ()
    """what `kept` is made of; places are a kind of block and a number, "double 0", and "" outside of the blocks"""
    flops: int = 0
    """of matmuls, attention and convolutions; what is computed again counts again"""
    host: int = 0
    """the most pinned host memory at once: offloaded checkpoints"""


@dataclass(frozen=True)
class PassSettings:
    """What a pass of the model depends on."""

    model: ModelConfig
    lora: LoraConfig
    objective: ObjectiveConfig
    max_tokens: int
    micro_batch: int
    recompute: Recompute
    accumulate: bool = True
    """whether gradients of an earlier micro-batch are there already"""
    adapter_dtype: torch.dtype = torch.float32
    cuda_kernels: bool = True
    """replace what the CPU takes apart by CUDA's kernels; off, the trace is what PyTorch shows on a CPU"""


def as_built(model: ModelConfig) -> ModelConfig:
    """The fields of `model` that memory depends on; every attention backend keeps what PyTorch's flash keeps."""
    guidance = ModelConfig.guidance if model.guidance > 1 else 1.0  # at 1 and below there is no second branch
    return replace(model, recompute="none", guidance=guidance, negative_prompt="", attention="native")


def dtype_of(model: ModelConfig) -> torch.dtype:
    return getattr(torch, model.dtype)


def _folder(model: ModelConfig) -> Path | None:
    """Where the modules are described; None for a configuration that the family knows by name."""
    return Path(model.path) if os.path.isdir(model.path) else None


@lru_cache(maxsize=64)
def weights_of(model: ModelConfig, lora: LoraConfig) -> Weights:
    """Sizes of the prepared transformer and of the decoder, as the allocator rounds them.

    Raises UserError as `Family.skeleton`.
    """
    skeleton = family_of(model.kind).skeleton(model, lora, "none")
    decoder = skeleton.decoder
    parameters = list(skeleton.transformer.parameters())
    trained = [p for p in parameters if p.requires_grad]
    return Weights(
        transformer=_sizes(parameters, skeleton),
        trained=_sizes(trained, skeleton),
        low_precision=trained[0].element_size() < 4,
        decoder=sum(allocated(t.nbytes) for t in (*decoder.parameters(), *decoder.buffers())),
        text=skeleton.text,
        latent_shape=skeleton.latent_shape,
        tokens=skeleton.tokens,
        branches=skeleton.branches,
        width=skeleton.width,
        blocks={kind: len(blocks) for kind, blocks in skeleton.blocks.items()},
        fused=skeleton.fused,
    )


def _sizes(parameters: Sequence[Tensor], skeleton: Skeleton) -> Sizes:
    counted = {id(p) for p in parameters}
    blocks = [
        sum(allocated(p.nbytes) for p in block.parameters() if id(p) in counted)
        for some in skeleton.blocks.values()
        for block in some
    ]
    return Sizes(
        count=sum(p.numel() for p in parameters),
        n_bytes=sum(allocated(p.nbytes) for p in parameters),
        block_bytes=sum(blocks),
        largest_block=max(blocks, default=0),
        largest=max(p.numel() for p in parameters),
    )


@contextmanager
def _fake_backbone(
    settings: PassSettings, decode_batch: int = 1, decode_tiled: bool = False
) -> Iterator[tuple[Backbone, LiveBytes]]:
    """The product's own backbone on fake weights; inside, new tensors are fake. Weights of the transformer are held.

    One prompt's embeddings are there, but not held: the planner counts the table of all prompts.
    """
    model = settings.model
    skeleton = family_of(model.kind).skeleton(model, settings.lora, settings.recompute)
    transformer = skeleton.transformer
    if model.train == "lora":
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(settings.adapter_dtype)
    with described_by(_folder(model)), FakeTensorMode():
        if settings.cuda_kernels:
            for name in [""] if skeleton.fused is None else skeleton.fused.left:  # fused blocks have their own kernels
                use_cuda_kernels(transformer.get_submodule(name))
        materialize(transformer)
        materialize(skeleton.decoder)
        backbone = skeleton.assemble(settings.max_tokens, decode_batch, decode_tiled)
        live = LiveBytes()
        live.hold(transformer.parameters(), "weights")
        for kind, blocks in skeleton.blocks.items():
            for i, block in enumerate(blocks):
                live.watch(block, f"{kind} {i}")
        yield backbone, live


def materialize(module: nn.Module) -> None:
    """Give a meta module empty parameters and buffers in place; under FakeTensorMode they take no memory."""
    made: dict[int, Any] = {}

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:  # tied weights stay tied
                    made[id(parameter)] = nn.Parameter(empty(parameter), requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = empty(buffer)


def _transitions(backbone: Backbone, n: int, with_reference: bool) -> RolloutBatch:
    """N transitions without values."""
    latents, velocity, noise, ref = (torch.empty(n, *backbone.latent_shape, dtype=backbone.dtype) for _ in range(4))
    index = torch.empty(n, dtype=torch.int64)
    return RolloutBatch(
        latents, velocity, noise, torch.empty(n), index, index, index, _some_step(n), ref if with_reference else None,
        step_weight=torch.empty(n),
    )  # fmt: skip


def _some_step(n: int) -> Transition:
    """Coefficients (N,) of a stochastic step, without values."""
    latents_coef, velocity_coef, std, dt = (torch.empty(n) for _ in range(4))
    return Transition("flow_sde", latents_coef, velocity_coef, std, dt, has_density=True, is_deterministic=False)


@lru_cache(maxsize=16)
def encode_pass(model: ModelConfig, max_tokens: int, encoders: Encoders) -> Pass:
    """The largest of the text encoders on a batch of `ENCODE_BATCH` prompts: one is freed before the next is loaded."""
    parts = family_of(model.kind).text_encoders(model, max_tokens, encoders)
    found = [Pass(0, 0, {})]
    with described_by(_folder(model)), FakeTensorMode(), torch.no_grad():
        for encoder in parts:
            live = LiveBytes()
            materialize(encoder.module)
            live.hold((*encoder.module.parameters(), *encoder.module.buffers()), "weights")
            ids = torch.empty(ENCODE_BATCH, encoder.tokens, dtype=torch.int64)
            with live, Flops() as flops:
                encoder.embed(ids)
            found.append(Pass(0, live.peak, live.at_peak, flops=flops.total))
    return replace(max(found, key=lambda run: run.peak), flops=sum(run.flops for run in found))


@lru_cache(maxsize=64)
def rollout_pass(settings: PassSettings, adapters: bool = True) -> Pass:
    """One denoising step of `micro_batch` images: the transformer without gradients, then the stochastic step.

    With compiled blocks, their wrapper runs here too: it saves one block's activations for a backward that never comes.

    adapters: False takes the model before training, which has no adapters to compute.
    """
    n = settings.micro_batch
    with (
        _fake_backbone(settings) as (backbone, live),
        nullcontext() if adapters or not backbone.has_adapters else backbone.adapters_off(),
        torch.no_grad(),
    ):
        latents = torch.empty(n, *backbone.latent_shape, dtype=backbone.dtype)
        prompts, seeds, step = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64), _some_step(n)
        with live, Flops() as flops:
            velocity = predict_velocity(backbone.policy, latents, 0.5, prompts)
            sde_step(latents, velocity, step, seeds=seeds)
    return Pass(0, live.peak, live.at_peak, flops=flops.total)


DECODED_PARTS = 3
"""of a rollout batch: a batch may have thousands, at a tenth of a second each"""


@lru_cache(maxsize=64)
def decode_pass(settings: PassSettings, decode_batch: int, decode_tiled: bool = False) -> Pass:
    """The decoder on the `micro_batch` images of a rollout batch, `decode_batch` at once; without its weights.

    Only the last parts are decoded: all are alike, and the images of the others are there. Their FLOPs count.
    """
    n = settings.micro_batch
    skipped = max(0, n // decode_batch - DECODED_PARTS) * decode_batch
    with _fake_backbone(settings, decode_batch, decode_tiled) as (backbone, live):
        latents = torch.empty(n, *backbone.latent_shape, dtype=backbone.dtype)
        shape = family_of(settings.model.kind).image_shape(settings.model)
        with live, Flops() as flops:
            earlier = torch.empty(skipped, *shape, dtype=torch.uint8)
            torch.cat([earlier, backbone.decode(latents[skipped:])])
    return Pass(0, live.peak, live.at_peak, flops=flops.total * n // (n - skipped))


@lru_cache(maxsize=64)
def update_pass(settings: PassSettings) -> Pass:
    """Forward, `guard_loss` and backward of one micro-batch, by the trainer's own `policy_loss`."""
    n = settings.micro_batch
    with _fake_backbone(settings) as (backbone, live):
        batch = _transitions(backbone, n, with_reference=settings.objective.kl_weight > 0)
        tensors = (batch.latents, batch.velocity, batch.noise, batch.ref_velocity)
        live.hold([t for t in tensors if t is not None], "trajectories")
        trained = [p for p in backbone.policy.parameters() if p.requires_grad]
        if settings.accumulate:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
        live.hold_gradients(trained)
        advantages = torch.empty(n)
        with live, Flops() as flops, host_memory_inside(partial(live.making, "host")):
            before = live.live.get("activations", 0)
            result = policy_loss(backbone.policy, batch, advantages, settings.objective)
            kept, kept_tensors = live.live["activations"] - before, tuple(live.labels("activations"))
            result.loss.backward()
    return Pass(kept, live.peak, live.at_peak, kept_tensors, flops.total, live.host_peak)


@lru_cache(maxsize=16)
def update_bytes(settings: PassSettings) -> tuple[int, int]:
    """Bytes that the operators of a forward and backward pass read and write; and of these, for dequantizing."""
    with _fake_backbone(settings) as (backbone, _):
        batch = _transitions(backbone, settings.micro_batch, with_reference=False)
        advantages = torch.empty(settings.micro_batch)
        with MovedBytes() as moved:
            policy_loss(backbone.policy, batch, advantages, replace(settings.objective, kl_weight=0.0)).loss.backward()
    return moved.total, moved.dequantizing
