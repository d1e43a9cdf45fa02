"""Where there is no GPU, kernels run through Triton's interpreter, which must be chosen before triton is imported."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """The device on which kernels run: every kernel test runs in the interpreter here, and natively on a GPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return "cuda"
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there: the kernels run on it, under -m gpu")
    return "cpu"


@pytest.fixture(autouse=True, scope="session")
def _signals_that_arrive() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and one under nohup SIGHUP; processes of tests would inherit that."""
    from fastguard.signals import ENDING  # not before the interpreter is chosen

    ignored = [n for n in ENDING if signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True)
def _room_for_others(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give back what a test that fills a GPU has taken: processes beside this one cannot free it."""
    yield
    if request.node.get_closest_marker("xdist_group"):
        torch.cuda.empty_cache()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer), so an element that a kernel does not write cannot pass."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
