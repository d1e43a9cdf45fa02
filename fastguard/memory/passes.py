"""The program's own phases on fake tensors: encode, rollout, decode, update. Results are kept for the process's life.

Axes: B image or transition, S image token, T text token, C channel, P prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastguard.backbones.flux import FluxBackbone, latent_grid, prepare_transformer
from fastguard.blocks import FuseReport
from fastguard.config import LoraConfig, ModelConfig, ObjectiveConfig, Recompute
from fastguard.memory.live import Kind, Label, LiveBytes, allocated, use_cuda_kernels
from fastguard.memory.models import (
    described_by,
    materialize,
    meta_encoders,
    meta_transformer,
    meta_vae,
    pipeline_configs,
)
from fastguard.prompts import ENCODE_BATCH, EncodedPrompts
from fastguard.sde import Transition
from fastguard.step import sde_step
from fastguard.train.rollout import RolloutBatch, predict_velocity
from fastguard.train.update import policy_loss


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
    vae: int
    """bytes"""
    text: tuple[int, int]
    """channels of a T5 token and of CLIP's pooled vector"""
    latent_shape: tuple[int, int]
    """(S, C)"""
    width: int
    """channels of a token in the transformer"""
    blocks: dict[str, int]
    """number of blocks, double and single"""
    fused: FuseReport | None
    """what `fuse_flux` makes of them"""


@dataclass(frozen=True)
class Pass:
    """Live bytes of one fake run."""

    kept: int
    """activations after the forward pass, alive for the backward pass (0 without one)"""
    peak: int
    at_peak: dict[Kind, int]
    """the peak, split"""
    kept_tensors: tuple[Label, ...] = ()
    """what `kept` is made of; places are "double 0", ..., "single 0", ..., and "" outside of the blocks"""


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


def _prepared_transformer(
    model: ModelConfig, lora: LoraConfig, recompute: Recompute, adapter_dtype: torch.dtype = torch.float32
) -> tuple[Any, FuseReport | None]:
    transformer = meta_transformer(pipeline_configs(model.path), dtype_of(model))
    with torch.device("meta"):
        fused = prepare_transformer(transformer, model, lora, recompute)
    if model.train == "lora":
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(adapter_dtype)
    return transformer, fused


@lru_cache(maxsize=64)
def weights_of(model: ModelConfig, lora: LoraConfig) -> Weights:
    """Sizes of the prepared transformer and of the VAE, as the allocator rounds them.

    Raises UserError as `pipeline_configs`, `latent_grid` and `add_lora` do.
    """
    configs = pipeline_configs(model.path)
    vae = meta_vae(configs, dtype_of(model))
    rows, columns = latent_grid(vae.config, model)
    transformer, fused = _prepared_transformer(model, lora, "none")
    parameters = dict(transformer.named_parameters())
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    return Weights(
        transformer=_sizes(parameters),
        trained=_sizes(trained),
        low_precision=next(iter(trained.values())).element_size() < 4,
        vae=sum(allocated(t.nbytes) for t in (*vae.parameters(), *vae.buffers())),
        text=(transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim),
        latent_shape=(rows * columns, transformer.config.in_channels),
        width=transformer.inner_dim,
        blocks={kind: len(blocks) for kind, blocks in _block_lists(transformer)},
        fused=fused,
    )


def _block_lists(transformer: Any) -> Iterator[tuple[str, Any]]:
    yield "double", transformer.transformer_blocks
    yield "single", transformer.single_transformer_blocks


def _sizes(parameters: dict[str, Tensor]) -> Sizes:
    blocks: dict[str, int] = {}
    for name, p in parameters.items():
        part, _, rest = name.partition(".")
        if part in ("transformer_blocks", "single_transformer_blocks"):
            block = f"{part}.{rest.partition('.')[0]}"
            blocks[block] = blocks.get(block, 0) + allocated(p.nbytes)
    return Sizes(
        count=sum(p.numel() for p in parameters.values()),
        n_bytes=sum(allocated(p.nbytes) for p in parameters.values()),
        block_bytes=sum(blocks.values()),
        largest_block=max(blocks.values(), default=0),
        largest=max(p.numel() for p in parameters.values()),
    )


