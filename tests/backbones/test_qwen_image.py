"""What is particular to Qwen-Image, on its tiny pipeline: text of many lengths, a mask, a VAE of videos, real sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import QwenImageTransformer2DModel
from diffusers.models import attention_dispatch
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift, retrieve_timesteps
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastguard import cli
from fastguard.backbones import family_of
from fastguard.backbones.folder import pipeline_problems
from fastguard.backbones.pipeline import backbone as backbone_module
from fastguard.backbones.pipeline.backbone import MASKED_ATTENTION, PipelineBackbone
from fastguard.backbones.pipeline.encoding import encode_prompts
from fastguard.backbones.pipeline.skeleton import pipeline_configs
from fastguard.backbones.pipeline.spec import Grid
from fastguard.backbones.pipeline.tiny import make_tiny
from fastguard.backbones.qwen_image.spec import QwenImageSpec
from fastguard.config import Encoders, LoraConfig, ModelConfig, Recipe
from fastguard.memory.passes import PassSettings, decode_pass, encode_pass, weights_of
from fastguard.prompts import EncodedPrompts, Prompt
from fastguard.recipe import find_recipe, load_recipe
from fastguard.train.build import gather_prompts, load_backbone
from fastguard.train.rollout import ode_schedule, predict_velocity
from fastguard.utils.sharding import trained_parameters

CPU = torch.device("cpu")
TOKENS = 96
TEXTS = ["a cat", "ein Käse 奶酪, and " + "a very long list of things, " * 4, "two dogs\non a sofa", ""]
WEIGHTS = {
    "transformer": ("diffusion_pytorch_model.safetensors", "txt_in.weight"),
    "vae": ("diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
    "text_encoder": ("model.safetensors", "model.layers.1.mlp.up_proj.weight"),
}
"""A weight of each part."""


@pytest.fixture(scope="module")
def spec() -> Any:
    family: Any = family_of("qwen_image")
    return family.spec


@pytest.fixture(scope="module")
def folder(spec: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(spec, tmp_path_factory.mktemp("cache") / "tiny")


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    tiny = load_recipe(find_recipe("qwen_image_tiny"))
    return replace(
        tiny, model=replace(tiny.model, path=str(folder)), prompts=replace(tiny.prompts, cache=folder.parent)
    )


@pytest.fixture(scope="module")
def pipe(spec: Any, folder: Path) -> Any:
    pipe = spec.pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def encoded(spec: Any, folder: Path) -> EncodedPrompts:
    return encode_prompts(spec, [Prompt(t) for t in TEXTS], str(folder), TOKENS, folder.parent, torch.float32, CPU)


def load(recipe: Recipe, **model: Any) -> PipelineBackbone:
    torch.manual_seed(0)
    chosen = replace(recipe, model=replace(recipe.model, **model))
    backbone: Any = load_backbone(chosen, gather_prompts(chosen), Accelerator(cpu=True), "none")
    return backbone


# --- prompts


def test_the_templates_beginning_has_as_many_tokens_as_the_pipeline_drops(pipe: Any) -> None:
    beginning, _, end = pipe.prompt_template_encode.partition("{}")
    ids = pipe.tokenizer(beginning).input_ids
    assert len(ids) == pipe.prompt_template_encode_start_idx == 34
    assert pipe.tokenizer.decode(ids) == beginning
    assert (
        len(pipe.tokenizer(end).input_ids) == 5
    )  # as in the real one: a special token, a line, another, a word, a line


def test_prompts_are_encoded_as_the_pipeline_does_and_filled_up(encoded: EncodedPrompts, pipe: Any) -> None:
    """Each by itself, without padding."""
    ours = encoded.load(range(len(TEXTS)))
    assert ours["embeds"].shape == (len(TEXTS), TOKENS, 32)
    assert ours["mask"].dtype == torch.bool
    lengths = []
    for i, text in enumerate(TEXTS):
        theirs, mask = pipe.encode_prompt(text, max_sequence_length=TOKENS)
        length = theirs.shape[1]
        assert mask is None
        assert torch.allclose(ours["embeds"][i, :length], theirs[0], atol=1e-5)
        assert not ours["embeds"][i, length:].any()
        assert ours["mask"][i].tolist() == [True] * length + [False] * (TOKENS - length)
        lengths.append(length)
    assert len(set(lengths)) == len(TEXTS)
    assert max(lengths) == TOKENS  # one is cut


@pytest.mark.parametrize("encoders", ["device", "int8"])
def test_prompts_are_encoded_in_bfloat16_and_in_8_bits(
    spec: Any, folder: Path, encoded: EncodedPrompts, encoders: Encoders
) -> None:
    if encoders == "int8":
        pytest.importorskip("torchao", reason="torchao is not installed")
    prompts = [Prompt(text) for text in TEXTS]
    made = encode_prompts(spec, prompts, str(folder), TOKENS, folder.parent, torch.bfloat16, CPU, encoders)
    ours, exact = made.load(range(len(TEXTS))), encoded.load(range(len(TEXTS)))
    assert ours["embeds"].dtype == torch.bfloat16
    assert torch.equal(ours["mask"], exact["mask"])
    assert 0 < (ours["embeds"].float() - exact["embeds"]).norm() < 0.03 * exact["embeds"].norm()


def test_more_tokens_than_the_pipeline_takes_are_refused(spec: Any, folder: Path, tmp_path: Path) -> None:
    told = r"prompts\.max_tokens must be at most 1024 for Qwen-Image, got 1025"
    with pytest.raises(ValueError, match=told):
        encode_prompts(spec, [Prompt("x")], str(folder), 1025, tmp_path, torch.float32, CPU)
    with pytest.raises(ValueError, match=told):
        spec.text_shapes(pipeline_configs(spec, "tiny"), Grid(1, 1, 8, 8), 1025)


# --- the velocity


@pytest.mark.parametrize("rows", [[0], [1], [2, 0], [3, 1, 0, 2]])
def test_what_is_filled_up_changes_no_velocity(spec: Any, pipe: Any, encoded: EncodedPrompts, rows: list[int]) -> None:
    """As the pipeline calls it: embeddings without padding, or filled up to the longest of the batch."""
    grid = Grid(6, 10, 48, 80)
    latents = torch.randn(len(rows), grid.tokens, 16, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.3, 0.9, len(rows))
    theirs, mask = pipe.encode_prompt([TEXTS[i] for i in rows], max_sequence_length=TOKENS)
    with torch.no_grad():
        ours = spec.velocity(pipe.transformer, latents, sigma, encoded.load(rows), 1.0, grid)
        expected = pipe.transformer(
            hidden_states=latents, encoder_hidden_states=theirs, encoder_hidden_states_mask=mask, timestep=sigma,
            img_shapes=[[(1, 6, 10)]] * len(rows), return_dict=False,
        )[0]  # fmt: skip
    assert (ours - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_guided_velocity_has_the_conditional_ones_length(spec: Any) -> None:
    conditional, unconditional = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    guided = spec.guide(conditional, unconditional, 4.0)
    combined = unconditional + 4.0 * (conditional - unconditional)
    assert torch.allclose(guided.norm(dim=-1), conditional.norm(dim=-1))
    assert torch.allclose(torch.cosine_similarity(guided, combined, dim=-1), torch.ones(3, 5))


@pytest.mark.parametrize("attention", ["flash", "_flash_3", "flash_varlen", "sage", "xformers", "_native_flash"])
def test_attention_without_a_mask_is_refused(attention: str) -> None:
    told = f"model.attention = '{attention}': a QwenImageTransformer2DModel needs attention with a mask .*native"
    with pytest.raises(ValueError, match=told):
        family_of("qwen_image").check_attention(ModelConfig(kind="qwen_image", attention=attention))


@pytest.mark.parametrize("attention", ["native", "_native_math"])
def test_attention_with_a_mask_passes_over_padding(
    spec: Any, folder: Path, encoded: EncodedPrompts, attention: str
) -> None:
    transformer: Any = QwenImageTransformer2DModel.from_pretrained(folder / "transformer")
    backbone_module.set_attention(spec, transformer, attention)
    text = dict(encoded.load([0]))
    latents = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    velocities = []
    for filled in (0.0, 100.0):
        text["embeds"] = text["embeds"].masked_fill(~text["mask"][..., None], filled)
        with torch.no_grad():
            velocities.append(spec.velocity(transformer, latents, torch.tensor([0.5]), text, 1.0, Grid(4, 4, 32, 32)))
    transformer.set_attention_backend("native")  # diffusers keeps the choice for the process
    assert torch.equal(*velocities)


def test_the_listed_backends_are_diffusers() -> None:
    assert set(MASKED_ATTENTION) <= {backend.value for backend in attention_dispatch.AttentionBackendName}


def test_layers_that_nothing_reads_get_no_adapters(recipe: Recipe) -> None:
    backbone = load(recipe)
    backbone.load_prompts([0])
    velocity = predict_velocity(backbone.policy, torch.randn(1, *backbone.latent_shape), 0.5, torch.tensor([0]))
    velocity.square().mean().backward()
    trained = trained_parameters(backbone.policy)
    assert all(parameter.grad is not None for parameter in trained.values())
    last = "transformer.transformer_blocks.1."
    adapted = {name.removeprefix(last).split(".lora_")[0] for name in trained if name.startswith(last)}
    targets = set(family_of("qwen_image").lora_targets)
    assert targets - adapted == {"attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"}


def test_all_weights_that_are_read_are_trained_and_the_rest_is_exported(recipe: Recipe, tmp_path: Path) -> None:
    backbone = load(replace(recipe, lora=LoraConfig()), train="full")
    backbone.load_prompts([0])
    velocity = predict_velocity(backbone.policy, torch.randn(1, *backbone.latent_shape), 0.5, torch.tensor([0]))
    velocity.square().mean().backward()
    trained = trained_parameters(backbone.policy)
    assert all(parameter.grad is not None for parameter in trained.values())
    backbone.export(tmp_path / "out", {name: p.detach() + 1 for name, p in trained.items()})
    written = QwenImageTransformer2DModel.from_pretrained(tmp_path / "out").state_dict()
    before = backbone.policy.transformer.state_dict()
    assert written.keys() == before.keys()
    for name, tensor in written.items():
        moved = 1 if f"transformer.{name}" in trained else 0
        assert torch.equal(tensor, before[name] + moved), name


# --- the schedule


@pytest.mark.parametrize("steps", [2, 10, 50])
@pytest.mark.parametrize("grid", [Grid(8, 8, 64, 64), Grid(32, 32, 512, 512), Grid(83, 83, 1328, 1328)])
def test_the_schedule_is_the_pipelines_and_ends_at_its_last_time(spec: Any, pipe: Any, grid: Grid, steps: int) -> None:
    scheduler = pipe.scheduler
    mu = calculate_shift(grid.tokens, 256, 8192, 0.5, 0.9)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = torch.tensor(spec.sigmas(scheduler, grid, steps))
    assert torch.allclose(ours, scheduler.sigmas, atol=1e-6, rtol=0)
    assert ours[-2] == pytest.approx(0.02, abs=1e-6)


def test_a_single_step_has_no_schedule(recipe: Recipe) -> None:
    """Its first time is 1, and its last one 0.02."""
    with pytest.raises(ValueError, match=r"sampler\.shift = .auto. takes the model's own schedule"):
        ode_schedule(recipe.sampler, load(recipe).sigmas, 1)


# --- images


def decoded(recipe: Recipe, height: int, width: int, tiled: bool) -> Tensor:
    backbone = load(replace(recipe, sampler=replace(recipe.sampler, decode_tiled=tiled)), height=height, width=width)
    latents = torch.randn(2, *backbone.latent_shape, generator=torch.Generator().manual_seed(0))
    return backbone.decode(latents)


def test_tiles_change_nothing_up_to_their_size_and_little_above(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone_module, "TILE", 64)
    assert torch.equal(decoded(recipe, 64, 32, tiled=True), decoded(recipe, 64, 32, tiled=False))
    whole, tiled = decoded(recipe, 96, 80, tiled=False), decoded(recipe, 96, 80, tiled=True)
    difference = (whole.int() - tiled.int()).abs().float()
    assert tiled.shape == (2, 3, 96, 80)
    assert 0 < difference.mean() < 0.1 * whole.float().std()


# --- a folder with something missing


@pytest.fixture
def copied(spec: Any, tmp_path: Path) -> Path:
    return make_tiny(spec, tmp_path / "copy")


def _lacks(part: str) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        name, key = WEIGHTS[part]
        weights = load_file(folder / part / name)
        found = next(stored for stored in weights if stored.endswith(key))
        weights.pop(found)
        save_file(weights, folder / part / name, metadata={"format": "pt"})

    return broken


def _is_gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        *((_lacks(part), f"the weights in {{}}/{part} do not fit its config.json: 1 missing") for part in WEIGHTS),
        (_is_gone("tokenizer/tokenizer.json"), "there is no {}/tokenizer/vocab.json (nor tokenizer.json)"),
        (_is_gone("scheduler/scheduler_config.json"), "there is no {}/scheduler/scheduler_config.json"),
        (_is_gone("text_encoder/config.json"), "there is no {}/text_encoder/config.json"),
    ],
)
def test_what_is_missing_is_named(
    spec: Any, recipe: Recipe, copied: Path, breaks: Callable[[Path], None], words: str
) -> None:
    assert list(pipeline_problems(copied, spec.parts)) == []
    breaks(copied)
    found = list(spec.family.examine(replace(recipe, model=replace(recipe.model, path=str(copied)))))
    assert [finding.level for finding in found] == ["FAIL"]
    assert found[0].text.startswith(words.format(copied))


def test_the_doctor_names_what_is_missing(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _lacks("text_encoder")(copied)
    assert cli.main(["doctor", "qwen_image_tiny", "--model.path", str(copied)]) == 1
    said = capsys.readouterr().out
    assert said.count("FAIL") == 1
    assert f"FAIL  model: the weights in {copied}/text_encoder do not fit its config.json" in said


def test_sizes_that_nobody_means_are_named(spec: Any, copied: Path) -> None:
    file = copied / "text_encoder" / "config.json"
    settings = json.loads(file.read_text())
    settings["text_config"]["num_hidden_layers"] = 10**9
    file.write_text(json.dumps(settings))
    (problem,) = pipeline_problems(copied, spec.parts)
    assert "text_config.num_hidden_layers must be a whole number in [1, 128], got 1000000000" in problem


# --- the planner


FULL = ModelConfig(kind="qwen_image", path="Qwen/Qwen-Image", guidance=4.0)


def test_the_planner_knows_the_real_sizes(spec: Any) -> None:
    """Those of the models' cards: 20 billion parameters and 8.3 billion (7.6 of text, 0.7 of vision)."""
    weights = weights_of(FULL, LoraConfig(64, 128))
    frozen = weights.transformer.count - weights.trained.count
    assert frozen == 20_430_401_088
    unused = 64 * ((3072 + 3072) + 2 * (3072 + 12288))
    assert weights.trained.count == 60 * 64 * (8 * (3072 + 3072) + 4 * (3072 + 12288)) - unused
    assert weights.decoder / 2 == pytest.approx(127e6, rel=0.01)
    assert (weights.branches, weights.blocks, weights.latent_shape) == (2, {"double": 60}, (1024, 64))
    assert weights.text == (3584 + 1, 0)
    tiny = replace(FULL, path="tiny")
    one = replace(tiny, guidance_gradient="conditional"), replace(tiny, guidance=1.0)
    assert [weights_of(model, LoraConfig()).branches for model in (tiny, *one)] == [2, 1, 1]


def test_encoding_at_full_size() -> None:
    """Weights in bfloat16; hidden states and logits of all layers of 16 prompts take little beside them."""
    peaks = [encode_pass(FULL, 128, how).peak / 2**30 for how in ("device", "int8")]
    assert 15.4 < peaks[0] < 18
    assert 8 < peaks[1] < 11


def test_the_last_tiles_alone_have_the_peak_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "TILE", 64)
    model = ModelConfig(kind="qwen_image", path="tiny", dtype="float32", height=128, width=96, guidance=4.0)
    recipe = load_recipe(find_recipe("qwen_image_tiny"))
    settings = PassSettings(model, recipe.lora, recipe.objective, 64, 2, "none")
    fast = decode_pass(settings, 2, decode_tiled=True)
    with monkeypatch.context() as patched:
        patched.setattr(QwenImageSpec, "decode_last_tiles", lambda *_: None)
        decode_pass.cache_clear()
        whole = decode_pass(settings, 2, decode_tiled=True)
    assert fast.peak == pytest.approx(whole.peak, rel=0.02)
    assert fast.flops < whole.flops
    decode_pass.cache_clear()
    assert fast.peak < decode_pass(settings, 2).peak
