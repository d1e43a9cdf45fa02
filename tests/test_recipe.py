"""Recipes: strict TOML, overrides, what is at odds or unread, and the shipped ones."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from helpers.toys import RECIPE, MemoryRecorder, ToyBackbone, ToyPolicy, pool
from torch import nn

from fastguard.advantages import ESTIMATORS
from fastguard.cli import COMMANDS, main, parse_command, takes_recipe
from fastguard.commands.demo import Demo
from fastguard.commands.doctor import Doctor
from fastguard.config import (
    NAMED,
    ModelConfig,
    ObjectiveConfig,
    Recipe,
    Recompute,
    SamplerConfig,
    UpdateConfig,
    advantages_config,
    objective_config,
    recompute_levels,
)
from fastguard.errors import UserError
from fastguard.loss.objectives import OBJECTIVES, OPTIONS
from fastguard.prompts import read_prompts
from fastguard.recipe import (
    as_dict,
    differences,
    find_recipe,
    load_recipe,
    parse_recipe,
    shipped_names,
    shipped_recipes,
    totals,
    unread_values,
)
from fastguard.train.build import gather_prompts
from fastguard.train.optim import build_optimizer
from fastguard.train.state import for_processes
from fastguard.train.trainer import train

SHIPPED = shipped_names()


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(text + ('\n[[rewards]]\nuse = "jpeg_compressibility"\n' if "[[rewards]]" not in text else ""))
    return file


def test_every_recipe_is_there() -> None:
    assert SHIPPED == [
        "digits", "digits_plain", "flux2_klein_lora", "flux2_lora", "flux2_tiny", "flux_full_1gpu", "flux_full_fsdp2",
        "flux_lora", "flux_lora_1024", "flux_lora_16gb", "flux_lora_24gb", "flux_lora_fast", "flux_tiny",
        "kontext_lora", "kontext_tiny", "qwen_image_lora", "qwen_image_tiny", "sd35_tiny", "sd35m_lora",
        "sd35m_lora_nocfg",
    ]  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_have_their_prompts(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    prompts = gather_prompts(recipe)
    assert prompts.trained >= recipe.prompts.per_epoch
    assert recipe.run.dir == Path("runs") / name
    assert dict(totals(recipe))["images per epoch"].startswith(str(recipe.images_per_epoch))


@pytest.mark.parametrize(
    ("objective", "lines"),
    [
        (objective_config("grpo_guard"), {}),
        (objective_config("rpg", window=1), {}),
        (
            objective_config("rpg", window=3),
            {
                "transitions per update": "240 = 1 x 240",
                "earlier rollouts": "2 kept, whole: an update trains on 3 rollouts as soon as there are so many",
            },
        ),
        (
            objective_config("op_grpo", keep=0.8),
            {
                "trained steps": "steps 0 to 3 of 6 (flow_sde)",
                "transitions per update": "80 = 1 x 80",  # half of 32 fresh and of 8 earlier images, 4 steps each
                "earlier rollouts": "3 kept: the best 2 of 8 images of each prompt, on every process",
                "replayed images": "at most 8 per epoch",
            },
        ),
    ],
    ids=str,
)
def test_what_earlier_rollouts_cost_is_said(objective: ObjectiveConfig, lines: dict[str, str]) -> None:
    said = dict(totals(replace(load_recipe(find_recipe("flux_tiny")), objective=objective)))
    assert ("earlier rollouts" in said) == ("earlier rollouts" in lines)
    for name, text in lines.items():
        assert said[name].startswith(text)


def test_the_flux_recipe_is_the_public_one() -> None:
    recipe = load_recipe(find_recipe("flux_lora"))
    assert (recipe.model.height, recipe.model.width, recipe.model.guidance) == (512, 512, 3.5)
    assert (recipe.model.dtype, recipe.lora.rank, recipe.lora.alpha) == ("bfloat16", 64, 128)
    assert (recipe.sampler.num_steps, recipe.sampler.noise_level, recipe.sampler.group_size) == (6, 0.9, 24)
    fast = load_recipe(find_recipe("flux_lora_fast"))
    changed = [line.split(":")[0] for line in differences(as_dict(recipe), as_dict(fast))]
    assert changed == ["run.dir", "sampler.sde_steps", "sampler.window"]
    assert 1 <= fast.sampler.sde_steps <= 3


def test_the_flux2_recipes_differ_in_the_model_alone() -> None:
    klein, dev = (load_recipe(find_recipe(name)) for name in ("flux2_klein_lora", "flux2_lora"))
    assert (klein.model.guidance, klein.prompts.max_tokens, klein.sampler.num_steps) == (4.0, 512, 8)
    changed = [line.split(":")[0] for line in differences(as_dict(klein), as_dict(dev))]
    assert sorted(changed) == ["model.kind", "model.path", "model.quantize", "run.dir", "sampler.noise_level"]


@pytest.mark.parametrize("name", ["flux_lora_16gb", "flux_lora_24gb"])
def test_recipes_for_small_cards_are_the_flux_recipe(name: str) -> None:
    recipe, small = load_recipe(find_recipe("flux_lora")), load_recipe(find_recipe(name))
    changed = [line.split(":")[0] for line in differences(as_dict(recipe), as_dict(small))]
    assert sorted(changed) == [
        "hardware.memory_gb", "hardware.tflops", "model.quantize", "monitor.gold.0.options.device",
        "rewards.0.options.device", "run.dir", "sampler.batch_size", "sampler.decode_batch", "update.micro_batch",
        "update.optimizer",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sampler]\nnum_stps = 3", r"sampler\.num_stps: there is no such field; did you mean num_steps\?"),
        ("[samplr]\nnum_steps = 3", r"samplr: there is no such field; did you mean sampler\?"),
        ("[[rewards]]\nuse = 'x'\nwieght = 1.0", r"rewards\.0\.wieght: there is no such field; did you mean weight"),
        ("[[rewards]]\nweight = 1.0", r"rewards\.0\.use: this field is needed"),
        ("[sampler]\nnum_steps = '3'", r"sampler\.num_steps: .*integer, got '3'"),
        ("[sampler]\nnum_steps = true", r"sampler\.num_steps: .*integer, got True"),
        ("[sampler]\nkind = 'ddim'", r"sampler\.kind: .*'flow_sde', 'dance_sde' or 'cps', got 'ddim'"),
        ("[update]\nbetas = [0.9]", r"update\.betas"),
        ("[sampler]\nshift = -1.0", r"sampler: shift must be positive or auto, got -1"),
        ("[model]\nguidance = 'high'", r"model\.guidance"),
        ("[model]\ncheckpointing = 'on'", r"model\.checkpointing: .* did you mean model\.recompute\?"),
        ("[model]\nrecompute = 'all'", r"model\.recompute: .*'auto', 'none', .*'block' or 'offload', got 'all'"),
        ("x = ", r"not valid TOML"),
        ("rewards = []", r"at least one \[\[rewards\]\] entry"),
    ],
)
def test_errors_name_the_field_and_the_fix(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(written(tmp_path, text) if "rewards = []" not in text else _raw(tmp_path, text))


def _raw(tmp_path: Path, text: str) -> Path:
    (tmp_path / "raw.toml").write_text(text)
    return tmp_path / "raw.toml"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"num_stps") as caught:
        load_recipe(written(tmp_path, "[sampler]\nnum_stps = 3\n[model]\nhight = 3"))
    assert "model.hight" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[model]\ntrain = "full"\n[lora]\nrank = 8', r'lora\.rank = 8: set, but not read: model\.train = "full"'),
        ("[sampler]\nwindow_epochs = 3", r"sampler\.window_epochs = 3: set, but not read"),
        ("[objective]\nkl_type = 'velocity'", r"objective\.kl_type = velocity: set, but not read.*kl_weight = 0"),
        (
            "[objective]\nname = 'flow_dppo'\nclip_range = 0.1",
            r"objective\.clip_range: flow_dppo has no option 'clip_range'; it is an option of grpo_guard, flow_grpo",
        ),
        (
            "[objective]\nkl_threshold = 0.1",
            r"objective\.kl_threshold: grpo_guard has no option 'kl_threshold'; it is an option of flow_dppo\. Known",
        ),
        ("[objective]\nname = 'ppo'", r"objective\.name: must be one of grpo_guard, .*, got 'ppo'"),
        ("[objective]\nclip_rang = 0.1", r"objective\.clip_rang: there is no such field; did you mean clip_range"),
        ("[objective]\nclip_range = [0.1]", r"objective\.clip_range"),
        ("[scoring]\nstd = 'global'", r"scoring\.std: there is no such field; did you mean advantages\.name"),
        ("[advantages]\nname = 'std'", r"advantages\.name: must be one of group, global, .*running, vgpo, got 'std'"),
        (
            "[advantages]\nname = 'running'\neps = 0.1",
            r"advantages\.eps: running has no option 'eps'; it is an option of group, .*Known: momentum",
        ),
        ("[advantages]\nepss = 0.1", r"advantages\.epss: there is no such field; did you mean eps"),
        ("[advantages]\nclip_range = 0.1", r"advantages\.clip_range: there is no such field; known: eps, name"),
        ("[advantages]\nname = 'trim'\nshare = 1.5", r"advantages: share must lie in \[0, 1\); got 1.5"),
        ("[advantages]\nname = 'bnpo'\nlow = 2.0", r"advantages: low must be below high.*got low = 2.0 and high = 1.0"),
        ("[advantages]\neps = '1'", r"advantages\.eps"),
        (
            "[objective]\nname = 'op_grpo'\nwindow = 1\ncap = 3.0",
            r"objective\.cap = 3.0: set, but not read: objective\.window = 1",
        ),
        ("[update]\nema_every = 3", r"update\.ema_every = 3: set, but not read"),
        ("[update]\ncopies = 'cpu'", r"update\.copies = cpu: set, but not read"),
        ("[monitor]\nprompts = 3", r"monitor\.prompts = 3: set, but not read: monitor\.every = 0"),
        ("[model]\nkind = 'digits'\nheight = 64", r"model\.height = 64: set, but not read"),
        ("[monitor]\nevery = 3", r"monitor\.every needs a reward in \[\[monitor\.gold\]\]"),
        ("[model]\nkind = 'digits'\nrecompute = 'block'", r"model\.recompute = block: set, but not read"),
        ("[model]\nfuse = false\nrecompute = 'mlp'", r'model: recompute = "mlp" needs fused blocks: set fuse = true'),
        ('[model]\ndtype = "float16"', r"model\.dtype"),
        ("[update]\nmax_grad_norm = -1.0", r"max_grad_norm must be positive"),
        ("[update]\nlearning_rate = -1e-4", r"learning_rate must be at least 0"),
        ("[update]\nbetas = [0.9, 1.0]", r"betas must lie in"),
        ("[run]\nseed = 4294967296", r"seed must be below"),
        ("[hardware]\nsharding = 'fsdp2'\n[update]\noptimizer = 'adamw8bit'", r'update\.optimizer.*use "adamw"'),
        ("[[rewards]]\nuse = 'a'\n[[rewards]]\nuse = 'a'", r"two rewards are called \['a'\]"),
        ("[update]\nminibatches = 7", r"20 transitions of a rollout batch do not divide into update\.minibatches = 7"),
        ("[sampler]\nsde_steps = 0", r"sampler\.sde_steps must be at least 1"),
    ],
)
def test_values_at_odds_or_without_effect_are_refused(tmp_path: Path, text: str, message: str) -> None:
    defaults = "" if "[sampler]" in text else "[sampler]\nsde_steps = 5\n"
    with pytest.raises(ValueError, match=message):
        load_recipe(written(tmp_path, defaults + text))


def numbers(kinds: tuple[type, ...]) -> list[tuple[str, str]]:
    """(section, field) of every field that takes numbers of these kinds."""
    sections = {name: kind for name, kind in get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)}
    return [
        (section, name)
        for section, kind in sections.items()
        for name, hint in get_type_hints(kind).items()
        if {hint, *get_args(hint)} & set(kinds)
    ]


def with_value(tmp_path: Path, section: str, field: str, value: str) -> Path:
    """A recipe with one number, which something reads."""
    value = f"[{value}, 0.9]" if field == "betas" else value
    beside = {
        "window_epochs": 'window = "sliding"\nsde_steps = 4',
        "kl_threshold": 'name = "flow_dppo"',
        "ema_every": "ema_decay = 0.5",
    }.get(field, "every = 3" if section == "monitor" and field != "every" else "")
    gold = '[[monitor.gold]]\nuse = "ocr"' if section == "monitor" else ""
    return written(tmp_path, f"[{section}]\n{field} = {value}\n{beside}\n{gold}")


@pytest.mark.parametrize("value", [10**30, 2**63, 2**31])
@pytest.mark.parametrize(("section", "field"), numbers((int,)))
def test_a_whole_number_that_nobody_means_is_refused_at_once(
    tmp_path: Path, section: str, field: str, value: int
) -> None:
    if field == "seed" and value < 2**32:
        load_recipe(with_value(tmp_path, section, field, str(value)))
        return
    with pytest.raises(ValueError, match=rf"{field} (must|=)[^\n]*"):
        load_recipe(with_value(tmp_path, section, field, str(value)))


@pytest.mark.parametrize("value", ["1e308", "1e400", "-1e308", "1" + "0" * 400])
@pytest.mark.parametrize(("section", "field"), numbers((float,)))
def test_a_number_beyond_float32_is_refused(tmp_path: Path, section: str, field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}\b.* (must|should)"):
        load_recipe(with_value(tmp_path, section, field, value))


@pytest.mark.parametrize("value", ["1e-300", "1e-45", "-1e-39"])
@pytest.mark.parametrize(("section", "field"), numbers((float,)))
def test_a_number_that_float32_takes_for_0_is_refused(tmp_path: Path, section: str, field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}\b.* must"):
        load_recipe(with_value(tmp_path, section, field, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # Without noise a step has no density.
        ("[sampler]\nnoise_level = 0.0", r"sampler: noise_level must lie in \[1e-06, 10\], got 0"),
        ("[sampler]\nnoise_level = 1e-30", r"noise_level must lie in \[1e-06, 10\], got 1e-30"),
        ("[sampler]\nnoise_level = 1e30", r"noise_level must lie in \[1e-06, 10\], got 1e\+30"),
        ("[sampler]\nkind = 'cps'\nnoise_level = 1.5\nsde_steps = 4", r"noise_level must lie in \[1e-06, 1\], got"),
        ("[lora]\nalpha = 0", r"lora: alpha must be at least 1, got 0"),
        ("[lora]\nalpha = 2147483647", r"lora: alpha must be at most 65536"),
        ("[scoring]\ntimeout_s = 1e30", r"scoring: timeout_s must lie in \[0.001, 1000000000\], got 1e\+30"),
        ("[scoring]\ntimeout_s = 1e-30", r"scoring: timeout_s must lie in \[0.001, 1000000000\], got 1e-30"),
        ("[scoring]\nthreads = 100000", r"scoring: threads must be at most 256, got 100000"),
        ("[update]\nlearning_rate = 1e308", r"update: learning_rate must be at most 10, got 1e\+308"),
        ("[update]\neps = 1e-30", r"update: eps must lie in \[1e-20, 1\], got 1e-30"),
        ("[update]\nlearning_rate = 1.0\nweight_decay = 2.0", r"learning_rate \* weight_decay must be at most 1, got"),
        ("[update]\ninner_epochs = 1000\nminibatches = 20000", r"inner_epochs \* minibatches must be at most 100000"),
        (
            "[prompts]\nper_epoch = 1000000\n[sampler]\ngroup_size = 65536\nsde_steps = 5",
            r"prompts.per_epoch \* sampler.group_size = 65536000000 images must be at most 1000000: lower one",
        ),
        (
            "[prompts]\nper_epoch = 1000\n[sampler]\ngroup_size = 1000\nnum_steps = 1000",
            r"group_size \* \(sampler.num_steps \+ 1\) = 1001000000 draws of noise must be at most 100000000: lower",
        ),
        (
            "[monitor]\nevery = 1\nprompts = 1000000\nimages_per_prompt = 65536\n[[monitor.gold]]\nuse = 'ocr'",
            r"monitor: prompts \* images_per_prompt = 65536000000 images must be at most 1000000: lower one",
        ),
        ('[run]\ndir = "a\\u0000b"', r"run.dir: 'a\\x00b' holds a control character"),
        ('[model]\npath = "a\\u001b[31mb"', r"model.path: 'a\\x1b\[31mb' holds a control character"),
        ('[[rewards]]\nuse = "a"\noptions = {"\\u009b" = 1}', r"rewards.0.options: '\\x9b' holds a control character"),
        ("[[rewards]]\nuse = 'x'\nweight = 1e-300", r"rewards.0.weight must be 0 or lie in"),
        ("n = 0x" + "f" * 5000, r"recipe.toml is no recipe: Exceeds the limit"),
        ("[" + ".".join("a" * 5000) + "]", r"recipe.toml is no recipe: maximum recursion"),
        ("[run]\ndir = [" + "'x'," * 100_000 + "]", r"run.dir: input should be a valid string, got \['x', .{,500}\]$"),
        ("[run]\n" + "\n".join(f"n{i} = 1" for i in range(1000)), r"(?s)run.n19: there is no such.*and 980 more$"),
    ],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_what_nobody_means_is_refused_at_once_with_the_range(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(written(tmp_path, text))


@pytest.mark.parametrize(("kind", "most"), [("flow_sde", 10.0), ("dance_sde", 10.0), ("cps", 1.0)])
def test_the_least_and_the_most_noise_train(kind: Any, most: float) -> None:
    for noise in (1e-6, most):
        sampler = replace(RECIPE.sampler, kind=kind, noise_level=noise, group_size=4, batch_size=8)
        recipe = replace(RECIPE, run=replace(RECIPE.run, epochs=1), sampler=sampler)
        policy, run = ToyPolicy(), MemoryRecorder()
        backbone = ToyBackbone(policy)
        with pool(recipe, backbone) as rewards:
            train(backbone, recipe, rewards, run)
        assert not run.messages
        assert policy.image.isfinite().all()
        assert policy.image.abs().max() > 1e-3
    assert SamplerConfig(kind=kind, noise_level=0.0, sde_steps=0).noise_level == 0  # deterministic sampling alone


def test_the_smallest_eps_takes_no_step_from_gradients_of_zero() -> None:
    """As those of the first layer of every adapter are before the first update."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = build_optimizer([weight], UpdateConfig(eps=1e-20, weight_decay=0.0))
    for size in (0.0, 1e-30, 1e-21):
        weight.grad = torch.full_like(weight, size)
        optimizer.step()
        assert (weight - 1).abs().max() < 1e-2


