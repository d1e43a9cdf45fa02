"""Flow-Factory's trainers with the fused loss: against the textbook, and against Flow-Factory itself where it is."""

from __future__ import annotations

import importlib
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT, TESTS
from helpers.flow_factory import Rollout, Scheduler, make_trainer, roll_out, saved_bytes, use_stand_in
from helpers.pages import blocks_of
from torch import Tensor

from fastguard.integrations import flow_factory
from fastguard.ops import transition as formulas

PAGE = ROOT / "docs" / "integrations" / "flow_factory.md"
DYNAMICS = ("Flow-SDE", "Dance-SDE", "CPS")
STORAGE = (torch.float32, torch.bfloat16, torch.float16)
TIMESTEPS = torch.tensor([1000.0, 900.0, 700.0, 400.0])
MIXED = torch.stack([TIMESTEPS, TIMESTEPS - 50, TIMESTEPS * 0.8, TIMESTEPS * 0.99])
# Ours runs in float32, from means that are rounded to it.
TOLERANCE = 1e-6
# The means hold the velocities times velocity_coef, which is about 0.1. So a KL of velocities has fewer digits.
TOLERANCE_OF_VELOCITY_KL = 1e-5


@pytest.fixture
def stand_in() -> Iterator[dict[str, Any]]:
    with use_stand_in() as modules:
        yield modules


