"""Rewards on CLIP: PickScore, CLIPScore, HPSv2 and the LAION aesthetic score.

All of them take the model's options:
    path: folder of a CLIP model in transformers' layout, or its name on the model hub
    processor: folder or hub name of its tokenizer and image processor; empty means `path`
    device: "auto" (this process's GPU if there is one, else the CPU), "cpu", "cuda", "cuda:1", ...
    dtype: of the weights: "float32", "bfloat16" or "float16"; scores are computed in float32
    batch_size: images per forward pass
Texts are cut at the tokenizer's limit (77 tokens for all public models). Calls take turns: one lock per model.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fastguard.errors import UserError
from fastguard.rewards.images import to_pil
from fastguard.rewards.options import checked

VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_L = "openai/clip-vit-large-patch14"

Device = Annotated[str, Field(pattern="^(auto|cpu|cuda(:[0-9]{1,3})?)$")]
DType = Literal["float32", "bfloat16", "float16"]
BatchSize = Annotated[int, Field(ge=1, le=65_536)]


class PickScore:
    """exp(logit_scale) times the cosine of image and prompt, about 15 to 26 (Kirstain et al. 2023, arXiv:2305.01569).

    Flow-GRPO's code divides by 26 as well; a `weight` of 0.0385 does the same. Options: the model's, as above.
    """

    @checked
    def __init__(
        self,
        path: str = "yuvalkirstain/PickScore_v1",
        processor: str = VIT_H,
        device: Device = "auto",
        dtype: DType = "float32",
        batch_size: BatchSize = 16,
    ) -> None:
        self.clip = _Clip(path, processor, device, dtype, batch_size)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """(B, C, H, W) uint8 images to (B,) float32 scores."""
        return self.clip.scale * self.clip.cosine(images, prompts)


class ClipScore:
    """2.5 max(cosine of image and prompt, 0) (Hessel et al. 2021, arXiv:2104.08718, equation in section 3).

    The paper uses ViT-B/32 and begins prompts with "A photo depicts"; here the prompt is taken as it is, on ViT-L/14.
    Options: the model's, as above.
    """

    @checked
    def __init__(
        self,
        path: str = VIT_L,
        processor: str = "",
        device: Device = "auto",
        dtype: DType = "float32",
        batch_size: BatchSize = 16,
    ) -> None:
        self.clip = _Clip(path, processor, device, dtype, batch_size)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """(B, C, H, W) uint8 images to (B,) float32 scores in [0, 2.5]."""
        return 2.5 * self.clip.cosine(images, prompts).clamp(min=0)


class HpsV2:
    """100 times the cosine of image and prompt, as HPSv2's benchmark prints it (Wu et al. 2023, arXiv:2306.09341).

    The public checkpoint is in open_clip's layout; `path` is a CLIP ViT-H/14 with its weights converted to
    transformers'. Images that are not square are padded with black, as HPSv2 does, instead of cropped.
    Options: the model's, as above; `path` is required.
    """

    @checked
    def __init__(
        self,
        path: str,
        processor: str = VIT_H,
        device: Device = "auto",
        dtype: DType = "float32",
        batch_size: BatchSize = 16,
    ) -> None:
        self.clip = _Clip(path, processor, device, dtype, batch_size)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """(B, C, H, W) uint8 images to (B,) float32 scores."""
        return 100 * self.clip.cosine(_square(images), prompts)


class AestheticScore:
    """LAION's aesthetic predictor: a chain of linear layers on the normalized image embedding; about 1 to 10.

    Schuhmann et al. 2022, arXiv:2210.08402, and github.com/christophschuhmann/improved-aesthetic-predictor, whose
    sac+logos+ava1-l14-linearMSE.pth is the usual head (no activations). Prompts are not read.

    Options: the model's, as above, and
        head: file of the head's weights, .safetensors or .pth; a .pth may hold tensors and nothing else
    """

    @checked
    def __init__(
        self,
        head: str,
        path: str = VIT_L,
        processor: str = "",
        device: Device = "auto",
        dtype: DType = "float32",
        batch_size: BatchSize = 16,
    ) -> None:
        layers = _load_head(Path(head))
        self.clip = _Clip(path, processor, device, dtype, batch_size)
        self.layers = [(weight.to(self.clip.device), bias.to(self.clip.device)) for weight, bias in layers]
        wanted, width = layers[0][0].shape[1], self.clip.model.config.projection_dim
        if wanted != width:
            raise UserError(f"rewards.options.head reads {wanted} features, but {path} gives {width}")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """(B, C, H, W) uint8 images to (B,) float32 scores."""
        features = self.clip.image_features(images)
        for weight, bias in self.layers:
            features = F.linear(features, weight, bias)
        return features[:, 0]


class _Clip:
    """A frozen CLIP model with its tokenizer and image processor."""

    def __init__(self, path: str, processor: str, device: str, dtype: str, batch_size: int) -> None:
        try:
            from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
        except ImportError as error:
            raise UserError(f"needs transformers: pip install transformers ({error})") from error
        self.batch_size = batch_size
        self.device = resolve_device(device)
        self._lock = threading.Lock()  # fast tokenizers refuse to truncate in two threads at once
        try:
            loaded: Any = CLIPModel.from_pretrained(path, output_loading_info=True, use_safetensors=True)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: weights of other shapes
            raise UserError(f"rewards.options.path = {path!r} gives no CLIP model: {error}") from error
        model, info = loaded
        if missing := sorted(info["missing_keys"]):  # transformers would go on with random weights there
            raise UserError(
                f"rewards.options.path = {path!r} lacks {len(missing)} weights of transformers' CLIP model, "
                f"{missing[0]} for one"
            )
        self.scale = model.logit_scale.detach().float().exp().item()  # before the cast: bfloat16 is 1% off
        self.model = model.to(self.device, getattr(torch, dtype)).eval().requires_grad_(False)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(processor or path)
            self.images = CLIPImageProcessor.from_pretrained(processor or path)
        except (OSError, ValueError) as error:
            field = "processor" if processor else "path"
            raise UserError(
                f"rewards.options.{field} = {processor or path!r} gives no tokenizer and image processor: {error}"
            ) from error
        positions = self.model.config.text_config.max_position_embeddings
        self.max_tokens = min(self.tokenizer.model_max_length, positions)  # some tokenizers name no limit: 1e30

    def cosine(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) float32 cosines of each image with its prompt."""
        texts = []
        for chunk in _chunks(list(prompts), self.batch_size):
            with self._lock, torch.no_grad():
                inputs = self.tokenizer(
                    chunk, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
                ).to(self.device)
                features = self.model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
                texts.append(_normalized(features))
        return (self.image_features(images) * torch.cat(texts)).sum(dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """(B, D) float32 embeddings of length 1."""
        found = []
        for chunk in images.split(self.batch_size):
            pictures = [image.convert("RGB") for image in to_pil(chunk)]
            pixels = self.images(images=pictures, return_tensors="pt")["pixel_values"]
            with self._lock, torch.no_grad():
                found.append(_normalized(self.model.get_image_features(pixels.to(self.device, self.model.dtype))))
        return torch.cat(found)


def resolve_device(device: str) -> torch.device:
    """The device by name, with the GPU's number: a new thread's "cuda" is GPU 0, whatever the process has chosen.

    Raises UserError for a GPU that is not there.
    """
    found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if found.type == "cuda" and (found.index or 0) >= (gpus := torch.cuda.device_count()):
        raise UserError(f"rewards.options.device = {device!r}, but this process sees {gpus} GPUs")
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def _normalized(features: Any) -> Tensor:
    """Embeddings of length 1 in float32; transformers 5 wraps what transformers 4 returns bare."""
    embeddings: Tensor = (features if isinstance(features, Tensor) else features.pooler_output).float()
    return F.normalize(embeddings, dim=-1)


def _chunks(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _square(images: Tensor) -> Tensor:
    """Pad (B, C, H, W) with black to a square, the image in its middle."""
    height, width = images.shape[-2:]
    down, right = max(width - height, 0), max(height - width, 0)
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def _load_head(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Weights (out, in) and biases (out,) of a chain of linear layers, in the order of the numbers in their names."""
    where = f"rewards.options.head = {str(path)!r}"
    if not path.is_file():
        raise UserError(f"{where}: there is no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both loaders have errors of their own for files that are broken or hold code
        raise UserError(f"{where} cannot be read as weights and nothing else: {error}") from error
    names = sorted(
        (name for name in state if name.endswith("weight")), key=lambda n: [int(i) for i in re.findall(r"\d+", n)]
    )
    layers = [(state[name].float(), state[name.removesuffix("weight") + "bias"].float()) for name in names]
    shapes = [tuple(weight.shape) for weight, _ in layers]
    chained = all(after[1] == before[0] for before, after in pairwise(shapes))
    if not layers or not chained or shapes[-1][0] != 1:
        raise UserError(f"{where}: expected a chain of linear layers that ends in one number, got weights {shapes}")
    return layers
