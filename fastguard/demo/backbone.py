"""The digit model as a backbone of the trainer, and its two judges as rewards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastguard.backbones import to_pixels
from fastguard.blocks import FuseReport, fuse_flux
from fastguard.demo.cache import load_or_train
from fastguard.demo.config import DemoConfig
from fastguard.demo.data import NUM_CLASSES, Digits, GoldClassifier, ProxyClassifier, fit_gold, fit_proxy, load_images
from fastguard.demo.model import LATENT_SHAPE, DigitPolicy, pretrain, unpatchify
from fastguard.errors import UserError
from fastguard.prompts import Prompt
from fastguard.schedule import shifted_sigmas


@dataclass(frozen=True)
class Models:
    """What every run starts from."""

    digits: Digits
    policy: DigitPolicy
    proxy: ProxyClassifier
    gold: GoldClassifier
    real_features: Tensor
    pretraining_cached: bool


def prepare(config: DemoConfig, device: torch.device) -> Models:
    """Load the data and the three networks, from the cache or by training them."""
    digits = load_images(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.classifiers.seed)
        proxy, gold = ProxyClassifier().to(device), GoldClassifier().to(device)
    policy = DigitPolicy(config.pretrain.seed).to(device)
    load_or_train(proxy, "proxy", config.classifiers, lambda: fit_proxy(proxy, digits, config.classifiers))
    load_or_train(gold, "gold", config.classifiers, lambda: fit_gold(gold, digits, config.classifiers))
    cached = load_or_train(policy, "policy", config.pretrain, lambda: pretrain(policy, digits, config.pretrain))
    with torch.no_grad():
        real_features = gold.features(digits.images)
    return Models(digits, policy, proxy, gold, real_features, cached)


class DigitBackbone:
    """The pretrained digit model; the protocol is `backbones.Backbone`.

    Args:
        policy: pretrained; its blocks are fused in place if `fuse` says so.
    """

    latent_shape = LATENT_SHAPE
    dtype = torch.float32
    shift = 3.0
    num_trained_prompts = NUM_CLASSES
    has_adapters = False
    fused: FuseReport | None = None

    def __init__(self, policy: DigitPolicy, fuse: bool = True) -> None:
        if fuse:
            fuse_flux(policy.flux, "pointwise")
        self.policy: nn.Module = policy
        self.prompts: Sequence[Prompt] = [Prompt(str(digit), {"digit": digit}) for digit in range(NUM_CLASSES)]

    @classmethod
    def load(cls, device: torch.device, fuse: bool) -> DigitBackbone:
        """Load the pretrained model from the cache, or pretrain it (about a minute on two CPU cores)."""
        return cls(prepare(DemoConfig(), device).policy, fuse)

    @classmethod
    def sigmas(cls, num_steps: int) -> tuple[float, ...]:
        return shifted_sigmas(num_steps, cls.shift)

    def load_prompts(self, prompt_indices: Iterable[int]) -> None:
        """Nothing to do: the policy holds all ten."""

    def decode(self, latents: Tensor) -> Tensor:
        return to_pixels(unpatchify(latents))

    def adapters_off(self) -> AbstractContextManager[None]:
        raise NotImplementedError("the digit model has no adapters")

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        folder.mkdir(parents=True)
        save_file(dict(weights), folder / "digit_policy.safetensors")


def from_pixels(images: Tensor) -> Tensor:
    """The inverse of `to_pixels`, up to the rounding."""
    return images.float().div(127.5).sub(1)


class Judge:
    """A digit classifier's logit of the digit that was asked for; `module:Class` in a recipe.

    Args:
        which: "proxy", trained on 30 images so that it can be fooled, or "gold".
    """

    def __init__(self, which: str = "proxy", models: Models | None = None) -> None:
        if which not in ("proxy", "gold"):
            raise UserError(f'which must be "proxy" or "gold", got {which!r}')
        self._which = which
        self._models = models or _trained_models()

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        device = self._models.digits.images.device
        digits = torch.tensor([entry["digit"] for entry in metadata], device=device)
        network = self._models.proxy if self._which == "proxy" else self._models.gold
        return network(from_pixels(images.to(device))).gather(1, digits[:, None])[:, 0]


@cache
def _trained_models() -> Models:
    return prepare(DemoConfig(), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
