"""The integration for verl-omni: against a stand-in of its interface, and, where it is there, against itself.

`FASTGUARD_PEERS` names a folder with a checkout of verl-omni, for the second half; verl must be installed.
"""

from __future__ import annotations

import gc
import importlib
import os
import re
import shlex
import subprocess
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import ROOT, verl_omni
from helpers.pages import blocks_of
from torch import Tensor

import fastguard as fg
import fastguard.integrations.verl_omni as adapter
from fastguard.ops import transition as naive

PAGE = ROOT / "docs/integrations/verl_omni.md"
NAMES = ("grpo_guard", "flow_grpo", "dance_grpo", "flow_dppo")
SDE_TYPES = ("sde", "dance_sde", "cps")
SAMPLERS = {"sde": fg.flow_sde, "dance_sde": fg.dance_sde, "cps": fg.cps}
pytestmark = pytest.mark.filterwarnings("error:verl-omni's own", "ignore:verl-omni's log-probs of cps")


# --- a stand-in of the interface ------------------------------------------------------------------------------------


class StandInResult(NamedTuple):
    loss: Tensor
    metrics: dict[str, float]


class StandInLoss:
    """In the place of any of theirs: a loss that cannot be taken for ours."""

    required_model_output_keys = ("log_probs",)

    def __call__(self, *, config: Any, model_output: Any, data: Any) -> StandInResult:
        return StandInResult(1000 + model_output["log_probs"].sum(), {"theirs": 1.0})


class StandInScheduler:
    sigmas = torch.tensor([0.98, 0.9, 0.7, 0.4, 0.2, 0.0])

    def sample_previous_step(
        self,
        sample: Tensor,
        model_output: Tensor,
        timestep: Tensor,
        prev_sample: Tensor | None = None,
        sde_type: str = "sde",
    ) -> tuple[Tensor, ...]:
        step = SAMPLERS[sde_type](self.sigmas[timestep], self.sigmas[timestep + 1])
        mean = naive.transition_mean(sample, model_output, step)
        if prev_sample is None:
            generator = torch.Generator().manual_seed(2)
            prev_sample = mean + naive.per_sample(step.std, mean) * torch.randn(mean.shape, generator=generator)
        sqrt_dt = (-step.dt).sqrt()
        std_dev_t = step.std / sqrt_dt if sde_type == "sde" else step.std
        log_prob = naive.log_prob(prev_sample.detach(), mean, step.std)
        return prev_sample, log_prob, mean, naive.per_sample(std_dev_t, mean), sqrt_dt


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """That of the stand-in, which the adapter has taken over."""
    names = ("pipelines", "pipelines.schedulers", "trainer", "trainer.diffusion", "trainer.diffusion.diffusion_algos")
    modules = {name: types.ModuleType(name) for name in ("verl_omni", *(f"verl_omni.{name}" for name in names))}
    scheduler = type("FlowMatchSDEDiscreteScheduler", (StandInScheduler,), dict(vars(StandInScheduler)))
    registry = {name: StandInLoss() for name in (*NAMES, "kl")}
    modules["verl_omni.pipelines.schedulers"].__dict__["FlowMatchSDEDiscreteScheduler"] = scheduler
    algorithms = modules["verl_omni.trainer.diffusion.diffusion_algos"].__dict__
    algorithms.update(DIFFUSION_LOSS_REGISTRY=registry, DiffusionLossResult=StandInResult)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    adapter.take_over()
    registry["scheduler"] = scheduler()
    return registry


def loss_config(**options: Any) -> Any:
    fields = {"clip_ratio": 2e-5, "adv_clip_max": 1.0, "kl_mask_threshold": 1e-5, "add_kl_coefficient": True}
    return types.SimpleNamespace(diffusion_loss=types.SimpleNamespace(**{**fields, **options}))


class Batch(NamedTuple):
    """What the engine has: model_output in `forward`'s result, data, and the model's prediction."""

    model_output: dict[str, Tensor]
    data: dict[str, Tensor]
    velocity: Tensor
    prev_sample: Tensor


TIMES = [0, 1, 2, 3]
"""of the samples of a batch: all differ"""


