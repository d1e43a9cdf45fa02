"""Client of a reward server: images go out as PNG in JSON, numbers come back. The format is in `server`'s docstring.

The server is a program of others, and may be broken or hostile: what it sends is bounded in size and in time.
"""

from __future__ import annotations

import base64
import json
import math
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from reprlib import repr as short_repr
from threading import Lock, Thread
from typing import Annotated, Any

import requests
from pydantic import Field
from requests.adapters import HTTPAdapter
from torch import Tensor
from urllib3 import HTTPConnectionPool
from urllib3.exceptions import HTTPError

from fastguard.errors import UserError
from fastguard.rewards.base import RewardError, one_line
from fastguard.rewards.images import encode_png, to_pil
from fastguard.rewards.options import checked

CONNECT_S = 10.0
LONGEST_WAIT_S = 120.0
ANSWER_BYTES = 1_000_000
"""An answer may have these, for an error's words or a proxy's page, ..."""
SCORE_BYTES = 100
"""... and for each image these; a float64 in JSON has up to 25."""
TRIED_AGAIN = {429, *range(500, 600)}


class RemoteReward:
    """Scores of a reward server, for `use = "http://host:port"`; images arrive there exactly.

    A lost connection, no answer in time, and the statuses 429 and 5xx are tried again: at once, then after 2, 4, 8, ...
    times backoff_s, or after the seconds of the server's Retry-After. A call ends after `longest_s` =
    (retries + 1) * timeout_s and the waits between (243 s unless options say otherwise), whatever the server does;
    that should stay below scoring.timeout_s.

    Options:
        timeout_s: seconds for one try: to connect (at most 10), send the images, and get the whole answer
        retries: tries after the first
        backoff_s: half the seconds before the second retry; each later wait is twice as long, up to two minutes
    """

    @checked
    def __init__(
        self,
        address: str,
        timeout_s: Annotated[float, Field(gt=0, le=1e6)] = 60.0,  # sockets wait for at most 2**31 ms
        retries: Annotated[int, Field(ge=0, le=1000)] = 3,
        backoff_s: Annotated[float, Field(ge=0, le=LONGEST_WAIT_S / 2)] = 0.5,
    ) -> None:
        try:
            requests.Request("POST", address).prepare()
        except ValueError as error:
            raise UserError(f"rewards.use = {address!r}: {error}; expected http://host:port") from error
        self.url = f"{address.rstrip('/')}/score"
        self.timeout_s = timeout_s
        self.waits = [min(backoff_s * 2.0**retry, LONGEST_WAIT_S) if retry else 0.0 for retry in range(retries)]
        self.longest_s = (retries + 1) * timeout_s + sum(self.waits)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        """(B, C, H, W) uint8 images to B scores, NaN where the server says null.

        Raises RewardError, with the server's own message if it sent one, in one line of printable text.
        """
        batch = {
            "images": [base64.b64encode(encode_png(image)).decode("ascii") for image in to_pil(images)],
            "prompts": list(prompts),
            "metadata": list(metadata),
        }
        body = json.dumps(batch, allow_nan=False).encode()
        end = time.monotonic() + self.longest_s
        for tries, wait_s in enumerate((*self.waits, math.inf), start=1):
            try:
                return self._try(body, len(images), min(self.timeout_s, end - time.monotonic()))
            except _Again as failure:
                problem = f"{failure} (after {tries} {'try' if tries == 1 else 'tries'})"
                wait_s = max(wait_s, failure.asked_s)
            if time.monotonic() + wait_s >= end:
                break
            time.sleep(wait_s)
        raise RewardError(problem)

    def _try(self, body: bytes, count: int, seconds: float) -> list[float]:
        """Raises _Again for what another try may mend, RewardError for the rest."""
        try:
            answer = _Exchange(self.url, body, ANSWER_BYTES + SCORE_BYTES * count, seconds).answer()
        except (OSError, HTTPError, ValueError) as error:  # requests' errors are OSErrors
            why = str(error) or f"timed out after {seconds:.1f} s"
            raise _Again(one_line(f"{self.url} gave no answer: {why}")) from error
        if answer.status in TRIED_AGAIN:
            asks = f", and asks for {answer.retry_after_s:g} s of rest" if answer.retry_after_s else ""
            raise _Again(_complaint(self.url, answer) + asks, answer.retry_after_s)
        if answer.status != 200:
            raise RewardError(_complaint(self.url, answer))
        return _scores(self.url, answer, count)


