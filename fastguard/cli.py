"""Online reinforcement learning of flow-matching image models.

RECIPE is a TOML file, or the name of a shipped one. `fastguard train RECIPE --help` lists every field, and each can be
overridden: --section.field VALUE.
"""

# Each command is a function or a class; heavy imports wait until it runs.
from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.extras import SubcommandApp

from fastguard.config import Recipe, RewardConfig
from fastguard.errors import UserError
from fastguard.recipe import find_recipe, load_recipe, overridden
from fastguard.utils.quiet import quiet_libraries
from fastguard.utils.signals import ENDING, handled_by
from fastguard.utils.terminal import say, unfailing_output

app = SubcommandApp()
RecipeFields = Annotated[Recipe, tyro.conf.arg(name="")]


@dataclass(frozen=True)
class Train:
    """Train as the recipe says. On several GPUs: accelerate launch --config_file ... -m fastguard.cli train RECIPE."""

    recipe: RecipeFields
    resume: str = "never"
    """"auto" goes on from the newest good checkpoint in run.dir, a path from that checkpoint; "never" begins anew"""

    def __call__(self) -> int:
        from fastguard.commands.train import train_recipe

        return train_recipe(self.recipe, self.resume)


@dataclass(frozen=True)
class Plan:
    """Predict the peak memory of every phase, without a GPU."""

    recipe: RecipeFields
    kept: bool = False
    """show what an update keeps for its backward pass instead, tensor by tensor, at each level of model.recompute"""

    def __call__(self) -> int:
        from fastguard.commands.plan import print_plan

        return print_plan(self.recipe, self.kept)


@dataclass(frozen=True)
class Doctor:
    """Check this machine and everything that the recipe needs, before a long run finds out."""

    recipe: RecipeFields

    def __call__(self) -> int:
        from fastguard.commands.doctor import examine

        return examine(self.recipe)


@dataclass(frozen=True)
class Sample:
    """Draw images with a run's trained weights, deterministically (ODE)."""

    recipe: RecipeFields
    prompt: tuple[str, ...] = ()
    """texts to draw; none draws the first prompts of the recipe"""
    checkpoint: str = "newest"
    """"newest" or "best" of run.dir, the path of a checkpoint, or "none" for the model before training"""
    images: int = 4
    """images per prompt"""
    steps: int = 28
    """denoising steps"""
    seed: int = 0
    """seed of the initial noise"""
    out: Path | None = None
    """folder for the PNG files; none means run.dir/samples"""

    def __call__(self) -> int:
        from fastguard.commands.sample import sample_recipe

        out = self.out or self.recipe.run.dir / "samples"
        return sample_recipe(self.recipe, self.prompt, self.checkpoint, self.images, self.steps, self.seed, out)


RECIPE_COMMANDS: dict[str, type[Train] | type[Plan] | type[Doctor] | type[Sample]] = {
    "train": Train,
    "plan": Plan,
    "doctor": Doctor,
    "sample": Sample,
}
PRINTING = ("plan", "doctor")
"""Commands whose result is what they print: they fail if it cannot be written. Others leave theirs in files."""


# These four stand in the list of commands and answer --help; with a recipe, `parse_recipe_command` takes over.


@app.command
def train(recipe: tyro.conf.Positional[str]) -> int:
    """Train as a recipe says; `fastguard train RECIPE --help` lists its fields, and --resume.

    Args:
        recipe: a TOML file, or the name of a shipped recipe
    """
    return main(["train", recipe])


@app.command
def plan(recipe: tyro.conf.Positional[str]) -> int:
    """Predict a recipe's peak memory, phase by phase, without a GPU.

    Args:
        recipe: a TOML file, or the name of a shipped recipe
    """
    return main(["plan", recipe])


@app.command
def doctor(recipe: tyro.conf.Positional[str] | None = None) -> int:
    """Check this machine (versions, GPU, kernels), and everything that a recipe needs.

    Args:
        recipe: a TOML file, or the name of a shipped recipe; none checks the machine alone
    """
    from fastguard.commands.doctor import examine

    return examine(None) if recipe is None else main(["doctor", recipe])