def forward(scheduler: Any, sde_type: str = "sde", times: list[int] | None = None, size: int = 256) -> Batch:
    generator = torch.Generator().manual_seed(0)
    sample, old_velocity, change = torch.randn(3, 4, size, 16, generator=generator).unbind()
    where = {"timestep": torch.tensor(times or TIMES), "sde_type": sde_type}
    prev_sample, old_log_probs, old_mean, *_ = scheduler.sample_previous_step(sample, old_velocity, **where)
    velocity = (old_velocity + 0.01 * change).requires_grad_()
    outputs = scheduler.sample_previous_step(sample, velocity, prev_sample=prev_sample, **where)
    names = ("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt")
    advantages = torch.tensor([2.0, -0.5, 0.25, -1.5])
    data = {"advantages": advantages, "old_log_probs": old_log_probs, "old_prev_sample_mean": old_mean}
    return Batch(dict(zip(names, outputs[1:], strict=True)), data, velocity, prev_sample)


def naive_loss(name: str, batch: Batch, step: fg.Transition, config: Any, weight: Tensor | None) -> Tensor:
    """The formulas as published, in float64, sample by sample; a function of the mean."""
    mean, old = batch.model_output["prev_sample_mean"].double(), batch.data["old_prev_sample_mean"].double()
    sample, std, advantages = batch.prev_sample.double(), step.std.double(), batch.data["advantages"].double()
    log_ratio = naive.log_ratio_by_subtraction(sample, mean, old, std)
    if name == "flow_dppo":
        kl = naive.mean_over_elements((mean - old) ** 2) / (2 * std**2)
        losses = naive.divergence_masked(log_ratio, kl, advantages, config.kl_mask_threshold)
    else:
        if name == "grpo_guard":
            log_ratio = naive.ratio_norm_by_subtraction(sample, mean, old, std)
        clipped = naive.clip_advantages(advantages, config.adv_clip_max)
        losses = naive.clipped_surrogate(log_ratio, clipped, config.clip_ratio, config.clip_ratio)
    if name == "grpo_guard":
        losses = losses / step.dt.double().abs()
    return (losses if weight is None else weight.double() * losses).mean()


@pytest.mark.parametrize("weighted", [False, True], ids=["", "rollout_is_weights"])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient(registry: dict[str, Any], name: str, sde_type: str, weighted: bool) -> None:
    batch = forward(registry["scheduler"], sde_type)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5]) if weighted else None
    if weight is not None:
        batch.data["rollout_is_weights"] = weight
    step = SAMPLERS[sde_type](StandInScheduler.sigmas[TIMES], StandInScheduler.sigmas[[t + 1 for t in TIMES]])
    config = loss_config()
    expected = naive_loss(name, batch, step, config.diffusion_loss, weight)
    (expected_grad,) = torch.autograd.grad(expected, batch.velocity, retain_graph=True)
    loss, metrics = registry[name](config=config, model_output=batch.model_output, data=batch.data)
    (grad,) = torch.autograd.grad(loss, batch.velocity)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    assert (grad - expected_grad).norm() <= 1e-5 * expected_grad.norm()
    share = metrics["actor/masked_fraction" if name == "flow_dppo" else "actor/pg_clipfrac"]
    assert share > 0  # else the clip was not tested


@pytest.mark.parametrize("name", NAMES)
def test_metrics(registry: dict[str, Any], name: str) -> None:
    """Each by its definition in float64; samples are clipped on both sides, and masked with both signs."""
    batch = forward(registry["scheduler"])
    config = loss_config(kl_mask_threshold=3e-6).diffusion_loss
    step = fg.flow_sde(StandInScheduler.sigmas[TIMES], StandInScheduler.sigmas[[t + 1 for t in TIMES]])
    mean, old = batch.model_output["prev_sample_mean"].detach().double(), batch.data["old_prev_sample_mean"].double()
    sample, std = batch.prev_sample.double(), step.std.double()
    plain = naive.log_ratio_by_subtraction(sample, mean, old, std)
    batch.data["advantages"] = advantages = plain.sign().float()  # every sample moves away
    ratio = torch.exp(naive.ratio_norm_by_subtraction(sample, mean, old, std) if name == "grpo_guard" else plain)
    expected = {"ppo_kl": -plain.mean(), "ratio_mean": ratio.mean()}
    if name == "flow_dppo":
        kl = naive.mean_over_elements((mean - old) ** 2) / (2 * std**2)
        high = kl >= config.kl_mask_threshold
        up, down = high & (ratio > 1) & (advantages > 0), high & (ratio < 1) & (advantages < 0)
        assert up.any()
        assert down.any()
        assert not high.all()
        shares = {"kl_mask": high, "pos_rm": up, "neg_rm": down, "masked": up | down, "unmasked": ~(up | down)}
        expected |= {f"{key}_fraction": these.double().mean() for key, these in shares.items()}
        expected |= {"approx_kl": (plain**2 / 2).mean(), "ratio_std": ratio.std(unbiased=False)}
        expected |= {"ratio_min": ratio.min(), "ratio_max": ratio.max()}
        expected |= {"kl_new_old_mean": kl.mean(), "kl_new_old_max": kl.max()}
    else:
        higher, lower = ratio > 1 + config.clip_ratio, ratio < 1 - config.clip_ratio
        assert higher.any()
        assert lower.any()
        shares = {"pg_clipfrac": higher | lower, "pg_clipfrac_higher": higher, "pg_clipfrac_lower": lower}
        expected |= {key: these.double().mean() for key, these in shares.items()} | {"ratio_std": ratio.std()}
    config = types.SimpleNamespace(diffusion_loss=config)
    metrics = registry[name](config=config, model_output=batch.model_output, data=batch.data).metrics
    assert metrics == {f"actor/{key}": pytest.approx(float(value), rel=1e-5) for key, value in expected.items()}


