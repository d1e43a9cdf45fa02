"""FLUX.1-Kontext, which edits an image as the prompt says: what is known of it without its weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastguard.backbones.flux import Flux
from fastguard.config import Recipe
from fastguard.errors import UserError
from fastguard.prompts import Prompt, read_prompts
from fastguard.utils.files import read_bytes
from fastguard.utils.findings import Finding

if TYPE_CHECKING:
    from fastguard.backbones.kontext.spec import KontextSpec

IMAGE = "image"
"""Key of a prompt's metadata: the file of the image that is edited."""
CONTENT = "image_sha256"
"""Key of a prompt's identity."""


class Kontext(Flux):
    """A FluxKontextPipeline in diffusers' layout: Flux.1 whose prompts have an image each."""

    pipeline = "FluxKontextPipeline"

    @property
    def spec(self) -> KontextSpec:
        from fastguard.backbones.kontext.spec import KontextSpec

        return KontextSpec(self)

    def read_prompts(self, file: Path) -> list[Prompt]:
        """The prompts of a JSONL file, whose images' names are relative to its folder; rewards get whole paths.

        A prompt is another one when the content of its image changes, and the same one in a folder that was moved.

        Raises UserError, naming the file, for a prompt without an image that is there.
        """
        found = []
        for prompt in read_prompts(file):
            name = prompt.metadata.get(IMAGE)
            path = file.parent.absolute() / name if isinstance(name, str) else None
            if path is None or not os.path.isfile(path):
                told = f"{IMAGE} = {name!r}, " + (f"and there is no {path}" if path else "which names no file")
                raise UserError(
                    f'{file}: the prompt {prompt.text[:60]!r} has {told}; model.kind = "kontext" needs lines such as '
                    '{"prompt": "at night", "image": "house.png"}'
                )
            identity = {**prompt.metadata, CONTENT: hashlib.sha256(read_bytes(path)).hexdigest()}
            found.append(Prompt(prompt.text, {**prompt.metadata, IMAGE: str(path)}, identity))
        return found

    def examine(self, recipe: Recipe) -> Iterator[Finding]:
        from fastguard.backbones.kontext.spec import load_image

        yield from super().examine(recipe)
        for file in sorted({prompt.metadata[IMAGE] for prompt in self.read_prompts(recipe.prompts.file)}):
            try:
                load_image(Path(file))
            except UserError as error:
                yield Finding("FAIL", str(error))

    def prompt(self, text: str) -> Prompt:
        raise UserError(
            f'the prompt {text[:60]!r} is a text alone, and model.kind = "kontext" edits an image: leave out --prompt, '
            "and name a file with images in prompts.file"
        )
