"""What libraries say at every start although it does not concern a run."""

from __future__ import annotations

import logging
import os
import sys

NOISY = (
    "bitsandbytes",  # a kernel for CPUs that it would fetch from Hugging Face's hub
    "torchao",  # compiled parts for other versions of Python and other GPUs
    "torch.utils._pytree",  # deprecations that torchao's own code meets
    "diffusers.quantizers.torchao.torchao_quantizer",  # parts that newer versions of torchao no longer have
)
"""Loggers whose warnings are no news. transformers, diffusers and peft import these libraries wherever they are
installed."""


def quiet_libraries() -> None:
    """Silence these libraries in this process. Call it in every process before it imports diffusers or transformers."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # a file would fill with control characters
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars as well
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_bars() -> None:
    """Turn diffusers' progress bars off where stderr is no terminal: it reads no environment variable. Imports it."""
    if not sys.stderr.isatty():
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