def test_it_takes_over_four_names_and_no_other(registry: dict[str, Any]) -> None:
    scheduler = registry.pop("scheduler")
    before, method = dict(registry), type(scheduler).sample_previous_step
    assert {name for name, loss in registry.items() if type(loss) is not StandInLoss} == set(NAMES)
    assert all(isinstance(loss, StandInLoss) for loss in registry.values())
    assert registry["grpo_guard"].required_model_output_keys == ("log_probs",)
    adapter.take_over()
    assert registry == before
    assert type(scheduler).sample_previous_step is method


@pytest.mark.long
def test_it_imports_without_verl_omni() -> None:
    code = f"import sys; sys.modules['verl_omni'] = None; import {adapter.__name__}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def without_draw(batch: Batch) -> None:
    batch.model_output["prev_sample_mean"] = batch.model_output["prev_sample_mean"] + 0


OBSTACLES: dict[str, tuple[str, Callable[[Batch], Any], dict[str, Any]]] = {
    "is not the tensor that FlowMatchSDEDiscreteScheduler returned": ("grpo_guard", without_draw, {}),
    "no old_prev_sample_mean": ("flow_grpo", lambda batch: batch.data.pop("old_prev_sample_mean"), {}),
    "output has no sqrt_dt": ("dance_grpo", lambda batch: batch.model_output.pop("sqrt_dt"), {}),
    "add_kl_coefficient is False": ("flow_dppo", lambda batch: None, {"add_kl_coefficient": False}),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_their_loss_runs_where_ours_cannot(registry: dict[str, Any], obstacle: str) -> None:
    name, change, options = OBSTACLES[obstacle]
    batch = forward(registry["scheduler"])
    change(batch)
    with pytest.warns(UserWarning, match=f"verl-omni's own {name} loss is used: .*{obstacle}"):
        loss, metrics = registry[name](config=loss_config(**options), model_output=batch.model_output, data=batch.data)
    assert metrics == {"theirs": 1.0}
    loss.backward()
    assert batch.velocity.grad is not None  # log_probs has kept its graph


def test_an_unknown_sampler_is_left_to_theirs(registry: dict[str, Any]) -> None:
    batch = forward(registry["scheduler"])
    setattr(batch.model_output["prev_sample_mean"], adapter.DRAW, adapter.Draw(batch.prev_sample, "new_sde"))
    with pytest.warns(UserWarning, match="sde_type is 'new_sde'; known are sde, dance_sde, cps"):
        result = registry["flow_grpo"](config=loss_config(), model_output=batch.model_output, data=batch.data)
    assert result.metrics == {"theirs": 1.0}


def test_scoring_without_a_gradient_carries_no_draw_and_does_not_warn(registry: dict[str, Any]) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = forward(registry["scheduler"])
        result = registry["flow_grpo"](config=loss_config(), model_output=batch.model_output, data=batch.data)
    assert not hasattr(batch.model_output["prev_sample_mean"], adapter.DRAW)
    assert result.metrics == {"theirs": 1.0}


def test_a_step_without_a_density_is_refused(registry: dict[str, Any]) -> None:
    batch = forward(registry["scheduler"], "cps", times=[3, 3, 3, 4])
    with pytest.raises(ValueError, match="std == 0 at samples \\[3\\]"):
        registry["grpo_guard"](config=loss_config(), model_output=batch.model_output, data=batch.data)


def test_cps_says_what_differs(registry: dict[str, Any]) -> None:
    batch = forward(registry["scheduler"], "cps")
    with pytest.warns(UserWarning, match="lack the factor 1 / \\(2 std\\^2\\)"):
        registry["flow_grpo"](config=loss_config(), model_output=batch.model_output, data=batch.data)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_may_be_added_to_in_place(registry: dict[str, Any], name: str) -> None:
    """As verl-omni does with the KL."""
    batch = forward(registry["scheduler"])
    loss = registry[name](config=loss_config(), model_output=batch.model_output, data=batch.data).loss
    loss += 2 * batch.velocity.mean()
    loss.backward()
    assert batch.velocity.grad is not None
    assert batch.velocity.grad.mean() > 0


class Saved:
    """A tensor that a graph holds for backward."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def held_for_backward(step: Callable[[], Any], inputs: list[Tensor]) -> int:
    """Bytes that are still held for backward once the step has returned, beyond its inputs' own."""
    held: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        held.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        outputs = step()
    gc.collect()
    storages = [saved.tensor.untyped_storage() for saved in held]
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    del outputs
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in known}.values())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_the_size_of_latents_is_saved_for_backward(registry: dict[str, Any], name: str) -> None:
    inputs: list[Tensor] = []

    def step() -> Any:
        batch = forward(registry["scheduler"])
        loss = registry[name](config=loss_config(), model_output=batch.model_output, data=batch.data).loss
        assert not batch.model_output["log_probs"].requires_grad
        mean = batch.model_output["prev_sample_mean"]  # the engine holds it until the batch is done
        inputs.extend([batch.velocity, batch.prev_sample, batch.data["old_prev_sample_mean"], mean])
        return loss, batch

    assert held_for_backward(step, inputs) <= 64 * 4


