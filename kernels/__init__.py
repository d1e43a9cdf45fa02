"""Triton kernels of fastguard: tensors in, tensors out, no autograd and no policy."""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path


def _importer() -> str:
    """Name of the module that imports this one: the first frame outside the import system."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals["__name__"].startswith(("importlib", __name__)):
        frame = frame.f_back
    return str(frame.f_globals["__name__"])


if __name__ != "fastguard.kernels":
    # Where the working directory is on the path, this folder hides Hugging Face's package of its name. It stands aside
    # for the package where that is installed.
    _here = Path(__file__).resolve().parent.parent
    _theirs = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != _here])
    if _theirs is not None and _theirs.loader is not None and _theirs.has_location:
        _package = sys.modules[__name__] = module_from_spec(_theirs)
        _theirs.loader.exec_module(_package)
    # Hugging Face's libraries look for the package, and import this folder to ask for its version. Without a file it
    # counts as absent to them.
    elif _importer().startswith(("transformers.", "diffusers.", "accelerate.", "peft.")):
        __file__ = None  # type: ignore[assignment]
        __path__ = []
    else:
        raise ImportError(
            f"this folder was imported as {__name__!r}, a name that belongs to Hugging Face's package, which is not "
            "installed. The folder is installed as fastguard.kernels: run `pip install -e .` and import "
            "fastguard.kernels"
        )