class _Again(Exception):
    """A failure that another try may mend, after the seconds that the server asks for."""

    def __init__(self, message: str, asked_s: float = 0.0) -> None:
        super().__init__(message)
        self.asked_s = asked_s


@dataclass(frozen=True)
class _Answer:
    status: int
    body: bytes
    retry_after_s: float
    location: str

    def json(self) -> Any:
        """The body's value, or None for what is no JSON, perhaps a proxy's page."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class _Exchange(HTTPAdapter):
    """One request and its answer, in a thread that is left at the deadline, and whose connection is then cut.

    Timeouts of sockets begin anew with every byte, and resolving a name has none at all.
    """

    def __init__(self, url: str, body: bytes, most_bytes: int, seconds: float) -> None:
        super().__init__()
        self._url = url
        self._body = body
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._lock = Lock()
        self._sockets: list[socket.socket] = []
        self._over = False

    def answer(self) -> _Answer:
        """Raises OSError, urllib3's HTTPError or ValueError for a failed transport, RewardError for a wrong answer."""
        found: Future[_Answer] = Future()
        Thread(target=self._run, args=(found,), name="fastguard-remote", daemon=True).start()
        try:
            return found.result(self._seconds)
        finally:
            with self._lock:
                self._over = True
                for sock in self._sockets:
                    with suppress(OSError):  # closed, as it is after a whole answer
                        sock.shutdown(socket.SHUT_RDWR)

    def _run(self, found: Future[_Answer]) -> None:
        try:
            found.set_result(self._ask())
        except BaseException as error:
            found.set_exception(error)

    def _ask(self) -> _Answer:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        session = requests.Session()
        request = session.prepare_request(requests.Request("POST", self._url, headers, data=self._body))
        settings = session.merge_environment_settings(self._url, {}, True, None, None)  # proxies, certificates
        # Not by the session, which reads the whole body of a redirection, and decompresses it.
        with closing(self), self.send(request, timeout=(min(CONNECT_S, self._seconds), None), **settings) as response:
            encoding = response.headers.get("Content-Encoding", "")
            if encoding.lower() not in ("", "identity"):
                raise RewardError(one_line(f"{self._url}: expected an answer without Content-Encoding, got {encoding}"))
            body = bytearray()
            while piece := response.raw.read(1 << 16, decode_content=False):
                body += piece
                if len(body) > self._most_bytes:
                    raise RewardError(f"{self._url}: the answer is longer than {self._most_bytes} bytes")
        asked = response.headers.get("Retry-After", "").strip()
        asked_s = float(asked) if asked.isascii() and asked.isdecimal() else 0.0
        return _Answer(response.status_code, bytes(body), asked_s, response.headers.get("Location", ""))

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> HTTPConnectionPool:
        """A pool whose connections `answer` can cut."""
        pool = super().get_connection_with_tls_context(*args, **options)
        exchange = self

        class Connection(pool.ConnectionCls):  # type: ignore[name-defined]
            def connect(self) -> None:
                super().connect()
                exchange._connected(self)

        pool.ConnectionCls = Connection
        return pool

    def _connected(self, connection: Any) -> None:
        with self._lock:
            if self._over:
                connection.close()
                raise TimeoutError
            self._sockets.append(connection.sock)
        connection.timeout = None  # the deadline is what counts; sending may take longer than connecting
        connection.sock.settimeout(None)


def _complaint(url: str, answer: _Answer) -> str:
    said = answer.json()
    error = said.get("error") if isinstance(said, dict) else None
    words = error if isinstance(error, str) else answer.body[:500].decode("utf-8", "replace")
    if 300 <= answer.status < 400 and answer.location:
        words += f" (it names {answer.location}; redirections are not followed)"
    return one_line(f"{url} answered {answer.status}: {words}")


def _scores(url: str, answer: _Answer, count: int) -> list[float]:
    said = answer.json()
    scores = said.get("scores") if isinstance(said, dict) else None
    if not isinstance(scores, list):
        start = answer.body[:200].decode("utf-8", "replace")
        raise RewardError(one_line(f'{url}: expected a JSON object with "scores", a list, got {start}'))
    if len(scores) != count:
        raise RewardError(f"{url}: expected {count} scores, got {len(scores)}")
    return [_score(url, score) for score in scores]


def _score(url: str, score: Any) -> float:
    if score is None:
        return math.nan
    try:
        if isinstance(score, int | float) and not isinstance(score, bool):
            return float(score)
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise RewardError(one_line(f"{url}: expected numbers or null as scores, got {short_repr(score)}"))
