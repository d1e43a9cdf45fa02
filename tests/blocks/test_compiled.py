"""Blocks under torch.compile: which graphs are made, and which run.

Most of it on a toy of linear layers, for a block of Flux takes the compiler seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.flux_models import FLOAT32, assert_agree, make_inputs, make_transformer, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import fastguard as fg
from fastguard.blocks import compiled
from fastguard.blocks.compiled import compile_blocks, start_compiler
from fastguard.errors import UserError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x) * temb))


class Toy(nn.Module):
    """Four blocks between layers that are not compiled; the blocks alone are trained, unless `full`."""

    def __init__(self, full: bool = False, block: Callable[[], nn.Module] = Block) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.embed_time, self.out = nn.Linear(3, 4), nn.Linear(3, 8), nn.Linear(4, 2)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.had_grad: list[bool] = []
        """whether gradients were on, of each pass"""
        for layer in (self.embed, self.embed_time, self.out):
            layer.requires_grad_(full)

    def forward(self, x: Tensor) -> Tensor:
        self.had_grad.append(torch.is_grad_enabled())
        x, temb = self.embed(x), self.embed_time(x)
        for block in self.blocks:
            x = block(x, temb)
        return self.out(x)


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _own_graphs() -> Iterator[None]:
    config: Any = torch._dynamo.config
    before = config.recompile_limit, config.optimize_ddp
    torch._dynamo.reset()
    yield
    config.recompile_limit, config.optimize_ddp = before
    torch._dynamo.reset()


def compiled_toy(full: bool = False) -> tuple[Toy, CompileCounter]:
    toy, counter = Toy(full), CompileCounter()
    compile_blocks(toy, toy.blocks, backend=counter)
    return toy, counter


def update(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of all trained parameters."""
    out = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return out.detach(), list(torch.autograd.grad(out, trained, upstream_of(out)))


def upstream_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(2))


# --- which graphs run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("full", "graphs"), [(False, 2), (True, 1)])
def test_a_pass_without_gradients_runs_the_graphs_of_training(full: bool, graphs: int) -> None:
    """Of blocks that train behind a frozen embedding, the first has inputs without a gradient, and its own graph."""
    toy, counter = compiled_toy(full)
    with torch.no_grad():
        sampled = toy(inputs())
    assert counter.frame_count == graphs
    assert not sampled.requires_grad
    out, gradients = update(toy, inputs())
    assert counter.frame_count == graphs
    assert torch.equal(out, sampled)
    want, wanted = update(Toy(full), inputs())
    torch.testing.assert_close((out, gradients), (want, wanted))


def test_each_size_has_graphs_of_its_own_and_keeps_them() -> None:
    """Whatever came before, so that a resumed run goes on with the same ones."""
    toy, counter = compiled_toy()
    with torch.no_grad():
        counts = [(toy(inputs(batch)), counter.frame_count)[1] for batch in (4, 2, 4, 1, 3, 2, 1)]
    assert counts == [2, 4, 4, 6, 8, 8, 8]
    for batch in (4, 2, 1):
        update(toy, inputs(batch))
    assert counter.frame_count == 8


def test_a_pass_runs_with_gradients_only_if_something_is_trained() -> None:
    """Not with adapters switched off, nor under inference_mode, which gives tensors that no graph may save."""
    toy, _ = compiled_toy()
    with torch.no_grad():
        trained = toy(inputs())
    with torch.inference_mode():
        inference = toy(inputs())
    toy.requires_grad_(False)
    with torch.no_grad():
        frozen = toy(inputs())
    assert toy.had_grad == [True, False, False]
    for out in (inference, frozen):
        torch.testing.assert_close(out.clone(), trained)


def test_a_pass_that_fails_leaves_no_trace() -> None:
    toy, _ = compiled_toy()
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"):
        toy(torch.zeros(2, 7))
    assert not any(torch.equal(g, torch.zeros_like(g)) for g in update(toy, inputs())[1])  # blocks are not cut off


def test_a_dispatch_mode_sees_the_operators_of_uncompiled_blocks() -> None:
    toy, counter = compiled_toy()
    with FlopCounterMode(display=False) as flops:
        update(toy, inputs())
    assert counter.frame_count == 0
    with FlopCounterMode(display=False) as of_uncompiled:
        update(Toy(), inputs())
    assert flops.get_total_flops() == of_uncompiled.get_total_flops() > 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_wrapped_for_several_processes(kind: str, tmp_path: Path) -> None:
    """FSDP2's hooks, around a block, are not compiled, and DDP does not cut a block's graph at its buckets."""
    toy, counter = compiled_toy(full=True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        if kind == "ddp":
            model: Any = DistributedDataParallel(toy, bucket_cap_mb=1e-6)
        else:
            for block in toy.blocks:
                fully_shard(block)
            model = fully_shard(toy)
        with torch.no_grad():
            sampled = model(inputs())
        out = model(inputs())
        assert torch.equal(out, sampled)
        assert counter.frame_count == 1
        out.backward(upstream_of(out))
        gradients = [p.grad.full_tensor() if kind == "fsdp2" else p.grad for p in toy.parameters()]
        torch.testing.assert_close((out, gradients), update(Toy(full=True), inputs()))
    finally:
        torch.distributed.destroy_process_group()


def test_copies_are_not_compiled() -> None:
    toy, counter = compiled_toy()
    copied = copy.deepcopy(toy)
    assert counter.frame_count == 0
    torch.testing.assert_close(update(copied, inputs()), update(Toy(), inputs()))
    assert counter.frame_count == 0


# --- errors ---------------------------------------------------------------------------------------------------------


class Breaking(Block):
    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, temb)


def test_a_block_that_is_no_single_graph_is_refused() -> None:
    toy = Toy(block=Breaking)
    compile_blocks(toy, toy.blocks, backend="eager")
    with pytest.raises(UserError, match=r'model.compile = "blocks": torch.compile fails for a Breaking .*"none"$'):
        toy(inputs())


def test_blocks_never_fall_back_to_uncompiled_ones() -> None:
    """PyTorch would do so in mid-run, after as many graphs as it allows, and the bits would change."""
    toy, counter = compiled_toy()
    config: Any = torch._dynamo.config
    assert config.recompile_limit == compiled.MOST_GRAPHS
    config.recompile_limit = 4
    for batch in (1, 2):
        toy(inputs(batch))
    with pytest.raises(UserError, match=r"a Block \(FailOnRecompileLimitHit"):
        toy(inputs(3))
    toy(inputs(2))
    assert counter.frame_count == 4


def test_a_compiler_that_does_not_work_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiled.CACHE, str(tmp_path / "chosen"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(UserError, match=r'model.compile = "blocks": .* on cpu: it needs a C\+\+ compiler'):
        start_compiler(tmp_path, torch.device("cpu"))


# --- blocks of Flux -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["pointwise", pytest.param("block", marks=pytest.mark.slow)])
def test_blocks_of_a_kind_share_their_graphs(recompute: Any) -> None:
    """Four blocks of a kind are compiled like two, the first of which has inputs of another kind: without a gradient in
    a double block, and apart from each other in a single one. So is the rollout before them."""
    model = make_transformer("lora", num_layers=4, num_single_layers=4)
    want = run(model)
    fg.fuse_flux(model, recompute)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, [*model.transformer_blocks, *model.single_transformer_blocks], backend=counter)
    with torch.no_grad():
        sampled = model(**make_inputs())[0]
    got = run(model)
    assert_agree(got, want, FLOAT32)
    assert torch.equal(sampled, got[0])
    assert counter.frame_count == 4
