"""The client of reward servers: what it tries again, and what no server can do to it."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
import zlib
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from socketserver import StreamRequestHandler, ThreadingTCPServer
from typing import Any

import pytest
from helpers import ROOT
from helpers.reward_calls import PATIENCE_S, built, call, listening, mutated, noise

from fastguard.rewards import RewardError


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


Script = list[tuple[int, bytes]]


class ScriptedServer(ThreadingHTTPServer):
    """Answers with the statuses and bodies of a list, then repeats the last; counts requests."""

    def __init__(self, script: Script, gate: threading.Event | None = None) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:
                handler.rfile.read(int(handler.headers["Content-Length"]))
                self.count += 1
                status, body = script[min(self.count, len(script)) - 1]
                if gate is not None:
                    gate.wait(PATIENCE_S)
                if status == 0:  # drop the connection
                    handler.close_connection = True
                    return
                with suppress(ConnectionError):  # of a client that has given up
                    handler.send_response(status)
                    handler.send_header("Content-Length", str(len(body)))
                    handler.send_header("Location", "http://127.0.0.1:9/")
                    handler.end_headers()
                    handler.wfile.write(body)

            def log_message(handler, format: str, *args: object) -> None:
                pass

        self.count = 0
        super().__init__(("127.0.0.1", 0), Handler)


@pytest.mark.parametrize("failure", [500, 503, 429, 0], ids=["500", "503", "429", "dropped connection"])
def test_a_server_that_fails_twice_and_then_answers_is_waited_for(failure: int) -> None:
    server = ScriptedServer([(failure, b""), (failure, b""), (200, b'{"scores": [1, 2.5]}')])
    with listening(server) as address:
        assert call(built(address, retries=2, backoff_s=0.0), noise(2)) == [1.0, 2.5]
    assert server.count == 3


def test_what_trying_again_cannot_mend_is_not_tried_again() -> None:
    for status in (400, 404, 301):
        server = ScriptedServer([(status, b'{"error": "not like this"}')])
        with listening(server) as address, pytest.raises(RewardError, match=f"answered {status}: not like this"):
            call(built(address, retries=3, backoff_s=0.0), noise(2))
        assert server.count == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>", 'expected a JSON object with "scores", a list, got <html>'),
        (b"[1, 2]", 'expected a JSON object with "scores"'),
        (b'{"scores": 3}', 'expected a JSON object with "scores"'),
        (b'{"scores": [1, 2, 3]}', "expected 2 scores, got 3"),
        (b'{"scores": [1, "2"]}', "expected numbers or null as scores, got '2'"),
        (b'{"scores": [1, true]}', "expected numbers or null as scores, got True"),
    ],
)
def test_answers_that_are_not_scores_are_refused(body: bytes, message: str) -> None:
    with listening(ScriptedServer([(200, body)])) as address, pytest.raises(RewardError, match=message):
        call(built(address, retries=0), noise(2))


def test_a_server_that_does_not_answer_is_given_up() -> None:
    gate = threading.Event()
    server = ScriptedServer([(200, b'{"scores": [1]}')], gate)
    with listening(server) as address:
        try:
            with pytest.raises(RewardError, match=r"/score gave no answer: timed out after 0.1 s \(after 2 tries\)"):
                call(built(address, timeout_s=0.1, retries=1, backoff_s=0.0), noise(1))
            assert server.count == 2
        finally:
            gate.set()
    with pytest.raises(RewardError, match="gave no answer"):  # nobody listens there any more
        call(built(address, retries=0), noise(1))


# ------------------------------------------------------------------------------------------------ hostile servers

Send = Callable[[bytes], None]


class HostileServer(ThreadingTCPServer):
    """Reads a request, then says what it likes until it is done or cut off; `ended` counts how often it was."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, speak: Callable[[Send], None]) -> None:
        class Handler(StreamRequestHandler):
            def handle(handler) -> None:
                length = 0
                while (line := handler.rfile.readline()).strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                handler.rfile.read(length)
                with suppress(OSError):
                    speak(handler.connection.sendall)
                self.ended.release()

        self.ended = threading.Semaphore(0)
        super().__init__(("127.0.0.1", 0), Handler)


def saying(answer: bytes) -> HostileServer:
    return HostileServer(lambda send: send(answer))