def test_a_models_own_shift_leaves_steps_or_is_refused() -> None:
    assert SamplerConfig().shift_for(3.15) == 3.15
    assert SamplerConfig(shift=2.0).shift_for(1e30) == 2.0
    for shift in (1e30, 0.0, float("nan")):
        with pytest.raises(ValueError, match=r'sampler\.shift = "auto" takes the model\'s own shift, which .* is'):
            SamplerConfig().shift_for(shift)


def test_settings_that_divide_are_found_among_divisors() -> None:
    """Without a search through all numbers up to the images, which prime numbers make the longest."""
    with pytest.raises(ValueError, match="= 983 or prompts.per_epoch = 983 or hardware.processes = 1$"):
        replace(
            RECIPE,
            prompts=replace(RECIPE.prompts, per_epoch=991),
            sampler=replace(RECIPE.sampler, group_size=997, batch_size=1),
            hardware=replace(RECIPE.hardware, processes=983),
        )


def test_a_file_that_is_not_utf8_is_told_by_its_line(tmp_path: Path) -> None:
    for name, content in (
        ("r.toml", b"[run]\nepochs = 3\n# caf\xe9\n"),
        ("p.txt", "a cat\ncaf\u00e9\n\n".encode() + b"caf\xe9 again"),
        ("p.jsonl", b'{"prompt": "a cat"}\n{"prompt": "caf\xe9"}'),
    ):
        (tmp_path / name).write_bytes(content)
        line = content[: content.index(b"\xe9")].count(b"\n") + 1
        with pytest.raises(ValueError, match=rf"{name}, line {line}: not UTF-8 \(byte 0xe9"):
            (load_recipe if name == "r.toml" else read_prompts)(tmp_path / name)
    file = written(tmp_path, "[run]\nepochs = 3")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as some editors begin a file
    assert load_recipe(file).run.epochs == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (r'{"prompt": "a \ud800 cat"}', r"line 2: not JSON: it holds '\\ud800', half of a character"),
        ('{"prompt": "a cat", "n": ' + "1" * 5000 + "}", "line 2: not JSON: .*4300"),
        ("[" * 100_000, "line 2: not JSON: it is nested deeper than 64 levels"),
    ],
    ids=["surrogate", "digits", "nesting"],
)
def test_a_prompt_line_that_cannot_be_used_is_told_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a dog"}\n' + line)
    with pytest.raises(ValueError, match=rf"p\.jsonl, {message}"):
        read_prompts(tmp_path / "p.jsonl")