def drawn(scheduler: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """A scheduler's step for `roll_out`."""

    def step(velocity: Tensor, t: Tensor, latents: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        out = scheduler.step(
            velocity, t, latents, next_latents=None, timestep_next=t_next, noise_level=scheduler.noise_level,
            compute_log_prob=False, return_kwargs=["next_latents", "next_latents_mean"],
        )  # fmt: skip
        return out.next_latents_mean, out.next_latents

    return step


def ours(scheduler: Any, rollout: Rollout, objective: str, **args: Any) -> tuple[Tensor, Tensor]:
    """Losses (T',) of the trained steps, and their gradients with respect to the velocities, (N, T, S, C)."""
    trainer = make_trainer(scheduler, objective, **args)
    samples = rollout.samples()
    flow_factory.optimize(trainer, samples)
    return torch.stack(trainer.accelerator.losses), torch.stack([sample["velocity"].grad for sample in samples])


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


# --- against the textbook, with a stand-in for Flow-Factory ---------------------------------------------------------


def textbook(scheduler: Any, rollout: Rollout, objective: str, index: int, **args: Any) -> tuple[Tensor, Tensor]:
    """The loss of a step in float64 by subtracting log-densities, and its gradient, (N, S, C)."""
    args = make_trainer(scheduler, objective, **args).training_args
    times = torch.nn.functional.pad(rollout.timesteps, (0, 1)).double()
    step = scheduler.transition(times[:, index], times[:, index + 1], scheduler.noise_level)
    latents, prev_sample = (rollout.all_latents[:, i].double() for i in (index, index + 1))
    velocity = rollout.velocity[:, index].double().requires_grad_()
    mean, ref_mean = (
        formulas.transition_mean(latents, v, step) for v in (velocity, rollout.ref_velocity[:, index].double())
    )
    log_ratio = {
        "flow_grpo": formulas.log_ratio_by_subtraction,
        "grpo_guard": formulas.ratio_norm_by_subtraction,
    }[objective](prev_sample, mean, rollout.next_latents_mean[:, index].double(), step.std)
    advantages = rollout.advantage.clamp(*args.adv_clip_range)
    loss = formulas.clipped_surrogate(log_ratio, advantages, -args.clip_range[0], args.clip_range[1])
    factor = {"none": 1.0, "inverse_dt": 1 / step.dt.abs(), "equalized": 1 / step.velocity_coef.abs()}
    loss = loss * factor[args.reweight]
    new, ref = (mean, ref_mean) if args.kl_type == "x-based" else (velocity, rollout.ref_velocity[:, index].double())
    loss = (loss + args.kl_beta * formulas.mean_over_elements((new - ref) ** 2)).mean()
    loss.backward()
    return loss.detach(), velocity.grad


@pytest.mark.parametrize("timesteps", [TIMESTEPS.expand(4, -1), MIXED], ids=["one time", "mixed times"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_the_transition_is_that_of_the_scheduler(stand_in: Any, dynamics: str, timesteps: Tensor) -> None:
    scheduler = Scheduler(dynamics, TIMESTEPS)
    for t, t_next in zip(timesteps.T, timesteps.T[1:], strict=False):
        found, expected = flow_factory.transition(scheduler, t, t_next), scheduler.transition(t, t_next, 0.7)
        for name in ("latents_coef", "velocity_coef", "std", "dt"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=0)


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("timesteps", [TIMESTEPS.expand(4, -1), MIXED], ids=["one time", "mixed times"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("objective", ["flow_grpo", "grpo_guard"])
def test_loss_and_gradient_are_those_of_the_textbook(
    stand_in: Any, objective: str, dynamics: str, timesteps: Tensor, storage: torch.dtype
) -> None:
    scheduler = Scheduler(dynamics, TIMESTEPS)
    rollout = roll_out(drawn(scheduler), timesteps, storage)
    compare(scheduler, rollout, objective)


@pytest.mark.parametrize("kl_type", ["x-based", "v-based"])
@pytest.mark.parametrize("reweight", ["none", "inverse_dt", "equalized"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_kl_and_reweighting_are_those_of_the_textbook(
    stand_in: Any, dynamics: str, reweight: str, kl_type: str
) -> None:
    scheduler = Scheduler(dynamics, TIMESTEPS)
    compare(scheduler, roll_out(drawn(scheduler), MIXED), "grpo_guard", reweight=reweight, kl_beta=3.0, kl_type=kl_type)


def compare(scheduler: Any, rollout: Rollout, objective: str, **args: Any) -> None:
    tolerance = TOLERANCE_OF_VELOCITY_KL if args.get("kl_type") == "v-based" else TOLERANCE
    losses, gradients = ours(scheduler, rollout, objective, **args)
    assert gradients[:, -1].abs().max() == 0  # the last step is not trained
    for index, loss in enumerate(losses):
        expected, gradient = textbook(scheduler, rollout, objective, index, **args)
        assert abs(float(loss / expected) - 1) < tolerance
        assert distance(gradients[:, index], gradient) < tolerance


def test_the_last_step_ends_at_0(stand_in: Any) -> None:
    scheduler = Scheduler("Dance-SDE", TIMESTEPS)
    scheduler.train_timesteps = torch.tensor([3])
    rollout = roll_out(drawn(scheduler), MIXED)
    (loss,), gradients = ours(scheduler, rollout, "flow_grpo")
    expected, gradient = textbook(scheduler, rollout, "flow_grpo", 3)
    assert abs(float(loss / expected) - 1) < TOLERANCE
    assert distance(gradients[:, 3], gradient) < TOLERANCE


def test_autocast_changes_nothing(stand_in: Any) -> None:
    scheduler = Scheduler("Flow-SDE", TIMESTEPS)
    rollout = roll_out(drawn(scheduler), MIXED, torch.bfloat16)
    plain = ours(scheduler, rollout, "flow_grpo", kl_beta=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ours(scheduler, rollout, "flow_grpo", kl_beta=3.0)
    assert all(map(torch.equal, plain, mixed))


def test_what_is_logged(stand_in: Any) -> None:
    """Flow-Factory's names, of the values that they have there; one entry per optimizer step."""
    scheduler = Scheduler("Dance-SDE", TIMESTEPS)
    rollout = roll_out(drawn(scheduler), MIXED, moved=0.3)
    options = {"per_device_batch_size": 2, "kl_beta": 3.0, "clip_range": (-1e-2, 5e-3)}
    trainer = make_trainer(scheduler, "flow_grpo", accumulated=2, **options)
    flow_factory.optimize(trainer, rollout.samples())
    losses = torch.stack(trainer.accelerator.losses)
    assert len(losses) == 2 * 3
    assert trainer.step == len(trainer.logged) == 3
    assert trainer.optimized == 3 * ["step", "zero_grad"]
    for log, loss in zip(trainer.logged, losses.split(2), strict=True):
        assert log.keys() == {
            f"train/{name}"
            for name in (
                "ratio", "log_ratio", "unclipped_loss", "clipped_loss", "policy_loss", "loss", "kl_div", "kl_loss",
                "clip_frac_high", "clip_frac_low", "clip_frac_total", "grad_norm",
            )
        }  # fmt: skip
        log = {name.removeprefix("train/"): value for name, value in log.items()}
        ratio = log["ratio"]
        torch.testing.assert_close(ratio.log(), log["log_ratio"], rtol=0, atol=1e-6)
        surrogate = torch.maximum(log["unclipped_loss"], log["clipped_loss"]).mean()
        torch.testing.assert_close(log["policy_loss"], surrogate, check_dtype=False)
        torch.testing.assert_close(log["loss"], loss.mean())
        torch.testing.assert_close(log["loss"], log["policy_loss"] + log["kl_loss"])
        torch.testing.assert_close(log["kl_loss"], 3.0 * log["kl_div"])
        assert log["clip_frac_high"] == (ratio > 1.005).float().mean()
        assert log["clip_frac_low"] == (ratio < 0.99).float().mean()
        assert log["clip_frac_total"] == log["clip_frac_high"] + log["clip_frac_low"] > 0


def test_every_inner_epoch_has_an_order_of_its_own(stand_in: Any) -> None:
    scheduler = Scheduler("Flow-SDE", TIMESTEPS)
    rollout = roll_out(drawn(scheduler), MIXED)
    alone = []
    for sample in rollout.samples():
        trainer = make_trainer(scheduler, "flow_grpo")
        flow_factory.optimize(trainer, [sample])
        alone.append(torch.stack(trainer.accelerator.losses))
    trainer = make_trainer(scheduler, "flow_grpo", per_device_batch_size=1, num_inner_epochs=2)
    trainer.epoch = 5
    flow_factory.optimize(trainer, rollout.samples())
    for inner_epoch, losses in enumerate(torch.stack(trainer.accelerator.losses).view(2, 4, 3)):
        generator = torch.Generator().manual_seed(hash((3, 5, inner_epoch)) % 2**32)
        assert torch.equal(losses, torch.stack(alone)[torch.randperm(4, generator=generator)])


def test_a_mean_of_another_shape_is_refused(stand_in: Any) -> None:
    """LTX-2 returns the mean of the video alone, and its latents hold the sound too."""

    class OfSomeTokens(Scheduler):
        def step(self, *args: Any, **options: Any) -> Any:
            out = super().step(*args, **options)
            out.next_latents_mean = out.next_latents_mean[:, :5]
            return out

    scheduler = OfSomeTokens("Flow-SDE", TIMESTEPS)
    samples = roll_out(drawn(scheduler), MIXED).samples()
    with pytest.raises(ValueError, match=r"prev_sample.* \(4, 8, 16\).* \(4, 5, 16\)"):
        flow_factory.optimize(make_trainer(scheduler, "flow_grpo"), samples)


def test_another_convention_of_the_scheduler_is_found(stand_in: Any) -> None:
    class WithoutTheRoot(Scheduler):
        def step(self, *args: Any, **options: Any) -> Any:
            out = super().step(*args, **options)
            if "std_dev_t" in vars(out):
                out.std_dev_t = out.std_dev_t / (-out.dt).sqrt()
            return out

    scheduler = WithoutTheRoot("CPS", TIMESTEPS)
    samples = roll_out(drawn(scheduler), MIXED, shape=(16, 64)).samples()
    trainer = make_trainer(scheduler, "flow_grpo")
    with pytest.raises(ValueError, match=r"has a mean square of .*, and 1 was expected"):
        flow_factory.optimize(trainer, samples)
    trainer.step = 1
    flow_factory.optimize(trainer, samples)


@pytest.mark.parametrize(
    ("objective", "kl_beta", "means"), [("grpo_guard", 0, 0), ("flow_grpo", 0, 1), ("grpo_guard", 3, 2)]
)
def test_no_tensor_of_latent_size_is_saved_but_means(stand_in: Any, objective: str, kl_beta: float, means: int) -> None:
    scheduler = Scheduler("Flow-SDE", TIMESTEPS)
    samples = roll_out(drawn(scheduler), MIXED).samples()
    mean_bytes = 4 * 4 * 8 * 16
    for size in saved_bytes(make_trainer(scheduler, objective, kl_beta=kl_beta), flow_factory.optimize, samples):
        assert means * mean_bytes <= size < means * mean_bytes + 100


# --- its tables -----------------------------------------------------------------------------------------------------


def test_the_tables_name_our_trainers(stand_in: Any) -> None:
    registry = stand_in["flow_factory.trainers.registry"]._TRAINER_REGISTRY
    arguments = stand_in["flow_factory.hparams.training_args"]._TRAINING_ARGS_REGISTRY
    flow_factory.register()
    assert registry["nft"] == "theirs"
    for name, objective in (("grpo", "flow_grpo"), ("grpo-guard", "grpo_guard")):
        module, _, trainer = registry[name].rpartition(".")
        found = getattr(importlib.import_module(module), trainer)
        assert issubclass(found, stand_in["flow_factory.trainers.grpo"].GRPOGuardTrainer)
        assert (found.__module__, found.__qualname__, found.objective) == (module, trainer, objective)
        assert found.optimize is flow_factory.optimize
        assert arguments[name](trainer_type=name).reweight == "none"
        assert arguments[name](reweight="inverse_dt").trainer_type == "grpo"
        with pytest.raises(ValueError, match=r"train\.reweight .*'equalized'.*; got 'dt'"):
            arguments[name](reweight="dt")
    with pytest.raises(AttributeError, match="NFTTrainer"):
        _ = flow_factory.NFTTrainer


def test_the_options_of_the_page_are_known(stand_in: Any) -> None:
    command, options = (block.code for block in blocks_of(PAGE)[:2])
    assert f" -m {flow_factory.__name__} " in command
    flow_factory.register()
    train = yaml.safe_load(options)["train"]
    table = stand_in["flow_factory.hparams.training_args"]._TRAINING_ARGS_REGISTRY
    assert vars(table[train["trainer_type"]](**train)) == train


def test_the_program_is_theirs_with_our_trainers(stand_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = stand_in["flow_factory.trainers.registry"]._TRAINER_REGISTRY
    found: list[str] = []
    stand_in["flow_factory.train"].main = lambda: found.extend(registry.values())
    monkeypatch.setitem(sys.modules, "fastguard.integrations.flow_factory", flow_factory)
    with pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("fastguard.integrations.flow_factory", run_name="__main__")
    assert sum(path.startswith("fastguard.integrations.flow_factory.") for path in found) == 2


# --- against Flow-Factory -------------------------------------------------------------------------------------------

FACTORS = {"one time": torch.ones(4, 1), "mixed times": torch.tensor([1.0, 0.97, 0.9, 0.8])[:, None]}
OBJECTIVES = {"grpo": "flow_grpo", "grpo-guard": "grpo_guard"}


@pytest.fixture(scope="module")
def peer() -> Any:
    """Flow-Factory's module `trainers.grpo`."""
    peers = os.environ.get("FASTGUARD_PEERS")
    if peers is None:
        pytest.skip("FASTGUARD_PEERS names no folder with checkouts of other projects")
    source = Path(peers) / "Flow-Factory" / "src"
    if not source.is_dir():
        pytest.skip(f"{source} does not exist")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(source))
        try:
            yield importlib.import_module("flow_factory.trainers.grpo")
        except ModuleNotFoundError as error:
            pytest.skip(f"Flow-Factory needs a package that is not here: {error.name}")


def peer_scheduler(kind: str, dynamics: str) -> Any:
    from flow_factory.scheduler import FlowMatchEulerDiscreteSDEScheduler, UniPCMultistepSDEScheduler

    if kind == "Euler":
        scheduler = FlowMatchEulerDiscreteSDEScheduler(noise_level=0.7, dynamics_type=dynamics, shift=3.0)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # as the adapters ask for it
    else:
        scheduler = UniPCMultistepSDEScheduler(
            noise_level=0.7, dynamics_type=dynamics, prediction_type="flow_prediction", use_flow_sigmas=True,
            flow_shift=3.0,
        )  # fmt: skip
        scheduler.set_timesteps(4)
    return scheduler


class Repaired:
    """Their scheduler with CPS repaired in two places.

    Its log-probability lacks 1 / (2 std^2). Its std_dev_t is the std of the draw, which GRPO-Guard multiplies by
    sqrt(|dt|) as it does for the other samplers, whose std_dev_t lacks that.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)

    def step(self, *args: Any, return_kwargs: list[str], **options: Any) -> Any:
        return_kwargs = list({*return_kwargs, "std_dev_t", "dt"})
        out = self.scheduler.step(*args, return_kwargs=return_kwargs, **options)
        if out.log_prob is not None:
            out.log_prob = out.log_prob / (2 * out.std_dev_t.flatten() ** 2)
        out.std_dev_t = out.std_dev_t / torch.sqrt(-out.dt)
        return out


def theirs(
    peer: Any, scheduler: Any, rollout: Rollout, trainer_type: str, dtype: torch.dtype = torch.float64, **args: Any
) -> tuple[Any, list[Any]]:
    """A trainer and its samples after the update of their own trainer, which sees one sample at a time.

    Their Guard mixes samples whose times differ.
    """
    trainer_class = {"grpo": peer.GRPOTrainer, "grpo-guard": peer.GRPOGuardTrainer}[trainer_type]
    scheduler = Repaired(scheduler) if scheduler.dynamics_type == "CPS" else scheduler
    times = torch.nn.functional.pad(rollout.timesteps, (0, 1))
    old = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda tensor: tensor.to(dtype))  # the scheduler's step asks for float32
        for i in range(rollout.timesteps.shape[1]):
            latents, next_latents = (rollout.all_latents[:, k].to(dtype) for k in (i, i + 1))
            out = scheduler.step(
                rollout.old_velocity[:, i].to(dtype), times[:, i], latents, next_latents=next_latents,
                timestep_next=times[:, i + 1], noise_level=scheduler.noise_level, compute_log_prob=True,
                return_kwargs=["log_prob", "next_latents_mean"],
            )  # fmt: skip
            old.append((out.log_prob, out.next_latents_mean))
        log_probs, means = (torch.stack(values, 1) for values in zip(*old, strict=True))
        samples = replace(rollout, next_latents_mean=means).samples(dtype, log_probs)
        trainer = make_trainer(scheduler, "", per_device_batch_size=1, **args)
        trainer_class.optimize(trainer, samples)
    return trainer, samples


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("times", FACTORS)
@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("kind", ["Euler", "UniPC"])
@pytest.mark.parametrize("trainer_type", OBJECTIVES)
def test_loss_and_gradient_are_theirs(
    peer: Any, trainer_type: str, kind: str, dynamics: str, times: str, storage: torch.dtype
) -> None:
    compare_with_theirs(peer, kind, dynamics, trainer_type, times, storage)


@pytest.mark.parametrize("kl_type", ["x-based", "v-based"])
@pytest.mark.parametrize("dynamics", DYNAMICS)
@pytest.mark.parametrize("trainer_type", OBJECTIVES)
def test_kl_is_theirs(peer: Any, trainer_type: str, dynamics: str, kl_type: str) -> None:
    compare_with_theirs(peer, "Euler", dynamics, trainer_type, "mixed times", kl_beta=3.0, kl_type=kl_type)


def compare_with_theirs(
    peer: Any,
    kind: str,
    dynamics: str,
    trainer_type: str,
    times: str,
    storage: torch.dtype = torch.bfloat16,
    **args: Any,
) -> tuple[float, float]:
    """The largest relative errors of the losses and of the gradients of a step."""
    scheduler = peer_scheduler(kind, dynamics)
    timesteps = (scheduler.timesteps * FACTORS[times]).to(scheduler.timesteps.dtype)
    rollout = roll_out(drawn(scheduler), timesteps, storage)
    losses, gradients = ours(scheduler, rollout, OBJECTIVES[trainer_type], **args)
    trainer, samples = theirs(peer, scheduler, rollout, trainer_type, **args)
    expected = torch.stack(trainer.accelerator.losses).view(len(samples), -1).mean(0)
    expected_gradients = torch.stack([sample["velocity"].grad for sample in samples]) / len(samples)
    errors = [distance(gradients[:, i], expected_gradients[:, i]) for i in range(len(losses))]
    error = float((losses / expected - 1).abs().max())
    tolerance = TOLERANCE_OF_VELOCITY_KL if args.get("kl_type") == "v-based" else TOLERANCE
    # A mean is rounded relative to its size: the first step of UniPC's Flow-SDE at t = 999 has a std of 7.
    tolerance *= max(1.0, float(rollout.next_latents_mean.square().mean().sqrt()))
    assert error < tolerance
    assert max(errors) < tolerance
    return error, max(errors)


@pytest.mark.parametrize(
    ("trainer_type", "kl_beta"), [(name, kl_beta) for name in OBJECTIVES for kl_beta in (0.0, 0.1)]
)
def test_the_page_states_what_is_saved_for_backward(peer: Any, trainer_type: str, kl_beta: float) -> None:
    scheduler = peer_scheduler("Euler", "Flow-SDE")
    samples = roll_out(drawn(scheduler), scheduler.timesteps.expand(4, -1), shape=(4096, 64)).samples()
    trainer_class = {"grpo": peer.GRPOTrainer, "grpo-guard": peer.GRPOGuardTrainer}[trainer_type]
    cells = []
    for update in (trainer_class.optimize, flow_factory.optimize):
        size = max(saved_bytes(make_trainer(scheduler, OBJECTIVES[trainer_type], kl_beta=kl_beta), update, samples))
        cells.append("under 100 B" if size < 100 else f"{size / 2**20:.1f} MiB")
    assert f"| `{trainer_type}`{' with KL' if kl_beta else ''} | {cells[0]} | {cells[1]} |" in PAGE.read_text()


@pytest.mark.parametrize("trainer_type", OBJECTIVES)
def test_the_page_states_the_error_of_the_log_ratio(peer: Any, trainer_type: str) -> None:
    """Theirs and ours in float32 against theirs in float64, where log-ratios are about 5e-7."""
    scheduler = peer_scheduler("Euler", "Flow-SDE")
    rollout = roll_out(drawn(scheduler), scheduler.timesteps.expand(4, -1), moved=1e-3, shape=(4096, 64))
    exact, rounded = (
        torch.tensor([log["train/ratio_mean"] for log in trainer.logged], dtype=torch.float64).log()
        for trainer, _ in (
            theirs(peer, scheduler, rollout, trainer_type, dtype, accumulated=1)
            for dtype in (torch.float64, torch.float32)
        )
    )
    trainer = make_trainer(scheduler, OBJECTIVES[trainer_type], per_device_batch_size=1, accumulated=1)
    flow_factory.optimize(trainer, rollout.samples())
    found = torch.tensor([log["train/log_ratio_mean"] for log in trainer.logged], dtype=torch.float64)
    assert 1e-7 < exact.abs().mean() < 1e-6
    for error, stated in (((rounded - exact).abs().max(), 1e-7), ((found - exact).abs().max(), 1e-10)):
        assert f"{stated:g}".replace("e-07", "e-7") in PAGE.read_text()
        assert stated / 4 < error < 4 * stated


@pytest.mark.parametrize("trainer_type", OBJECTIVES)
def test_a_training_run_is_theirs(
    peer: Any, trainer_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their program on a tiny Flux, with our trainers and without."""
    from flow_factory.hparams import training_args
    from flow_factory.trainers import registry
    from helpers.flow_factory_run import configuration, train

    without = train(configuration(tmp_path, trainer_type))
    for module, table in ((registry, "_TRAINER_REGISTRY"), (training_args, "_TRAINING_ARGS_REGISTRY")):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    flow_factory.register()
    with_ours = train(configuration(tmp_path, trainer_type))
    assert type(with_ours.trainer).optimize is flow_factory.optimize
    assert len(with_ours.weights) == len(without.weights) == len(with_ours.logs) == 4
    # Autocast rounds the gradient of the model's output to bf16, which hides most differences and doubles a few.
    assert distance(with_ours.gradients[0], without.gradients[0]) < 1e-3
    moved = float((without.weights[-1] - without.weights[0]).norm())
    assert float((with_ours.weights[-1] - without.weights[-1]).norm()) < 0.01 * moved
    for got, want in zip(with_ours.logs, without.logs, strict=True):
        assert want.keys() <= got.keys()
    for name, value in without.logs[0].items():
        if not name.endswith("_std"):  # by subtraction, so that of ratios near 1 is noise
            assert float(with_ours.logs[0][name]) == pytest.approx(float(value), abs=1e-5), name


def test_the_command_of_the_page_trains(peer: Any, tmp_path: Path) -> None:
    """With the configuration of the page, too."""
    from helpers.flow_factory_run import configuration

    command, options = (block.code for block in blocks_of(PAGE)[:2])
    config = configuration(tmp_path, **yaml.safe_load(options)["train"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    paths = [str(Path(peer.__file__).parents[2]), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "train/log_ratio_mean" in done.stderr  # a name that only our trainers log
    assert "reweight: inverse_dt" in done.stderr