def with_body(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*head, "", ""]).encode("latin-1") + body


def zipped(megabytes: int) -> bytes:
    """The gzip stream of so many megabytes of zeros."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    first = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    each = packer.compress(bytes(10**6)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + each * (megabytes - 1)


OK, CHUNKED, GZIP = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Encoding: gzip\r\n"
MEGABYTE = b"1," * 500_000
CHUNK = b"%x\r\n%s\r\n" % (len(MEGABYTE), MEGABYTE)

ENDLESS = {  # what comes first, what follows again and again, and what the client makes of it
    "plain": (OK + b'\r\n{"scores": [', MEGABYTE, "is longer than 1000100 bytes"),
    "chunked": (OK + CHUNKED + b"\r\n", CHUNK, "is longer than 1000100 bytes"),
    "gzip": (OK + GZIP + b"\r\n" + zipped(500), b"", "expected an answer without Content-Encoding, got gzip"),
    "error": (b"HTTP/1.1 503 No\r\n\r\n", MEGABYTE, "is longer than 1000100 bytes"),
    "redirection": (b"HTTP/1.1 301 No\r\nLocation: /\r\n" + GZIP + b"\r\n" + zipped(500), b"", "expected an answer"),
    "status line": (b"HTTP/1.1 200 ", MEGABYTE, "gave no answer: "),
    "header": (OK + b"X: ", MEGABYTE, "gave no answer: "),
    "headers": (OK, b"X: 1\r\n" * 10_000, "gave no answer: "),
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, "gave no answer: timed out"),
    "size of a chunk": (OK + CHUNKED + b"\r\n1;", MEGABYTE, "gave no answer: "),
    "trailers": (OK + CHUNKED + b"\r\n0\r\n", b"X: 1\r\n" * 10_000, "gave no answer: timed out"),
}

ASKING = """
import json, sys, torch
from pathlib import Path
from fastguard.config import RewardConfig
from fastguard.rewards import RewardError, build_reward
def megabytes(name):
    return int(Path("/proc/self/status").read_text().partition(name + ":")[2].split()[0]) / 1024