def test_levels_of_recompute_are_those_of_the_blocks(tmp_path: Path) -> None:
    assert recompute_levels(fuse=True) == get_args(Recompute)
    for fuse in (True, False):
        for level in ("auto", *recompute_levels(fuse)):
            assert ModelConfig(fuse=fuse, recompute=level).recompute == level
    digits = load_recipe(find_recipe("digits"))
    assert unread_values(replace(digits, model=replace(digits.model, fuse=False))) == {}


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 7, 8, 16])
def test_a_group_that_does_not_divide_is_refused_with_what_works(processes: int) -> None:
    recipe = replace(RECIPE, sampler=replace(RECIPE.sampler, batch_size=4))  # 32 images
    if 32 % (4 * processes) == 0:
        assert for_processes(recipe, processes).images_per_process == 32 // processes
        return
    with pytest.raises(ValueError, match=rf"launched on {processes} processes.*32 images do not divide") as caught:
        for_processes(recipe, processes)
    offers = re.findall(r"(\w+)\.(\w+) = (\d+)(?= or|$)", str(caught.value))
    assert offers
    for section, field, value in offers:  # every offer works
        changed = replace(recipe, **{section: replace(getattr(recipe, section), **{field: int(value)})})
        chosen = processes if section != "hardware" else int(value)
        pairs = changed.sampler.batch_size * changed.sampler.sde_steps
        if pairs % changed.update.minibatches == 0:
            for_processes(changed, chosen)


