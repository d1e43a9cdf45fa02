"""Score images in threads while the next ones are sampled.

The threads are daemons of our own: the interpreter waits at its exit for those of concurrent.futures' executors, so
that a reward that hangs would keep a finished or failed run from ending, and its GPUs from being free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastguard.config import RewardConfig, ScoringConfig
from fastguard.rewards.base import Reward, RewardError, call_reward, one_line, usable
from fastguard.rewards.settings import keep_settings

if TYPE_CHECKING:  # a reward server has no need of what encodes prompts
    from fastguard.prompts import Prompt

GRACE_S = 2.0
"""Seconds that closing a pool waits for calls that are still running."""


@dataclass(frozen=True)
class RewardFailure:
    """A reward that gave no score for images of one prompt."""

    label: str
    """the reward's `RewardConfig.label`"""
    prompt_index: int
    """which prompt"""
    prompt: str
    """its text"""
    reason: str
    """what the reward raised, gave or did not give in time"""


@dataclass(frozen=True)
class Scores:
    """What all rewards say about all images."""

    values: Tensor
    """(R, B) float64 in host memory: rewards in the pool's order, images in the order of their submission;
    with scoring.on_failure = "drop_group", NaN where there is no score"""
    failures: tuple[RewardFailure, ...]
    """why, once for each reward, batch and prompt with a NaN"""


@dataclass(frozen=True)
class _Batch:
    prompt_indices: list[int]
    calls: list[Future[Tensor]]  # one per reward


