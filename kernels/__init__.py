"""Triton kernels of fastguard: tensors in, tensors out, no autograd and no policy."""

if __name__ != "fastguard.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}, a name that belongs to Hugging Face's package. It is installed "
        "as fastguard.kernels: run `pip install -e .` and import fastguard.kernels"
    )