@app.command
def sample(recipe: tyro.conf.Positional[str]) -> int:
    """Draw prompts with a run's trained weights; `fastguard sample RECIPE --help` lists the options.

    Args:
        recipe: a TOML file, or the name of a shipped recipe
    """
    return main(["sample", recipe])


@app.command
def report(run: tyro.conf.Positional[Path]) -> int:
    """Write RUN/report.html: metrics, ratio statistics, clip advice, images.

    Args:
        run: folder of a run (run.dir of its recipe)
    """
    from fastguard.commands.report import report_run

    return report_run(run)


@app.command
def reward_server(
    use: tyro.conf.Positional[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    options: dict[str, bool | int | float | str] | None = None,
) -> int:
    """Serve a reward over HTTP: a recipe elsewhere names its address in [[rewards]] use.

    Args:
        use: a built-in's name, or module:function
        host: address to listen on; 0.0.0.0 for other machines (there is no password: keep it in your network)
        port: port to listen on
        options: keyword arguments of the reward, as --options NAME VALUE ...
    """
    from fastguard.rewards.server import run_server

    return run_server(RewardConfig(use, options=options or {}), host, port)


@app.command
def demo(
    out: Path = Path("runs/demo"), seeds: int | None = None, workers: int | None = None, quick: bool = False
) -> int:
    """Compare Flow-GRPO and GRPO-Guard on handwritten digits, and write a report.

    Pretrains a tiny Flux model (kept in $FASTGUARD_CACHE or ~/.cache/fastguard), trains it with both objectives,
    and explains what is seen. A few minutes on two CPU cores. Ctrl-C leaves a report of the finished runs.

    Args:
        out: folder for report.html, its pictures and results.json
        seeds: runs per objective (3 unless given, 1 with --quick)
        workers: processes for the training runs (2 unless given; 1 on a GPU)
        quick: a smoke run of half a minute that exercises every stage; its numbers mean nothing
    """
    if find_spec("sklearn") is None:
        say("the demo's data and metrics need scikit-learn: pip install scikit-learn")
        return 1
    from fastguard.demo.config import DemoConfig, quick_demo
    from fastguard.demo.run import run_demo

    config = quick_demo() if quick else DemoConfig()
    if seeds is not None:
        config = replace(config, seeds=seeds)
    return run_demo(config, out, workers=1 if quick and workers is None else workers)


def parse_recipe_command(args: Sequence[str]) -> Callable[[], int] | None:
    """`train RECIPE --section.field value ...` as a command; None if there is no recipe."""
    if len(args) < 2 or args[0] not in RECIPE_COMMANDS or args[1].startswith("-"):
        return None
    name, recipe = args[0], load_recipe(find_recipe(args[1]))
    kind: Any = RECIPE_COMMANDS[name]
    command = tyro.cli(kind, default=kind(recipe), args=list(args[2:]), prog=f"fastguard {name} {args[1]}")
    overridden(recipe, command.recipe)
    return command


def terminations_as_interrupts() -> AbstractContextManager[None]:
    """SIGTERM (kill, timeout, docker stop), SIGHUP (a closed terminal) and what schedulers send before the end of a
    job end a command as Ctrl-C does: tidily. Handlers of the caller's own stay."""
    unhandled = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
    return handled_by(signal.default_int_handler, unhandled)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of the `fastguard` script; returns the exit code."""
    args = sys.argv[1:] if args is None else args
    with unfailing_output() as stdout:
        code = _run(args)
        stdout.flush()
        if stdout.lost is not None and args and args[0] in PRINTING:
            say(f"fastguard: cannot write to stdout: {stdout.lost.strerror}")
            return code or 2
    return code


def _run(args: Sequence[str]) -> int:
    quiet_libraries()
    try:
        with terminations_as_interrupts():
            command = parse_recipe_command(args)
            if command is None:
                return app.cli(prog="fastguard", description=__doc__, args=args)
            return command()
    except UserError as error:
        say(f"fastguard: {error}")
        return error.exit_code
    except ValueError as error:  # a setting out of range; the message names it
        say(f"fastguard: {error}")
        return 2
    except Exception:
        say(traceback.format_exc())
        return 1
    except KeyboardInterrupt:  # before the command could take care of it itself
        say("fastguard: interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
