"""FLUX.2, dev and klein, as backbones, on tiny random pipelines: what its two pipelines do, is what is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from helpers.adapters import move
from helpers.tiny_pipelines import make_tiny_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastguard import cli
from fastguard.backbones import family_of
from fastguard.backbones.folder import pipeline_problems
from fastguard.backbones.pipeline import backbone as backbone_module
from fastguard.backbones.pipeline.backbone import PipelineBackbone, load_pipeline
from fastguard.backbones.pipeline.encoding import encode_prompts
from fastguard.backbones.pipeline.skeleton import pipeline_configs
from fastguard.blocks.linear import QuantizedLinear
from fastguard.config import Encoders, LoraConfig, ModelConfig, Recipe, Recompute, recompute_levels
from fastguard.memory import plan
from fastguard.prompts import EncodedPrompts, Prompt
from fastguard.recipe import find_recipe, load_recipe, unread_values
from fastguard.train.rollout import initial_latents, ode_schedule, predict_velocity, rollout
from fastguard.utils.rows import read_rows
from fastguard.utils.sharding import trained_parameters

CPU = torch.device("cpu")
TEXTS = ["a cat", "two dogs on a mat, très joli", "an [IMG] of " + 40 * "very " + "small mice"]
TOKENS = 128
STEPS = 4
GUIDANCE = 10.0
"""Much, for most tokens of these prompts are the same padding."""


@dataclass(frozen=True)
class Case:
    kind: str
    recipe: Recipe
    encoded: EncodedPrompts
    """of `TEXTS`, and of the negative prompt where there is guidance with one"""
    pipe: Any
    """diffusers' own"""

    @property
    def spec(self) -> Any:
        family: Any = family_of(self.kind)
        return family.spec

    @property
    def guided(self) -> bool:
        return self.kind == "flux2_klein"

    def load(self, recompute: Recompute = "none", decode_tiled: bool = False, **model: Any) -> PipelineBackbone:
        torch.manual_seed(0)
        sampler = replace(self.recipe.sampler, decode_tiled=decode_tiled)
        recipe = replace(self.recipe, model=replace(self.recipe.model, **model), sampler=sampler)
        return load_pipeline(self.spec, recipe, self.encoded, len(TEXTS), CPU, recompute)

    def pipeline_images(self, texts: list[str], seeds: list[int]) -> Tensor:
        tokens = initial_latents(torch.tensor(seeds), (64, 16), CPU)
        images = self.pipe(
            prompt=texts, height=64, width=64, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            max_sequence_length=TOKENS, latents=tokens.mT.unflatten(-1, (8, 8)), output_type="pt",
        ).images  # fmt: skip
        return images.mul(255)


def make_case(kind: str, folder: Path, cache: Path, pipeline: Any) -> Case:
    tiny = load_recipe(find_recipe("flux2_tiny"))
    model = replace(tiny.model, kind=kind, path=str(folder), guidance=GUIDANCE)  # type: ignore[arg-type]
    recipe = replace(
        tiny, model=model, prompts=replace(tiny.prompts, cache=cache, max_tokens=TOKENS), lora=LoraConfig(4, 8)
    )
    family: Any = family_of(kind)
    pipe = pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return Case(kind, recipe, family.encode(recipe, [Prompt(text) for text in TEXTS], CPU), pipe)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    cache = tmp_path_factory.mktemp("cache")
    kinds = {"flux2": Flux2Pipeline, "flux2_klein": Flux2KleinPipeline}
    return {
        kind: make_case(kind, make_tiny_pipeline(kind, cache / kind), cache, pipeline)
        for kind, pipeline in kinds.items()
    }