@contextmanager
def _fake_backbone(settings: PassSettings, decode_batch: int = 1) -> Iterator[tuple[FluxBackbone, LiveBytes]]:
    """The product's own backbone on fake weights; inside, new tensors are fake. Weights of the transformer are held.

    One prompt's embeddings are there, but not held: the planner counts the table of all prompts.
    """
    model, weights = settings.model, weights_of(settings.model, settings.lora)
    transformer, fused = _prepared_transformer(model, settings.lora, settings.recompute, settings.adapter_dtype)
    configs = pipeline_configs(model.path)
    vae = meta_vae(configs, dtype_of(model))
    scheduler = SimpleNamespace(config=SimpleNamespace(use_dynamic_shifting=False, shift=1.0))
    recipe: Any = SimpleNamespace(model=model, sampler=SimpleNamespace(decode_batch=decode_batch))
    with described_by(configs.folder), FakeTensorMode():
        if settings.cuda_kernels:
            for name in [""] if fused is None else fused.left:  # fused blocks have kernels of their own
                use_cuda_kernels(transformer.get_submodule(name))
        materialize(transformer)
        materialize(vae)
        backbone = FluxBackbone(
            transformer,
            vae,
            scheduler,
            encoded=EncodedPrompts([], []),
            num_trained_prompts=0,
            recipe=recipe,
            device=torch.device("cpu"),
        )
        channels, pooled = weights.text
        policy = backbone.policy
        policy.row_of = torch.empty(1, dtype=torch.int64)
        policy.embeds = torch.empty(1, settings.max_tokens, channels, dtype=backbone.dtype)
        policy.pooled = torch.empty(1, pooled, dtype=backbone.dtype)
        live = LiveBytes()
        live.hold(transformer.parameters(), "weights")
        for kind, blocks in _block_lists(transformer):
            for i, block in enumerate(blocks):
                live.watch(block, f"{kind} {i}")
        yield backbone, live


def _transitions(backbone: FluxBackbone, n: int, with_reference: bool) -> RolloutBatch:
    """N transitions without values."""
    latents, velocity, noise, ref = (torch.empty(n, *backbone.latent_shape, dtype=backbone.dtype) for _ in range(4))
    index = torch.empty(n, dtype=torch.int64)
    return RolloutBatch(
        latents, velocity, noise, torch.empty(n), index, index, index, _some_step(n), ref if with_reference else None
    )


def _some_step(n: int) -> Transition:
    """Coefficients (N,) of a stochastic step, without values."""
    latents_coef, velocity_coef, std, dt = (torch.empty(n) for _ in range(4))
    return Transition("flow_sde", latents_coef, velocity_coef, std, dt, has_density=True, is_deterministic=False)


@lru_cache(maxsize=16)
def encode_pass(path: str, dtype: torch.dtype, max_tokens: int) -> Pass:
    """CLIP and T5 on a batch of `ENCODE_BATCH` prompts, one after the other, as `FluxPipeline.encode_prompt` does."""
    configs = pipeline_configs(path)
    clip, t5 = meta_encoders(configs, dtype)
    with described_by(configs.folder), FakeTensorMode(), torch.no_grad():
        live = LiveBytes()
        for module in (clip, t5):
            materialize(module)
            live.hold((*module.parameters(), *module.buffers()), "weights")
        clip_ids = torch.empty(ENCODE_BATCH, clip.config.max_position_embeddings, dtype=torch.int64)
        t5_ids = torch.empty(ENCODE_BATCH, max_tokens, dtype=torch.int64)
        with live:
            pooled = clip(clip_ids, output_hidden_states=False).pooler_output
            embeds = t5(t5_ids, output_hidden_states=False)[0]
            del pooled, embeds
    return Pass(0, live.peak, live.at_peak)


@lru_cache(maxsize=64)
def rollout_pass(settings: PassSettings) -> Pass:
    """One denoising step of `micro_batch` images: the transformer without gradients, then the stochastic step."""
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
    """The VAE's decoder on the `micro_batch` images of a rollout batch, `decode_batch` at once; without its weights.

    Only the last parts are decoded: all are alike, and the images of the others are there.
    """
    n = settings.micro_batch
    skipped = max(0, n // decode_batch - DECODED_PARTS) * decode_batch
    with _fake_backbone(settings, decode_batch) as (backbone, live):
        latents = torch.empty(n, *backbone.latent_shape, dtype=backbone.dtype)
        height, width = settings.model.height, settings.model.width
        with live:
            earlier = torch.empty(skipped, 3, height, width, dtype=torch.uint8)
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
