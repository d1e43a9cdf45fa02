"""A reward server on Python's own HTTP server, and the format that it speaks.

    GET /health   200 {"status": "ok", "reward": "<name>"}
    POST /score   {"images": [...], "prompts": [...], "metadata": [...]}
                  200 {"scores": [...]}

`images` holds B PNG files in base64, 8-bit grey or RGB, all of one size; `prompts` B strings; `metadata`, which may be
left out, B objects. `scores` holds B numbers, larger is better, with null for an image that has no finite score. Every
other answer is {"error": "<what was wrong>"}: 400 for a bad request, 413 for too many bytes, 404 for another path, 500
for a reward that raised. PNG is lossless: the reward sees exactly the pixels that were sampled.

Requests are answered in threads of their own, so the reward may be called several times at once. There is no
authentication and no encryption: leave it on 127.0.0.1, or on a network where everybody may use it.
"""

from __future__ import annotations

import base64
import json
import math
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from fastguard.config import RewardConfig
from fastguard.rewards.base import Reward, call_reward
from fastguard.rewards.build import build_reward
from fastguard.rewards.images import decode_png

MAX_REQUEST_BYTES = 256_000_000
MAX_PIXELS = 2**27  # of a request's images together: 128 of 1024 x 1024, 400 MB decoded


class RewardServer(ThreadingHTTPServer):
    """An HTTP server that answers for one reward; `port` 0 takes a free one, `server_port` says which.

    Args:
        reward: what scores
        host, port: where to listen
        name: the reward's name in /health
        max_request_bytes: longest body that is read
        max_pixels: most pixels that the images of one request may have together
    """

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        name: str = "reward",
        max_request_bytes: int = MAX_REQUEST_BYTES,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.reward = reward
        self.name = name
        self.max_request_bytes = max_request_bytes
        self.max_pixels = max_pixels
        super().__init__((host, port), _Handler)


def serve(reward: Reward, host: str = "127.0.0.1", port: int = 8000, *, name: str = "reward", **limits: int) -> None:
    """Print the address, then answer requests until KeyboardInterrupt, which is let through.

    Raises OSError if the port is taken. `limits` are RewardServer's.
    """
    with RewardServer(reward, host, port, name=name, **limits) as server:
        print(f"reward {name!r} listens on http://{host}:{server.server_port}", flush=True)
        server.serve_forever()


def run_server(config: RewardConfig, host: str = "127.0.0.1", port: int = 8000) -> int:
    """Build the reward and serve it until Ctrl-C (KeyboardInterrupt); returns the exit code 0.

    Raises ValueError for a port that cannot be.
    """
    if not 0 <= port <= 65_535:
        raise ValueError(f"port must lie in [0, 65535], got {port}")
    reward = build_reward(config)
    try:
        serve(reward, host, port, name=config.label)
    except KeyboardInterrupt:
        print("reward server: stopped", flush=True)
    return 0


class _Refused(ValueError):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # seconds without a byte before a client is given up

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, {"status": "ok", "reward": self.server.name})
        else:
            self._reply(404, {"error": f"there is no {self.path}; GET /health or POST /score"})

    def do_POST(self) -> None:
        try:
            body = self._body()
            if self.path != "/score":
                raise _Refused(404, f"there is no {self.path}; POST /score")
            images, prompts, metadata = parse_request(body, self.server.max_pixels)
        except _Refused as refused:
            self._reply(refused.status, {"error": str(refused)})
            return
        except ValueError as error:
            self._reply(400, {"error": str(error)})
            return
        try:
            scores = call_reward(self.server.reward, images, prompts, metadata).tolist()
        except Exception as error:  # whatever it was, the client is to read it, and this server goes on
            traceback.print_exc()
            self._reply(500, {"error": f"{type(error).__name__}: {error}"})
            return
        self._reply(200, {"scores": [score if math.isfinite(score) else None for score in scores]})

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise _Refused(400, f"expected a Content-Length in bytes, got {length!r}")
        limit = self.server.max_request_bytes
        if int(length) <= limit:
            return self.rfile.read(int(length))
        # Closing on unread bytes resets the connection, and a client that still sends may never read the answer.
        left = min(int(length), 2 * MAX_REQUEST_BYTES)
        while left > 0 and (read := self.rfile.read(min(left, 1 << 20))):
            left -= len(read)
        raise _Refused(413, f"the request has {length} bytes, the limit is {limit}; send fewer images at once")

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """No line per batch; errors are still logged."""


def parse_request(body: bytes, max_pixels: int) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
    """Images (B, C, H, W) uint8, prompts and metadata of a /score request. Raises ValueError for a bad one."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the request is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise ValueError('expected a JSON object with "images", "prompts" and "metadata"')
    images = _list_of(request, "images", str, "strings (PNG in base64)")
    prompts = _list_of(request, "prompts", str, "strings")
    metadata = _list_of(request, "metadata", dict, "objects") if "metadata" in request else [{} for _ in images]
    if not images or len(prompts) != len(images) or len(metadata) != len(images):
        raise ValueError(
            f"expected as many images as prompts and metadata, at least one; got {len(images)} images, "
            f"{len(prompts)} prompts and {len(metadata)} metadata"
        )
    decoded: list[Tensor] = []
    for index, text in enumerate(images):
        try:
            left = max_pixels - sum(image[0].numel() for image in decoded)
            decoded.append(decode_png(base64.b64decode(text, validate=True), left))
        except ValueError as error:
            raise ValueError(f"images[{index}]: {error}") from error
        if decoded[-1].shape != decoded[0].shape:
            raise ValueError(
                f"images[{index}] is {tuple(decoded[-1].shape)}, images[0] is {tuple(decoded[0].shape)} (channels, "
                "height, width); send images of one size in one request"
            )
    return torch.stack(decoded), prompts, metadata


def _list_of(request: dict[str, Any], key: str, kind: type, name: str) -> list[Any]:
    values = request.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f'"{key}" must be a list of {name}')
    return values