@pytest.fixture(params=["flux2", "flux2_klein"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


@pytest.fixture
def klein(cases: dict[str, Case]) -> Case:
    return cases["flux2_klein"]


@pytest.fixture
def backbone(case: Case) -> PipelineBackbone:
    return case.load()


# --- prompts


def test_prompts_are_encoded_as_the_pipeline_does(case: Case) -> None:
    expected, _ = case.pipe.encode_prompt([*TEXTS, ""], max_sequence_length=TOKENS)
    assert [prompt.text for prompt in case.encoded.prompts] == [*TEXTS, ""][: 3 + case.guided]
    embeds = case.encoded.load(range(3 + case.guided))["embeds"]
    assert embeds.shape[1:] == (TOKENS, 96)
    assert torch.allclose(embeds, expected[: len(embeds)], atol=1e-5)
    assert (embeds[0] - embeds[1]).abs().max() > 1e-3


@pytest.mark.parametrize("encoders", ["cpu", "int8"])
def test_prompts_are_encoded_on_the_host_and_in_8_bits(case: Case, tmp_path: Path, encoders: Encoders) -> None:
    if encoders == "int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    path, prompts = case.recipe.model.path, [Prompt(TEXTS[0])]
    encoded = encode_prompts(case.spec, prompts, path, TOKENS, tmp_path, torch.float32, CPU, encoders)
    ours, exact = encoded.load([0])["embeds"], case.encoded.load([0])["embeds"]
    distance = (ours - exact).norm() / exact.norm()
    assert distance < 1e-6 if encoders == "cpu" else 1e-4 < distance < 0.05  # of 28 layers or more


# --- sampling


def test_deterministic_sampling_is_the_pipelines(case: Case, backbone: PipelineBackbone) -> None:
    """Dev with its guidance as an input, klein with classifier-free guidance."""
    calls: list[tuple[dict[str, Any], Tensor]] = []
    hook = case.pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: calls.append((kwargs, out[0])), with_kwargs=True
    )
    expected = case.pipeline_images([TEXTS[0], TEXTS[2]], [7, 8])
    hook.remove()

    backbone.load_prompts([0, 2])
    schedule = ode_schedule(case.recipe.sampler, backbone.sigmas, STEPS)
    assert torch.allclose(case.pipe.scheduler.sigmas, torch.tensor(schedule.sigmas), rtol=0, atol=1e-6)
    with torch.no_grad():
        passes = 1 + case.guided
        for i in range(STEPS):
            told, velocity = calls[i * passes]
            if case.guided:
                negative = calls[i * passes + 1][1]
                velocity = negative + GUIDANCE * (velocity - negative)
            latents, sigma = told["hidden_states"], float(told["timestep"][0])
            ours = predict_velocity(backbone.policy, latents, sigma, torch.tensor([0, 2]))
            rounding = 1e-6 * (GUIDANCE if case.guided else 1)  # of both branches, which are one batch here
            assert (ours - velocity).abs().max() < rounding * velocity.abs().max().clamp(min=1)
        seeds = torch.tensor([[7, 0, 0, 0, 0], [8, 0, 0, 0, 0]])
        latents = rollout(backbone.policy, torch.tensor([0, 2]), seeds, backbone.latent_shape, schedule).latents
    images = backbone.decode(latents)
    assert images.shape == (2, 3, 64, 64)
    assert (images - expected).abs().max() < 1.01  # rounding to 256 levels
    assert expected.std() > 10


def test_guidance_has_an_effect(case: Case, backbone: PipelineBackbone) -> None:
    other = case.load(guidance=1.5)
    latents = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    velocities = []
    for one in (backbone, other):
        one.load_prompts([1])
        with torch.no_grad():
            velocities.append(predict_velocity(one.policy, latents, 0.7, torch.tensor([1])))
    assert (velocities[0] - velocities[1]).abs().max() > 1e-4


def test_positions_are_the_pipelines_in_every_dtype(case: Case) -> None:
    """512 text tokens, which bfloat16 cannot count."""
    told: dict[str, Any] = {}

    def transformer(**kwargs: Any) -> tuple[Tensor]:
        told.update(kwargs)
        return (kwargs["hidden_states"],)

    transformer.config = case.pipe.transformer.config  # type: ignore[attr-defined]
    configs = {"vae": case.pipe.vae.config}
    grid = case.spec.grid(configs, ModelConfig(height=64, width=96))
    embeds = torch.zeros(2, 512, 96, dtype=torch.bfloat16)
    latents, sigma = torch.zeros(2, 96, 16, dtype=torch.bfloat16), torch.ones(2)
    case.spec.velocity(transformer, latents, sigma, {"embeds": embeds}, 4.0, case.spec.positions(grid))
    assert torch.equal(told["txt_ids"].float(), case.pipe._prepare_text_ids(embeds)[0].float())
    expected = case.pipe._prepare_latent_ids(torch.zeros(2, 16, 8, 12))[0]
    assert torch.equal(told["img_ids"].float(), expected.float())
    assert (told["guidance"] is None) == case.guided


def test_a_distilled_klein_has_no_guidance(klein: Case, tmp_path: Path) -> None:
    folder = shutil.copytree(klein.recipe.model.path, tmp_path / "distilled")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    distilled = make_case("flux2_klein", folder, tmp_path / "cache", Flux2KleinPipeline)
    assert [prompt.text for prompt in distilled.encoded.prompts] == TEXTS  # and no negative prompt
    one = distilled.load()
    assert not one.policy.guided
    one.load_prompts([0])
    schedule = ode_schedule(distilled.recipe.sampler, one.sigmas, STEPS)
    latents = rollout(one.policy, torch.tensor([0]), torch.tensor([[7] + [0] * 4]), one.latent_shape, schedule).latents
    told = [finding.text for finding in distilled.spec.family.examine(distilled.recipe)]
    assert told[1:] == [
        f"this model is distilled, and does not read model.guidance = {distilled.recipe.model.guidance:g}"
    ]
    assert len(list(klein.spec.family.examine(klein.recipe))) == 1
    expected = distilled.pipeline_images([TEXTS[0]], [7])
    assert (one.decode(latents) - expected).abs().max() < 1.01
    assert (expected - klein.pipeline_images([TEXTS[0]], [7])).abs().max() > 3


def test_the_models_on_the_hub_are_guided_as_they_are() -> None:
    for kind, guided in (("flux2", ()), ("flux2_klein", ("base-4B", "base-9B"))):
        family: Any = family_of(kind)
        for name in family.spec.known:
            configs = pipeline_configs(family.spec, name)
            assert family.spec.guided(configs, ModelConfig(guidance=4.0)) == name.endswith(guided or "none")
            assert not family.spec.guided(configs, ModelConfig(guidance=1.0))


def test_dev_reads_no_negative_prompt(cases: dict[str, Case]) -> None:
    found = {}
    for kind, one in cases.items():
        recipe = replace(one.recipe, model=replace(one.recipe.model, negative_prompt="ugly"))
        found[kind] = sorted(unread_values(recipe))
    assert found == {"flux2": ["model.negative_prompt"], "flux2_klein": []}


def test_tiles_change_little(klein: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "TILE", 128)
    whole, tiled = (klein.load(height=192, width=192, decode_tiled=tiled) for tiled in (False, True))
    seen: list[tuple[int, ...]] = []
    tiled._vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    latents = torch.randn(1, *whole.latent_shape, generator=torch.Generator().manual_seed(0))
    difference = (whole.decode(latents).int() - tiled.decode(latents).int()).abs().float()
    assert seen == [(32, 32), (32, 24), (24, 32), (24, 24)]  # 128 pixels, and what is left from the 96th on
    assert 0 < difference.mean() < 0.1 * whole.decode(latents).float().std()  # each tile is normalized by itself


# --- adapters


def images_of(case: Case, backbone: PipelineBackbone) -> Tensor:
    backbone.load_prompts([0])
    schedule = ode_schedule(case.recipe.sampler, backbone.sigmas, STEPS)
    seeds = torch.tensor([[7, 0, 0, 0, 0]])
    return backbone.decode(
        rollout(backbone.policy, torch.tensor([0]), seeds, backbone.latent_shape, schedule).latents
    ).float()


def test_trained_adapters_load_in_plain_diffusers_and_switch_off(
    case: Case, backbone: PipelineBackbone, tmp_path: Path
) -> None:
    before = images_of(case, backbone)
    moved = move(backbone)
    layers = {name.split(".lora_")[0].removeprefix("transformer.") for name in moved}
    assert len(layers) == 12 + 2 * 2  # of one double block, and of two single ones
    assert {"single_transformer_blocks.1.attn.to_out", "transformer_blocks.0.attn.to_out.0"} <= layers
    after = images_of(case, backbone)
    assert (after - before).abs().max() > 5
    with backbone.adapters_off():
        assert torch.equal(images_of(case, backbone), before)

    backbone.export(tmp_path, moved)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(file, "pt") as content:
        assert "lora_adapter_metadata" in content.metadata()
    for with_header in (True, False):  # of which other tools know nothing
        if not with_header:
            save_file(load_file(file), file)
        case.pipe.load_lora_weights(tmp_path)
        assert (case.pipeline_images([TEXTS[0]], [7]) - after).abs().max() < 1.01
        case.pipe.unload_lora_weights()
    assert (case.pipeline_images([TEXTS[0]], [7]) - before).abs().max() < 1.01


def test_every_level_of_recompute_has_the_same_gradients(case: Case) -> None:
    gradients: dict[str, dict[str, Tensor]] = {}
    for level in recompute_levels(fuse=False):
        one = case.load(level, fuse=False)
        move(one)
        one.load_prompts([0, 1])
        latents = torch.randn(2, *one.latent_shape, generator=torch.Generator().manual_seed(0))
        predict_velocity(one.policy, latents, 0.5, torch.tensor([0, 1])).square().mean().backward()
        gradients[level] = {name: p.grad for name, p in trained_parameters(one.policy).items() if p.grad is not None}
    for name, gradient in gradients["none"].items():
        assert gradient.abs().max() > 0
        for other in gradients.values():
            assert torch.allclose(gradient, other[name], rtol=1e-5, atol=1e-8), name


# --- the doctor


def change(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    how(values)
    file.write_text(json.dumps(values))


def lacks_a_weight(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in sorted(weights) if "layers.3.mlp" in name))
    save_file(weights, file, metadata={"format": "pt"})


def has_a_wide_text_encoder(folder: Path) -> None:
    change(
        folder / "text_encoder" / "config.json",
        lambda settings: settings.get("text_config", settings).update(hidden_size=10**9),
    )


BREAKAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a weight": (lacks_a_weight, "text_encoder do not fit its config.json: 1 missing"),
    "a size": (has_a_wide_text_encoder, "hidden_size must be a whole number in [1, 65536], got 1000000000"),
    "the tokens": (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "tokenizer"),
    "the template": (lambda folder: (folder / "tokenizer" / "chat_template.jinja").unlink(), "no chat_template"),
    "the statistics": (
        lambda folder: change(folder / "vae" / "config.json", lambda vae: vae.update(latent_channels=8)),
        "vae do not fit its config.json",
    ),
    "the transformer": (lambda folder: shutil.rmtree(folder / "transformer"), "there is no"),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_the_doctor_finds_what_is_missing(what: str, case: Case, tmp_path: Path) -> None:
    breaks, words = BREAKAGES[what]
    folder = shutil.copytree(case.recipe.model.path, tmp_path / "folder")
    assert list(pipeline_problems(folder, case.spec.parts)) == []
    breaks(folder)
    found = list(pipeline_problems(folder, case.spec.parts))
    assert len(found) == 1
    assert words.replace("no chat_template", f"{folder / 'tokenizer' / 'chat_template.jinja'}") in found[0]


def test_tokenizers_of_language_models_pass(cases: dict[str, Case], tmp_path: Path) -> None:
    """As the published ones are: longer than the encoder's positions, and with tokens that no merge makes."""
    for kind, one in cases.items():
        folder = shutil.copytree(one.recipe.model.path, tmp_path / kind)
        change(folder / "tokenizer" / "tokenizer_config.json", lambda settings: settings.update(model_max_length=10**6))
        change(folder / "tokenizer" / "tokenizer.json", spare_tokens)
        change(
            folder / "text_encoder" / "config.json",
            lambda settings: settings.get("text_config", settings).update(vocab_size=10**4),
        )
        problems = list(pipeline_problems(folder, one.spec.parts))
        assert all("of another shape" in problem for problem in problems)  # the vocabulary is larger now
        assert len(problems) == 1


def spare_tokens(tokenizer: dict[str, Any]) -> None:
    last = max(tokenizer["model"]["vocab"].values(), default=0) + 100
    token = {
        "id": last, "content": "<SPECIAL_20>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False,
    }  # fmt: skip
    tokenizer["model"]["vocab"]["<SPECIAL_20>"] = last
    tokenizer["added_tokens"].append(token)


# --- the planner


@pytest.mark.parametrize(
    ("kind", "name", "transformer", "encoder"),
    [
        ("flux2", "FLUX.2-dev", 32.2, 24.0),
        ("flux2_klein", "FLUX.2-klein-base-4B", 3.88, 4.02),
        ("flux2_klein", "FLUX.2-klein-9B", 9.08, 8.19),
    ],
)
def test_models_at_full_size_have_their_published_numbers_of_weights(
    kind: str, name: str, transformer: float, encoder: float
) -> None:
    """In billions."""
    model = ModelConfig(kind=kind, path=f"black-forest-labs/{name}", fuse=False)  # type: ignore[arg-type]
    family = family_of(kind)
    skeleton = family.skeleton(model, LoraConfig(rank=1), "none")
    frozen = sum(p.numel() for p in skeleton.transformer.parameters() if not p.requires_grad)
    (text,) = family.text_encoders(model, 512, "device")
    assert frozen / 1e9 == pytest.approx(transformer, rel=3e-3)
    assert sum(p.numel() for p in text.module.parameters()) / 1e9 == pytest.approx(encoder, rel=3e-3)
    assert sum(p.numel() for p in skeleton.decoder.parameters()) / 1e6 == pytest.approx(84.0, rel=1e-3)
    assert (skeleton.latent_shape, skeleton.tokens) == ((1024, 128), 1024)
    assert skeleton.branches == (2 if "base" in name else 1)


def test_a_recipe_is_planned() -> None:
    recipe = load_recipe(find_recipe("flux2_tiny"))
    planned = plan(recipe)
    assert planned.fits
    assert planned.phase("update").activations > planned.phase("rollout").activations > 0
    unguided = plan(replace(recipe, model=replace(recipe.model, guidance=1.0)))
    assert planned.phase("update").activations > 1.5 * unguided.phase("update").activations  # two branches


# --- training


@pytest.mark.slow  # tests/commands/test_models.py trains the recipe
@pytest.mark.parametrize("how", ["none", "int8"])
def test_the_recipe_trains_and_resumes(how: str, cases: dict[str, Case], tmp_path: Path) -> None:
    """A resume changes no bit; frozen weights may have 8 bits."""
    if how == "int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    kind = "flux2_klein" if how == "none" else "flux2"
    options = (
        "--model.kind", kind, "--model.path", cases[kind].recipe.model.path, "--model.quantize", how,
        "--prompts.cache", str(tmp_path / "cache"), "--prompts.per-epoch", "1", "--prompts.max-tokens", "48",
        "--sampler.group-size", "4", "--sampler.batch-size", "4", "--sampler.num-steps", "3", "--sampler.sde-steps",
        "2", "--update.micro-batch", "4", "--update.inner-epochs", "1", "--monitor.every", "0", "--run.trackers",
    )  # fmt: skip
    for name, epochs, resume in (("whole", 2, "never"), ("halves", 1, "never"), ("halves", 2, "auto")):
        arguments = ["--run.dir", str(tmp_path / name), "--run.epochs", str(epochs), "--resume", resume]
        assert cli.main(["train", "flux2_tiny", *arguments, *options]) == 0
    whole, halves = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("whole", "halves"))
    assert [row["updates"][0]["ratio"]["std"] for row in whole] == [0, 0]  # the rollout's own policy
    assert all(row["updates"][1]["ratio"]["std"] > 0 for row in whole)
    assert [row["reward_mean"] for row in whole] == [row["reward_mean"] for row in halves]
    files = [
        tmp_path / name / "checkpoints" / "epoch_000002" / "diffusers" / "pytorch_lora_weights.safetensors"
        for name in ("whole", "halves")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_quantized_weights_are_frozen_and_give_gradients(case: Case, how: str) -> None:
    pytest.importorskip({"int8": "torchao", "nf4": "bitsandbytes"}[how], reason="it makes the codes")
    exact, one = case.load(), case.load(quantize=how)
    assert sum(isinstance(module, QuantizedLinear) for module in one.policy.modules()) == 12 + 2 * 2
    velocities = []
    for each in (exact, one):
        move(each)
        each.load_prompts([0])
        latents = torch.randn(1, *each.latent_shape, generator=torch.Generator().manual_seed(0))
        velocities.append(predict_velocity(each.policy, latents, 0.5, torch.tensor([0])))
    distance = (velocities[1] - velocities[0]).norm() / velocities[0].norm()
    assert 1e-4 < distance < {"int8": 0.02, "nf4": 0.2}[how]
    velocities[1].square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained_parameters(one.policy).values())
