"""Triton kernels of fastguard: tensors in, tensors out, no autograd and no policy."""

import sys


def _importer() -> str:
    """Name of the module that imports this one: the first frame outside the import system."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].startswith(("importlib", __name__)):
        frame = frame.f_back
    return str(frame.f_globals["__name__"])


if __name__ != "fastguard.kernels":
    # Where the working directory is on the path, Hugging Face's libraries find this folder when they look for their
    # own package of this name, and import it to ask for its version. Without a file it counts as absent to them.
    if not _importer().startswith(("transformers.", "diffusers.", "accelerate.", "peft.")):
        raise ImportError(
            f"this folder was imported as {__name__!r}, a name that belongs to Hugging Face's package. It is installed "
            "as fastguard.kernels: run `pip install -e .` and import fastguard.kernels"
        )
    __file__ = None  # type: ignore[assignment]
    __path__ = []
