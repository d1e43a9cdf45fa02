"""Online reinforcement learning of flow-matching image models.

RECIPE is a TOML file, or the name of a shipped one. `fastguard train RECIPE --help` lists every field, and each can be
overridden: --section.field VALUE.
"""

from __future__ import annotations

from fastguard.extras import need

need("train")

import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from inspect import getdoc
from typing import Annotated, Any, Union

import tyro

from fastguard.commands.compare import Compare
from fastguard.commands.demo import Demo
from fastguard.commands.doctor import Doctor
from fastguard.commands.plan import Plan
from fastguard.commands.report import Report
from fastguard.commands.reward_server import RewardServer
from fastguard.commands.sample import Sample
from fastguard.commands.train import Train
from fastguard.errors import UserError
from fastguard.recipe import arms_beside, find_recipe, load_recipe, overridden, with_names
from fastguard.utils.quiet import quiet_libraries
from fastguard.utils.signals import ENDING, INTERRUPTED, handled_by
from fastguard.utils.terminal import say, unfailing_output

Command = Callable[[], int]
"""a command with its options; returns the exit code"""
COMMANDS: dict[str, Any] = {
    "train": Train,
    "compare": Compare,
    "plan": Plan,
    "doctor": Doctor,
    "sample": Sample,
    "report": Report,
    "reward-server": RewardServer,
    "demo": Demo,
}
PRINTING = ("plan", "doctor")
"""Commands whose result is what they print: they fail if it cannot be written. Others leave theirs in files."""


def parse_command(args: Sequence[str]) -> Command:
    """The command that the arguments name. Lists the commands and exits if they name none."""
    if not args or args[0] not in COMMANDS:
        rows = [
            Annotated[kind, tyro.conf.subcommand(name, description=kind.__doc__.partition("\n")[0])]
            for name, kind in COMMANDS.items()
        ]
        commands: Any = Union[tuple(rows)]  # noqa: UP007
        return tyro.cli(commands, args=args, prog="fastguard", description=__doc__)
    name, *options = args
    if takes_recipe(name):
        return parse_recipe_command(name, options)
    return tyro.cli(COMMANDS[name], args=options, prog=f"fastguard {name}")


def takes_recipe(name: str) -> bool:
    """Whether a command takes a recipe, whose fields are options."""
    return "recipe" in COMMANDS[name].__dataclass_fields__


def parse_recipe_command(name: str, options: Sequence[str]) -> Command:
    """`RECIPE --section.field VALUE ...` as a command; what the recipe says are the defaults of the options.

    Without a recipe: the command itself if it needs none, else what is missing, or help, is shown, and this exits.
    """
    kind, prog = COMMANDS[name], f"fastguard {name}"
    if options and not options[0].startswith("-"):
        path = find_recipe(options[0])
        recipe, others = with_names(load_recipe(path), options[1:])
        known = {"arms": arms_beside(path), "recipe_name": options[0]}
        beside = {name: value for name, value in known.items() if name in kind.__dataclass_fields__}
        command: Any = tyro.cli(kind, default=kind(recipe, **beside), args=others, prog=f"{prog} {options[0]}")
        overridden(recipe, command.recipe)
        return command
    if options and options[0] not in ("-h", "--help"):
        raise UserError(f"options come after the recipe: {prog} RECIPE {' '.join(options)}")
    needed = kind.__dataclass_fields__["recipe"].default is not None
    told = "a TOML file, or the name of a shipped recipe. After it, --help lists its fields and the other options"
    recipe_name: Any = Annotated[
        str if needed else str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE", help=told)
    ]
    default = tyro.MISSING if needed else None
    tyro.cli(recipe_name, default=default, args=options, prog=prog, description=getdoc(kind))
    return kind()


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
            return parse_command(args)()
    except UserError as error:
        say(f"fastguard: {error}")
        return error.exit_code
    except Exception:
        say(traceback.format_exc())
        return 1
    except KeyboardInterrupt:  # before the command could take care of it itself
        say("fastguard: interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
