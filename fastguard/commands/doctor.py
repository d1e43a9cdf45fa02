"""`fastguard doctor`: checks this machine, and everything that a recipe needs, before a long run finds out.

A check is a generator of findings; what it raises becomes a FAIL of that check, and the next one goes on.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn

from fastguard import guard_loss, sde_step
from fastguard.backbones import family_of
from fastguard.commands import OptionalRecipeFields
from fastguard.config import Recipe, RewardConfig
from fastguard.errors import UserError
from fastguard.extras import DISTRIBUTION
from fastguard.ops import transition as naive
from fastguard.ops.registry import Backend
from fastguard.ops.sde_step import naive_sde_step
from fastguard.prompts import Prompt, cache_folder
from fastguard.rewards import RewardPool, build_reward
from fastguard.sde import flow_sde
from fastguard.utils.findings import Finding
from fastguard.utils.terminal import say

GIB = 2**30
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "pydantic")
"""Packages whose versions are shown, and which have to be there."""
OPTIONAL = {
    "torchao": 'update.optimizer = "adamw8bit", model.quantize = "int8" or "float8", prompts.encoders = "int8"',
    "bitsandbytes": 'model.quantize = "nf4"',
    "tensorboard": 'run.trackers = ["tensorboard"]',
    "wandb": 'run.trackers = ["wandb"]',
    "easyocr": 'the reward "ocr"',
    "pytesseract": 'the reward "ocr"',
    "sklearn": "the digit model and `fastguard demo` (scikit-learn)",
}
TOLERANCE = 1e-4
"""Relative to the largest value; float32 sums over 4,096 elements differ from float64 by about 1e-6."""

Check = Callable[[], Iterator[Finding]]


@dataclass(frozen=True)
class Doctor:
    """Check this machine (versions, GPU, kernels), and what a recipe needs if one is given."""

    recipe: OptionalRecipeFields = None

    def __call__(self) -> int:
        return examine(self.recipe)


def examine(recipe: Recipe | None) -> int:
    """Print a line per finding; returns 1 if one of them is a FAIL, else 0."""
    failed = 0
    for name, check in (*machine_checks(recipe), *([] if recipe is None else recipe_checks(recipe))):
        for finding in _findings(check):
            say(f"{finding.level:>4}  {name}: {finding.text}", sys.stdout)
            failed += finding.level == "FAIL"
    print(f"\n{failed} of the checks failed" if failed else "\nno check failed")
    return 1 if failed else 0


def _findings(check: Check) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:
        message = " ".join(str(error).split())
        yield Finding(
            "FAIL", message if isinstance(error, UserError) and message else f"{type(error).__name__}: {message}"
        )


def machine_checks(recipe: Recipe | None) -> list[tuple[str, Check]]:
    cache = cache_folder(None if recipe is None else recipe.prompts.cache)
    return [
        ("python", _python),
        ("packages", _packages),
        ("optional", _optional),
        ("gpu", _gpus),
        ("kernels", _kernels),
        ("cache", partial(_writable, cache, "prompts.cache or $FASTGUARD_CACHE")),
    ]


def recipe_checks(recipe: Recipe) -> list[tuple[str, Check]]:
    rewards = [(f"reward {reward.label}", partial(_reward, recipe, reward, 0)) for reward in recipe.rewards]
    gold = [(f"gold reward {reward.label}", partial(_reward, recipe, reward, None)) for reward in recipe.monitor.gold]
    return [
        ("prompts", partial(_prompts, recipe)),
        ("model", partial(_model, recipe)),
        ("quantize", partial(_quantize, recipe)),
        ("attention", partial(_attention, recipe)),
        *([("compile", partial(_compile, recipe))] if recipe.model.compile == "blocks" else []),
        ("processes", partial(_processes, recipe)),
        ("run.dir", partial(_run_folder, recipe)),
        ("disk", partial(_disk, recipe)),
        ("encoders", partial(_encoders, recipe)),
        ("optimizer", partial(_optimizer, recipe)),
        ("trackers", partial(_trackers, recipe)),
        *rewards,
        *gold,
        ("memory", partial(_memory, recipe)),
    ]


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    """Versions against the package's own requirements; those of the extras come last, and are higher."""
    required = [Requirement(text) for text in metadata.requires(DISTRIBUTION) or []]
    wanted = {
        r.name: r
        for r in required
        if r.name != DISTRIBUTION
        and (r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in ("", "blocks", "train")))
    }
    found = []
    for name in dict.fromkeys((*PACKAGES, *wanted)):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding("FAIL", f"{name} is not installed: pip install '{wanted.get(name, name)}'")
            continue
        if name in wanted and not wanted[name].specifier.contains(version, prereleases=True):
            yield Finding("FAIL", f"{name} is {version}, needed is {wanted[name]}: pip install '{wanted[name]}'")
        elif name in PACKAGES:
            found.append(f"{name} {version}")
    if found:
        yield Finding("ok", ", ".join(found))


