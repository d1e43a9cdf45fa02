"""The program's own phases on fake tensors: encode, rollout, decode, update. Results are kept for the process's life.

The model family makes the modules; nothing here knows one. Axes: N image or transition, S image token, C channel.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastguard.backbones import Backbone, Skeleton, family_of
from fastguard.backbones.folder import described_by
from fastguard.blocks import FuseReport
from fastguard.config import LoraConfig, ModelConfig, ObjectiveConfig, Recompute
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
    latent_shape: tuple[int, int]
    """(S, C)"""
    width: int
    """channels of a token in the transformer"""
    blocks: dict[str, int]
    """number of blocks of each kind"""
    fused: FuseReport | None
    """what is fused of them"""


@dataclass(frozen=True)
class Pass:
    """Live bytes of one fake run."""

    kept: int
    """activations after the forward pass, alive for the backward pass (0 without one)"""
    peak: int
    at_peak: dict[Kind, int]
    """the peak, split"""
    kept_tensors: tuple[Label, ...] = ()
    """what `kept` is made of; places are a kind of block and a number, "double 0", and "" outside of the blocks"""


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
    return replace(model, recompute="none", guidance=ModelConfig.guidance, attention="native")


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
def _fake_backbone(settings: PassSettings, decode_batch: int = 1) -> Iterator[tuple[Backbone, LiveBytes]]:
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
        backbone = skeleton.assemble(settings.max_tokens, decode_batch)
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
def encode_pass(model: ModelConfig, max_tokens: int) -> Pass:
    """The text encoders on a batch of `ENCODE_BATCH` prompts, one after the other."""
    encoders = family_of(model.kind).text_encoders(model, max_tokens)
    with described_by(_folder(model)), FakeTensorMode(), torch.no_grad():
        live = LiveBytes()
        for encoder in encoders:
            materialize(encoder.module)
            live.hold((*encoder.module.parameters(), *encoder.module.buffers()), "weights")
        ids = [torch.empty(ENCODE_BATCH, encoder.tokens, dtype=torch.int64) for encoder in encoders]
        with live:
            kept = [encoder.embed(some) for encoder, some in zip(encoders, ids, strict=True)]
            del kept
    return Pass(0, live.peak, live.at_peak)


@lru_cache(maxsize=64)
def rollout_pass(settings: PassSettings) -> Pass:
    """One denoising step of `micro_batch` images: the transformer without gradients, then the stochastic step.

    With compiled blocks, their wrapper runs here too: it saves one block's activations for a backward that never comes.
    """
    n = settings.micro_batch
    with _fake_backbone(settings) as (backbone, live), torch.no_grad():
        latents = torch.empty(n, *backbone.latent_shape, dtype=backbone.dtype)
        prompts, seeds, step = torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64), _some_step(n)
        with live:
            velocity = predict_velocity(backbone.policy, latents, 0.5, prompts)
            sde_step(latents, velocity, step, seeds=seeds)
    return Pass(0, live.peak, live.at_peak)


DECODED_PARTS = 3
"""of a rollout batch: a batch may have thousands, at a tenth of a second each"""


@lru_cache(maxsize=64)
def decode_pass(settings: PassSettings, decode_batch: int) -> Pass:
    """The decoder on the `micro_batch` images of a rollout batch, `decode_batch` at once; without its weights.

    Only the last parts are decoded: all are alike, and the images of the others are there.
    """
    n = settings.micro_batch
    skipped = max(0, n // decode_batch - DECODED_PARTS) * decode_batch
    with _fake_backbone(settings, decode_batch) as (backbone, live):
        latents = torch.empty(n, *backbone.latent_shape, dtype=backbone.dtype)
        shape = family_of(settings.model.kind).image_shape(settings.model)
        with live:
            earlier = torch.empty(skipped, *shape, dtype=torch.uint8)
            torch.cat([earlier, backbone.decode(latents[skipped:])])
    return Pass(0, live.peak, live.at_peak)


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
        with live:
            before = live.live.get("activations", 0)
            result = policy_loss(backbone.policy, batch, advantages, settings.objective)
            kept, kept_tensors = live.live["activations"] - before, tuple(live.labels("activations"))
            result.loss.backward()
    return Pass(kept, live.peak, live.at_peak, kept_tensors)


@lru_cache(maxsize=16)
def rollout_flops(settings: PassSettings) -> int:
    """Matmul, convolution and attention FLOPs of the transformer in one denoising step of `micro_batch` images."""
    n = settings.micro_batch
    with _fake_backbone(settings) as (backbone, _), torch.no_grad():
        latents, prompts = (
            torch.empty(n, *backbone.latent_shape, dtype=backbone.dtype),
            torch.empty(n, dtype=torch.int64),
        )
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            predict_velocity(backbone.policy, latents, 0.5, prompts)
    return counter.get_total_flops()


@lru_cache(maxsize=16)
def update_flops(settings: PassSettings) -> int:
    """Matmul, convolution and attention FLOPs of a forward and backward pass, with those that are done twice.

    Only what flash attention computes again inside its backward does not count. Frozen weights get no gradient.
    """
    with _fake_backbone(settings) as (backbone, _):
        batch = _transitions(backbone, settings.micro_batch, with_reference=False)
        advantages = torch.empty(settings.micro_batch)
        with FlopCounterMode(display=False, custom_mapping=FLOPS) as counter:
            policy_loss(backbone.policy, batch, advantages, replace(settings.objective, kl_weight=0.0)).loss.backward()
    return counter.get_total_flops()


def _linear_flops(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    """(m, k) by (k, n), added to the first argument."""
    return 2 * a[0] * a[1] * b[1]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Two matmuls, q k^T and p v; the arguments are shapes (B, H, S, D)."""
    batch, heads, rows, channels = query
    return 2 * batch * heads * rows * key[2] * (channels + value[3])


def _attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Four matmuls: the gradients of p, v, q and k."""
    return 2 * _attention_flops(query, key, value)


FLOPS = {
    torch.ops.aten.addmm_: _linear_flops,  # in place: PyTorch's own table lacks it
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
