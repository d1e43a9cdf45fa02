"""Tiny transformers of Stable Diffusion 3 and Qwen-Image with random weights, for tests that are the same for each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_qwenimage
from peft import LoraConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastguard as fg
from fastguard.backbones.lora import add_lora
from fastguard.blocks.offload import host_memory_inside
from fastguard.config import LoraConfig as OurLoraConfig
from fastguard.memory.live import LiveBytes
from fastguard.memory.passes import materialize
from helpers.flux_models import run as run_on

SD3_CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 64,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "sd3": SD3_CONFIG,
    "sd3.5": {**SD3_CONFIG, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "qwen_image": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
}
"""Plain SD3 has no norms of query and key. Of SD3.5, the first block has a second attention of the image."""
MODELS = list(CONFIGS)
BLOCKS = {"sd3": 3, "sd3.5": 3, "qwen_image": 2}
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LORA_TARGETS = [*ATTENTION, "net.0.proj", "net.2"]


def make_model(name: str, train: str = "full", targets: list[str] = LORA_TARGETS, rank: int = 4, **config: Any) -> Any:
    """A tiny transformer whose weights are all random; with "lora" only its adapters are trained."""
    torch.manual_seed(0)
    cls = QwenImageTransformer2DModel if name == "qwen_image" else SD3Transformer2DModel
    model: Any = cls(**{**CONFIGS[name], **config})
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    if train == "lora":
        add_adapters(model, targets, rank)
    return model


def add_adapters(model: Any, targets: list[str] = LORA_TARGETS, rank: int = 4) -> Any:
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=6, target_modules=targets, init_lora_weights=False))
    return model


def make_inputs(
    name: str,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    device: str = "cpu",
    side: int = 3,
    text: int = 5,
    masked: bool = True,
) -> dict[str, Any]:
    """Of side x side image tokens. `masked`: all samples of Qwen-Image but the first have one text token less."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    inputs = {
        "encoder_hidden_states": randn(batch, text, 32),
        "timestep": torch.rand(batch, generator=generator).to(device, dtype),
        "return_dict": False,
    }
    if name != "qwen_image":
        latents = randn(batch, 4, 2 * side, 2 * side)
        return inputs | {"hidden_states": latents, "pooled_projections": randn(batch, 32)}
    mask = torch.ones(batch, text, dtype=torch.bool, device=device)
    mask[1:, -1:] = False
    shapes = [(1, side, side)] * batch
    inputs |= {"hidden_states": randn(batch, side * side, 16), "img_shapes": shapes}
    return inputs | {"encoder_hidden_states_mask": mask if masked else None}


def run(name: str, model: Any, inputs: dict[str, Any] | None = None, **extra: Any) -> Any:
    """`helpers.flux_models.run` on inputs of this model."""
    parameter = next(model.parameters())
    return run_on(model, inputs or make_inputs(name, parameter.dtype, device=str(parameter.device)), **extra)


# --- real sizes -----------------------------------------------------------------------------------------------------

SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
SD35_LARGE = SD35_MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}
REAL: dict[str, dict[str, Any]] = {"SD3.5 Medium": SD35_MEDIUM, "SD3.5 Large": SD35_LARGE, "Qwen-Image": {}}


