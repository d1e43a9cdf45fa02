"""Images as rewards get them, for libraries that want PIL's, and as PNG for the wire."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) or (B, 1, H, W) uint8 to B images of mode RGB or L (grey)."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"expected uint8 images of shape (B, 3, H, W) or (B, 1, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    arrays = images.cpu().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)) for array in arrays]


def encode_png(image: Image.Image) -> bytes:
    """Lossless PNG, at zlib's fastest level: the wire is faster than its best one."""
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def decode_png(data: bytes, max_pixels: int) -> Tensor:
    """8-bit grey or RGB PNG to a (1, H, W) or (3, H, W) uint8 tensor. Raises ValueError for everything else.

    The size is read from the header and checked before a pixel is decoded: a small file can hold a huge image.
    """
    try:
        image = Image.open(BytesIO(data), formats=["PNG"])
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels are more than the {max_pixels} left of the limit")
        if image.mode not in ("L", "RGB"):
            raise ValueError(f"expected 8-bit grey or RGB, got PIL's mode {image.mode}")
        array = np.array(image)
    except ValueError:
        raise
    except Exception as error:  # PIL raises OSError, SyntaxError, zlib.error and its own, by where the file is broken
        raise ValueError(f"not a PNG image: {error}") from error
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1).contiguous()
