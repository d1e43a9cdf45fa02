"""Images side by side in one PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps
from torch import Tensor


def save_grid(path: Path, tiles: np.ndarray, gap: int = 6) -> Path:
    """Write images, uint8 (rows, columns, H, W) grey or (rows, columns, H, W, 3), to one PNG with white gaps."""
    rows, columns = tiles.shape[:2]
    images = [Image.fromarray(tile).convert("RGB") for tile in tiles.reshape(-1, *tiles.shape[2:])]
    framed = [ImageOps.expand(image, (0, 0, gap, gap), "white") for image in images]
    grid = make_image_grid(framed, rows, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.crop((0, 0, grid.width - gap, grid.height - gap)).save(path)
    return path


def save_images(path: Path, images: Tensor, columns: int = 4) -> Path:
    """Write images, uint8 (B, 1 or 3, H, W), to one PNG, `columns` to a row; the last row is filled with white."""
    tiles = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    columns = min(columns, len(tiles))
    missing = -len(tiles) % columns
    filled = np.concatenate([tiles, np.full((missing, *tiles.shape[1:]), 255, np.uint8)])
    return save_grid(path, filled.reshape(-1, columns, *tiles.shape[1:]))
