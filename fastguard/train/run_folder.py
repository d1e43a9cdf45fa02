"""The folder of a run: checkpoints, metrics, images; and how a run is asked to stop.

recipe.json          the recipe, every field
metrics.jsonl        an `EpochLog` per line
evaluations.jsonl    an `EvaluationLog` per line
skipped.jsonl        updates that were not finite, and reward failures
*_odd.jsonl          damaged lines of these three, moved there by a resume
images/              grids: epoch_000010.png (training), evaluation_000010.png
checkpoints/         see checkpoint.py; each holds diffusers/, for others to load
fastguard/           what TensorBoard's tracker writes
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from fastguard.config import Recipe
from fastguard.errors import UserError
from fastguard.prompts import fingerprint
from fastguard.recipe import as_dict, differences
from fastguard.train.buffer import Buffer, buffer_of, is_of
from fastguard.train.checkpoint import (
    FORMAT,
    CheckpointError,
    CheckpointFolder,
    checkpoint_name,
    checkpoints_in,
    read_state,
    read_tensors,
    require,
    restore_rng,
)
from fastguard.train.metrics import EpochLog
from fastguard.train.monitor import Verdict
from fastguard.train.optim import load_state
from fastguard.train.state import TrainState
from fastguard.utils.files import write_text, writing
from fastguard.utils.grids import save_images
from fastguard.utils.rows import keep_rows, odd_rows, read_lines
from fastguard.utils.sharding import copy_all_into
from fastguard.utils.signals import handled_by
from fastguard.utils.terminal import say

OF_STORED_ROLLOUTS = (
    "model.kind", "model.path", "model.dtype", "model.height", "model.width", "model.guidance",
    "model.negative_prompt", "model.train", "model.quantize", "prompts: ", "prompts.per_epoch", "prompts.max_tokens",
    "prompts.encoders", "rewards", "scoring.normalize_each", "advantages",
    "objective.name", "objective.kl_weight", "objective.keep", "objective.reweight", "sampler.kind",
    "sampler.num_steps", "sampler.sde_steps", "sampler.group_size", "sampler.batch_size",
)  # fmt: skip
"""Fields without which an earlier rollout does not fit the ones that follow."""
GRID_IMAGES = 16
TRACKED = "fastguard"
"""Name of the run for trackers, and so TensorBoard's folder."""
SAME_WISH_S = 3.0
"""Seconds after a signal within which another one counts as the same."""