def test_relative_prompt_files_belong_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a cat\n" * 48)
    recipe = load_recipe(written(tmp_path, '[prompts]\nfile = "mine.txt"\n[sampler]\nsde_steps = 5'))
    assert recipe.prompts.file == tmp_path / "mine.txt"
    assert gather_prompts(recipe).trained == 48
    few = replace(recipe, prompts=replace(recipe.prompts, per_epoch=50))
    with pytest.raises(ValueError, match=r"prompts\.per_epoch = 50, but the file holds 48 prompts"):
        gather_prompts(few)


def test_overrides_come_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(written(tmp_path, "[sampler]\nsde_steps = 5"))
    options = ["--run.dir", "elsewhere", "--objective.clip-range", "3e-6", "--resume", "auto", "--sampler.shift", "2.5"]
    command: Any = parse_command(["train", file, *options])
    assert (command.recipe.run.dir, command.recipe.objective.clip_range) == (Path("elsewhere"), 3e-6)
    assert (command.recipe.sampler.shift, command.resume) == (2.5, "auto")
    assert command.recipe.sampler.sde_steps == 5
    masked: Any = parse_command(["train", file, "--objective.name", "flow_dppo", "--objective.kl-threshold", "1"])
    assert masked.recipe.objective == objective_config("flow_dppo", kl_threshold=1.0)
    with pytest.raises(SystemExit) as caught:
        parse_command(["train", file, "--sampler.num-steps", "many"])
    assert caught.value.code == 2
    assert "sampler.num-steps" in capsys.readouterr().err
    with pytest.raises((ValueError, SystemExit)):
        parse_command(["train", file, "--lora.rank", "0"])
    with pytest.raises(ValueError, match=r"no recipe nothing\.toml.*flux_lora"):
        parse_command(["train", "nothing.toml"])


