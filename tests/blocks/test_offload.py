"""Offloaded checkpoints: gradients to the bit, when inputs of blocks leave the device and come back, what is freed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed
from helpers.flux_models import Result, make_inputs, make_transformer, run
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastguard as fg
from fastguard.blocks import offload
from fastguard.blocks.offload import OffloadedCheckpoints

CPU_COPY, HOST_MEMORY = offload._start_copy, offload._host_memory


class LateCopies:
    """A device whose copies end as late as they may: when something waits for them, and nothing before."""

    def __init__(self) -> None:
        self.pending: deque[tuple[Any, weakref.ref[Any], weakref.ref[Any]]] = deque()

    def start(self, target: Tensor, source: Tensor) -> Any:
        target.fill_(float("nan"))
        event = CopyEnd(self)
        storages = (weakref.ref(tensor.untyped_storage()) for tensor in (target, source))
        self.pending.append((event, *storages))
        self.dtype = source.dtype
        return event

    def wait(self, event: Any) -> None:
        while any(each is event for each, *_ in self.pending):
            _, target, source = self.pending.popleft()
            assert target() is not None, "freed before the copy into it"
            assert source() is not None, "freed before the copy out of it"
            CPU_COPY(*(torch.empty(0, dtype=self.dtype).set_(each()) for each in (target, source)))


class CopyEnd:
    def __init__(self, copies: LateCopies) -> None:
        self.wait = lambda: copies.wait(self)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    copies = LateCopies()
    monkeypatch.setattr(offload, "_start_copy", copies.start)
    return copies


class Hosted:
    """The host copies that were made."""

    def __init__(self) -> None:
        self.shapes: list[int] = []
        self._alive: list[weakref.ref[Tensor]] = []

    def make(self, like: Tensor) -> Tensor:
        copied = torch.empty_like(like)
        self.shapes.append(like.numel())
        self._alive.append(weakref.ref(copied))
        return copied

    @property
    def alive(self) -> int:
        return sum(each() is not None for each in self._alive)


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> Hosted:
    found = Hosted()
    monkeypatch.setattr(offload, "_host_memory", found.make)
    return found


def checkpointed(level: str, train: str = "lora", fuse: bool = True) -> Any:
    model = make_transformer(train)
    if fuse:
        fg.fuse_flux(model, level)  # type: ignore[arg-type]
    else:
        model.enable_gradient_checkpointing(OffloadedCheckpoints() if level == "offload" else None)
    return model


def assert_equal(got: Result, want: Result) -> None:
    assert torch.equal(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    assert [name for name, gradient in want[1].items() if not torch.equal(got[1][name], gradient)] == []


# --- gradients to the bit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_gradients_are_those_of_block_to_the_bit(train: str, fuse: bool, late: LateCopies, hosted: Hosted) -> None:
    want = run(checkpointed("block", train, fuse))
    model = checkpointed("offload", train, fuse)
    for _ in range(2):
        assert_equal(run(model), want)
        assert not late.pending
    image, text, embedding = 2 * 9 * 64, 2 * 5 * 64, 2 * 64
    # The first block's inputs need a gradient only where all weights are trained; single blocks join text and image.
    first = [] if train == "lora" else [image, text, embedding]
    assert hosted.shapes == 2 * [*first, image, text, image, text, image + text]
    assert hosted.alive == 0


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "unfused"])
def test_micro_batches_with_rollouts_between_them_add_up_to_the_bit(fuse: bool, late: LateCopies) -> None:
    def gradients(level: str) -> dict[str, Tensor]:
        model = checkpointed(level, fuse=fuse)
        for seed in range(2):
            out = model(**make_inputs(batch=1 + seed))[0]
            with torch.no_grad():
                model(**make_inputs(batch=3))
            out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)))
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want, got = gradients("block"), gradients("offload")
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())


def test_two_graphs_and_one_backward_pass(late: LateCopies, hosted: Hosted) -> None:
    """As an objective of pairs has them: the second forward begins while the checkpoints of the first wait."""

    def gradients(level: str) -> dict[str, Tensor]:
        model = checkpointed(level)
        outs = [model(**make_inputs(batch=n))[0] for n in (1, 2)]
        (outs[0].square().mean() * outs[1].square().mean()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    want, got = gradients("block"), gradients("offload")
    assert all(torch.equal(got[name], gradient) for name, gradient in want.items())
    assert hosted.alive == 0


def test_a_retained_graph_has_a_second_backward_pass_and_another_one_has_not(late: LateCopies) -> None:
    found = []
    for level in ("block", "offload"):
        model = checkpointed(level)
        loss = model(**make_inputs())[0].square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            loss.backward()
    assert all(torch.equal(got, want) for want, got in zip(*found, strict=True))


def test_an_input_that_is_changed_before_it_is_saved_is_an_error_as_without_offload(late: LateCopies) -> None:
    def chain(checkpoint: Callable[..., Any], change: Callable[[Tensor], object]) -> Tensor:
        weight = torch.ones(3, requires_grad=True)
        x = weight * 2
        y = checkpoint(torch.sin, x)
        change(x)
        checkpoint(torch.sin, y).sum().backward()
        assert weight.grad is not None
        return weight.grad

    def plain(block: Callable[..., Any], x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)

    assert torch.equal(chain(OffloadedCheckpoints(), lambda x: None), chain(plain, lambda x: None))
    for checkpoint in (plain, OffloadedCheckpoints()):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            chain(checkpoint, lambda x: x.add_(1))


# --- what is on the device, and when ---------------------------------------------------------------------------------


@pytest.fixture
def watched() -> tuple[Any, list[tuple[str, list[int]]]]:
    """A model, and at each run of a block: its number, and of which blocks the inputs are on the device."""
    model: Any = checkpointed("offload", "full")
    log: list[tuple[str, list[int]]] = []
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    alive: dict[int, list[weakref.ref[Any]]] = {i: [] for i in range(len(blocks))}

    def before(i: int, args: Any) -> None:
        alive[i] = [weakref.ref(tensor.untyped_storage()) for tensor in args[:2]]
        log.append((str(i), [n for n, refs in alive.items() if any(ref() is not None for ref in refs)]))

    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, i=i: before(i, args))
    return model, log


def test_inputs_leave_the_device_before_the_next_block_runs(watched: Any, late: LateCopies) -> None:
    model, log = watched
    out = model(**make_inputs())[0]
    assert log == [(str(i), [i]) for i in range(4)]
    log.clear()
    out.square().mean().backward()
    assert [i for i, _ in log] == ["3", "2", "1", "0"]
    # The inputs of a block that is recomputed are there; those that came back earlier are gone with its backward.
    assert all(len(alive) == 1 for _, alive in log[1:])


def test_a_block_runs_while_its_inputs_go_and_those_of_the_block_before_come(watched: Any, late: LateCopies) -> None:
    model, _ = watched
    pending: list[int] = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_pre_hook(lambda *_: pending.append(len(late.pending)))
    out = model(**make_inputs())[0]
    assert pending == [3, 2, 2, 1]  # image, text, embedding; image, text; twice; joined
    pending.clear()
    out.square().mean().backward()
    assert pending == [2, 2, 3, 0]


def test_views_of_one_storage_come_back_as_they_were() -> None:
    model: Any = checkpointed("offload")
    seen: list[list[tuple[Any, ...]]] = []

    def note(_: Any, args: Any) -> None:
        seen.append([(t.shape, t.stride(), t.storage_offset(), t.untyped_storage().nbytes()) for t in args[:2]])

    model.single_transformer_blocks[1].register_forward_pre_hook(note)
    run(model)
    forward, recomputed = seen
    assert forward == recomputed
    (*_, first, size), (*_, second, same) = forward
    assert first != second
    assert size == same == 2 * 14 * 64 * 4


# --- what is freed ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_step_that_ends_in_an_exception_leaves_nothing(no_collector: None, late: LateCopies, hosted: Hosted) -> None:
    want = run(checkpointed("block"))
    model = checkpointed("offload")
    out = model(**make_inputs())[0]
    assert hosted.alive == 5
    del out  # as an exception between forward and backward does
    assert hosted.alive == 0
    late.pending.clear()  # a GPU would do it; nothing reads it
    assert_equal(run(model), want)

    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    outs = [model(**make_inputs())[0] for _ in range(2)]
    del outs[0]  # the later graph holds nothing of the earlier one
    assert hosted.alive == 5
    outs.clear()
    late.pending.clear()
    for block in (model.single_transformer_blocks[0], model.transformer_blocks[1]):
        handle = block.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="on purpose"):
            run(model)
        handle.remove()
        late.pending.clear()
        assert hosted.alive == 0
        assert_equal(run(model), want)
        assert hosted.alive == 0


def test_an_exception_in_a_recomputed_block_leaves_nothing(
    no_collector: None, late: LateCopies, hosted: Hosted
) -> None:
    want = run(checkpointed("block"))
    model = checkpointed("offload")
    out = model(**make_inputs())[0]

    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    handle = model.transformer_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="on purpose"):
        out.square().mean().backward()
    handle.remove()
    del out
    late.pending.clear()
    assert_equal(run(model), want)  # PyTorch's queue of the failed backward pass is freed with it
    assert hosted.alive == 0


# --- the model around it ---------------------------------------------------------------------------------------------


def test_unfuse_restores_the_checkpointing_that_was_there() -> None:
    def own(block: Any, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

    model = make_transformer()
    fg.fuse_flux(model, "offload")
    assert isinstance(model._gradient_checkpointing_func, OffloadedCheckpoints)
    fg.unfuse_flux(model)
    assert not model.is_gradient_checkpointing
    for function in (None, own):
        model.enable_gradient_checkpointing(function)
        before = model._gradient_checkpointing_func
        fg.fuse_flux(model, "offload")
        assert isinstance(model._gradient_checkpointing_func, OffloadedCheckpoints)
        fg.unfuse_flux(model)
        assert model.is_gradient_checkpointing
        assert model._gradient_checkpointing_func is before


def test_copies_and_pickles_of_a_model_offload_their_own_checkpoints(hosted: Hosted) -> None:
    model = checkpointed("offload")
    out = model(**make_inputs())[0]
    want = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._gradient_checkpointing_func is not model._gradient_checkpointing_func
        hosted.shapes.clear()
        assert_equal(run(other), want)
        assert len(hosted.shapes) == 5
    out.square().mean().backward()


def test_compiled_blocks_run_inside(hosted: Hosted) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)))
    found = []
    torch._dynamo.reset()
    for compiled in (False, True):
        checkpoint = OffloadedCheckpoints()
        x = torch.ones(2, 8)
        for layer in layers:
            x = checkpoint(torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer, x)
        found.append(torch.autograd.grad(x.square().mean(), list(layers.parameters())))
    assert len(hosted.shapes) == 2 * 2
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_distributed_wrappers(tmp_path: Any, wrapper: str, hosted: Hosted) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = []
        for level in ("block", "offload"):
            model: Any = checkpointed(level)
            if wrapper == "ddp":
                model = DistributedDataParallel(model)
            else:
                for block in (*model.transformer_blocks, *model.single_transformer_blocks):
                    fully_shard(block, reshard_after_forward=True)
                fully_shard(model)
            out, gradients = run(model)
            found.append((out, {n: getattr(g, "_local_tensor", g) for n, g in gradients.items()}))
        assert_equal(found[1], found[0])
        assert len(hosted.shapes) == 5
    finally:
        torch.distributed.destroy_process_group()


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("train", ["full", "lora"])
def test_on_a_gpu_checkpoints_wait_in_pinned_memory(train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def spy(like: Tensor) -> Tensor:
        made.append(copied := HOST_MEMORY(like))
        return copied

    monkeypatch.setattr(offload, "_host_memory", spy)
    inputs = make_inputs(torch.bfloat16, batch=1, device="cuda", tokens=2048)
    kept, found = {}, {}
    for level in ("block", "offload"):
        model = make_transformer(train, num_layers=2, num_single_layers=14).to("cuda", torch.bfloat16)
        fg.fuse_flux(model, level)  # type: ignore[arg-type]
        run(model, inputs)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = model(**inputs)[0]
        kept[level] = torch.cuda.memory_allocated() - before
        del out
        found[level] = [run(model, inputs) for _ in range(3)]
        del model
    for each in found["offload"]:
        assert_equal(each, found["block"][0])
    assert made
    assert all(host.is_pinned() for host in made)
    checkpoint = (2048 + 5) * 64 * 2
    assert kept["block"] - kept["offload"] >= 13 * checkpoint  # all single blocks' but the last