# --- verl-omni itself -----------------------------------------------------------------------------------------------


@pytest.fixture
def verl() -> Iterator[Any]:
    """verl-omni as it came."""
    with verl_omni.untouched() as peer:
        yield peer


def take_over() -> None:
    importlib.import_module(verl_omni.ADAPTER)  # which the fixture has made sys.modules forget


def make_scheduler(kind: Any) -> Any:
    scheduler = kind(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


def drawn(times: list[int], sde_type: str, storage: torch.dtype, size: int = 1024) -> dict[str, Tensor]:
    """(4, size, 64) latents of a step of their scheduler, as a rollout stores them, and the prediction now."""
    generator = torch.Generator().manual_seed(3)
    sample, old_velocity, change = torch.randn(3, 4, size, 64, generator=generator).unbind()
    sample, old_velocity = sample.to(storage).float(), old_velocity.to(storage).float()
    velocity = (old_velocity + 0.01 * change).to(storage).float()
    scheduler = make_scheduler(verl_omni.load().Scheduler)
    timestep = scheduler.timesteps[torch.tensor(times)]
    prev_sample = scheduler.sample_previous_step(sample, old_velocity, timestep, generator, sde_type=sde_type)[0]
    return {
        "sample": sample, "old_velocity": old_velocity, "velocity": velocity, "timestep": timestep,
        "prev_sample": prev_sample.to(storage).float(),
    }  # fmt: skip


def their_step(scheduler: Any, rollout: dict[str, Tensor], velocity: Tensor, sde_type: str) -> dict[str, Tensor]:
    """Their engine's model_output."""
    outputs = scheduler.sample_previous_step(
        sample=rollout["sample"], model_output=velocity, timestep=rollout["timestep"],
        prev_sample=rollout["prev_sample"], sde_type=sde_type, return_sqrt_dt=True,
    )  # fmt: skip
    return dict(zip(("log_probs", "prev_sample_mean", "std_dev_t", "sqrt_dt"), outputs[1:], strict=True))


ADVANTAGES = torch.tensor([6.0, -0.75, 1.5, -2.0])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 1.5])
MIXED, ONE = [1, 3, 5, 7], [4, 4, 4, 4]


def their_data(scheduler: Any, rollout: dict[str, Tensor], sde_type: str) -> dict[str, Tensor]:
    """The batch of their engine."""
    old = their_step(scheduler, rollout, rollout["old_velocity"], sde_type)
    return {
        "advantages": ADVANTAGES, "rollout_is_weights": WEIGHTS, "old_log_probs": old["log_probs"],
        "old_prev_sample_mean": old["prev_sample_mean"], "ref_prev_sample_mean": old["prev_sample_mean"] + 0.001,
    }  # fmt: skip