def test_an_override_may_leave_other_fields_unread_but_must_be_read_itself() -> None:
    command: Any = parse_command(["train", "flux_tiny", "--monitor.every", "0", "--model.train", "full"])
    assert (command.recipe.monitor.every, command.recipe.model.train) == (0, "full")  # monitor.*, lora.* stand idle
    with pytest.raises(ValueError, match=r"lora\.rank = 3: set, but not read"):
        parse_command(["train", "flux_tiny", "--model.train", "full", "--lora.rank", "3"])


def test_a_recipe_survives_the_way_through_json() -> None:
    recipe = load_recipe(find_recipe("digits"))
    assert parse_recipe(as_dict(recipe), "again") == recipe
    assert differences(as_dict(recipe), as_dict(replace(recipe, run=replace(recipe.run, seed=4)))) == [
        "run.seed: 0 -> 4"
    ]


def test_differences_between_rewards_are_told_one_by_one() -> None:
    old = as_dict(load_recipe(find_recipe("digits")))
    new = as_dict(load_recipe(find_recipe("digits")))
    new["rewards"][0]["weight"] = 2.0
    new["monitor"]["gold"][0]["options"]["which"] = "other"
    assert differences(old, new) == ["monitor.gold.0.options.which: gold -> other", "rewards.0.weight: 1.0 -> 2.0"]
    new["rewards"].append(new["rewards"][0])
    assert differences(old, new)[1].startswith("rewards: [{")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_recipe_has_every_option_of_an_objective(name: str) -> None:
    assert set(OPTIONS[name]) <= {field.name for field in dataclasses.fields(objective_config(name))}


