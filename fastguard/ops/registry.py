"""From tensors to registered operators: which backend runs, and what autograd Functions have in common.

An operator is one function: the torch version, run under fake tensors, is also its fake implementation, and its Triton
half has the same name in `fastguard.kernels`. They are registered with `torch.library`, so that
`torch.compile(fullgraph=True)`, fake tensors and `opcheck` see one node each. Where nothing watches, PyTorch's
dispatcher is left out: it costs the host more than a kernel runs. Public functions validate first; nothing here does.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, wraps
from typing import Any, Literal, get_args

import torch
from torch import Tensor

PACKAGE = __name__.removesuffix(".ops.registry")
NAMESPACE = PACKAGE.replace(".", "_")
"""of the operators. A copy of the package under another name has its own, so that both can be loaded."""
Backend = Literal["auto", "triton", "torch"]
Recompute = Literal["none", "pointwise", "mlp", "block", "offload"]
"""How much of a fused block its backward pass recomputes, from the fastest to the smallest."""
# Looked up without importing triton, which takes a second.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ORDINARY = frozenset({Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype})
"""types of arguments that want to see no operator; a list may hold one that does"""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is accumulated in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of the arithmetic; per-sample rows (B, C) become (B, 1, C)."""
    dtype = compute_dtype(tensors[0].dtype)
    return [(t if t.ndim > 2 else t[:, None]).to(dtype) for t in tensors]


def resolve_backend(backend: str, tensor: Tensor) -> str:
    """'triton' or 'torch' for the latents at hand. A backend asked for by name is taken or refused, never replaced.

    `auto` takes Triton on CUDA where it is installed, and torch elsewhere and for float64.
    """
    if backend == "torch":
        return "torch"
    if backend == "auto":
        return "triton" if tensor.is_cuda and tensor.dtype in TRITON_DTYPES and TRITON_INSTALLED else "torch"
    if backend != "triton":
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}; got {backend!r}")
    if not TRITON_INSTALLED:
        raise ValueError("backend='triton' needs the package triton, which is not installed; use backend='torch'")
    if tensor.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"backend='triton' takes bfloat16, float16 and float32; got {tensor.dtype}; use backend='torch'"
        )
    if tensor.device.type == "cpu" and not kernels("common").interpreted():
        raise ValueError(
            "backend='triton' needs CUDA tensors; got CPU tensors. Use backend='torch', or set "
            "TRITON_INTERPRET=1 before triton is first imported to run the kernels in its interpreter"
        )
    return "triton"


class Operator:
    """A registered operator: called through PyTorch's dispatcher where something watches, else directly."""

    def __init__(
        self, overload: torch._ops.OpOverload, run: Callable[..., Any], torch_version: Callable[..., Any]
    ) -> None:
        self.overload = overload
        self.torch = torch_version
        self._run = run

    def __call__(self, *args: Any) -> Any:
        watched = modes_watch() or not ORDINARY.issuperset(map(type, args))
        return self.overload(*args) if watched else self._run(*args)

    def name(self) -> str:
        return self.overload.name()


def modes_watch() -> bool:
    """Whether a compiler, a mode, a transform or a profiler wants to see operators. A tensor subclass may, too."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def operator(
    triton: str | Callable[..., Any], mutates: tuple[str, ...] = (), fake: Callable[..., Any] | None = None
) -> Callable[[Callable[..., Any]], Operator]:
    """Register a torch function as `<NAMESPACE>::<its name>`, with the backend ("auto", "triton", "torch") as a last
    argument.

    Results are contiguous, whatever the strides of the arguments, with either backend and in the fake: torch.compile
    trusts the strides of the fake.

    A list of tensors is annotated `Sequence[Tensor]`: torch 2.6 does not know `list[Tensor]`.

    Args:
        triton: module in `fastguard.kernels` with a function of the same name and positional arguments; or the function
            itself, which imports its kernels when it is called.
        mutates: arguments that are written.
        fake: gives tensors of the results' shapes. Needed only where the torch version loops over a size: torch.compile
            would make a graph for each value of it.
    """

    def register(function: Callable[..., Any]) -> Operator:
        name = f"{NAMESPACE}::{function.__name__}"

        @cache
        def launcher() -> Callable[..., Any]:
            return getattr(kernels(triton), function.__name__) if isinstance(triton, str) else triton

        def run(*args: Any) -> Any:
            *inputs, backend = args
            if resolve_backend(backend, inputs[0]) == "torch":
                return _contiguous(function(*inputs))
            with device_guard(inputs[0]):
                return launcher()(*resolved(inputs))

        arguments, results = torch.library.infer_schema(function, mutates_args=mutates).rsplit(") -> ", 1)
        torch.library.define(name, f"{arguments}, str backend) -> {results}", tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "CompositeExplicitAutograd", run)
        formula = fake or function
        shaped = _once_a_layout(lambda *inputs: _contiguous(formula(*inputs)))
        torch.library.register_fake(name, lambda *args: shaped(*args[:-1]))
        return Operator(getattr(getattr(torch.ops, NAMESPACE), function.__name__).default, run, function)

    return register


def _contiguous(results: Any) -> Any:
    if results is None or isinstance(results, Tensor):
        return None if results is None else results.contiguous()
    return tuple([each.contiguous() for each in results])


def _once_a_layout(fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake, run once for each layout of its arguments and values of its options; later calls remember the results.

    A planned model calls an operator in each of its many blocks, and PyTorch remembers the fake results of its own
    operators only.
    """
    known: dict[Any, Any] = {}

    def run(*args: Any) -> Any:
        if any(map(_is_symbolic, args)):
            return fake(*args)
        key = tuple(map(_layout, args))
        if key not in known:
            results = fake(*args)
            several = () if results is None else (results,) if isinstance(results, Tensor) else results
            known[key] = type(results), list(map(_layout, several))
        kind, layouts = known[key]
        made = [_empty(*layout) for layout in layouts]
        return None if kind is type(None) else made[0] if issubclass(kind, Tensor) else tuple(made)

    return run