def limits(name: str) -> Any:
    """With which some samples are clipped, and others not."""
    return {"clip_ratio": 3e-6 if name == "grpo_guard" else 2e-5, "kl_mask_threshold": 2e-5}


@pytest.mark.parametrize("times", [MIXED, ONE], ids=["mixed", "one"])
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sde_type", SDE_TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_against_theirs(verl: Any, name: str, sde_type: str, storage: torch.dtype, times: list[int]) -> None:
    """Their scheduler and our loss in float32, against their scheduler and their loss in float64."""
    config = verl_omni.actor_config(name, **limits(name))
    rollout = drawn(times, sde_type, storage)
    take_over()
    scheduler = make_scheduler(verl.Scheduler)
    data = their_data(scheduler, rollout, sde_type)
    outputs = their_step(scheduler, rollout, rollout["velocity"].requires_grad_(), sde_type)
    loss = verl.registry[name](config=config, model_output=outputs, data=data).loss
    (grad,) = torch.autograd.grad(loss, rollout["velocity"])

    scheduler = make_scheduler(verl_omni.scheduler_64())
    scheduler.sigmas = scheduler.sigmas.double()
    exact = {key: value if key == "timestep" else value.detach().double() for key, value in rollout.items()}
    data = their_data(scheduler, exact, sde_type)
    outputs = their_step(scheduler, exact, exact["velocity"].requires_grad_(), sde_type)
    if sde_type == "cps":  # their log-probs lack a Gaussian's factor
        factor = 2 * outputs["std_dev_t"].flatten() ** 2
        data["old_log_probs"], outputs["log_probs"] = data["old_log_probs"] / factor, outputs["log_probs"] / factor
    if sde_type != "sde":  # their losses multiply the whole std by sqrt(|dt|) again
        outputs["std_dev_t"] = outputs["std_dev_t"] / naive.per_sample(outputs["sqrt_dt"], outputs["std_dev_t"])
    expected = one_by_one(verl.losses[name], config, outputs, data)
    (expected_grad,) = torch.autograd.grad(expected, exact["velocity"])

    loss_error = float((loss.detach().double() / expected.detach() - 1).abs())
    grad_error = float((grad - expected_grad).norm() / expected_grad.norm())
    record(name, sde_type, loss_error, grad_error)
    # Twice the page's, because another CPU adds in another order.
    (row,) = re.findall(rf"^\| `{name}` \| (.*e-.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    loss_limit, grad_limit = (2 * float(figure) for figure in row.split(" | ")[SDE_TYPES.index(sde_type)].split(", "))
    assert loss_error <= min(loss_limit, 1e-6)
    assert grad_error <= min(grad_limit, 1e-6)
    trained = grad.flatten(1).norm(dim=1) > 0
    assert trained.any()
    assert not trained.all() or times == ONE


def one_by_one(theirs: Any, config: Any, outputs: dict[str, Tensor], data: dict[str, Tensor]) -> Tensor:
    """Their loss as the mean over the samples: of a whole batch it averages sigma and sqrt(|dt|)."""
    losses = []
    for sample in range(len(data["advantages"])):
        one = slice(sample, sample + 1)
        output = {key: value[one] for key, value in outputs.items()}
        batch = {key: value.double()[one] for key, value in data.items()}
        losses.append(theirs(config=config, model_output=output, data=batch).loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("use_kl_loss", [False, True], ids=["", "kl"])
@pytest.mark.parametrize("name", NAMES)
def test_what_their_diffusion_loss_returns_and_logs(verl: Any, name: str, use_kl_loss: bool) -> None:
    """The same through their `diffusion_loss`, with and without the adapter: loss, gradient, names and metrics."""
    from verl.utils import tensordict_utils

    def run() -> tuple[Tensor, Tensor, dict[str, Any]]:
        rollout, scheduler = drawn(ONE, "sde", torch.float32), make_scheduler(verl.Scheduler)
        data = their_data(scheduler, rollout, "sde")
        outputs = their_step(scheduler, rollout, rollout["velocity"].requires_grad_(), "sde")
        batch = tensordict_utils.get_tensordict(data)
        tensordict_utils.assign_non_tensor(batch, gradient_accumulation_steps=2, sp_size=1)
        config = verl_omni.actor_config(name, use_kl_loss=use_kl_loss, **limits(name))
        loss, metrics = verl.diffusion_loss(config, outputs, batch)
        (grad,) = torch.autograd.grad(loss, rollout["velocity"])
        values = {key: metric.aggregate() for key, metric in metrics.items() if hasattr(metric, "aggregate")}
        return loss, grad, values

    theirs = run()
    take_over()
    ours = run()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert (ours[1] - theirs[1]).norm() <= 1e-4 * theirs[1].norm()
    assert list(ours[2]) == list(theirs[2])
    for key, value in theirs[2].items():
        # A mean log-prob near -1 is good to 1e-7, so the difference of two is too, and so is a float32 ratio.
        assert ours[2][key] == pytest.approx(value, rel=1e-4, abs=5e-7), key


RUNS = [(name, "sde") for name in NAMES] + [("flow_grpo", "dance_sde"), ("dance_grpo", "dance_sde")]


@pytest.mark.parametrize(("name", "sde_type"), RUNS)
def test_a_run_of_their_engine(verl: Any, name: str, sde_type: str, tmp_path: Path) -> None:
    """Three updates of their FSDP2 engine on a tiny SD3 transformer, with the option external_lib and without."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        verl_omni.make_tiny_sd3(tmp_path)
        theirs = verl_omni.train(tmp_path, name, sde_type, external_lib=None)
        assert verl_omni.ADAPTER not in sys.modules
        ours = verl_omni.train(tmp_path, name, sde_type, external_lib=verl_omni.ADAPTER)
        assert verl_omni.ADAPTER in sys.modules
    finally:
        torch.distributed.destroy_process_group()
    assert list(ours) == list(theirs)
    assert ours["loss"].unique().numel() > 3  # else it would have stood still
    # AdamW divides a gradient by its own size, so a weight whose gradient is nearly 0 moves by another's rounding.
    for key, tolerance in (("loss", 1e-6), ("grad_norm", 1e-6), ("weights", 1e-5)):
        error = float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max())
        record(f"run {name} {sde_type} {key}", error)
        assert error <= tolerance, key


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_of_the_page(verl: Any, name: str) -> None:
    """4 x 4096 x 64 in float32: theirs, ours with their log-prob held, ours."""
    config = verl_omni.actor_config(name)

    def run(held: list[Any]) -> int:
        rollout, scheduler = drawn(MIXED, "sde", torch.float32, size=4096), make_scheduler(verl.Scheduler)
        data = their_data(scheduler, rollout, "sde")
        inputs = [*rollout.values(), *data.values()]

        def step() -> Any:
            outputs = their_step(scheduler, rollout, rollout["velocity"].requires_grad_(), "sde")
            inputs.append(outputs["prev_sample_mean"])  # their engine holds it until the batch is done
            held.append(outputs["log_probs"]) if held else None
            return verl.registry[name](config=config, model_output=outputs, data=data).loss, outputs

        return held_for_backward(step, inputs)

    theirs = run([])
    take_over()
    with_log_prob, ours = run([None]), run([])
    assert f"| `{name}` | {theirs:,} | {with_log_prob:,} | {ours} |" in PAGE.read_text(encoding="utf-8")


def test_the_options_of_the_page_are_theirs(verl: Any) -> None:
    from hydra import compose, initialize_config_dir

    (block,) = [block for block in blocks_of(PAGE) if block.language == "bash"]
    overrides = [word for word in shlex.split(block.code) if "=" in word]
    with initialize_config_dir(str(verl_omni.CHECKOUT / "verl_omni/trainer/config"), version_base=None):
        config = compose("diffusion_trainer", overrides).actor_rollout_ref
    assert config.model.external_lib == adapter.__name__
    assert config.actor.diffusion_loss.loss_mode in adapter.LOSSES


TESTS_OF_THEIRS = [
    f"tests/trainer/diffusion/test_{name}_on_cpu.py"
    for name in (
        "diffusion_core_algos", "diffusion_registry", "diffusion_distillation_losses", "rollout_correction",
    )
]  # fmt: skip


@pytest.mark.parametrize("with_adapter", [False, True], ids=["as it came", "with the adapter"])
def test_their_own_tests_pass(verl: Any, with_adapter: bool) -> None:
    lines = [
        "import importlib, sys, pytest",
        "from helpers import verl_omni",
        "verl_omni.load()",
        f"importlib.import_module({verl_omni.ADAPTER!r})" if with_adapter else "",
        f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{TESTS_OF_THEIRS}]))",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=verl_omni.CHECKOUT, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout


def record(*what: Any) -> None:
    """Printed with `pytest -rP`: the figures of docs/integrations/verl_omni.md."""
    print("measured:", *what)