def test_every_field_has_its_line() -> None:
    """A field without a docstring has no help on the command line."""
    sections = [kind for kind in get_type_hints(Recipe).values() if dataclasses.is_dataclass(kind)]
    sections += [base for named in NAMED.values() for kind in named.configs.values() for base in kind.__mro__[1:-1]]
    assert len(sections) >= 10
    for section in sections:
        body = inspect.getsource(section)
        inherited = {field.name for base in section.__mro__[1:-1] for field in dataclasses.fields(base)}
        for field in dataclasses.fields(section):
            if field.name in inherited:
                continue
            assert re.search(rf"\n    {field.name}: [^\n]*\n    \"\"\"[^\n]+\"\"\"\n", body), f"{section} {field.name}"


@pytest.mark.parametrize("name", [name for name in COMMANDS if takes_recipe(name)])
def test_every_recipe_command_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(parse_command([name, "flux_tiny"]), COMMANDS[name])
    for options, said in (
        (["--help"], "RECIPE      a TOML file, or the name of a shipped recipe"),
        (["flux_tiny", "--help"], "--update.learning-rate FLOAT"),
    ):
        with pytest.raises(SystemExit) as caught:
            parse_command([name, *options])
        assert caught.value.code == 0
        assert said in capsys.readouterr().out
    with pytest.raises(UserError, match=f"options come after the recipe: fastguard {name} RECIPE --run.seed 3"):
        parse_command([name, "--run.seed", "3"])


