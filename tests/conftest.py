"""Where there is no GPU, kernels run through Triton's interpreter, which must be chosen before triton is imported."""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TESTS, interpreter

CUDA = torch.cuda.is_available()
if CUDA:
    # Tests compare fused with unfused blocks in one process, in which PyTorch's cuDNN attention confuses gradients of
    # different strides (`leave_out_cudnn`).
    torch.backends.cuda.enable_cudnn_sdp(False)
else:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])  # of processes

FOR_CUDA = pytest.StashKey[int]()
# Files whose tests start processes, or take many seconds of CPU time, the longest first.
LONG = (
    "test_memory.py",
    "test_flops.py",
    "test_fuse_flux.py",
    "test_distributed.py",
    "test_demo.py",
    "test_train.py",
    "test_golden.py",
    "test_run_folder.py",
    "test_buffer.py",
    "test_flux.py",
    "test_flux2.py",
    "test_operators.py",
    "test_qk_norm_rope.py",
    "test_fuse_flux2.py",
    "test_fuse_changes.py",
    "test_fuse_joint.py",
    "test_offload.py",
    "test_cache.py",
    "test_quiet.py",
    "test_output.py",
    "test_compare.py",
    "test_packaging.py",
    "test_run_report.py",
    "test_damage.py",
    "test_hostile_files.py",
    "test_reward_server.py",
    "test_proposals.py",
    "test_plan.py",
    "test_optim.py",
    "test_fuzz_recipes.py",
    "test_extending.py",
    "test_docs.py",
    "test_readme.py",
    "test_conftest.py",
)


def pytest_report_header() -> str:
    if CUDA:
        return "kernels: on the CUDA device (-m gpu selects their tests)"
    return "kernels: in Triton's interpreter; there is no CUDA device, so tests for one alone are deselected"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without CUDA, no test that is for it alone. Tests of long files are marked: `make quick` leaves them out.

    The longest files first: under pytest-xdist, which shares out files, one process would end with one of them.
    """
    for item in items:
        if item.path.name in LONG or item.path.parent.name == "benchmarks":
            item.add_marker("long")
    for_cuda = [] if CUDA else [item for item in items if item.get_closest_marker("gpu")]
    if for_cuda:
        items[:] = [item for item in items if item not in for_cuda]
        config.hook.pytest_deselected(items=for_cuda)
        config.stash[FOR_CUDA] = len(for_cuda)
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()  # else every full collection goes through all that was imported, a tenth of a second each time
    if not CUDA and any("kernel_device" in getattr(item, "fixturenames", ()) for item in session.items):
        interpreter.list_builtins_once()


def pytest_report_collectionfinish(config: pytest.Config) -> str | None:
    count = config.stash.get(FOR_CUDA, 0)
    return f"deselected {count} tests that only a CUDA device can run" if count else None


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if CUDA else "interpreter"])
def kernel_device(request: pytest.FixtureRequest) -> str:
    """The device on which kernels run: natively on a GPU where there is one, else in the interpreter on the CPU."""
    return "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16, torch.device("meta")], ids=str)
def other_defaults(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[None]]:
    """A context with another default dtype or device of torch, which some libraries set for the whole process.

    Meta tensors have no values, so a tensor that is made on the default device cannot pass for one on the host.
    """

    @contextmanager
    def changed() -> Iterator[None]:
        if isinstance(request.param, torch.device):
            with request.param:
                yield
            return
        before = torch.get_default_dtype()
        torch.set_default_dtype(request.param)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return changed


@pytest.fixture
def count_graphs() -> Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], int]:
    """How many graphs torch.compile makes of a function over several calls, whose results must be the eager ones.

    So must the gradients of the results' sum with respect to the first argument.
    """

    from torch._dynamo.testing import CompileCounterWithBackend  # imports triton, so not before the lines above

    def outcome(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        results = function(*arguments)
        differentiable = [value.sum() for value in results if value is not None and value.requires_grad]
        return results, torch.autograd.grad(sum(differentiable), arguments[0]) if differentiable else None

    def count(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> int:
        torch._dynamo.reset()
        backend = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=backend)
        for arguments in calls:
            torch.testing.assert_close(outcome(compiled, arguments), outcome(function, arguments))
        return backend.frame_count

    return count


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole pipeline of toy size; read it only."""
    from helpers.tiny_pipelines import make_tiny_flux  # not before the interpreter is chosen

    return make_tiny_flux(tmp_path_factory.mktemp("session") / "tiny_flux")


@pytest.fixture
def folder(tiny_flux: Path, tmp_path: Path) -> Path:
    """A copy of it, to break."""
    shutil.copytree(tiny_flux, tmp_path / "flux")
    return tmp_path / "flux"


@pytest.fixture(autouse=True, scope="session")
def _signals_that_arrive() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and one under nohup SIGHUP; processes of tests would inherit that."""
    from fastguard.utils.signals import ENDING  # not before the interpreter is chosen

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


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Says what a test has counted ("24 of 24 kills lost nothing"), in a list at the end of the session."""

    def say(line: str) -> None:
        request.node.user_properties.append(("counted", line))

    return say


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    lines = [text for report in reports for name, text in report.user_properties if name == "counted"]
    if lines:
        terminalreporter.section("counted")
        for line in lines:
            terminalreporter.write_line(line)