def _is_symbolic(argument: Any) -> bool:
    if isinstance(argument, list):
        return any(map(_is_symbolic, argument))
    if isinstance(argument, Tensor):
        return any(isinstance(n, torch.SymInt) for n in (*argument.shape, *argument.stride()))
    return isinstance(argument, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _layout(argument: Any) -> Any:
    if isinstance(argument, list):
        return tuple(map(_layout, argument))
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return type(argument), argument


def _empty(shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


_NOTHING = nullcontext()


@cache
def kernels(module: str) -> Any:
    """A module of `fastguard.kernels`, imported when it is first asked for. An import statement costs a call 1 us."""
    return importlib.import_module(f"{PACKAGE}.kernels.{module}")


def device_guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return _NOTHING


def resolved(arguments: list[Any]) -> list[Any]:
    """The arguments as a kernel reads them: the memory of a negative view holds the negative of its values."""
    for value in arguments:
        if isinstance(value, Tensor) and value.is_neg():
            return [value.resolve_neg() if isinstance(value, Tensor) else value for value in arguments]
    return arguments


def refuse_double_backward(what: str) -> None:
    """Gradients are on in a backward pass only under create_graph=True; ours would enter that graph as constants."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} can be differentiated once; its backward pass does not support create_graph=True")


def refuse_transforms(what: str) -> None:
    """PyTorch's own message would ask the user to write a `setup_context` for our Functions."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{what} cannot run inside a transform of torch.func (grad, vmap, jvp and the like); differentiate it with "
            "loss.backward() or torch.autograd.grad"
        )


def savable(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as `save_for_backward` takes them: one made under `torch.inference_mode` becomes an ordinary tensor.

    A rollout under `inference_mode` makes tensors that autograd refuses to save. The ordinary tensor shares their
    memory, so nothing is copied, and hooks of saved tensors see it as they see any other. A negative view is copied. As
    for every tensor of `inference_mode`, autograd cannot notice that its values were changed before the backward pass.

    Compiled code has to go without: dynamo cannot ask whether a tensor was made under `inference_mode`.
    """
    if torch.compiler.is_compiling():
        return tensors
    return tuple([tensor if tensor is None or not tensor.is_inference() else _ordinary(tensor) for tensor in tensors])


def _ordinary(tensor: Tensor) -> Tensor:
    if type(tensor) not in ORDINARY:
        return tensor  # a subclass may keep its values elsewhere than in its own storage
    if tensor.is_neg():  # memory holds its negative
        return tensor.resolve_neg()
    layout = (tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*layout)


def autocast_to(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives matmuls now, or None where it is off."""
    kind = device.type
    # Autocast does not know the meta device, and raises.
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def backward_of_blocks(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of a Function: it runs in the dtypes of its forward, whatever autocast says by then, and
    once."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        refuse_double_backward("a fused block")
        device = next(grad.device for grad in grads if grad is not None)
        if autocast_to(device) is None:
            return backward(ctx, *grads)
        with torch.autocast(device.type, enabled=False):
            return backward(ctx, *grads)

    return run