def test_doctor_alone_needs_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_command(["doctor"]) == Doctor(None)
    assert parse_command(["demo", "--quick"]) == Demo(quick=True)
    with pytest.raises(SystemExit) as caught:
        parse_command(["train"])
    assert caught.value.code == 2
    assert "RECIPE" in capsys.readouterr().err


def test_help_lists_every_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_command(["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, kind in COMMANDS.items():
        assert f"• {name} {kind.__doc__.splitlines()[0]}" in said


def test_the_tutorials_recipe_is_a_whole_recipe(tmp_path: Path) -> None:
    text = (shipped_recipes().parent / "docs" / "training.md").read_text()
    block = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    recipe = load_recipe(_raw(tmp_path, block[1]))
    assert recipe.rewards[0].use == "my_reward:blue"
    assert (recipe.monitor.every, recipe.monitor.gold[0].use) == (20, "clipscore")
    # What it does not say is what the recipe that it begins with says, but for choices of that recipe.
    defaults, shipped = as_dict(recipe), as_dict(load_recipe(find_recipe("flux_lora")))
    for section in ("lora", "sampler", "objective", "hardware"):
        assert defaults[section] == shipped[section]


@pytest.mark.parametrize(
    "names",
    [
        ["--objective.name=flow_dppo", "--objective.name", "flow_grpo"],
        ["--objective.name", "flow_dppo", "--objective.name=flow_grpo"],
        ["--objective.name", "flow_dppo", "--objective.name", "flow_grpo"],
    ],
)
def test_the_last_name_of_an_objective_counts(names: list[str], tmp_path: Path) -> None:
    file = str(written(tmp_path, "[objective]\nkl_weight = 0.5\n[sampler]\nsde_steps = 5"))
    command: Any = parse_command(["train", file, *names, "--objective.clip-range", "1e-4"])
    assert command.recipe.objective == objective_config("flow_grpo", clip_range=1e-4, kl_weight=0.5)
    with pytest.raises(UserError, match="objective.name must be one of grpo_guard, flow_grpo, .*, got 'ppo'"):
        parse_command(["train", file, *names, "--objective.name=ppo"])


def test_an_estimator_is_chosen_with_its_options(tmp_path: Path) -> None:
    file = written(tmp_path, "[advantages]\nname = 'trim'\nshare = 0.25\n[sampler]\nsde_steps = 5")
    recipe = load_recipe(file)
    assert recipe.advantages == advantages_config("trim", share=0.25)
    assert isinstance(recipe.advantages, ESTIMATORS["trim"])
    assert parse_recipe(as_dict(recipe), "again") == recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    command: Any = parse_command(["train", str(file), "--advantages.share", "0.5"])
    assert command.recipe.advantages == advantages_config("trim", share=0.5)
    names = ["--advantages.name", "running", "--objective.name", "flow_grpo"]
    command = parse_command(["train", str(file), *names, "--advantages.momentum", "0.5"])
    assert command.recipe.advantages == advantages_config("running", momentum=0.5)
    assert command.recipe.objective == objective_config("flow_grpo")
    with pytest.raises(UserError, match="advantages.name must be one of group, global, .*running, vgpo, got 'std'"):
        parse_command(["train", str(file), "--advantages.name=std"])


PER_STEP = "[sampler]\nsde_steps = 5\n[advantages]\nname = 'vgpo'\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[objective]\nname = 'tic_grpo'",
            "advantages.name = vgpo gives each.*objective.name = tic_grpo takes one for",
        ),
        ("[scoring]\nnormalize_each = true", "scoring.normalize_each centers rewards at 0, and advantages.name = vgpo"),
        (
            "[objective]\nreweight = 'mean'",
            "objective.reweight: input should be 'none', .* 'tempflow' or 'noise_level'",
        ),
    ],
)
def test_advantages_per_step_go_with_losses_per_step(tmp_path: Path, text: str, message: str) -> None:
    recipe = load_recipe(written(tmp_path, PER_STEP))
    assert (recipe.advantages.per_step, recipe.scored_per_image) == (True, 5)
    with pytest.raises(UserError, match=message):
        load_recipe(written(tmp_path, PER_STEP + text))