class RewardPool:
    """Runs every reward on every submitted batch, in `scoring.threads` threads, first come, first served.

    A context manager: leaving it cancels what waits, gives running calls two seconds, and leaves them behind. Threads
    start with the CUDA device of the thread that makes the pool.

    Args:
        rewards: configs, for their labels, and what `build_reward` made of them
        scoring: threads, timeout_s and on_failure are read
        prompts: what prompt indices point into
    """

    def __init__(
        self, rewards: Sequence[tuple[RewardConfig, Reward]], scoring: ScoringConfig, prompts: Sequence[Prompt]
    ) -> None:
        self._rewards = list(rewards)
        self._scoring = scoring
        self._prompts = prompts
        self._pending: list[_Batch] = []
        self._put_back = keep_settings()
        self._threads = _Threads(scoring.threads)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what waits and end the threads; one that hangs is left behind. May be called twice."""
        self._cancel()
        self._threads.close(GRACE_S)

    def submit(self, images: Tensor, prompt_indices: Tensor) -> None:
        """Start all rewards on a batch and return at once.

        Args:
            images: uint8 (B, 3, H, W) or (B, 1, H, W) in host memory; not to be changed before `collect`
            prompt_indices: int64 (B,), the prompt of each image
        """
        if (
            images.dtype != torch.uint8
            or images.dim() != 4
            or images.shape[1] not in (1, 3)
            or images.device.type != "cpu"
        ):
            raise ValueError(
                "images must be uint8 of shape (B, 3, H, W) or (B, 1, H, W) in host memory, got "
                f"{images.dtype} {tuple(images.shape)} on {images.device}"
            )
        if prompt_indices.dtype != torch.int64 or prompt_indices.shape != images.shape[:1]:
            raise ValueError(
                f"prompt_indices must be int64 of shape ({len(images)},), got {prompt_indices.dtype} "
                f"{tuple(prompt_indices.shape)}"
            )
        indices = prompt_indices.tolist()
        if not all(0 <= index < len(self._prompts) for index in indices):
            raise ValueError(f"prompt_indices must lie in [0, {len(self._prompts)}), got {indices}")
        texts = [self._prompts[index].text for index in indices]
        calls = []
        for _, reward in self._rewards:
            metadata = [dict(self._prompts[index].metadata) for index in indices]
            calls.append(self._threads.submit(partial(call_reward, reward, images, texts, metadata)))
        self._pending.append(_Batch(indices, calls))

    def collect(self) -> Scores:
        """Wait for all batches since the last `collect`, in order, and return their scores.

        `scoring.timeout_s` counts from here on, anew for each call that is waited for. As calls start in the order in
        which they are waited for, that call runs during the whole wait: time in the queue does not count. A call that
        is given up is left to itself, and its thread replaced. Settings of the process that calls have changed are put
        back to what they were when the pool was made.

        Raises RewardError with scoring.on_failure = "stop" at the first reward that raised, took too long, or gave a
        wrong number of scores or one that is not finite; what is pending is then cancelled, as it is by Ctrl-C.
        """
        failures: list[RewardFailure] = []
        columns = [torch.empty(len(self._rewards), 0, dtype=torch.float64, device="cpu")]
        try:
            for batch in self._pending:
                shape = (len(self._rewards), len(batch.prompt_indices))
                rows = torch.empty(shape, dtype=torch.float64, device="cpu")
                for row, (config, _) in enumerate(self._rewards):
                    rows[row] = self._finish(config.label, batch, batch.calls[row], failures)
                columns.append(rows)
        finally:
            self._cancel()
            self._put_back()
        return Scores(torch.cat(columns, dim=1), tuple(failures))

    def _finish(self, label: str, batch: _Batch, call: Future[Tensor], failures: list[RewardFailure]) -> Tensor:
        """(B,) scores of one reward for one batch; NaN, and an entry in `failures`, where there is none."""
        done, _ = wait([call], timeout=self._scoring.timeout_s)
        scores = torch.full((len(batch.prompt_indices),), torch.nan, dtype=torch.float64, device="cpu")
        error: BaseException | None
        if not done:
            self._threads.abandon(call)
            error = TimeoutError(f"no scores within scoring.timeout_s = {self._scoring.timeout_s:g} seconds")
            reason = str(error)
        elif error := call.exception():
            reason = one_line(f"{type(error).__name__}: {error}")
        else:
            scores = call.result()
            reason = (
                f"scores that are not finite in float32: {sorted({str(s) for s in scores[~usable(scores)].tolist()})}"
            )
        bad = ~usable(scores)
        concerned = sorted({batch.prompt_indices[i] for i in torch.nonzero(bad).flatten().tolist()})
        if concerned and self._scoring.on_failure == "stop":
            exact = bool(done) and error is None
            raise RewardError(
                f'reward "{label}" failed for {self._name(concerned, len(concerned) if exact else 3)}: {reason}. '
                'Set scoring.on_failure = "drop_group" to go on without the groups of such prompts'
            ) from error
        failures += [RewardFailure(label, index, self._prompts[index].text, reason) for index in concerned]
        return scores.masked_fill(bad, torch.nan)

    def _name(self, indices: list[int], most: int) -> str:
        """The prompts in words, the first `most` of them, each cut to a line."""
        names = []
        for index in indices[:most]:
            names.append(f'{index} "{one_line(self._prompts[index].text, most=100)}"')
        more = f" and {len(indices) - most} more" if len(indices) > most else ""
        return f"prompt{'s' if len(indices) > 1 else ''} {', '.join(names)}{more}"

    def _cancel(self) -> None:
        for batch in self._pending:
            for call in batch.calls:
                call.cancel()
        self._pending = []


Task = tuple[Future[Tensor], Callable[[], Tensor]]


class _Threads:
    """Daemon threads that take tasks from one queue."""

    def __init__(self, count: int) -> None:
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._abandoned: set[Future[Tensor]] = set()
        self._device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._threads: list[Thread] = []
        self._closed = False
        for _ in range(count):
            self._start()

    def submit(self, function: Callable[[], Tensor]) -> Future[Tensor]:
        if self._closed:
            raise RuntimeError("this pool of rewards is closed")
        call: Future[Tensor] = Future()
        self._tasks.put((call, function))
        return call

    def abandon(self, call: Future[Tensor]) -> None:
        """Give up a call: its thread ends when the call does, and another one takes its place now."""
        self._abandoned.add(call)
        self._start()

    def close(self, grace_s: float) -> None:
        if self._closed:
            return
        self._closed = True
        for _ in self._threads:
            self._tasks.put(None)
        until = time.monotonic() + grace_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _start(self) -> None:
        thread = Thread(target=self._work, name="fastguard-reward", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)  # a new thread's is GPU 0, whatever the process has chosen
        while (task := self._tasks.get()) is not None:
            call = task[0]
            _run(*task)
            del task  # its images, which would otherwise stay until the next task
            if call in self._abandoned:
                self._abandoned.discard(call)
                return


def _run(call: Future[Tensor], function: Callable[[], Tensor]) -> None:
    if not call.set_running_or_notify_cancel():
        return
    try:
        call.set_result(function())
    except BaseException as error:  # SystemExit too: a thread that ends would leave its call without an answer
        call.set_exception(error)
