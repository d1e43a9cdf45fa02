"""A pipeline's folder with something missing, damaged or not finite is refused by name before anything is cached."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from fastguard import cli
from fastguard.backbones.flux.spec import PARTS
from fastguard.backbones.folder import pipeline_problems
from fastguard.backbones.pipeline.tiny import bytes_vocabulary
from fastguard.commands import doctor
from fastguard.config import Recipe
from fastguard.recipe import find_recipe, load_recipe
from fastguard.train.build import gather_prompts, load_backbone
from fastguard.utils.finite import not_finite

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "text_encoder_2": "text_encoder_2/model.safetensors",
}
KEYS = {
    "transformer": "context_embedder.weight",
    "vae": "decoder.conv_in.weight",
    "text_encoder": "encoder.layers.1.mlp.fc1.weight",
    "text_encoder_2": "encoder.block.0.layer.0.SelfAttention.q.weight",
}
"""A weight of each part."""


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Recipe:
    tiny = load_recipe(find_recipe("flux_tiny"))
    model = replace(tiny.model, path=str(folder), fuse=False)
    return replace(tiny, model=model, prompts=replace(tiny.prompts, cache=tmp_path / "cache"))


def load(recipe: Recipe) -> Any:
    return load_backbone(recipe, gather_prompts(recipe), Accelerator(cpu=True), "none")


def change(file: Path, how: Callable[[dict[str, Any]], Any]) -> None:
    """Change a file of weights, or a JSON file, in place."""
    if file.suffix == ".json":
        values = json.loads(file.read_text())
        how(values)
        file.write_text(json.dumps(values))
    else:
        weights = load_file(file)
        how(weights)
        save_file(weights, file, metadata={"format": "pt"})


def lacks(part: str) -> Callable[[Path], None]:
    return lambda folder: change(folder / WEIGHTS[part], lambda weights: weights.pop(KEYS[part]))


def knows_another(part: str) -> Callable[[Path], None]:
    return lambda folder: change(folder / WEIGHTS[part], lambda weights: weights.update(extra=torch.ones(2)))


def has_another_shape(part: str) -> Callable[[Path], None]:
    return lambda folder: change(folder / WEIGHTS[part], lambda weights: weights.update({KEYS[part]: torch.ones(2, 3)}))


def holds(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def is_cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100]) and None


def is_gone(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def is_set(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / name, lambda settings: settings.update(values))


def old_clip(folder: Path, merges: str = "#version: 0.2\np h\nph o\n") -> None:
    """The tokenizer as Flux.1-dev has it: vocab.json and merges.txt."""
    letters = bytes_vocabulary()
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "ph", "pho", "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "tokenizer" / "merges.txt").write_text(merges)
    resize_clip(folder, len(vocabulary))


def resize_clip(folder: Path, size: int) -> None:
    is_set("text_encoder/config.json", vocab_size=size)(folder)
    embedding = {"embeddings.token_embedding.weight": torch.ones(size, 32)}
    change(folder / WEIGHTS["text_encoder"], lambda weights: weights.update(embedding))


def old_clip_without(name: str) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        old_clip(folder)
        (folder / "tokenizer" / name).unlink()

    return broken


def without_vocabulary(part: str, empty: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / part / "tokenizer.json", lambda whole: whole["model"].update(vocab=empty))


def sharded(folder: Path) -> Path:
    """Write the transformer in shards; returns its index."""
    FluxTransformer2DModel.from_pretrained(folder / "transformer").save_pretrained(
        folder / "transformer", max_shard_size="400KB"
    )
    (folder / WEIGHTS["transformer"]).unlink(missing_ok=True)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    assert len(set(json.loads(index.read_text())["weight_map"].values())) > 2
    return index


def shard_of(index: Path, key: str) -> Path:
    return index.parent / json.loads(index.read_text())["weight_map"][key]


def shard_lacks(folder: Path) -> None:
    shard = shard_of(sharded(folder), KEYS["transformer"])
    change(shard, lambda weights: weights.pop(KEYS["transformer"]))


def shard_is_gone(folder: Path) -> None:
    shard_of(sharded(folder), KEYS["transformer"]).unlink()


def embeds_fewer(folder: Path) -> None:
    resize_clip(folder, 200)


SETTINGS_FILES = [str(Path(part) / name) for part, name in PARTS.settings.items()]
BREAKAGES: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    **{f"{p} lacks a weight": (lacks(p), (f"{p} ", f"1 missing ({KEYS[p]})")) for p in KEYS},
    **{f"{p} has one too many": (knows_another(p), (f"{p} ", "1 unexpected (extra)")) for p in KEYS},
    **{
        f"{p} has another shape": (
            has_another_shape(p),
            (f"{p} ", f"1 of another shape ({KEYS[p]} (2, 3) instead of ("),
        )
        for p in KEYS
    },
    **{f"{p} is a pointer": (holds(f, LFS), (f, "git lfs pull")) for p, f in WEIGHTS.items()},
    **{f"{p} is cut": (is_cut(f), (f, "cut short or damaged")) for p, f in WEIGHTS.items()},
    **{f"{p} has no weights": (is_gone(f), ("no weights (*.safetensors) in", f"{p}:")) for p, f in WEIGHTS.items()},
    **{f"no {f}": (is_gone(f), ("there is no", f)) for f in SETTINGS_FILES},
    **{f"{f} is a pointer": (holds(f, LFS), (f, "git lfs pull")) for f in SETTINGS_FILES},
    "JSON that is cut": (is_cut("model_index.json"), ("model_index.json is cut short or no JSON", "column")),
    "settings that are cut": (is_cut("vae/config.json"), ("vae/config.json is cut short or no JSON", "column")),
    "no schedule": (holds("scheduler/scheduler_config.json", "{}"), ("scheduler_config.json is empty",)),
    "no lengths": (holds("tokenizer/tokenizer_config.json", "{}"), ("tokenizer/tokenizer_config.json is empty",)),
    "a list of settings": (holds("vae/config.json", "[]"), ("vae/config.json holds a JSON list",)),
    "a class too few": (is_set("model_index.json", vae=[None, None]), ("model_index.json names no class for vae",)),
    "fewer layers": (is_set("text_encoder_2/config.json", num_layers=1), ("unexpected (encoder.block.1",)),
    "no shard": (shard_is_gone, ("there is no", "of-")),
    "a shard lacks a weight": (shard_lacks, (f"safetensors.index.json lists: 1 missing ({KEYS['transformer']})",)),
    "no CLIP tokens": (is_gone("tokenizer/tokenizer.json"), ("tokenizer/vocab.json (nor tokenizer.json)",)),
    "no T5 tokens": (is_gone("tokenizer_2/tokenizer.json"), ("tokenizer_2/spiece.model (nor tokenizer.json)",)),
    "a tokenizer's pointer": (holds("tokenizer/tokenizer.json", LFS), ("tokenizer/tokenizer.json", "git lfs pull")),
    "few CLIP tokens": (without_vocabulary("tokenizer", {"<|endoftext|>": 257}), ("tokenizer ", "26 letters apart")),
    "few T5 tokens": (without_vocabulary("tokenizer_2", [["<unk>", 0.0]] * 3), ("tokenizer_2 ", "26 letters apart")),
    "no merges.txt": (old_clip_without("merges.txt"), ("tokenizer/merges.txt",)),
    "no vocab.json": (old_clip_without("vocab.json"), ("tokenizer/vocab.json",)),
    "merges are a pointer": (lambda folder: old_clip(folder, LFS), ("tokenizer/merges.txt", "git lfs pull")),
    "no merges": (
        lambda folder: old_clip(folder, ""),
        ("tokenizer lacks merges for tokens of its vocabulary (ph, pho)",),
    ),
    "too few merges": (
        lambda folder: old_clip(folder, "#version: 0.2\np h\n"),
        ("tokenizer lacks merges for tokens of its vocabulary (pho)",),
    ),
    "another tokenizer": (embeds_fewer, ("tokenizer knows 258 tokens, but text_encoder embeds 200",)),
}


@pytest.mark.parametrize("what", BREAKAGES)
def test_a_broken_folder_is_refused_by_name_before_anything_is_cached(what: str, folder: Path, recipe: Recipe) -> None:
    breaks, words = BREAKAGES[what]
    breaks(folder)
    found = list(doctor._model(recipe))
    assert [finding.level for finding in found] == ["FAIL"]  # one fault, one finding
    assert str(folder) in found[0].text
    assert all(word in found[0].text for word in words), found[0].text
    assert "\n" not in found[0].text
    with pytest.raises(ValueError, match=re.escape(f"model.path: {found[0].text}")):
        load(recipe)
    assert not (recipe.prompts.cache or folder).exists()


def test_several_faults_are_counted(folder: Path, recipe: Recipe) -> None:
    lacks("vae")(folder)
    lacks("text_encoder_2")(folder)
    with pytest.raises(ValueError, match=r"vae do not fit .*\(and 1 more, which `fastguard doctor` lists\)"):
        load(recipe)


def test_the_command_line_says_it_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model.path",
        str(folder),
        "--prompts.cache",
        str(tmp_path / "cache"),
        "--run.dir",
        str(tmp_path / "r"),
    ]
    lacks("text_encoder_2")(folder)
    assert cli.main(["train", "flux_tiny", *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert KEYS["text_encoder_2"] in error[0]
    holds("transformer/config.json", LFS)(folder)  # the planner reads it first
    assert cli.main(["train", "flux_tiny", *options]) == 2
    assert f"{folder}/transformer/config.json is git-lfs's pointer" in capsys.readouterr().err


def test_files_that_no_loader_reads_are_passed_over(folder: Path) -> None:
    (folder / "vae" / "._config.json").write_bytes(b"\x00\x05\x16\x07")  # what macOS leaves on foreign disks
    (folder / "vae" / "notes.json").write_text("[1]")
    assert not list(pipeline_problems(folder, PARTS))


def test_whole_folders_of_every_layout_pass(folder: Path, recipe: Recipe) -> None:
    """As the public repositories have them: shards, older names, tied weights twice, other parts' keys."""
    assert not list(pipeline_problems(folder, PARTS))
    sharded(folder)
    old_clip(folder)
    clip = load_file(folder / WEIGHTS["text_encoder"])
    clip = {f"text_model.{key}": tensor for key, tensor in clip.items()}
    clip["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(clip, folder / WEIGHTS["text_encoder"])  # no metadata either
    t5 = load_file(folder / WEIGHTS["text_encoder_2"])
    t5["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()
    t5["decoder.final_layer_norm.weight"] = torch.ones(32)
    save_file(t5, folder / WEIGHTS["text_encoder_2"], metadata={"format": "pt"})
    (folder / "text_encoder_2" / "pytorch_model.bin").write_text(LFS)  # beside the weights, and not read
    vae = load_file(folder / WEIGHTS["vae"])
    save_file({key: t.bfloat16() for key, t in vae.items()}, folder / WEIGHTS["vae"], metadata={"format": "pt"})
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_text(LFS)  # a variant that nothing loads
    (folder / "my_prompts.json").write_text("[]")
    assert not list(pipeline_problems(folder, PARTS))
    load(recipe)


def test_looking_changes_no_settings_of_the_libraries(folder: Path) -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    half = {key: weight.bfloat16() for key, weight in load_file(folder / WEIGHTS["transformer"]).items()}
    save_file(half, folder / WEIGHTS["transformer"])
    # A width of 2**32 raises while diffusers has bfloat16 as the default.
    is_set("transformer/config.json", num_attention_heads=65_536, attention_head_dim=65_536)(folder)
    assert next(pipeline_problems(folder, PARTS)).startswith(f"{folder / 'transformer'} ")
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before
    assert torch.get_default_dtype() == torch.float32


# --- weights and encodings that are not finite


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("part", KEYS)
def test_weights_that_are_not_finite_are_named(part: str, value: float, folder: Path, recipe: Recipe) -> None:
    change(folder / WEIGHTS[part], lambda weights: weights[KEYS[part]].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match=f"weights of {part} hold NaN or infinity \\({KEYS[part]}\\)"):
        load(recipe)
    assert part in ("transformer", "vae") or not list((recipe.prompts.cache or folder).rglob("*.safetensors"))


def test_encodings_that_are_not_finite_are_not_cached(folder: Path, recipe: Recipe) -> None:
    """Finite weights whose product is not."""
    wide = {"final_layer_norm.weight": torch.full((32,), 3e38)}
    change(folder / WEIGHTS["text_encoder"], lambda weights: weights.update(wide))
    with pytest.raises(ValueError, match=r"text_encoder makes NaN .* in torch.float32.*: take another"):
        load(recipe)
    assert not list((recipe.prompts.cache or folder).rglob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_one_bad_value_is_found_wherever_it_is(dtype: torch.dtype, value: float, size: int) -> None:
    module = torch.nn.Module()
    module.register_buffer("counts", torch.arange(3))
    module.register_buffer("nothing", torch.ones(0))
    module.register_parameter("good", torch.nn.Parameter(torch.full((size,), torch.finfo(dtype).max, dtype=dtype)))
    assert not_finite(module) == []
    for place in {0, size // 2, size - 1}:
        bad = torch.randn(size).to(dtype)
        bad[place] = value
        module.register_buffer("bad", bad)
        assert not_finite(module) == ["bad"]


def test_a_process_looks_at_its_own_shards() -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        module = torch.nn.Module()
        for name, value in (("good", 1.0), ("bad", torch.nan)):
            whole = torch.full((4, 2), value)
            setattr(module, name, torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)])))
        assert not_finite(module) == ["bad"]
    finally:
        distributed.destroy_process_group()