def test_the_cost_of_advantages_per_step_is_said(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, PER_STEP))
    said = dict(totals(recipe))["images scored per epoch"]
    assert said == "5760 = 1152 x 5: advantages.name = vgpo decodes and scores one after each trained step"
    assert "images scored per epoch" not in dict(totals(load_recipe(find_recipe("flux_lora"))))


def test_a_recipe_without_advantages_standardizes_by_group(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "[sampler]\nsde_steps = 5"))
    assert recipe.advantages == advantages_config() == advantages_config("group", eps=1e-4)
    assert load_recipe(find_recipe("flux_lora")).advantages == advantages_config("global")


def test_a_name_and_the_options_of_another_objective_do_not_mix() -> None:
    with pytest.raises(UserError, match="does not fit the options of FlowGrpoConfig"):
        dataclasses.replace(objective_config("flow_grpo"), name="grpo_guard")
    with pytest.raises(UserError, match="does not fit the options of ObjectiveConfig"):
        ObjectiveConfig()
    with pytest.raises(UserError, match="does not fit the options of GroupConfig: make one of another name"):
        dataclasses.replace(advantages_config(), name="global")


@pytest.mark.parametrize("content", [[1], 3.0, None, "text"])
def test_what_is_no_object_is_no_recipe(content: Any) -> None:
    with pytest.raises(UserError, match="recipe.json is no recipe: expected an object, got"):
        parse_recipe(content, "recipe.json")


NOT_TO_BE_ASKED = "/" + "x" * 5000
"""The system refuses to look such a name up."""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "digits", "--resume", NOT_TO_BE_ASKED],
        ["sample", "digits", "--checkpoint", NOT_TO_BE_ASKED],
        ["sample", "digits", "--run.dir", NOT_TO_BE_ASKED],
        ["plan", "flux_lora", "--model.path", NOT_TO_BE_ASKED],
        ["reward-server", ".:f"],
    ],
    ids=lambda arguments: " ".join(a for a in arguments if a != NOT_TO_BE_ASKED),
)
def test_paths_that_cannot_be_looked_up_are_the_users(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastguard: ")
    assert "Traceback" not in said
