"""Optimizers: each against torch's AdamW in float32, and their state through a save and a load."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastguard.config import UpdateConfig
from fastguard.train.optim import Optimizer, build_optimizer, load_state, state_tensors
from fastguard.utils.finite import names_not_finite
from fastguard.utils.sharding import copy_into, full_tensor

CONFIG = UpdateConfig(learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
NAMES = ["adamw", "adamw_cpu", "adamw8bit"]


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


def gradients(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 512, generator=generator) for _ in range(steps)]


def trained(name: str, dtype: torch.dtype, steps: int = 20) -> tuple[nn.Parameter, Optimizer]:
    if name == "adamw8bit":
        pytest.importorskip("torchao", reason="torchao is not installed")
    start = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    parameter = nn.Parameter(start.to(dtype))
    optimizer = build_optimizer([parameter], replace(CONFIG, optimizer=name))
    for gradient in gradients(steps):
        parameter.grad = gradient.to(dtype)
        optimizer.step()
        optimizer.zero_grad()
        assert parameter.grad is None
    return parameter, optimizer


def expected(dtype: torch.dtype, steps: int = 20) -> Tensor:
    """torch's AdamW in float32 on the same (rounded) start and gradients."""
    start = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    parameter = nn.Parameter(start.to(dtype).float())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for gradient in gradients(steps):
        parameter.grad = gradient.to(dtype).float()
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("name", ["adamw", "adamw_cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_weights_are_the_rounded_float32_ones(name: str, dtype: torch.dtype) -> None:
    parameter, _ = trained(name, dtype)
    assert torch.equal(parameter.detach(), expected(dtype).to(dtype))


def test_bfloat16_weights_take_steps_that_bfloat16_cannot_show() -> None:
    """Ten steps of 2^-12 each: none of them moves a bfloat16 weight of 1 on its own."""
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = build_optimizer([parameter], replace(CONFIG, learning_rate=2**-12, weight_decay=0.0))
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert parameter.tolist() == pytest.approx([1 - 20 * 2**-12] * 4, abs=2**-9)
    assert parameter[0].item() < 1


@pytest.mark.parametrize("stance", ["force_eager", pytest.param("default", marks=pytest.mark.slow)])
def test_eight_bits_stay_near_float32(stance: str) -> None:
    """torchao compiles its step, which takes most of a minute on a CPU; other tests run the same uncompiled."""
    with torch.compiler.set_stance(stance):
        parameter, _ = trained("adamw8bit", torch.float32)
    exact = expected(torch.float32)
    start = torch.randn(8, 512, generator=torch.Generator().manual_seed(1))
    error = (parameter.detach() - exact).norm() / (exact - start).norm()
    assert 0 < error < 0.03  # the moments' 8 bits; measured 0.016


def test_stochastic_rounding_has_no_bias() -> None:
    """Rounding to nearest would lose every step; on average over 4,096 weights none is lost."""
    parameter, _ = trained("adamw8bit", torch.bfloat16)
    difference = parameter.detach().float() - expected(torch.bfloat16)
    # 20 roundings to 2^-8 of a weight of size 1 spread by about 0.01, their mean over 4,096 by 64 times less.
    assert difference.mean().abs() < 4 * 0.01 / 64
    assert difference.std() < 0.05


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_survives_a_file(name: str, dtype: torch.dtype, tmp_path) -> None:  # type: ignore[no-untyped-def]
    parameter, optimizer = trained(name, dtype)
    named = {"layer.weight": parameter}
    saved = {key: full_tensor(tensor).contiguous() for key, tensor in state_tensors(optimizer, named)}
    save_file(saved, tmp_path / "state.safetensors")
    assert all(key.startswith("layer.weight.") for key in saved)

    other = nn.Parameter(torch.zeros(8, 512, dtype=dtype))
    fresh = build_optimizer([other], replace(CONFIG, optimizer=name))
    load_state(fresh, {"layer.weight": other}, load_file(tmp_path / "state.safetensors"))
    copy_into(other, parameter.detach())
    for gradient in gradients(3):
        for p, o in ((parameter, optimizer), (other, fresh)):
            torch.manual_seed(7)  # of the stochastic rounding
            p.grad = gradient.to(dtype)
            o.step()
    assert torch.equal(parameter, other)


def test_state_of_another_kind_or_shape_is_refused() -> None:
    parameter, optimizer = trained("adamw", torch.float32, steps=1)
    saved = {key: full_tensor(tensor) for key, tensor in state_tensors(optimizer, {"w": parameter})}
    other = nn.Parameter(torch.zeros(8, 512))
    with pytest.raises(ValueError, match=r"another kind.*exp_avg"):
        load_state(build_optimizer([other], CONFIG), {"w": other}, {k: v for k, v in saved.items() if "sq" in k})
    small = nn.Parameter(torch.zeros(8, 2))
    with pytest.raises(ValueError, match=r"shape \(8, 512\), expected \(8, 2\)"):
        load_state(build_optimizer([small], CONFIG), {"w": small}, saved)


def test_before_the_first_step_there_is_nothing_to_save() -> None:
    for name in ("adamw", "adamw_cpu"):
        parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
        optimizer = build_optimizer([parameter], replace(CONFIG, optimizer=name))
        assert list(state_tensors(optimizer, {"p": parameter})) == []
        load_state(optimizer, {"p": parameter}, {})
        assert parameter.grad is None


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r'^update\.optimizer = "adamw8bit" needs torchao: pip install .*\[lowbit\]'):
        build_optimizer([nn.Parameter(torch.zeros(2))], replace(CONFIG, optimizer="adamw8bit"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_packed_state_that_is_not_finite_is_named(value: float) -> None:
    """Its codes are integers: what is not finite in eight bits is the scale of a block."""
    from torchao.optim.subclass_8bit import OptimState8bit

    state = OptimState8bit.zeros((64, 128), signed=True, block_size=256)
    assert names_not_finite([("w.exp_avg", state)]) == []
    state.scale[3] = value
    assert names_not_finite([("w.exp_avg", state)]) == ["w.exp_avg.scale"]
