"""What every family of pipelines has to be, on its tiny random pipeline: diffusers' own in another form."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import move
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastguard.backbones import family_of
from fastguard.backbones.pipeline import PipelineFamily
from fastguard.backbones.pipeline.backbone import PipelineBackbone
from fastguard.commands.doctor import examine
from fastguard.config import Recipe, SamplerConfig
from fastguard.errors import UserError
from fastguard.memory import plan
from fastguard.recipe import find_recipe, load_recipe
from fastguard.train.build import gather_prompts, with_model
from fastguard.train.rollout import initial_latents, ode_schedule, predict_velocity, rollout
from fastguard.utils.sharding import trained_parameters

CPU = torch.device("cpu")
STEPS = 3
PROMPTS = [0, 5]


@dataclass(frozen=True)
class Case:
    """A family, and how its pipeline in diffusers is called as ours."""

    recipe: str
    call: Callable[[Recipe], dict[str, Any]]
    """arguments of the pipeline beside prompts, steps and sizes"""
    unpacked: Callable[[Tensor], Tensor] = lambda latents: latents
    """latents of the pipeline as it takes them, from ours"""


def _edited(recipe: Recipe) -> dict[str, Any]:
    prompts = gather_prompts(recipe).all
    size = recipe.model.width, recipe.model.height
    images = [Image.open(prompts[i].metadata["image"]).convert("RGB").resize(size, Image.LANCZOS) for i in PROMPTS]
    return {"guidance_scale": recipe.model.guidance, "image": images, "_auto_resize": False, "max_area": 64 * 64}


def _guided(recipe: Recipe) -> dict[str, Any]:
    return {"guidance_scale": recipe.model.guidance, "negative_prompt": [recipe.model.negative_prompt] * len(PROMPTS)}


def _truly_guided(recipe: Recipe) -> dict[str, Any]:
    called = _guided(recipe)
    return {"true_cfg_scale": called.pop("guidance_scale"), **called}


CASES = {
    "flux": Case("flux_tiny", lambda recipe: {"guidance_scale": recipe.model.guidance}),
    "kontext": Case("kontext_tiny", _edited),
    "qwen_image": Case("qwen_image_tiny", _truly_guided),
    "sd3": Case("sd35_tiny", _guided),
}


GUIDED = ["qwen_image", "sd3"]
"""kinds with classifier-free guidance"""


@pytest.fixture(scope="module", params=CASES)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def recipe(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Of the tiny pipeline, which is made."""
    tiny = load_recipe(find_recipe(CASES[kind].recipe))
    return with_model(replace(tiny, prompts=replace(tiny.prompts, cache=tmp_path_factory.mktemp("cache"))))


@pytest.fixture(scope="module")
def pipe(recipe: Recipe) -> Any:
    """As plain diffusers loads it."""
    family: Any = family_of(recipe.model.kind)
    pipe = family.spec.pipeline.from_pretrained(recipe.model.path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(recipe: Recipe) -> Any:
    family = family_of(recipe.model.kind)
    assert isinstance(family, PipelineFamily)
    torch.manual_seed(0)
    encoded = family.encode(recipe, gather_prompts(recipe).all, CPU)
    return family.load(recipe, encoded, 1, CPU, "none")


@pytest.fixture
def backbone(recipe: Recipe) -> PipelineBackbone:
    return load(recipe)


def sampled(backbone: PipelineBackbone) -> Tensor:
    """Final latents of two prompts, without noise."""
    seeds = torch.tensor([[7] + STEPS * [0], [8] + STEPS * [0]])
    backbone.load_prompts(PROMPTS)
    schedule = ode_schedule(SamplerConfig(), backbone.sigmas, STEPS)
    return rollout(backbone.policy, torch.tensor(PROMPTS), seeds, backbone.latent_shape, schedule).latents


def sampled_by(pipe: Any, backbone: PipelineBackbone, recipe: Recipe, output: str) -> Tensor:
    """The same by diffusers: latents, or images in [0, 255]."""
    case, model = CASES[recipe.model.kind], recipe.model
    latents = initial_latents(torch.tensor([7, 8]), backbone.latent_shape, CPU)
    return pipe(
        prompt=[backbone.prompts[i].text for i in PROMPTS],
        height=model.height, width=model.width, num_inference_steps=STEPS,
        max_sequence_length=recipe.prompts.max_tokens,
        latents=case.unpacked(latents), output_type=output,
        **case.call(recipe),
    ).images  # fmt: skip


def test_a_folder_of_another_family_is_refused_with_its_kind(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = recipe.model.kind
    other: Any = "sd3" if kind != "sd3" else "flux"
    wrong = replace(recipe, model=replace(recipe.model, kind=other, recompute="none"))
    message = f'holds a .*, and this model.kind takes a .*: set model.kind = "{kind}"'
    for ask in (lambda: load(wrong), lambda: plan(wrong)):
        with pytest.raises(UserError, match=message):
            ask()
    assert examine(wrong) == 1
    assert re.search(message, capsys.readouterr().out)


def test_an_unknown_pipeline_is_refused_and_a_missing_index_is_named(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "copied"
    shutil.copytree(recipe.model.path, folder)
    copied = replace(recipe, model=replace(recipe.model, path=str(folder)))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "AnEditPipeline"}))
    with pytest.raises(UserError, match="holds a AnEditPipeline, .*: no model.kind takes it, choose another model"):
        load(copied)
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"there is no .*model_index\.json"):
        load(copied)