def _optional() -> Iterator[Finding]:
    missing = [f"{name} for {use}" for name, use in OPTIONAL.items() if find_spec(name) is None]
    there = [name for name in OPTIONAL if find_spec(name) is not None]
    yield Finding("info", f"installed: {', '.join(there) or 'none'}; not installed: {', '.join(missing) or 'none'}")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU or no driver"
        yield Finding("warn", f"no CUDA device ({why}): only toy recipes (flux_tiny, digits) run here in good time")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{index} {properties.name}, compute capability {properties.major}.{properties.minor}, {free / GIB:.1f} of "
            f"{total / GIB:.1f} GiB free, driver {_driver()}, CUDA {torch.version.cuda}"
        )
        if properties.major < 8:
            yield Finding("FAIL", f'{text}: no bfloat16 before capability 8.0; set model.dtype = "float32"')
        elif free < 0.9 * total:
            yield Finding("warn", f"{text}: another process holds memory; `nvidia-smi` shows which")
        else:
            yield Finding("ok", f"{text}, bfloat16")


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
        return output.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _kernels() -> Iterator[Finding]:
    """A loss with its gradient and a rollout step, against the reference in float64."""
    backend: Backend = "triton" if torch.cuda.is_available() else "torch"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, error in _kernel_errors(device, backend).items():
        if not error <= TOLERANCE:
            yield Finding(
                "FAIL",
                f"{name} of the {backend} backend is off by {error:.1e} of the largest value (at most {TOLERANCE:g} is "
                "rounding): do not train on this machine; please report the versions above",
            )
            return
    yield Finding("ok", f"guard_loss, its gradient and sde_step of the {backend} backend agree with the reference")


def _kernel_errors(device: torch.device, backend: Backend) -> dict[str, float]:
    """Largest error of each output, as a share of the largest value of the reference."""
    generator = torch.Generator().manual_seed(0)
    latents, velocity, old, noise = torch.randn(4, 3, 4096, generator=generator, dtype=torch.float32, device="cpu")
    old = velocity + 0.01 * old
    advantages, sigma, sigma_next = torch.tensor(
        [[1.0, -1.0, 0.5], [0.9, 0.6, 0.3], [0.8, 0.5, 0.2]], dtype=torch.float32, device="cpu"
    )
    step, exact = flow_sde(sigma, sigma_next, 0.7), flow_sde(sigma.double(), sigma_next.double(), 0.7)

    ours = velocity.to(device, copy=True).requires_grad_()
    loss = guard_loss(
        ours, old.to(device), noise.to(device), advantages.to(device), step.to(device), clip_range=1.0, backend=backend
    ).loss
    loss.backward()
    truth = velocity.double().requires_grad_()
    cross, _ = naive.moments(truth, old.double(), noise.double(), exact)
    log_ratio = naive.ratio_norm(cross, exact.std)
    expected = (naive.clipped_surrogate(log_ratio, advantages.double(), 1.0, 1.0) / exact.dt.abs()).mean()
    expected.backward()

    seeds = torch.tensor([1, 2, 3], device="cpu")
    drawn = sde_step(latents.to(device), velocity.to(device), step.to(device), seeds=seeds.to(device), backend=backend)
    on_host = sde_step(latents, velocity, step, seeds=seeds, backend="torch")
    assert ours.grad is not None
    assert truth.grad is not None
    assert on_host.noise is not None
    following = naive_sde_step(latents.double(), velocity.double(), on_host.noise.double(), exact)
    pairs = {
        "the loss": (loss, expected),
        "the gradient": (ours.grad, truth.grad),
        "sde_step": (drawn.latents, following),
    }
    return {name: _relative(came, wanted) for name, (came, wanted) in pairs.items()}


