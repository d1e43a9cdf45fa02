"""The Flux kernels and whole blocks: bytes moved and kept, and times beside eager, torch.compile and copying.

    python benchmarks/bench_flux_block.py --bytes [--save]      bytes that each kernel moves; any machine, no GPU
    python benchmarks/bench_flux_block.py [--save] [--resume]   times on a GPU, at Flux.1-dev's size
    pytest benchmarks/bench_flux_block.py                       small blocks on the device at hand, by pytest-benchmark

One sample at 1024^2: 4,096 image and 512 text tokens of 3,072 channels in bfloat16, LoRA of rank 64 on all linear
layers of a block. Correctness is asserted before anything is timed. `--dry-run`: toy sizes on the CPU, nothing saved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import program
import pytest
import results
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import (
    FluxPosEmbed,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from peft import LoraConfig, inject_adapter_in_model
from timing import copy_times, graph_times, kept_bytes, rotations, with_bandwidth
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastguard.blocks import flux, torch_backend
from fastguard.blocks.architecture import Fusion, fuse_block
from fastguard.config import Recompute
from fastguard.kernels import adaln, gated_residual, gelu, qk_norm_rope

KERNELS = (adaln, gated_residual, qk_norm_rope, gelu)
Results = dict[str, Any]
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
LAYERS += ["net.0.proj", "net.2", "proj_mlp", "proj_out"]
LEVELS: tuple[Recompute, ...] = ("none", "pointwise", "mlp")
KERNELS_SECTION, BLOCKS_SECTION, BYTES_SECTION = "flux_kernels", "flux_blocks", "flux_bytes"
KINDS = ("double", "single")


@dataclass(frozen=True)
class Size:
    """Of a block and its inputs."""

    image: int
    """tokens"""
    text: int
    heads: int
    head_dim: int
    rank: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


FLUX = Size(image=4096, text=512, heads=24, head_dim=128, rank=64)
SMALL = Size(image=64, text=16, heads=4, head_dim=16, rank=4)


# --- kernels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One use of a kernel, as a fused block makes it.

    least: bytes of everything that has to be read or written once, whatever the method.
    eager: the same in plain torch, as diffusers runs it; None where it has no counterpart (recomputation).
    twice: bytes of tensors that are both read and written.
    unread: bytes of tensors that the kernel is given for their place in its signature, or reads half of.
    overwritten: what it writes its result over.
    """

    run: Callable[[], Any]
    least: int
    eager: Callable[[], Any] | None
    twice: int = 0
    unread: int = 0
    overwritten: Tensor | None = None