def test_all_weights_load_in_plain_diffusers_with_the_models_own_tables(recipe: Recipe, tmp_path: Path) -> None:
    """Positions of Stable Diffusion 3 are a buffer, whose values the file has."""
    folder = tmp_path / "copied"
    shutil.copytree(recipe.model.path, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = load_file(file)
    save_file({n: t * 0.5 if n == "pos_embed.pos_embed" else t for n, t in content.items()}, file, {"format": "pt"})
    backbone = load(replace(recipe, model=replace(recipe.model, path=str(folder), train="full")))
    backbone.export(tmp_path / "diffusers", trained_parameters(backbone.policy))
    kind: Any = backbone._spec.parts.modules["transformer"][0]
    loaded, info = kind.from_pretrained(tmp_path / "diffusers", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        ours = sampled(backbone)
        backbone.policy.transformer = loaded
        assert (sampled(backbone) - ours).abs().max() < 1e-5 * ours.abs().max()


def test_sampling_is_the_pipelines(backbone: PipelineBackbone, pipe: Any, recipe: Recipe) -> None:
    latents = sampled(backbone)
    theirs = sampled_by(pipe, backbone, recipe, "latent").reshape(latents.shape)
    assert (latents - theirs).abs().max() < 2e-6 * theirs.abs().max()
    images = backbone.decode(latents)
    assert images.shape == (2, 3, recipe.model.height, recipe.model.width)
    assert (images - sampled_by(pipe, backbone, recipe, "pt").mul(255)).abs().max() < 1.01  # rounding to 256 levels
    times = torch.tensor(backbone.sigmas(STEPS))
    assert torch.allclose(pipe.scheduler.sigmas, times, atol=1e-6, rtol=0)


def test_trained_adapters_load_in_plain_diffusers(
    backbone: PipelineBackbone, pipe: Any, recipe: Recipe, tmp_path: Path
) -> None:
    before = sampled(backbone)
    backbone.export(tmp_path / "diffusers", move(backbone))
    content = load_file(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in content.values()} == {torch.float32}
    pipe.load_lora_weights(tmp_path / "diffusers")
    try:
        loaded = sampled_by(pipe, backbone, recipe, "latent").reshape(before.shape)
    finally:
        pipe.unload_lora_weights()
    ours = sampled(backbone)
    assert (ours - before).abs().max() > 1e-3
    assert (loaded - ours).abs().max() < 1e-5 * ours.abs().max()


def test_adapters_off_is_the_model_before_training(backbone: PipelineBackbone) -> None:
    base = sampled(backbone)
    move(backbone)
    moved = sampled(backbone)
    with backbone.adapters_off():
        assert torch.equal(sampled(backbone), base)
    assert torch.equal(sampled(backbone), moved)


def velocity_and_gradients(backbone: PipelineBackbone) -> tuple[Tensor, dict[str, Tensor]]:
    backbone.load_prompts(PROMPTS)
    latents = initial_latents(torch.tensor([7, 8]), backbone.latent_shape, CPU)
    velocity = predict_velocity(backbone.policy, latents, 0.6, torch.tensor(PROMPTS))
    parameters = trained_parameters(backbone.policy)
    # Not from the velocity's norm: Qwen-Image's guidance leaves it as it is in the prompt's branch.
    upstream = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(velocity, list(parameters.values()), upstream, allow_unused=True)
    return velocity.detach(), {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize("kind", GUIDED, indirect=True)
def test_the_gradient_goes_through_both_branches_of_the_guidance_or_through_one(recipe: Recipe) -> None:
    """d v / d theta of `v_u + g (v_c - v_u)`: the part through v_c alone is g times its own."""
    both, one = (
        load(replace(recipe, model=replace(recipe.model, guidance_gradient=which))) for which in ("both", "conditional")
    )
    for backbone in (both, one):
        move(backbone)
    (velocity, whole), (again, part) = velocity_and_gradients(both), velocity_and_gradients(one)
    # Two calls, or one of both, whose sums have another order; guidance multiplies the rounding of their difference.
    assert (velocity - again).abs().max() < 1e-6 * recipe.model.guidance * velocity.abs().max()
    assert any((whole[name] - part[name]).abs().max() > 0.05 * whole[name].abs().max() for name in whole)

    spec = both._spec
    guide = spec.guide
    spec.guide = lambda conditional, unconditional, scale: guide(conditional, unconditional.detach(), scale)
    _, expected = velocity_and_gradients(both)
    for name, gradient in expected.items():
        assert torch.allclose(gradient, part[name], rtol=1e-4, atol=1e-6 * float(gradient.abs().max())), name


def test_without_guidance_there_is_one_branch(recipe: Recipe) -> None:
    calls: list[int] = []
    for guidance in (1.0, 2.0):
        backbone = load(replace(recipe, model=replace(recipe.model, guidance=guidance)))
        spec = backbone._spec

        def velocity(transformer: Any, latents: Tensor, *rest: Any, real: Any = spec.velocity) -> Tensor:
            calls.append(len(latents))
            return real(transformer, latents, *rest)

        spec.velocity = velocity
        with torch.no_grad():
            sampled(backbone)
    assert set(calls[:STEPS]) == {2}
    assert set(calls[STEPS:]) == {4 if recipe.model.kind in GUIDED else 2}
