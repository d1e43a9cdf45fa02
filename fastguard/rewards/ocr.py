"""Reward for text in images: how much of the wanted text an OCR model reads."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from fastguard.errors import UserError
from fastguard.rewards.images import to_pil
from fastguard.rewards.options import checked

Reader = Callable[[Image.Image], str]


class OcrReward:
    """1 - min(edit distance, n) / n of the text that is read to the n characters wanted: 1 is exact, 0 is unreadable.

    Flow-GRPO's visual text reward (Liu et al. 2025, arXiv:2505.05470, section 5.1); case and spaces do not count. The
    wanted text is metadata[key], else what stands between the first quotation marks of the prompt.

    Options:
        key: metadata key of the wanted text
        engine: "easyocr", "pytesseract", or "auto" for the first of them that is installed
        language: in the engine's spelling; empty means English ("en" for easyocr, "eng" for pytesseract)
        gpu: easyocr runs on the GPU (its own choice of device); pytesseract has no such mode
        allow_extra: text that contains the wanted text scores 1, as in Flow-GRPO's code; rewards writing more
    """

    @checked
    def __init__(
        self,
        key: str = "text",
        engine: Literal["auto", "easyocr", "pytesseract"] = "auto",
        language: str = "",
        gpu: bool = False,
        allow_extra: bool = False,
    ) -> None:
        self.key = key
        self.allow_extra = allow_extra
        self._read = _reader(engine, language, gpu)
        self._lock = threading.Lock()  # neither engine promises to take two images at once

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        """(B, C, H, W) uint8 images to B scores in [0, 1]. Raises UserError for a prompt without a wanted text."""
        wanted = [self._wanted(prompt, data) for prompt, data in zip(prompts, metadata, strict=True)]
        scores = []
        for image, want in zip(to_pil(images), wanted, strict=True):
            with self._lock:
                read = _plain(self._read(image.convert("RGB")))
            distance = 0 if self.allow_extra and want in read else edit_distance(read, want)
            scores.append(1 - min(distance, len(want)) / len(want))
        return scores

    def _wanted(self, prompt: str, metadata: dict[str, Any]) -> str:
        quoted = re.search(r'"([^"]+)"|“([^”]+)”', prompt)
        text = metadata.get(self.key, (quoted[1] or quoted[2]) if quoted else "")
        if not _plain(str(text)):
            raise UserError(
                f'prompt "{prompt}" says nothing to read: give it "{self.key}" in its JSON line, put the text in '
                "quotation marks, or change rewards.options.key"
            )
        return _plain(str(text))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements of one character from a to b."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        above, row = row, [i]
        for j, right in enumerate(b, start=1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (left != right)))
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _reader(engine: str, language: str, gpu: bool) -> Reader:
    """Text of an RGB image, with the engine asked for, or the first that is installed."""
    engines = {"easyocr": _easyocr, "pytesseract": _pytesseract}
    asked = list(engines) if engine == "auto" else [engine]
    for name in asked:
        if find_spec(name) is not None:
            return engines[name](language, gpu)
    raise UserError(
        f"reads images with {' or '.join(asked)}, which {'are' if len(asked) > 1 else 'is'} not installed: "
        "pip install easyocr, or pip install pytesseract and the tesseract program"
    )


def _easyocr(language: str, gpu: bool) -> Reader:
    import easyocr

    reader = easyocr.Reader([language or "en"], gpu=gpu, verbose=False)
    return lambda image: " ".join(reader.readtext(np.asarray(image), detail=0))


def _pytesseract(language: str, gpu: bool) -> Reader:
    import pytesseract

    if gpu:
        raise UserError("rewards.options.gpu: pytesseract runs on the CPU; remove it, or pip install easyocr")
    try:
        pytesseract.get_tesseract_version()
    except OSError as error:
        raise UserError(
            f"pytesseract does not find the tesseract program (apt install tesseract-ocr): {error}"
        ) from error
    return lambda image: pytesseract.image_to_string(image, lang=language or "eng")
