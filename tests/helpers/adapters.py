"""What training does to a backbone, at random."""

from __future__ import annotations

import torch
from torch import Tensor

from fastguard.backbones import Backbone
from fastguard.utils.sharding import trained_parameters


def move(backbone: Backbone) -> dict[str, Tensor]:
    """Change every trained weight; returns them by name, whole."""
    with torch.no_grad():
        for parameter in trained_parameters(backbone.policy).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return {name: p.detach() for name, p in trained_parameters(backbone.policy).items()}