def saved_at_real_size(name: str, level: str, **config: Any) -> int:
    """Bytes that a forward pass saves for backward, from the real program on fake tensors: one image of 1024 x 1024
    with and without its prompt (a batch of 2), 333 or, of Qwen-Image, 512 text tokens, LoRA of rank 32 on attention."""
    of_qwen = name == "Qwen-Image"
    cls: Any = QwenImageTransformer2DModel if of_qwen else SD3Transformer2DModel
    with torch.device("meta"):
        model: Any = cls(**REAL[name] | config)
    if of_qwen:
        model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    add_lora(model, OurLoraConfig(rank=32, alpha=64), ATTENTION)
    if level != "unfused":
        report = fg.fuse(model, recompute=level)  # type: ignore[arg-type]
        assert not report.left
        assert not report.kept

    def empty(*shape: int) -> Tensor:
        return torch.empty(2, *shape, dtype=torch.bfloat16)

    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize(model)
        inputs: dict[str, Any] = {"timestep": empty(), "return_dict": False}
        if of_qwen:
            inputs |= {"hidden_states": empty(4096, 64), "encoder_hidden_states": empty(512, 3584)}
            inputs |= {"encoder_hidden_states_mask": empty(512).bool(), "img_shapes": [(1, 64, 64)] * 2}
        else:
            inputs |= {"hidden_states": empty(16, 128, 128), "encoder_hidden_states": empty(333, 4096)}
            inputs |= {"pooled_projections": empty(2048)}
        live = LiveBytes()
        live.hold((*model.parameters(), *model.buffers()), "weights")
        with live, host_memory_inside(partial(live.making, "host")):
            before = live.live.get("activations", 0)
            out = model(**inputs)[0]
            assert out.requires_grad
            return live.live["activations"] - before


# --- single blocks --------------------------------------------------------------------------------------------------

KINDS = {
    "sd3": ("sd3", 0),
    "sd3 last": ("sd3", 2),
    "sd3.5 dual": ("sd3.5", 0),
    "sd3.5": ("sd3.5", 1),
    "sd3.5 last": ("sd3.5", 2),
    "qwen_image": ("qwen_image", 0),
}
"""Every kind of block: the model that has it, and where."""
STREAMS = {"hidden_states": (12, 64), "encoder_hidden_states": (7, 64), "temb": (64,)}
"""Arguments of a block that have a gradient, and their shapes"""


def make_block(kind: str, train: str = "full", seed: int = 0) -> tuple[Any, dict[str, Any]]:
    """A block and the arguments of its forward; values are bfloat16's, so that all dtypes work on the same numbers."""
    name, place = KINDS[kind]
    model = make_model(name, train)
    block: Any = model.transformer_blocks[place]
    torch.manual_seed(seed)
    for parameter in block.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    inputs: dict[str, Any] = {name: torch.randn(2, *shape).bfloat16() for name, shape in STREAMS.items()}
    if name == "qwen_image":
        inputs["encoder_hidden_states_mask"] = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
        inputs["image_rotary_emb"] = model.pos_embed([(1, 3, 4)], max_txt_seq_len=7, device=torch.device("cpu"))
    return block.to(torch.bfloat16), inputs


def as_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of a block with streams of this dtype."""
    return {name: value.to(dtype) if name in STREAMS else value for name, value in inputs.items()}


def block_results(block: Any, inputs: dict[str, Any], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Outputs, and gradients of inputs and parameters."""
    leaves = {name: inputs[name].to(device, dtype, copy=True).requires_grad_() for name in STREAMS}
    others = {name: value for name, value in inputs.items() if name not in STREAMS}
    if "image_rotary_emb" in others:
        others["image_rotary_emb"] = tuple(table.to(device) for table in others["image_rotary_emb"])
        others["encoder_hidden_states_mask"] = others["encoder_hidden_states_mask"].to(device)
    block.zero_grad()
    text, image = block(**leaves, **others)
    outputs = {"image": image} if text is None else {"image": image, "text": text}
    generator = torch.Generator().manual_seed(5)
    torch.autograd.backward(
        list(outputs.values()), [torch.randn(t.shape, generator=generator).to(t) for t in outputs.values()]
    )
    found = outputs | {f"grad of {name}": leaf.grad for name, leaf in leaves.items()}
    found |= {f"grad of {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {name: tensor.detach().double().cpu() for name, tensor in found.items()}


@contextmanager
def in_float64() -> Iterator[None]:
    """diffusers takes the mean of squares, and rotates, in float32, whatever the dtype: not inside of this."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.weight

    def rotate(x: Tensor, angles: Tensor, use_real: bool) -> Tensor:
        assert not use_real
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * angles[:, None].to(torch.complex128)
        return torch.view_as_real(pairs).flatten(-2)

    with patch.object(RMSNorm, "forward", norm), patch.object(transformer_qwenimage, "apply_rotary_emb_qwen", rotate):
        yield