def ask(address, seconds):
    options = {"timeout_s": float(seconds), "retries": 0}
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    return build_reward(RewardConfig(address, options=options))(images, ["a"], [{}])
ask(*sys.argv[1:3])
for address, seconds in zip(sys.argv[3::2], sys.argv[4::2]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = megabytes("VmRSS")
    try:
        said = str(ask(address, seconds))
    except RewardError as error:
        said = str(error)
    print(json.dumps([megabytes("VmHWM") - before, said]), flush=True)
"""


@pytest.mark.long
def test_an_answer_without_an_end_costs_little_memory(counted: Callable[[str], None]) -> None:
    def speaking(first: bytes, then: bytes) -> HostileServer:
        def speak(send: Send) -> None:
            send(first)
            until = time.monotonic() + PATIENCE_S
            while then and time.monotonic() < until:
                send(then)

        return HostileServer(speak)

    with ExitStack() as stack:
        arguments = [stack.enter_context(listening(saying(with_body(b'{"scores": [1]}')))), str(PATIENCE_S)]
        for first, then, said in ENDLESS.values():
            address = stack.enter_context(listening(speaking(first, then)))
            arguments += [address, "0.5" if "timed out" in said else str(PATIENCE_S)]
        command = [sys.executable, "-c", ASKING, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(zip(ENDLESS, map(json.loads, done.stdout.splitlines()), strict=True))
    counted(f"memory of a client of endless answers: {', '.join(f'{k} + {v[0]:.0f} MB' for k, v in found.items())}")
    for name, (megabytes, said) in found.items():
        assert ENDLESS[name][2] in said, name
        assert said.isprintable(), name
        assert megabytes <= 64, name


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (b"HTTP/1.1 2", b"0"),
        (OK + b"X: ", b"x"),
        (OK + b"Content-Length: 100000\r\n\r\n", b" "),
        (OK + b"\r\n", b" "),
        (OK + CHUNKED + b"\r\n", b"1\r\n \r\n"),
        (OK + CHUNKED + b"\r\n", b"0"),
    ],
    ids=["status line", "header", "body", "body without a length", "chunks", "size of a chunk"],
)
def test_a_byte_now_and_then_does_not_prolong_a_call(first: bytes, then: bytes) -> None:
    def speak(send: Send) -> None:
        send(first)
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            send(then)
            time.sleep(0.02)

    server = HostileServer(speak)
    with listening(server) as address:
        before = time.monotonic()
        with pytest.raises(RewardError, match=r"/score gave no answer: timed out after 0.3 s \(after 2 tries\)"):
            call(built(address, timeout_s=0.3, retries=1), noise(1))
        assert time.monotonic() - before < PATIENCE_S / 2
        for _ in range(2):  # the connections were cut: nobody reads on in the background
            assert server.ended.acquire(timeout=PATIENCE_S / 2)


def test_a_name_that_nobody_resolves_does_not_prolong_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: over.wait(PATIENCE_S))
    before = time.monotonic()
    with pytest.raises(RewardError, match="gave no answer: timed out"):
        call(built("http://far.example:1", timeout_s=0.2, retries=0), noise(1))
    assert time.monotonic() - before < PATIENCE_S / 2
    over.set()


def test_sending_may_take_longer_than_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastguard.rewards.remote.CONNECT_S", 0.2)
    server = socket.create_server(("127.0.0.1", 0))

    def answer_late() -> None:
        raw, _ = server.accept()
        with raw, raw.makefile("rb") as file:
            time.sleep(0.5)  # sockets hold some megabytes, the request has more
            while b"Content-Length" not in (line := file.readline()):
                pass
            length = int(line.split(b":")[1])
            while file.readline().strip():
                pass
            file.read(length)
            raw.sendall(with_body(b'{"scores": [7]}'))

    thread = threading.Thread(target=answer_late)
    thread.start()
    reward = built(f"http://127.0.0.1:{server.getsockname()[1]}", timeout_s=PATIENCE_S, retries=0)
    assert call(reward, noise(1), ["x" * 30_000_000]) == [7]
    thread.join()
    server.close()


def waits_of(monkeypatch: pytest.MonkeyPatch, answer: bytes, **options: Any) -> tuple[list[float], str]:
    """The waits between the tries of a call that fails, and its error."""
    waits: list[float] = []
    monkeypatch.setattr("fastguard.rewards.remote.time", Namespace(monotonic=time.monotonic, sleep=waits.append))
    with listening(saying(answer)) as address, pytest.raises(RewardError) as failure:
        call(built(address, **options), noise(1))
    return waits, str(failure.value)


def test_waits_double_and_follow_the_server_within_the_time_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = "503 Busy"
    body = b'{"error": "busy"}'
    waits, said = waits_of(monkeypatch, with_body(body, status=busy), retries=10)
    assert waits == [0, 1, 2, 4, 8, 16, 32, 64, 120, 120]
    assert said.endswith("/score answered 503: busy (after 11 tries)")
    for value in ("3", "0", "soon", "-5", "²"):
        waits, said = waits_of(monkeypatch, with_body(body, f"Retry-After: {value}", status=busy))
        assert waits == ([3, 3, 3] if value == "3" else [0, 1, 2]), value
    for year in ("31536000", "9" * 5000):
        waits, said = waits_of(monkeypatch, with_body(body, f"Retry-After: {year}", status=busy))
        assert waits == []
        assert re.search(r"answered 503: busy, and asks for (3.1536e\+07|inf) s of rest \(after 1 try\)$", said)


def test_a_call_has_a_stated_end() -> None:
    assert built("http://h:1").longest_s == 4 * 60 + 0 + 1 + 2
    assert built("http://h:1", timeout_s=2, retries=0).longest_s == 2


def test_numbers_in_answers_come_in_many_kinds() -> None:
    answer = with_body(b'{"scores": [null, NaN, Infinity, -1e999, 12345678901234567890, 1e-400]}')
    with listening(saying(answer)) as address:
        scores = call(built(address, retries=0), noise(6))
    assert str(scores) == "[nan, nan, inf, -inf, 1.2345678901234567e+19, 0.0]"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (with_body(b"[" * 100_000), r'expected a JSON object with "scores", a list, got \[\[\['),
        (with_body(b'{"scores": ' + b"[" * 900 + b"]" * 900 + b"}"), r"as scores, got \[\[.*\.\.\."),
        (with_body(b'{"scores": [' + b"1" * 400 + b"]}"), "expected numbers or null as scores, got 111.*111"),
        (with_body(b'{"scores": [' + b"1" * 5000 + b"]}"), 'expected a JSON object with "scores"'),
        (with_body(b'{"scores": ["\\ud800\\u001b[2J"]}'), r"as scores, got '\\ud800\\x1b\[2J'"),
        (with_body(b'{"error": "\\u001b[31m\\n\\ud800"}', status="400 No\x1b"), r"answered 400: \\x1b\[31m \\ud800"),
        (with_body(b'{"error": {"a": 1}}', status="400 No"), r'answered 400: \{"error": \{"a": 1\}\}'),
        (with_body(b"\x1b[2J\xff\xfe", "Content-Type: text/plain; charset=none"), r"got \\x1b\[2J"),
        (with_body(b'{"error": "' + b"x" * 900_000 + b'"}', status="404 No"), r"answered 404: x+\.\.\."),
        (with_body(b"{}", status="301 Moved"), "answered 301: {}"),
        (with_body(b"", "Location: http://b/score/", status="307 No"), r"answered 307: \(it names http://b/score/; "),
        (with_body(b"", status="204 No"), "answered 204:"),
        (with_body(b'{"scores": [1]}').replace(b": 15", b": 16"), "gave no answer: .*IncompleteRead"),
        (b"\x1b[2J", r"gave no answer: .*x1b\[2J"),
        (b"", "gave no answer: "),
    ],
    ids=[
        "deep", "deep score", "beyond float64", "beyond int", "escaped score", "escaped error", "error that is no text",
        "escaped text", "long error", "moved", "moved there", "empty", "short", "no HTTP", "closed",
    ],
)  # fmt: skip
def test_what_a_hostile_server_says_is_told_in_one_printable_line(answer: bytes, message: str) -> None:
    with listening(saying(answer)) as address, pytest.raises(RewardError, match=message) as failure:
        call(built(address, retries=0), noise(1))
    assert str(failure.value).isprintable()
    assert len(str(failure.value)) < 1100


@pytest.mark.parametrize("encoding", ["", "identity", "Identity"])
def test_an_answer_may_say_that_it_is_not_compressed(encoding: str) -> None:
    answer = with_body(b'{"scores": [1, 2]}', f"Content-Encoding: {encoding}")
    with listening(HostileServer(lambda send: send(answer))) as address:
        assert call(built(address, retries=0), noise(2)) == [1.0, 2.0]


ANSWERS = [
    with_body(b'{"scores": [1.5, null]}', "Content-Type: application/json"),
    OK + CHUNKED + b'\r\n9\r\n{"scores"\r\n9\r\n: [1, -2]\r\n1\r\n}\r\n0\r\n\r\n',
    with_body(b'{"error": "no such breed"}', "Retry-After: 1", status="503 Busy"),
    with_body(b"", "Location: http://127.0.0.1:9/score", "Set-Cookie: a=b; Path=/", status="302 Found"),
    b"HTTP/1.1 100 Continue\r\n\r\n" + with_body(b'{"scores": [1, 2]}', "Content-Encoding: identity"),
]


def fuzzed_answers(count: int, counted: Callable[[str], None]) -> None:
    """Answers mutated at random give scores, or a RewardError in one line."""
    random, outcomes = Random(1), Counter[str]()
    answer = b""
    with listening(HostileServer(lambda send: send(answer))) as address:
        reward = built(address, timeout_s=PATIENCE_S, retries=0)
        for _ in range(count):
            answer = mutated(random.choice(ANSWERS), random)
            said = ""
            try:
                scores = call(reward, noise(2))
            except RewardError as error:
                said = str(error)
            assert said or [type(score) for score in scores] == [float, float], answer
            assert said.isprintable(), answer
            assert "timed out" not in said, answer
            outcomes["errors of one line" if said else "scores"] += 1
    counted(f"{count} mutated answers of a reward server: {dict(outcomes)}, 0 tracebacks, 0 hangs")
    assert outcomes["errors of one line"] > count // 4


def test_mutated_answers_give_scores_or_an_error(counted: Callable[[str], None]) -> None:
    fuzzed_answers(60, counted)


@pytest.mark.slow
def test_many_mutated_answers_give_scores_or_an_error(counted: Callable[[str], None]) -> None:
    fuzzed_answers(2000, counted)