def kernel_calls(size: Size, dtype: torch.dtype, device: str, backend: str = "triton") -> dict[str, Call]:
    """Each kernel at this size. The text stream's calls are left out: they are smaller copies of the image's."""
    c, joined = size.width, size.image + size.text

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device)

    def wide(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device) + 0.5

    def n_bytes(*tensors: Any) -> int:
        return sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, Tensor))

    x, y, grad, other = (randn(1, joined, c) for _ in range(4))
    scale, shift, gate = (randn(1, c) for _ in range(3))
    mean, rstd = wide(1, joined), wide(1, joined)
    norms = [wide(size.head_dim).to(dtype) for _ in range(4)]
    angles = wide(joined, size.head_dim // 2).repeat_interleave(2, dim=1)
    cos, sin = angles.cos(), angles.sin()
    image, text = [randn(1, size.image, c) for _ in range(3)], [randn(1, size.text, c) for _ in range(3)]
    heads = [randn(1, joined, size.heads, size.head_dim) for _ in range(5)]
    rstds = wide(2, 1, joined, size.heads)
    hidden, grad_hidden, bias = randn(1, joined, 4 * c), randn(1, joined, 4 * c), randn(4 * c)
    ada, gated, qk, act = KERNELS if backend == "triton" else (torch_backend,) * 4

    def eager_norm(residual: bool) -> Tensor:
        source = x + gate[:, None] * y if residual else x
        return nn.functional.layer_norm(source, (c,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def eager_rope(*streams: list[Tensor]) -> list[Any]:
        """Query and key of each stream normalized, the streams joined, query and key rotated; as diffusers does."""
        split = [[part.unflatten(-1, (size.heads, size.head_dim)) for part in stream] for stream in streams]
        for stream, (query_norm, key_norm) in zip(split, (norms[2:], norms[:2])[-len(split) :], strict=True):
            stream[0] = nn.functional.rms_norm(stream[0], (size.head_dim,), query_norm, 1e-6)
            stream[1] = nn.functional.rms_norm(stream[1], (size.head_dim,), key_norm, 1e-6)
        joined = [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in zip(*split, strict=True)]
        table: Any = (cos, sin)  # diffusers' annotation says a tuple of one
        return [*(apply_rotary_emb(part, table, sequence_dim=1) for part in joined[:2]), joined[2]]

    text_part, image_part = slice(size.text), slice(size.text, None)
    rotated = (heads[3][:, image_part], heads[4][:, image_part], heads[3][:, text_part], heads[4][:, text_part])
    single = (*heads[:2], None, *heads[3:], None, None)
    rows = n_bytes(mean, rstd)
    table = n_bytes(cos, sin) // 2  # one of each pair of equal angles
    token = n_bytes(x)
    mod = n_bytes(scale, shift)
    sums = 4 * c  # one float32 row
    calls: dict[str, tuple[Any, ...]] = {
        "adaln forward": (
            lambda: ada.adaln_fwd(x, None, None, scale, shift, 1e-6), 2 * token + mod + rows, lambda: eager_norm(False),
        ),
        "gated residual + adaln forward": (
            lambda: ada.adaln_fwd(x, y, gate, scale, shift, 1e-6), 4 * token + mod + n_bytes(gate) + rows,
            lambda: eager_norm(True),
        ),
        "adaln recompute": (
            lambda: ada.adaln_apply(x, mean, rstd, scale, shift), 2 * token + mod + rows, None,
        ),
        "adaln backward": (
            lambda: ada.adaln_bwd(grad, x, mean, rstd, scale, None, None, None, False),
            3 * token + n_bytes(scale) + rows, None,
        ),
        "gated residual + adaln backward": (
            lambda: ada.adaln_bwd(grad, x, mean, rstd, scale, other, None, gate, False),
            5 * token + n_bytes(scale, gate) + rows, None,
        ),
        "the same with gradients of the modulation": (
            lambda: ada.adaln_bwd(grad, x, mean, rstd, scale, other, y, gate, True),
            6 * token + n_bytes(scale, gate) + rows + 3 * sums, None,
        ),
        "gated residual forward": (
            lambda: gated.gated_residual_fwd(x, y, gate), 3 * token + n_bytes(gate), lambda: x + gate[:, None] * y,
        ),
        "gated residual backward": (
            lambda: gated.gated_residual_bwd(grad, None, gate), 2 * token + n_bytes(gate), lambda: gate[:, None] * grad,
        ),
        "the same with the gradient of the gate": (
            lambda: gated.gated_residual_bwd(grad, y, gate), 3 * token + n_bytes(gate) + sums, None,
        ),
        "norm + rope, two streams, forward": (
            lambda: qk.qk_norm_rope_fwd(*image, *text, norms, cos, sin, 1e-6),
            6 * token + n_bytes(norms, rstds) + table, lambda: eager_rope(text, image), 0, table,
        ),
        "norm + rope, two streams, backward": (
            lambda: qk.qk_norm_rope_bwd(*heads[:3], *rotated, rstds, norms, cos, sin, True, False),
            8 * token + n_bytes(norms, rstds) + table, None, 0, table,
        ),
        "norm + rope, one stream, forward": (
            lambda: qk.qk_norm_rope_fwd(x, y, other, None, None, None, norms[:2], cos, sin, 1e-6),
            4 * token + n_bytes(norms[:2], rstds) + table, lambda: eager_rope([x, y, other]), 0, table + token,
        ),
        "norm + rope, one stream, backward": (
            lambda: qk.qk_norm_rope_bwd(*single, rstds, norms[:2], cos, sin, True, False),
            6 * token + n_bytes(norms[:2], rstds) + table, None, 0, table,
        ),
        "the same with gradients of the norms": (
            lambda: qk.qk_norm_rope_bwd(*single, rstds, norms[:2], cos, sin, False, True),
            6 * token + n_bytes(norms[:2], rstds) + table + 2 * 4 * size.head_dim, None, 0, table,
        ),
        "bias + GELU forward": (
            lambda: act.bias_gelu_fwd(hidden, bias, None), 8 * token + n_bytes(bias),
            lambda: nn.functional.gelu(hidden + bias, approximate="tanh"),
        ),
        "bias + GELU beside attention, forward": (
            lambda: act.bias_gelu_fwd(hidden, bias, x), 10 * token + n_bytes(bias),
            lambda: torch.cat([x, nn.functional.gelu(hidden + bias, approximate="tanh")], dim=-1),
        ),
        "bias + GELU backward": (
            lambda: act.bias_gelu_bwd_(grad_hidden, hidden, bias, False), 12 * token + n_bytes(bias), None, 4 * token,
            0, grad_hidden,
        ),
        "bias + GELU backward and recompute": (
            lambda: act.bias_gelu_bwd_(grad_hidden, hidden, bias, True), 16 * token + n_bytes(bias), None, 4 * token,
            0, grad_hidden,
        ),
    }  # fmt: skip
    return {name: Call(*call) for name, call in calls.items()}


class _Launches:
    """Stands where a kernel is, and counts the bytes of the tensors that it is given instead of running it."""

    def __init__(self) -> None:
        self.n_bytes = 0

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **flags: Any) -> None:
            self.n_bytes += sum(t.nbytes for t in args if isinstance(t, Tensor))

        return launch


class _TorchBytes(TorchDispatchMode):
    """Bytes that torch's own operators around a launch read and write; views and empty tensors move none."""

    n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        moves = not func.is_view and "empty" not in func.name()
        if moves:
            self.n_bytes += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
        return out


@contextmanager
def counted_launches() -> Iterator[_Launches]:
    """Replace the kernels of the Flux modules by a counter."""
    launches, saved = _Launches(), {}
    for module in KERNELS:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            saved[module, name] = getattr(module, name)
            setattr(module, name, launches)
    try:
        yield launches
    finally:
        for (module, name), kernel in saved.items():
            setattr(module, name, kernel)


def moved_bytes(size: Size = FLUX) -> dict[str, dict[str, int]]:
    """Bytes that each kernel moves and the least possible, from its launches at full size.

    Each tensor given to a kernel counts once: h100_code.py shows in the machine code that no access is repeated. What
    torch adds (partial sums) counts with its inputs and results.
    """
    table = {}
    with counted_launches() as launches:
        for name, call in kernel_calls(size, torch.bfloat16, "cpu").items():
            launches.n_bytes = 0
            with _TorchBytes() as around:
                call.run()
            moved = launches.n_bytes + around.n_bytes + call.twice - call.unread
            table[name] = {"moved": moved, "least": call.least}
    return table


def assert_kernel_correct(name: str, size: Size, dtype: torch.dtype, device: str) -> None:
    """On the same random numbers the kernel gives what plain torch gives, up to the rounding of the storage dtype."""
    found = []
    for backend in ("triton" if device == "cuda" else "torch", "torch"):
        torch.manual_seed(0)
        call = kernel_calls(size, dtype, device, backend)[name]
        written = tree_leaves((call.run(), call.overwritten))
        found.append([t for t in written if isinstance(t, Tensor) and t.numel()])
    assert found[0]
    for got, want in zip(*found, strict=True):
        off = float((got.double() - want.double()).norm() / want.double().norm())
        assert off < torch.finfo(dtype).eps, f"{name}: off by {off:.1e}"


def measure_kernel(name: str, size: Size, dtype: torch.dtype, device: str) -> Results:
    """p20, p50 and p80 of a kernel and of its eager form, with the copy bandwidth of the same moment."""
    cuda = device == "cuda"
    assert_kernel_correct(name, size, dtype, device)
    shape = (size.image + size.text, size.width)
    count = rotations(shape[0] * shape[1] * dtype.itemsize, cuda)
    calls = [kernel_calls(size, dtype, device, "triton" if cuda else "torch")[name] for _ in range(count)]
    row: Results = {**with_bandwidth(graph_times([call.run for call in calls], cuda), calls[0].least)}
    eager = [call.eager for call in calls if call.eager is not None]
    if eager:
        row["eager"] = graph_times(eager, cuda)
    del calls, eager
    row["copy"] = copy_times([torch.randn(shape, device=device).to(dtype) for _ in range(count)], cuda)
    row["of_copy"] = row["gb_per_s"] / row["copy"]["gb_per_s"]
    return row


# --- blocks ---------------------------------------------------------------------------------------------------------


def make_block(kind: str, size: Size, dtype: torch.dtype, device: str) -> nn.Module:
    """Random weights of a plausible size, frozen, and LoRA adapters."""
    torch.manual_seed(0)
    cls = FluxTransformerBlock if kind == "double" else FluxSingleTransformerBlock
    with torch.device(device):
        block: nn.Module = cls(dim=size.width, num_attention_heads=size.heads, attention_head_dim=size.head_dim)
        block.requires_grad_(False)
        config = LoraConfig(r=size.rank, lora_alpha=size.rank, target_modules=LAYERS, init_lora_weights=False)
        block = inject_adapter_in_model(config, block)
    return block.to(dtype)


def fused(block: nn.Module, recompute: Recompute) -> nn.Module:
    """A fused block with the same weights; the block itself stays as it is."""
    other = copy.copy(block)
    fuse_block(other, flux.FLUX.kind_of(other), Fusion(recompute, "auto", rotated=True))
    return other


@dataclass(frozen=True)
class BlockInputs:
    """Of one call, and the upstream gradients."""

    args: tuple[Any, ...]
    upstream: tuple[Tensor, Tensor]


def block_inputs(size: Size, dtype: torch.dtype, device: str) -> BlockInputs:
    image, text = (torch.randn(1, n, size.width, device=device).to(dtype) for n in (size.image, size.text))
    temb = torch.randn(1, size.width, device=device).to(dtype)
    vertical = size.head_dim * 7 // 32 * 2
    axes = (size.head_dim - 2 * vertical, vertical, vertical)
    ids = torch.arange(size.image + size.text, device=device).float()[:, None].expand(-1, 3) / 64
    rope = FluxPosEmbed(theta=10000, axes_dim=list(axes))(ids.floor())
    upstream = (torch.randn_like(text), torch.randn_like(image))
    return BlockInputs((image.requires_grad_(), text.requires_grad_(), temb, rope), upstream)


def train_once(run: Callable[..., Any], inputs: BlockInputs) -> list[Tensor]:
    """Forward and backward; the gradients of the two streams."""
    outputs = run(*inputs.args)
    return list(torch.autograd.grad(outputs, inputs.args[:2], inputs.upstream))


def contenders(
    kind: str, size: Size, dtype: torch.dtype, device: str
) -> tuple[nn.Module, dict[str, Callable[..., Any]]]:
    """The block, and its forward in each form."""
    block = make_block(kind, size, dtype, device)
    torch._dynamo.reset()
    backend = "inductor" if device == "cuda" else "aot_eager"
    forms: dict[str, Callable[..., Any]] = {
        "eager": block.forward,
        "compiled": torch.compile(block.forward, dynamic=False, backend=backend),
    }
    forms |= {f"fused {level}": fused(block, level) for level in LEVELS}
    forms["fused pointwise, compiled"] = torch.compile(fused(block, "pointwise"), dynamic=False, backend=backend)
    return block, forms


def assert_correct(forms: dict[str, Callable[..., Any]], inputs: BlockInputs) -> None:
    """Every form is as close to eager as two bfloat16 computations are."""
    want = train_once(forms["eager"], inputs)
    tolerance = 1e-4 if want[0].dtype == torch.float32 else 0.03
    for name, run in forms.items():
        for got, expected in zip(train_once(run, inputs), want, strict=True):
            off = float((got.double() - expected.double()).norm() / expected.double().norm())
            assert off < tolerance, f"{name}: gradient off by {off:.1e}"


def measure_block(kind: str, size: Size, dtype: torch.dtype, device: str) -> Results:
    """Forward without a graph of gradients, forward + backward, and bytes kept, of each form."""
    cuda = device == "cuda"
    block, forms = contenders(kind, size, dtype, device)
    inputs = block_inputs(size, dtype, device)
    assert_correct(forms, inputs)
    weights = [*block.parameters(), *inputs.args[3]]
    rows: Results = {}
    for name, run in forms.items():

        def inference(run: Callable[..., Any] = run) -> Any:
            with torch.no_grad():
                return run(*inputs.args)

        def training(run: Callable[..., Any] = run) -> Any:
            return train_once(run, inputs)

        rows[name] = {
            "inference": graph_times([inference] * 4, cuda),
            "training": graph_times([training] * 2, cuda),
        }
        if "compiled" not in name:
            rows[name]["kept_bytes"] = kept_bytes(partial(run, *inputs.args), weights)
        for phase in ("inference", "training"):
            rows[name][f"{phase}_times_eager"] = rows["eager"][phase]["p50_us"] / rows[name][phase]["p50_us"]
    return rows


# --- pytest-benchmark -----------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("form", ["eager", "compiled", "fused none", "fused pointwise", "fused mlp"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_block(benchmark: Any, kind: str, form: str) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    size = FLUX if DEVICE == "cuda" else SMALL
    block, forms = contenders(kind, size, dtype, DEVICE)
    inputs = block_inputs(size, dtype, DEVICE)
    assert_correct({"eager": forms["eager"], form: forms[form]}, inputs)
    benchmark.group = f"{kind} block, forward + backward, {size} {dtype} {DEVICE}"
    if form != "compiled":
        benchmark.extra_info["kept_bytes"] = kept_bytes(
            partial(forms[form], *inputs.args), [*block.parameters(), *inputs.args[3]]
        )

    def run() -> None:
        train_once(forms[form], inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=20, warmup_rounds=3)


# --- the command ----------------------------------------------------------------------------------------------------


def print_bytes(table: dict[str, dict[str, int]]) -> None:
    print(f"{'kernel':44} {'moved, MB':>10} {'least, MB':>10}  ratio")
    for name, row in table.items():
        moved, least = row["moved"], row["least"]
        print(f"{name:44} {moved / 1e6:10.2f} {least / 1e6:10.2f}  {moved / least:.3f}")


def print_kernel(name: str, row: Results) -> None:
    eager = f"{row['eager']['p50_us']:10.1f} us eager" if "eager" in row else ""
    print(
        f"{name:44} {row['p50_us']:9.1f} us {row['gb_per_s']:8.0f} GB/s {row['of_copy']:8.0%} of copy {eager}",
        flush=True,
    )


def print_blocks(kind: str, rows: Results) -> None:
    print(
        f"\n{kind + ' block':26} {'inference ms':>13} {'x eager':>8} {'training ms':>12} {'x eager':>8} {'kept MiB':>9}"
    )
    for name, row in rows.items():
        kept = f"{row['kept_bytes'] / 2**20:9.1f}" if "kept_bytes" in row else f"{'-':>9}"
        times = [
            f"{row[phase]['p50_us'] / 1e3:{width}.3f} {row[f'{phase}_times_eager']:8.2f}"
            for phase, width in (("inference", 13), ("training", 12))
        ]
        print(f"{name:26} {times[0]} {times[1]} {kept}")


def main() -> str | None:
    parser = program.parser(__doc__)
    parser.add_argument("--bytes", action="store_true", help="count the bytes that each kernel moves; needs no GPU")
    program.add_arguments(parser)
    args = parser.parse_args()
    program.check_arguments(parser, args, needs_gpu=not args.bytes)
    if args.bytes:
        table = moved_bytes()
        print_bytes(table)
        if args.save:
            print(f"\nsaved {results.save(BYTES_SECTION, results.environment(), {'kernels': table}, args.out)}")
        return None
    size, dtype, device = (SMALL, torch.float32, "cpu") if args.dry_run else (FLUX, torch.bfloat16, "cuda")
    fixed = {"size": vars(size), "dtype": str(dtype)}

    def kernel_row(name: str) -> Results:
        row = measure_kernel(name, size, dtype, device)
        print_kernel(name, row)
        return row

    def block_row(kind: str) -> Results:
        row = measure_block(kind, size, dtype, device)
        print_blocks(kind, row)
        return row

    kernels, blocks = results.Run(KERNELS_SECTION, args, **fixed), results.Run(BLOCKS_SECTION, args, **fixed)
    kernels.measure(kernel_calls(SMALL, dtype, "cpu", "torch"), kernel_row)
    blocks.measure(KINDS, block_row)
    return "; ".join(problem for problem in (kernels.finish(), blocks.finish()) if problem) or None


if __name__ == "__main__":
    program.run(main)
