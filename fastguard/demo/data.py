"""Digits, the two classifiers that judge them, and the metrics that use the classifiers.

Images are (B, 1, 64, 64) float32 in [-1, 1] for real data; samples may leave that range a little.
"""

from __future__ import annotations

from fastguard.extras import need

need("demo")

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from fastguard.demo.config import ClassifierConfig

IMAGE_SIZE = 64
NUM_CLASSES = 10
POLICY_IMAGES = 1000
"""The model and the proxy learn from the first 1,000 of the shuffled images, the gold classifier from the other 797."""


@dataclass(frozen=True)
class Digits:
    """Real images (B, 1, 64, 64) and labels (B,), in two disjoint parts."""

    images: Tensor
    """what the generative model learns from, and the reference of the Frechet distance"""
    labels: Tensor
    gold_images: Tensor
    """what only the gold classifier sees"""
    gold_labels: Tensor


def load_images(device: torch.device) -> Digits:
    """scikit-learn's 1,797 digits of 8x8 pixels, bilinearly upsampled to 64x64, shuffled with a fixed seed."""
    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(small, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].to(device), torch.from_numpy(data.target).long()[order].to(device)
    n = POLICY_IMAGES
    return Digits(images[:n], labels[:n], images[n:], labels[n:])


class GoldClassifier(nn.Module):
    """A small convolutional network; the metrics use its logits (B, 10) and its features (B, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.AvgPool2d(4),
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 32),
            nn.GELU(),
        )
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class ProxyClassifier(nn.Sequential):
    """The proxy reward: a perceptron on 8x8 pixels that has seen a few images per digit, logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__(
            nn.AvgPool2d(IMAGE_SIZE // 8),
            nn.Flatten(),
            nn.Linear(64, 64),
            nn.GELU(),
            nn.Linear(64, NUM_CLASSES),
        )

    def score(self, images: Tensor, classes: Tensor) -> Tensor:
        """The logit (B,) of each image's own class (B,)."""
        return self(images).gather(1, classes[:, None])[:, 0]


def fit_gold(classifier: nn.Module, digits: Digits, config: ClassifierConfig) -> None:
    """Train on the 797 images that nothing else sees, with shifts of up to 6 pixels and a little noise."""
    images, labels = digits.gold_images, digits.gold_labels
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.gold_steps)
    rng = np.random.default_rng(config.seed)
    for _ in tqdm(range(config.gold_steps), desc="gold classifier", leave=False, disable=None):
        index = torch.from_numpy(rng.integers(len(images), size=64)).to(images.device)
        shift = rng.integers(-6, 7, size=2).tolist()
        noise = torch.from_numpy(rng.standard_normal((64, 1, IMAGE_SIZE, IMAGE_SIZE), dtype=np.float32))
        batch = images[index].roll(shift, dims=(2, 3)) + 0.2 * noise.to(images.device)
        F.cross_entropy(classifier(batch), labels[index], label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def fit_proxy(classifier: nn.Module, digits: Digits, config: ClassifierConfig) -> None:
    """Train on the first few images of each class until they are memorized."""
    few = torch.cat([(digits.labels == c).nonzero()[: config.proxy_images_per_class, 0] for c in range(NUM_CLASSES)])
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(config.proxy_steps):
        F.cross_entropy(classifier(digits.images[few]), digits.labels[few]).backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass(frozen=True)
class Metrics:
    """What an evaluation reports; plain numbers, for JSON."""

    proxy: float
    """mean proxy reward, logits"""
    accuracy: float
    """share of images that the gold classifier recognizes as their prompt's digit"""
    frechet: float
    """Frechet distance of gold features to the real images; depends on the number of samples"""
    diversity: float
    """mean Euclidean distance between two images of a class, on 8x8 pixels in [-1, 1]"""


@torch.no_grad()
def evaluate(
    images: Tensor, classes: Tensor, proxy: ProxyClassifier, gold: GoldClassifier, real_features: Tensor
) -> Metrics:
    """Judge images (B, 1, 64, 64) of the given classes (B,); real_features (R, 32) come from `gold.features`."""
    features = gold.features(images)
    return Metrics(
        proxy=proxy.score(images, classes).mean().item(),
        accuracy=(gold.head(features).argmax(1) == classes).float().mean().item(),
        frechet=frechet_distance(features, real_features),
        diversity=class_diversity(images, classes),
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 sqrt(C_a C_b)) of features (B, F), in float64."""
    x, y = (features.double().cpu().numpy() for features in (a, b))
    cov_a, cov_b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # Features that never vary make the product singular; sqrtm then returns tiny imaginary parts.
    root = sqrtm(cov_a @ cov_b).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def class_diversity(images: Tensor, classes: Tensor) -> float:
    """Mean over classes of the mean Euclidean distance between two different images of the class, on 8x8 pixels."""
    pixels = F.avg_pool2d(images, IMAGE_SIZE // 8).flatten(1)
    distances = [torch.pdist(pixels[classes == c]).mean() for c in classes.unique()]
    return torch.stack(distances).mean().item()
