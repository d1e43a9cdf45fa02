"""verl-omni from the checkouts in FASTGUARD_PEERS, on a CPU: what the tests of its integration share.

It needs verl at the commit in verl-omni's .github/verl_pin.txt, and from PyPI ray, tensordict, hydra-core, peft,
accelerate, datasets, torchdata, codetiming, cachetools, dill, pandas, pylatexenc, math_verify and TransferQueue.

`load` changes the process: the rollout engines, which training does not call, are blank modules where they are not
installed, and verl learns of a platform called cpu.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

PEERS = os.environ.get("FASTGUARD_PEERS", "")
CHECKOUT = Path(PEERS, "verl-omni")
ADAPTER = "fastguard.integrations.verl_omni"
N_SAMPLES, N_STEPS = 4, 5


class Anything(type):
    """A class with every attribute."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(cls, name, Anything(name, (), {}))
        return vars(cls)[name]


class Blank(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that have every attribute, for packages that are not installed."""

    def __init__(self, *packages: str) -> None:
        self.packages = packages

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        inside = fullname.partition(".")[0] in self.packages
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if inside else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = functools.partial(getattr, Anything("module", (), {}))  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@functools.cache
def load() -> types.SimpleNamespace:
    """The parts of verl-omni that the tests use, as they are without the adapter. Skips where it cannot be imported."""
    if not CHECKOUT.is_dir():
        pytest.skip("FASTGUARD_PEERS names no folder with a checkout of verl-omni")
    pytest.importorskip("verl", reason="verl, which verl-omni is built on, is not installed")
    sys.path.insert(0, str(CHECKOUT))
    sys.meta_path.append(Blank(*(name for name in ("vllm", "vllm_omni") if importlib.util.find_spec(name) is None)))
    set_platform()
    from verl_omni.pipelines.schedulers import FlowMatchSDEDiscreteScheduler, flow_match_sde
    from verl_omni.trainer.diffusion.diffusion_algos import DIFFUSION_LOSS_REGISTRY
    from verl_omni.workers.utils.losses import diffusion_loss

    return types.SimpleNamespace(
        Scheduler=FlowMatchSDEDiscreteScheduler,
        scheduler_file=flow_match_sde.__file__,
        registry=DIFFUSION_LOSS_REGISTRY,
        losses=dict(DIFFUSION_LOSS_REGISTRY),
        sample_previous_step=FlowMatchSDEDiscreteScheduler.sample_previous_step,
        diffusion_loss=diffusion_loss,
    )


def set_platform() -> None:
    from verl.plugin.platform import platform_manager
    from verl.plugin.platform.platform_cuda import PlatformCUDA

    class Cpu(PlatformCUDA):
        device_name = "cpu"
        device_module = torch.cpu

        def is_available(self) -> bool:
            return True

        def current_device(self) -> Any:
            return torch.device("cpu")

        def communication_backend_name(self) -> str:
            return "gloo"

        def empty_cache(self) -> None:
            pass

    platform_manager.set_platform(Cpu())
    os.environ["VERL_ENGINE_DEVICE"] = "cuda"  # the engine is registered for accelerators only


@contextmanager
def untouched() -> Iterator[types.SimpleNamespace]:
    """verl-omni without the adapter; whatever is changed inside is undone at the end."""
    verl = load()

    def undo() -> None:
        verl.Scheduler.sample_previous_step = verl.sample_previous_step
        verl.registry.clear()
        verl.registry.update(verl.losses)
        sys.modules.pop(ADAPTER, None)

    undo()
    try:
        yield verl
    finally:
        undo()


def actor_config(loss_mode: str, **options: Any) -> Any:
    """An actor's config; options are those of its `diffusion_loss`, and use_kl_loss."""
    from verl_omni.workers.config import DiffusionActorConfig
    from verl_omni.workers.config.diffusion.actor import DiffusionLossConfig

    use_kl_loss = options.pop("use_kl_loss", False)
    loss = DiffusionLossConfig(loss_mode=loss_mode, **options)
    return DiffusionActorConfig(
        strategy="fsdp", ppo_micro_batch_size_per_gpu=4, rollout_n=4, diffusion_loss=loss, use_kl_loss=use_kl_loss
    )


def scheduler_64() -> Any:
    """Their scheduler without its asserts, which refuse float64."""
    verl = load()
    code = compile(Path(verl.scheduler_file).read_text(), verl.scheduler_file, "exec", optimize=1)
    names = {"__name__": "verl_omni.pipelines.schedulers.flow_match_sde"}
    exec(code, names)
    return names["FlowMatchSDEDiscreteScheduler"]


# --- a run of their training engine ---------------------------------------------------------------------------------


def make_tiny_sd3(folder: Path) -> None:
    """A pipeline's folder with a random transformer of 22 thousand parameters."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    load().Scheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))


def make_engine(folder: Path, loss_mode: str, sde_type: str, external_lib: str | None) -> tuple[Any, Any]:
    """Their FSDP2 engine on the tiny model, and the actor's config, both from their yaml files."""
    from hydra import compose, initialize_config_dir
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.engine import EngineRegistry

    def config(name: str, part: str, **overrides: Any) -> Any:
        with initialize_config_dir(str(CHECKOUT / "verl_omni/trainer/config/diffusion" / part), version_base=None):
            return omega_conf_to_dataclass(compose(name, [f"{key}={value}" for key, value in overrides.items()]))

    model = config(
        "diffusion_model", "model",
        **{
            "path": folder, "external_lib": external_lib or "null", "+load_tokenizer": False,
            "attn_backend": "native", "enable_gradient_checkpointing": False, "algo.noise_level": 0.7,
            "algo.sde_type": sde_type, "pipeline.num_inference_steps": N_STEPS + 1, "pipeline.height": 64,
            "pipeline.width": 64,
        },
    )  # fmt: skip
    actor = config(
        "dp_diffusion_actor", "actor",
        **{
            "strategy": "fsdp2", "diffusion_loss.loss_mode": loss_mode, "diffusion_loss.clip_ratio": 0.001,
            "ppo_mini_batch_size": N_SAMPLES, "ppo_micro_batch_size_per_gpu": 2, "rollout_n": N_SAMPLES,
            "optim.lr": 1e-3, "optim.total_training_steps": 10, "fsdp_config.fsdp_size": 1,
            "fsdp_config.model_dtype": "float32", "fsdp_config.dtype": "float32",
            "+fsdp_config.mixed_precision.param_dtype": "fp32",
        },
    )  # fmt: skip
    engine = EngineRegistry.new(
        model_type="diffusion_model", backend="fsdp2", model_config=model, engine_config=actor.engine,
        optimizer_config=actor.optim, checkpoint_config=actor.checkpoint,
    )  # fmt: skip
    engine._build_model_optimizer()
    return engine, actor


def roll_out(engine: Any, sde_type: str) -> Any:
    """A batch as their trainer hands it to the actor: sampled by their scheduler, re-scored by their engine."""
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    generator = torch.Generator().manual_seed(1)
    draw = functools.partial(torch.randn, generator=generator)
    latents, prompts, pooled = draw(N_SAMPLES, 4, 8, 8), draw(N_SAMPLES, 5, 16), draw(N_SAMPLES, 16)
    trajectory, times = [latents], []
    with torch.no_grad():
        for time in engine.scheduler.timesteps[:N_STEPS]:
            times.append(time.expand(N_SAMPLES))
            velocity = engine.module(
                hidden_states=latents, encoder_hidden_states=prompts, pooled_projections=pooled, timestep=times[-1],
                return_dict=False,
            )[0]  # fmt: skip
            latents = engine.scheduler.step(
                velocity, time, latents, generator=generator, noise_level=0.7, sde_type=sde_type, return_dict=False
            )[0]
            trajectory.append(latents)
    batch = TensorDict(
        {
            "all_latents": torch.stack(trajectory, 1),
            "all_timesteps": torch.stack(times, 1),
            "prompt_embeds": prompts,
            "prompt_embeds_mask": torch.ones(N_SAMPLES, 5, dtype=torch.int32),
            "pooled_prompt_embeds": pooled,
            "advantages": draw(N_SAMPLES)[:, None].repeat(1, N_STEPS),
        },
        batch_size=N_SAMPLES,
    )
    tensordict_utils.assign_non_tensor(batch, micro_batch_size_per_gpu=2)
    with engine.eval_mode():
        scored = engine.infer_batch(batch)["model_output"]
    batch["old_log_probs"], batch["old_prev_sample_mean"] = scored["log_probs"], scored["prev_sample_mean"]
    return batch


def train(folder: Path, loss_mode: str, sde_type: str, external_lib: str | None) -> dict[str, Tensor]:
    """Three updates by their engine; returns the losses and metrics of every step, and the weights at the end."""
    engine, actor = make_engine(folder, loss_mode, sde_type, external_lib)
    batch = roll_out(engine, sde_type)
    loss_function = functools.partial(load().diffusion_loss, config=actor)
    seen: dict[str, list[float]] = {"loss": [], "grad_norm": []}
    for _ in range(3):
        with engine.train_mode():
            output = engine.train_batch(batch, loss_function=loss_function)
        seen["grad_norm"].append(output["metrics"].pop("grad_norm"))
        seen["loss"] += [loss for micro_batch in output["loss"] for loss in micro_batch]
        for name, metric in output["metrics"].items():
            seen.setdefault(name, []).extend(metric.values)
    weights = torch.cat([weight.full_tensor().detach().flatten() for weight in engine.module.parameters()])
    return {**{name: torch.tensor(values) for name, values in seen.items()}, "weights": weights}