def _relative(came: Tensor, wanted: Tensor) -> float:
    return ((came.detach().cpu().double() - wanted.detach()).abs().max() / wanted.detach().abs().max()).item()


def _writable(folder: Path, setting: str) -> Iterator[Finding]:
    """Whether files can be written to a folder that may not be there yet."""
    there = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Finding("FAIL", f"cannot write to {there}: {error.strerror or error}; change {setting}")
        return
    free = shutil.disk_usage(there).free
    if free > 5 * GIB:
        yield Finding("ok", f"{folder} can be written to; {_size(free)} free")
    else:
        yield Finding(
            "warn", f"{folder} can be written to, but only {_size(free)} are free: make room, or change {setting}"
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists())


def _size(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.1f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:.1f} MiB"


def _prompts(recipe: Recipe) -> Iterator[Finding]:
    from fastguard.train.build import gather_prompts

    prompts = gather_prompts(recipe)
    own = len(prompts.all) - prompts.first_evaluated if prompts.first_evaluated else 0
    evaluated = f", {own} more for the monitor" if own else ""
    yield Finding("ok", f"{prompts.trained} prompts, {recipe.prompts.per_epoch} per epoch{evaluated}")


def _model(recipe: Recipe) -> Iterator[Finding]:
    yield from family_of(recipe.model.kind).examine(recipe)


def _attention(recipe: Recipe) -> Iterator[Finding]:
    family_of(recipe.model.kind).check_attention(recipe.model)
    yield Finding("ok", f"model.attention = {recipe.model.attention}")


def _compile(recipe: Recipe) -> Iterator[Finding]:
    from fastguard.blocks.compiled import start_compiler

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = start_compiler(cache_folder(recipe.prompts.cache), device)
    yield Finding("ok", f"torch.compile works on {device.type}; {folder} keeps compiled code")


def _processes(recipe: Recipe) -> Iterator[Finding]:

    processes, gpus = recipe.hardware.processes, torch.cuda.device_count()
    if gpus == 0:
        toy = family_of(recipe.model.kind).runs_on_cpu(recipe.model)
        yield Finding("ok" if toy else "warn", f"hardware.processes = {processes}, and no GPU here")
        return
    if processes > gpus and processes % gpus:
        yield Finding("FAIL", f"hardware.processes = {processes}, but there are {gpus} GPUs; lower it, or add machines")
    elif processes > gpus:
        machines = processes // gpus
        yield Finding("warn", f"hardware.processes = {processes} needs {machines} machines like this one ({gpus} GPUs)")
    else:
        yield Finding("ok", f"hardware.processes = {processes} of {gpus} GPUs")
    smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
    if smallest < 1e9 * recipe.hardware.memory_gb:
        yield Finding(
            "warn",
            f"hardware.memory_gb = {recipe.hardware.memory_gb:g}, but a GPU here has {smallest / 1e9:.0f} GB: the "
            "memory check below is for a larger one; change it",
        )


def _run_folder(recipe: Recipe) -> Iterator[Finding]:
    folder = recipe.run.dir
    if folder.exists() and not folder.is_dir():
        yield Finding("FAIL", f"{folder} is a file; choose another --run.dir")
        return
    there = sorted((folder / "checkpoints").glob("epoch_*"))
    if there:
        yield Finding(
            "warn", f"{folder} holds a run ({there[-1].name}): go on with --resume auto, or choose another --run.dir"
        )
    yield from _writable(folder, "run.dir")


def _disk(recipe: Recipe) -> Iterator[Finding]:
    family = family_of(recipe.model.kind)
    if family.footprint is not None:
        yield Finding("ok", f"checkpoints of {family.describe(recipe.model)} take {family.footprint}")
        return
    one = checkpoint_bytes(recipe)
    count = recipe.run.keep_last + 1 + (recipe.monitor.every > 0)
    free = shutil.disk_usage(_existing(recipe.run.dir)).free
    text = f"{count} checkpoints of {_size(one)} (with the one being written), {_size(free)} free"
    if count * one > free:
        yield Finding("FAIL", f"{text}: make room, lower run.keep_last, or choose another run.dir")
    else:
        yield Finding("ok", text)


