"""Rewards as tests build and call them, and servers that listen for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from random import Random
from socketserver import TCPServer
from typing import Any

import torch
from torch import Tensor

from fastguard.config import RewardConfig
from fastguard.rewards import build_reward
from helpers.deadline import DEADLINE_S

PATIENCE_S = float(DEADLINE_S)  # of waits that end at once unless the code is wrong


def noise(batch: int = 4, channels: int = 3, height: int = 17, width: int = 23, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, channels, height, width), dtype=torch.uint8, generator=generator)


def built(use: str, **options: Any) -> Any:
    return build_reward(RewardConfig(use, options=options))


def call(reward: Any, images: Tensor, prompts: Sequence[str] | None = None) -> Any:
    return reward(images, prompts or ["a cat"] * len(images), [{} for _ in images])


@contextmanager
def listening(server: TCPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


_ODD = [
    b"\r\n", b"\n", b"\x00", b"\x1b[2J", b"\xff", b"\xed\xa0\x80", b"\xc2\xb2", b"\\ud800", b" ", b":", b",", b'"',
    b"-1", b"9" * 5000, b"[" * 5000, b"NaN", b"1e999", b"null", b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 7\r\n", b"Content-Encoding: gzip\r\n", b"Retry-After: 99999999999\r\n", b"X: y\r\n" * 200,
    b"x" * 70_000,
]  # fmt: skip


def mutated(message: bytes, random: Random) -> bytes:
    """A message with one to four random changes: bits, missing, repeated and odd pieces, an early end."""
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(message))
        end = min(len(message), start + random.choice([1, 2, 8, 40]))
        piece = message[start:end]
        change = random.choice(["bit", "without", "twice", "odd", "odd", "cut"])
        if change == "bit":
            piece = bytes(byte ^ (1 << random.randrange(8)) for byte in piece[:1]) + piece[1:]
        elif change == "twice":
            piece *= random.choice([2, 100])
        elif change == "odd":
            piece += random.choice(_ODD)
        rest = b"" if change == "cut" else message[end:]
        message = message[:start] + (b"" if change in ("without", "cut") else piece) + rest
    return message
