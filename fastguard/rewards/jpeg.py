"""Size of the JPEG file: a reward without a model, for smoke runs and for watching a policy move."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from fastguard.rewards.images import to_pil
from fastguard.rewards.options import checked


class JpegCompressibility:
    """Minus the size of the image's JPEG in kB (1000 bytes): smooth images score higher.

    As in DDPO (Black et al. 2023, arXiv:2305.13301, section 5.1). Flow-GRPO's code divides by 500 as well; a
    `weight` of 0.002 does the same.

    Options:
        quality: JPEG quality, 1 to 95
    """

    sign = -1.0

    @checked
    def __init__(self, quality: Annotated[int, Field(ge=1, le=95)] = 95) -> None:
        self.quality = quality

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        """(B, C, H, W) uint8 images to B scores in kB; prompts and metadata are not read."""
        sizes = []
        for image in to_pil(images):
            buffer = BytesIO()
            image.save(buffer, format="JPEG", quality=self.quality)
            sizes.append(self.sign * buffer.tell() / 1000)
        return sizes


class JpegIncompressibility(JpegCompressibility):
    """The size of the image's JPEG in kB (1000 bytes): detailed images score higher. Source and options as above.

    Options:
        quality: JPEG quality, 1 to 95
    """

    sign = 1.0