class RunFolder:
    """Implements `recorder.Recorder`; `catching_signals` makes SIGTERM, Ctrl-C and their like save and stop the run.

    Args:
        resume: "never" refuses a folder that holds checkpoints, "auto" goes on from the newest good one (or begins,
            if there is none), anything else is the path of a checkpoint.

    Raises UserError if the folder is in use, or holds a run and `resume` is "never".
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, resume: str = "never") -> None:
        self.path = recipe.run.dir.absolute()  # a reward may change the working directory
        self._recipe, self._accelerator = recipe, accelerator
        self._main = accelerator.is_main_process
        if "wandb" in recipe.run.trackers and find_spec("wandb") is None:
            raise UserError('run.trackers names "wandb", which is not installed: pip install wandb')
        if self._main:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path)
        self.checkpoints = CheckpointFolder(self.path / "checkpoints", accelerator)
        self._from = self._choose(resume)
        self._saved: int | None = None
        self._best: str | None = None
        self._earlier_best: list[str] = []
        self._idle_monitor: dict[str, Any] = {"monitor": None}
        self._asked_at: float | None = None
        self._bar: tqdm | None = None

    def _choose(self, resume: str) -> Path | None:
        there = self.checkpoints.all()
        if resume == "never":
            if there:
                raise UserError(
                    f"run.dir = {self._recipe.run.dir} holds a run ({there[0].name}): go on with --resume auto, or "
                    "choose another --run.dir"
                )
            return None
        if resume == "auto":
            newest = self.checkpoints.newest_good()
            if not there and self._main:
                say(f"nothing to resume in {self._recipe.run.dir}: beginning anew", sys.stdout)
            if newest is None and there:
                raise UserError(f"none of the {len(there)} checkpoints in {self.checkpoints.folder} is good")
            return newest
        chosen = Path(resume)
        require(chosen)
        if there and not self.checkpoints.holds(chosen):
            raise UserError(
                f"run.dir = {self._recipe.run.dir} holds another run than {chosen}: choose another --run.dir to branch "
                "off from it"
            )
        return chosen

    @contextmanager
    def catching_signals(self) -> Iterator[None]:
        """Inside, the signals of `signals.ENDING` ask the run to save and stop; another Ctrl-C interrupts at once.

        A launcher forwards its signals, and the terminal or the scheduler sends them to every process as well: what
        comes again within seconds is the same wish.
        """

        def ask(number: int, frame: Any) -> None:
            if self._asked_at is not None:
                if number == signal.SIGINT and time.monotonic() - self._asked_at > SAME_WISH_S:
                    raise KeyboardInterrupt
                return
            self._asked_at = time.monotonic()
            if self._main:
                name = signal.Signals(number).name
                say(f"\n{name}: saving at the next safe point; Ctrl-C again stops at once")

        with handled_by(ask):
            try:
                yield
            finally:
                if self._bar is not None:
                    self._bar.close()

    def stop_requested(self) -> bool:
        if self._accelerator.num_processes == 1:
            return self.was_stopped
        own = torch.tensor([self.was_stopped], device=self._accelerator.device)
        return bool(self._accelerator.gather(own).any().item())

    @property
    def was_stopped(self) -> bool:
        """Whether a signal ended the run before its last epoch."""
        return self._asked_at is not None

    def restore(self, state: TrainState) -> None:
        recipe = as_dict(self._recipe)
        if self._from is not None:
            if self._main:
                content = read_state(self._from)
                changed = differences(content["recipe"], recipe)
                lines = [f"resuming {self._from} after {content['epoch']} epochs", *changed]
                say("\n  ".join(lines), sys.stdout)
            self._load(self._from, state)
            self.checkpoints.set_aside_after(state.epoch)
            if self._main and state.epoch >= self._recipe.run.epochs:
                say(f"run.epochs = {self._recipe.run.epochs}: all of them are done", sys.stdout)
        if self._main:
            with _writing(self.path / "recipe.json") as file:
                write_text(file, json.dumps(recipe, indent=1))
            # What a killed run logged after its last save will be done, and logged, again.
            self._keep("metrics.jsonl", lambda epoch: epoch < state.epoch)
            self._keep("skipped.jsonl", lambda epoch: epoch < state.epoch)
            if state.monitor is not None:
                evaluated = {log.epoch for log in state.monitor.history}
                self._keep("evaluations.jsonl", lambda epoch: epoch < state.epoch or epoch in evaluated)
            self._bar = tqdm(
                total=max(self._recipe.run.epochs, state.epoch),
                initial=state.epoch,
                desc="training",
                unit="epoch",
                disable=None,
            )
        if self._recipe.run.trackers:
            with _writing(self.path / TRACKED):
                self._accelerator.init_trackers(TRACKED, config=_flat(recipe))

    def _keep(self, name: str, wanted: Callable[[int], bool]) -> None:
        file = self.path / name
        with _writing(file):
            odd = keep_rows(file, wanted)
        if odd:
            say(f"  odd rows of {name} (half a line, say): {odd}, moved to {odd_rows(file).name}", sys.stdout)

    def _load(self, path: Path, state: TrainState) -> None:
        content = read_state(path)
        try:
            load_state(state.optimizer, state.parameters, read_tensors(path, "optimizer"))
            copy_all_into(state.parameters, read_tensors(path, "weights"))
            for name, copied in (("average", state.average), ("old", state.old)):
                if copied is not None:
                    copy_all_into(copied.tensors, read_tensors(path, name) or read_tensors(path, "weights"))
        except UserError as error:
            changed = differences(content["recipe"], as_dict(self._recipe))
            causes = [c for c in changed if c.startswith(("model.", "lora.", "update.optimizer"))]
            since = f"; changed since then: {', '.join(causes)}" if causes else ""
            raise UserError(f"checkpoint {path} does not fit this recipe: {error}{since}") from None
        state.epoch, state.updates = content["epoch"], content["updates"]
        state.bad_in_a_row = content["bad_in_a_row"]
        if self._main and state.bad_in_a_row:
            say(f"  its last {state.bad_in_a_row} updates were skipped (skipped.jsonl). {self.way_back()}", sys.stdout)
        prompts = _trained_prompts(state)
        if self._main and content.get("trained_prompts", prompts) != prompts:
            say("  prompts.file holds other prompts than before", sys.stdout)
        changed = differences(content["recipe"], as_dict(self._recipe))
        compared = ("rewards", "scoring.normalize_each", "advantages")  # what the baselines of prompts are about
        same = content.get("trained_prompts") == prompts and not any(c.startswith(compared) for c in changed)
        baselines = content.get("baselines", {}) if same else {}
        state.baselines = {int(prompt): baseline for prompt, baseline in baselines.items()}
        if content.get("trained_prompts") != prompts:
            changed.append("prompts: other ones")
        state.buffer = self._restore_buffer(path, changed, state)
        if content["monitor"] is not None:
            best = content["monitor"]["best"]
            self._best = None if best is None else checkpoint_name(best["epoch"])  # kept until there is a better one
        self._earlier_best = content.get("earlier_best", [])
        anew = self._restore_monitor(content, state)
        restore_rng(path, self._accelerator)
        if self.checkpoints.holds(path):
            self._saved = None if anew else state.epoch
        elif self._best != path.name:  # the best stayed in the other run's folder
            self._best = None
            if state.monitor is not None:
                state.monitor.best = None

    def _restore_buffer(self, path: Path, changed: Sequence[str], state: TrainState) -> Buffer:
        """The rollouts that updates still train on: those of the checkpoint, or none if they no longer fit."""
        recipe = state.recipe
        if recipe.objective.rollouts == 1:
            return Buffer()
        causes = [c for c in changed if c.startswith(OF_STORED_ROLLOUTS)]
        try:
            own = read_tensors(path, "buffer", lambda name: is_of(name, recipe, self._accelerator.process_index))
            if causes and own and self._main:
                causes_said = ", ".join(causes)
                say(f"  earlier rollouts are not trained on again, since they do not fit: {causes_said}", sys.stdout)
            if causes:
                return Buffer()
            backbone, epoch = state.backbone, state.epoch
            return buffer_of(own, recipe, backbone.latent_shape, len(backbone.prompts), epoch, self._accelerator)
        except (LookupError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {path}: its earlier rollouts are not as they were written: {error}"
            ) from None

    def _restore_monitor(self, content: dict[str, Any], state: TrainState) -> bool:
        """Give the monitor its history; True if its evaluations begin anew, as earlier ones do not compare."""
        if state.monitor is None:  # for a resume that turns it on again
            self._idle_monitor = {name: content.get(name) for name in ("monitor", "monitor_conditions")}
            return False
        if content["monitor"] is None:
            return False
        before, now = content.get("monitor_conditions"), state.monitor.conditions(state.backbone)
        changed = differences(before, now) if before is not None else ["the checkpoint does not say what they were"]
        if not changed:
            state.monitor.restore(content["monitor"])
            return False
        if self._best is not None:  # the best before the reward was hacked, maybe
            self._earlier_best.append(self._best)
            self._best = None
        if self._main:
            log, earlier = self.path / "evaluations.jsonl", self.path / f"evaluations_until_{state.epoch:06d}.jsonl"
            reason = "as evaluations are no longer the same: " + ", ".join(changed)
            say(f"  the best score begins anew, {reason}", sys.stdout)
            if self._earlier_best:
                say(f"  the best checkpoint until now is kept: {self._earlier_best[-1]}", sys.stdout)
            if lines := read_lines(log):
                with _writing(earlier), earlier.open("ab") as file:
                    file.write(b"".join(line + b"\n" for line in lines))
                log.unlink()
            if earlier.exists():
                say(f"  earlier evaluations are in {earlier.name}", sys.stdout)
        return True

    def skipped(self, epoch: int, message: str) -> None:
        if self._main:
            say(f"skipped: {message}")
            _append(self.path / "skipped.jsonl", {"epoch": epoch, "message": message})

    def end_epoch(self, log: EpochLog, images: Tensor, state: TrainState) -> None:
        every = self._recipe.run.images_every
        if self._main:
            _append(self.path / "metrics.jsonl", dataclasses.asdict(log))
            if every and log.epoch % every == 0:
                self._save_images(f"epoch_{log.epoch:06d}.png", images)
            assert self._bar is not None
            self._bar.set_postfix_str(f"reward {log.reward_mean:.4g}", refresh=False)
            self._bar.update()
            if self._bar.disable:  # stderr is a file or a pipe
                seconds = sum(log.seconds.values())
                say(f"epoch {state.epoch} of {self._bar.total}: reward {log.reward_mean:.4g}, {seconds:.1f} s")
        self._track(log.scalars(), log.epoch)

    def evaluated(self, verdict: Verdict) -> None:
        log = verdict.log
        if self._main:
            _append(self.path / "evaluations.jsonl", dataclasses.asdict(log))
            self._save_images(f"evaluation_{log.epoch:06d}.png", verdict.images)
            if log.warning:
                say(f"warning: {log.warning}")
        diversity = {} if log.diversity is None else {"gold/diversity": log.diversity}
        self._track({"gold/score": log.gold, "gold/proxy": log.proxy, **diversity}, log.epoch)

    def end(self) -> None:
        """Write what the trackers still hold; the last call of a run."""
        with _writing(self.path / TRACKED):
            self._accelerator.end_training()

    def _save_images(self, name: str, images: Tensor) -> None:
        with _writing(self.path / "images" / name) as file:
            file.unlink(missing_ok=True)  # the file behind a link would be written over
            save_images(file, images[:GRID_IMAGES])

    def _track(self, values: dict[str, float], epoch: int) -> None:
        with _writing(self.path / TRACKED):
            self._accelerator.log(values, step=epoch)

    def save(self, state: TrainState) -> None:
        if self._saved == state.epoch:
            return
        state.require_finite()
        content = {
            "format": FORMAT,
            "epoch": state.epoch,
            "updates": state.updates,
            "bad_in_a_row": state.bad_in_a_row,
            "baselines": state.baselines,
            "prompts_used": state.epoch * self._recipe.prompts.per_epoch,
            "processes": self._accelerator.num_processes,
            "trained_prompts": _trained_prompts(state),
            "earlier_best": self._earlier_best,
            **self._idle_monitor,
            "recipe": as_dict(self._recipe),
            "torch": torch.__version__,
        }
        if state.monitor is not None:
            content["monitor"] = state.monitor.state()
            content["monitor_conditions"] = state.monitor.conditions(state.backbone)
        groups = state.tensors()
        if len(state.buffer):
            groups["buffer"] = state.buffer.tensors(state.recipe, self._accelerator)
        exported = groups["weights" if state.average is None else "average"]
        self.checkpoints.save(state.epoch, content, groups, exported, state.backbone.export)
        self._saved = state.epoch
        if state.monitor is not None and state.monitor.best is not None:
            self._best = checkpoint_name(state.monitor.best.epoch)
        if state.bad_in_a_row == 0:  # else the last good update may have been what ruined the newest ones
            self.checkpoints.prune(self._recipe.run.keep_last, {self._best, *self._earlier_best})

    def way_back(self) -> str:
        """The newest checkpoint that was saved while no update was being skipped, in words."""
        for path in (*self.checkpoints.all(), *([self._from] if self._from is not None else [])):
            with suppress(CheckpointError):
                if read_state(path)["bad_in_a_row"] == 0:
                    return f"To go on from the last good checkpoint: --resume {path}"
        return "There is no good checkpoint to go on from"


def checkpoint_of(run: Path, which: str) -> Path:
    """A run's "newest" or "best" checkpoint (by gold score), or the checkpoint at the path `which`."""
    if which not in ("newest", "best"):
        return Path(which)
    checkpoints = checkpoints_in(run / "checkpoints")
    if not checkpoints:
        raise UserError(f"{run} holds no checkpoint")
    if which == "newest":
        return checkpoints[0]
    monitor = read_state(checkpoints[0])["monitor"]
    if monitor is None or monitor["best"] is None:
        raise UserError(
            f"{run} has no best checkpoint: monitor.every was 0, or nothing was evaluated under the monitor's settings"
        )
    return run / "checkpoints" / checkpoint_name(monitor["best"]["epoch"])


def _trained_prompts(state: TrainState) -> str:
    return fingerprint(state.backbone.prompts[: state.backbone.num_trained_prompts])


def _lock(folder: Path) -> Any:
    """Hold the folder for this process; the lock goes with the process, however it ends."""
    with _writing(folder / ".lock") as file:
        # Never through a link, and without a change of what is there.
        handle = open(os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "rb")  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"run.dir = {folder} is in use by another process; choose another --run.dir") from None
    except OSError as error:  # NFS without its lock service, Lustre without -o flock
        say(f"warning: run.dir = {folder} cannot be locked ({error.strerror}): start no second run there meanwhile")
    return handle


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """`files.writing`, in the words of a run."""
    with writing(path, then="go on with --resume auto"):
        yield path


def _append(file: Path, row: dict[str, Any]) -> None:
    with _writing(file), file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as one level of strings, which every tracker takes."""
    flat: dict[str, str] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: str(value)}
    return flat
