"""FLOPs of an epoch and of a run: the planner's against those of the trainer, and against a formula."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.tiny_pipelines import make_tiny_flux
from helpers.toys import MemoryRecorder, brightness, pool, with_
from torch.utils.flop_counter import FlopCounterMode

from fastguard.config import Recipe, advantages_config, objective_config
from fastguard.memory import hours, rollout_flops, run_flops, update_flops
from fastguard.recipe import find_recipe, load_recipe
from fastguard.train import collect, replay, trainer
from fastguard.train.build import gather_prompts, load_backbone
from fastguard.train.state import for_processes

aten: Any = torch.ops.aten


def of_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Scores and their product with the values."""
    return 2 * math.prod(query) * key[2] + 2 * math.prod(query[:3]) * math.prod(value[2:])


def of_its_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * of_attention(query, key, value)


ON_CPU = {
    aten._scaled_dot_product_flash_attention_for_cpu: of_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: of_its_backward,
    aten.addmm_: lambda _, a, b, **__: 2 * math.prod(a) * b[1],
}
"""What PyTorch's counter does not know."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A tiny Flux of two prompts, in rollout batches of 2 images with 2 of 3 steps trained, for one epoch."""
    cache = tmp_path_factory.mktemp("cache")
    prompts = cache / "prompts.txt"
    prompts.write_text("a light picture\na dark picture\n")
    return with_(
        load_recipe(find_recipe("flux_tiny")),
        run={"epochs": 1, "images_every": 0, "trackers": ()},
        model={"path": str(make_tiny_flux(cache / "tiny")), "height": 32, "width": 32, "recompute": "mlp"},
        prompts={"file": prompts, "cache": cache, "per_epoch": 2, "max_tokens": 16},
        sampler={"num_steps": 3, "sde_steps": 2, "group_size": 2, "batch_size": 2, "decode_batch": 1},
        update={"inner_epochs": 1, "minibatches": 2, "micro_batch": 4, "parity": 0.0},
        monitor={"every": 0},
    )


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=ON_CPU)


def counted(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What a run of the trainer does, by what it calls."""
    accelerator = Accelerator(cpu=True)
    backbone = load_backbone(recipe, gather_prompts(recipe), accelerator, recipe.model.recompute)
    found = dict.fromkeys(("rollout", "decode", "velocities", "update", "parity"), 0)

    def count(module: Any, name: str, part: str) -> None:
        function = getattr(module, name)

        def counting(*args: Any, **options: Any) -> Any:
            with counter() as flops:
                result = function(*args, **options)
            found[part] += flops.get_total_flops()
            return result

        monkeypatch.setattr(module, name, counting)

    for module, name, part in (
        (collect, "rollout", "rollout"), (collect, "noised_batch", "velocities"),
        (trainer, "add_reference", "velocities"), (replay, "log_ratios", "velocities"),
        (trainer, "update_weights", "update"), (trainer, "check_parity", "parity"), (backbone, "decode", "decode"),
    ):  # fmt: skip
        count(module, name, part)
    with pool(recipe, backbone, brightness) as rewards, counter() as everything:
        trainer.train(backbone, recipe, rewards, MemoryRecorder(), accelerator)
    monkeypatch.undo()
    elsewhere = everything.get_total_flops() - sum(found.values())
    assert 0 <= elsewhere < 1e-5 * everything.get_total_flops()  # weighted sums of rewards
    return found


CASES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "policy_gradient": (
        "grpo_guard",
        {"kl_weight": 0.1},
        # 4 transitions an update, in micro-batches of 3 and 1
        {"update": {"inner_epochs": 2, "micro_batch": 3, "parity": 0.5}},
    ),
    "trajectories": ("gmpo", {"kl_weight": 0.1}, {"model": {"train": "full"}, "update": {"inner_epochs": 2}}),
    "some_images": ("flow_grpo", {}, {"update": {"subsample": 0.5, "minibatches": 1, "micro_batch": 0}}),
    "final_latents": ("diffusion_nft", {"kl_weight": 0.1}, {"update": {"draws": 2, "inner_epochs": 2}}),
    "groups": ("dgpo", {}, {"update": {"draws": 2}}),
    "earlier_rollouts": ("rpg", {"window": 2}, {"run": {"epochs": 3}, "update": {"minibatches": 1, "micro_batch": 5}}),
    "earlier_images": ("op_grpo", {"window": 2, "replayed": 0.5}, {"run": {"epochs": 3}, "update": {"micro_batch": 3}}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_the_trainer_does(small: Recipe, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, options, sections = CASES[case]
    recipe = replace(with_(small, **sections), objective=objective_config(name, **options))
    planned, done = run_flops(recipe), counted(recipe, monkeypatch)
    epochs = recipe.run.epochs
    assert planned.epoch.rollout * epochs == done["rollout"]
    assert planned.epoch.decode * epochs == done["decode"]
    assert planned.parity == done["parity"]
    assert (done["parity"] > 0) == (recipe.update.parity > 0)
    if recipe.objective.rollouts == 1:
        assert planned.epoch.velocities == done["velocities"]
        assert planned.epoch.update == done["update"]
    else:  # the first epochs have fewer earlier rollouts
        assert planned.epoch.update * epochs > done["update"]
    assert planned.total == sum(done.values())


def test_images_after_each_step_are_decoded_too(small: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(small, advantages=advantages_config("vgpo"))
    assert run_flops(recipe).epoch.decode == 2 * run_flops(small).epoch.decode == counted(recipe, monkeypatch)["decode"]
    thousands = with_(small, sampler={"group_size": 500, "batch_size": 1000}, prompts={"per_epoch": 2})
    assert run_flops(thousands).epoch.decode == 250 * run_flops(small).epoch.decode  # most of them not run


def test_flops_of_an_epoch_are_those_of_its_calls_and_of_one_process(small: Recipe) -> None:
    recipe = with_(small, run={"epochs": 7}, update={"inner_epochs": 3, "parity": 0.5})
    found = run_flops(recipe)
    assert found.epoch.rollout == 3 * 2 * rollout_flops(recipe)  # steps, batches
    executed = with_(recipe, model={"recompute": "none"})
    assert run_flops(executed).epoch.update == 3 * 2 * update_flops(recipe)  # passes, minibatches of one micro-batch
    assert found.epoch.update > run_flops(executed).epoch.update  # which recomputes
    assert found.total == 7 * found.epoch.total + found.parity
    assert found.parity == 2 * rollout_flops(recipe)  # of 4 transitions; a rollout batch has 2
    shared = run_flops(for_processes(recipe, 2))
    assert 2 * shared.epoch.update == found.epoch.update
    assert 2 * shared.epoch.rollout == found.epoch.rollout


def test_what_a_recipe_leaves_open_is_said(small: Recipe) -> None:
    plain = set(run_flops(small).notes)
    assert any("evaluations of the monitor" in note for note in plain)
    stopping = set(run_flops(with_(small, update={"stop": "espo"})).notes) - plain
    assert stopping == {"as if update.stop = espo left out no update"}
    replaying = replace(small, objective=objective_config("op_grpo", window=2, replayed=0.5))
    assert set(run_flops(replaying).notes) - plain == {
        "as if every epoch but the first replayed 2 earlier images, the most"
    }


def test_hours_are_flops_at_a_share_of_the_peak() -> None:
    assert hours(3.6e18, tflops=1000.0, utilisation=0.5) == 2.0
    for share in (0.0, -0.1, 1.01, math.nan):
        with pytest.raises(ValueError, match=r"utilisation must lie in \(0, 1\]"):
            hours(1.0, 1.0, share)
