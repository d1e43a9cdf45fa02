"""A reward server on Python's own HTTP server, and the format that it speaks.

    GET /health   200 {"status": "ok", "reward": "<name>"}
    POST /score   {"images": [...], "prompts": [...], "metadata": [...]}
                  200 {"scores": [...]}

`images` holds B PNG files in base64, 8-bit grey or RGB, all of one size; `prompts` B strings; `metadata`, which may be
left out, B objects. `scores` holds B numbers, larger is better, with null for an image that has no finite score. Every
other answer is {"error": "<what was wrong>"}: 400 for a bad request, 411 for one without a Content-Length, 413 for too
many bytes, 404 for another path, 500 for a reward that raised. PNG is lossless: the reward sees exactly the pixels that
were sampled.

Requests are answered in threads of their own, so the reward may be called several times at once. Clients are programs
of others, and may be broken or hostile: what they send is bounded in size and in time. There is no
authentication and no encryption: leave it on 127.0.0.1, or on a network where everybody may use it.
"""

from __future__ import annotations

import base64
import json
import math
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from fastguard.config import RewardConfig
from fastguard.errors import UserError
from fastguard.rewards.base import Reward, call_reward, one_line
from fastguard.rewards.build import build_reward
from fastguard.rewards.images import decode_png
from fastguard.utils.terminal import say

MAX_REQUEST_BYTES = 256_000_000
MAX_PIXELS = 2**27  # of a request's images together: 128 of 1024 x 1024, 400 MB decoded
RECEIVE_S = 300.0
LINGER_S = 5.0


class RewardServer(ThreadingHTTPServer):
    """An HTTP server that answers for one reward; `port` 0 takes a free one, `server_port` says which.

    Args:
        reward: what scores
        host, port: where to listen
        name: the reward's name in /health
        max_request_bytes: longest body that is read
        max_pixels: most pixels that the images of one request may have together
        receive_s: seconds for a client to send its request, and again to take its answer
    """

    request_queue_size = 1024  # clients that connect at once; the kernel's somaxconn may allow fewer

    def __init__(
        self,
        reward: Reward,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        name: str = "reward",
        max_request_bytes: int = MAX_REQUEST_BYTES,
        max_pixels: int = MAX_PIXELS,
        receive_s: float = RECEIVE_S,
    ) -> None:
        self.reward = reward
        self.name = name
        self.max_request_bytes = max_request_bytes
        self.max_pixels = max_pixels
        self.receive_s = receive_s
        self._deadlines: dict[Any, float] = {}  # of connections that send, or that are sent to
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own."""
        self._deadlines[request] = time.monotonic() + self.receive_s
        super().process_request(request, client_address)

    @contextmanager
    def unhurried(self, request: Any) -> Iterator[None]:
        """Inside, a connection has no deadline: a reward may take its time."""
        self._deadlines.pop(request)
        try:
            yield
        finally:
            self._deadlines[request] = time.monotonic() + self.receive_s

    def service_actions(self) -> None:
        """Cut connections past their deadline (serve_forever calls this twice a second): the timeout of a socket begins
        anew with every byte."""
        now = time.monotonic()
        for request, deadline in self._deadlines.copy().items():
            if now > deadline:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)

    def close_request(self, request: Any) -> None:
        """Forget a connection."""
        self._deadlines.pop(request, None)
        super().close_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what went wrong; that a client went away is no reason for a traceback."""
        error = sys.exception()
        gone = isinstance(error, OSError)
        say(f"reward server: {client_address[0]} went away: {error}" if gone else traceback.format_exc())


def serve(reward: Reward, host: str = "127.0.0.1", port: int = 8000, *, name: str = "reward", **limits: Any) -> None:
    """Print the address, then answer requests until KeyboardInterrupt, which is let through.

    Raises UserError if it cannot listen there (a port that is taken, say). `limits` are RewardServer's.
    """
    try:
        server = RewardServer(reward, host, port, name=name, **limits)
    except (OSError, ValueError) as error:  # ValueError: a name that no host can have
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
    with server:
        where = f"[{host}]" if ":" in host else host
        print(f"reward {name!r} listens on http://{where}:{server.server_port}", flush=True)
        server.serve_forever()


def run_server(config: RewardConfig, host: str = "127.0.0.1", port: int = 8000) -> int:
    """Build the reward and serve it until Ctrl-C (KeyboardInterrupt); returns the exit code 0.

    Raises UserError for a port that cannot be.
    """
    if not 0 <= port <= 65_535:
        raise UserError(f"port must lie in [0, 65535], got {port}")
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

    def finish(self) -> None:
        """Read on until the client closes: closing on unread bytes resets the connection, and a client that still sends
        may never read the answer."""
        super().finish()
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_S)
            while self.connection.recv(1 << 16):
                pass

    def do_GET(self) -> None:
        if self.path == "/health":
            self._reply(200, {"status": "ok", "reward": self.server.name})
        else:
            self._reply(404, {"error": f"there is no {self.path}; GET /health or POST /score"})

    def do_POST(self) -> None:
        try:
            self._reply(200, {"scores": self._scores()})
        except _Refused as refused:
            self._reply(refused.status, {"error": one_line(str(refused))})

    def _scores(self) -> list[float | None]:
        if self.path != "/score":
            raise _Refused(404, f"there is no {self.path}; POST /score")
        body = self._body()
        with self.server.unhurried(self.connection):
            try:
                batch = parse_request(body, self.server.max_pixels)
            except ValueError as error:
                raise _Refused(400, str(error)) from error
            del body
            try:
                scores = call_reward(self.server.reward, *batch).tolist()
            except (Exception, SystemExit) as error:  # whatever it was, the client reads it, and this server goes on
                say(traceback.format_exc())
                raise _Refused(500, f"{type(error).__name__}: {error}") from error
        return [score if math.isfinite(score) else None for score in scores]

    def _body(self) -> bytearray:
        lengths = self.headers.get_all("Content-Length", [])
        if not lengths or "Transfer-Encoding" in self.headers:
            raise _Refused(411, "expected a Content-Length, and no Transfer-Encoding")
        if len(lengths) > 1 or not (lengths[0].isascii() and lengths[0].isdecimal()):
            raise _Refused(400, f"expected one Content-Length in bytes, got {', '.join(lengths)}")
        limit = self.server.max_request_bytes
        if len(lengths[0]) > 18 or int(lengths[0]) > limit:
            raise _Refused(413, f"the request is longer than {limit} bytes; send fewer images at once")
        length, body = int(lengths[0]), bytearray()
        while len(body) < length and (piece := self.rfile.read(min(length - len(body), 1 << 20))):
            body += piece
        if len(body) < length:
            raise _Refused(400, f"the request announced {length} bytes, and ended after {len(body)}")
        return body

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer, allow_nan=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What is wrong with a request as such, in the form of all errors."""
        self.log_error("%d %s", code, message)
        self._reply(code, {"error": one_line(message or HTTPStatus(code).phrase)})

    def log_request(self, code: object = "-", size: object = "-") -> None:
        """No line per batch; errors are still logged."""

    def log_message(self, format: str, *args: Any) -> None:
        say(one_line(f"reward server: {self.address_string()}: {format % args}"))


def parse_request(body: bytes | bytearray, max_pixels: int) -> tuple[Tensor, list[str], list[dict[str, Any]]]:
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