def checkpoint_bytes(recipe: Recipe) -> int:
    """About what a checkpoint takes on the disk: weights, export, averages, optimizer state, and earlier rollouts."""
    from fastguard.memory.passes import as_built, weights_of
    from fastguard.memory.phases import buffer_bytes

    count = weights_of(as_built(recipe.model), recipe.lora).trained.count
    weight = 4 if recipe.model.train == "lora" else getattr(torch, recipe.model.dtype).itemsize
    masters = weight < 4 or recipe.update.optimizer == "adamw_cpu"
    state = 2 if recipe.update.optimizer == "adamw8bit" else 12 if masters else 8
    shared = recipe.objective.reuse == "best"  # every process has the same
    rollouts = buffer_bytes(recipe) * (1 if shared else recipe.hardware.processes)
    return count * (2 * weight + 4 * recipe.averages + state) + rollouts


def _encoders(recipe: Recipe) -> Iterator[Finding]:
    """The others need nothing."""
    if recipe.prompts.encoders == "int8":
        from fastguard.backbones.quantize import require_library

        require_library("int8", 'prompts.encoders = "int8"', '"device" or "cpu"')
        yield Finding("ok", recipe.prompts.encoders)


def _quantize(recipe: Recipe) -> Iterator[Finding]:
    """Whether the weights can be made; those in the cache are read without a library."""
    if recipe.model.quantize != "none":
        from fastguard.backbones.quantize import LIBRARIES, require_library_of_model

        require_library_of_model(recipe.model.quantize)
        library = LIBRARIES[recipe.model.quantize]
        yield Finding("ok", f"{recipe.model.quantize}, made by {library} {metadata.version(library)}")


def _optimizer(recipe: Recipe) -> Iterator[Finding]:
    from fastguard.train.optim import build_optimizer

    build_optimizer([nn.Parameter(torch.zeros(256))], recipe.update)
    yield Finding("ok", recipe.update.optimizer)


def _trackers(recipe: Recipe) -> Iterator[Finding]:
    for name in recipe.run.trackers:
        if any(find_spec(module) for module in ((name, "tensorboardX") if name == "tensorboard" else (name,))):
            yield Finding("ok", name)
        elif name == "wandb":
            yield Finding("FAIL", "wandb is not installed: pip install wandb, or leave it out of run.trackers")
        else:
            yield Finding(
                "warn", f"{name} is not installed, and gets nothing: pip install {name}; metrics.jsonl is whole"
            )


def _reward(recipe: Recipe, config: RewardConfig, first: int | None) -> Iterator[Finding]:
    """Build a reward and score two random images of the recipe's size with it, as a run does.

    Args:
        first: which prompts it gets: from this one on; None takes those of the monitor.
    """
    from fastguard.train.build import gather_prompts

    began = time.perf_counter()
    reward = build_reward(config)
    built = time.perf_counter()
    try:
        prompts = gather_prompts(recipe)
        texts = prompts.all[prompts.first_evaluated if first is None else first :][:2]
    except UserError:  # a line of its own says so
        texts = [Prompt("a photo of a cat")]
    generator = torch.Generator().manual_seed(0)
    shape = family_of(recipe.model.kind).image_shape(recipe.model)
    images = torch.randint(256, (2, *shape), generator=generator, dtype=torch.uint8, device="cpu")
    with RewardPool([(config, reward)], replace(recipe.scoring, on_failure="stop"), texts) as pool:
        pool.submit(images, torch.arange(2, device="cpu") % len(texts))
        scores = pool.collect().values[0].tolist()
    yield Finding(
        "ok",
        f"scored two random images {scores[0]:.4g} and {scores[1]:.4g} in {time.perf_counter() - built:.1f} s, built "
        f"in {built - began:.1f} s",
    )


def _memory(recipe: Recipe) -> Iterator[Finding]:
    family = family_of(recipe.model.kind)
    if family.footprint is not None:
        yield Finding("ok", f"{family.describe(recipe.model)} takes {family.footprint}")
        return
    from fastguard.memory import plan, propose

    planned = plan(recipe)
    text = f"predicted peak {_size(planned.peak)} of {recipe.hardware.memory_gb:g} GB per GPU"
    if planned.fits:
        yield Finding("ok", text)
    else:
        yield Finding("FAIL", f"{text} does not fit: {propose(recipe).summary}")
