"""The reward server: pixels arrive exactly, and no client ends it, fills it or hangs it."""

from __future__ import annotations

import base64
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
import requests
import torch
from helpers import ROOT
from helpers.reward_calls import PATIENCE_S, built, call, listening, mutated, noise
from torch import Tensor

from fastguard.cli import main
from fastguard.config import RewardConfig, ScoringConfig
from fastguard.prompts import Prompt
from fastguard.rewards import RewardError, RewardPool
from fastguard.rewards.images import encode_png, to_pil
from fastguard.rewards.server import RewardServer
from fastguard.utils.terminal import printable


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
def test_a_remote_reward_sees_the_same_pixels_prompts_and_metadata(channels: int) -> None:
    seen: list[tuple[Any, ...]] = []

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        seen.append((images, prompts, metadata, torch.is_grad_enabled()))
        return torch.tensor([0.1, float("nan"), -3e-300, float("inf")], dtype=torch.float64)

    images, prompts = noise(4, channels), ["a", 'quo"ted', "ünïcode 猫", ""]
    metadata = [{"text": "猫"}, {}, {"n": [1, 2.5, None]}, {}]
    with listening(RewardServer(reward, name="mine")) as address:
        scores = built(address + "/")(images, prompts, metadata)
        assert requests.get(f"{address}/health", timeout=PATIENCE_S).json() == {"status": "ok", "reward": "mine"}
    assert str(scores) == str([0.1, float("nan"), -3e-300, float("nan")])
    ((got, got_prompts, got_metadata, grad),) = seen
    assert torch.equal(got, images)
    assert got.dtype == torch.uint8
    assert (got_prompts, got_metadata, grad) == (prompts, metadata, False)


def test_a_remote_reward_that_raises_is_quoted_and_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        calls.append(len(images))
        raise KeyError("no such breed")

    with (
        listening(RewardServer(reward)) as address,
        pytest.raises(RewardError, match="/score answered 500: KeyError: 'no such breed'"),
    ):
        call(built(address, retries=2, backoff_s=0.0), noise())
    assert calls == [4, 4, 4]
    assert "Traceback" in capsys.readouterr().err


def encoded(images: Tensor) -> list[str]:
    return [base64.b64encode(encode_png(image)).decode() for image in to_pil(images)]


def test_bad_requests_are_answered_with_what_is_wrong() -> None:
    good = encoded(noise(2))
    body: Any
    with listening(RewardServer(lambda i, p, m: [1.0] * len(i), max_pixels=1000)) as address:
        for body, message in [
            (b"{", "not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b"\xff\xfe\xfd", "not JSON"),
            ([], "expected a JSON object"),
            ({}, '"images" must be a list'),
            ({"images": [1], "prompts": ["a"]}, '"images" must be a list of strings'),
            ({"images": good, "prompts": "ab"}, '"prompts" must be a list of strings'),
            ({"images": good, "prompts": ["a", "b"], "metadata": [1, 2]}, '"metadata" must be a list of objects'),
            ({"images": good, "prompts": ["a"]}, "got 2 images, 1 prompts and 2 metadata"),
            ({"images": [], "prompts": []}, "at least one"),
            ({"images": ["é"], "prompts": ["a"]}, "images[0]: "),
            ({"images": [good[0], good[1][:-30]], "prompts": ["a", "b"]}, "images[1]: "),
            (
                {"images": [good[0], *encoded(noise(1, 1))], "prompts": ["a", "b"]},
                "images[1] is (1, 17, 23), images[0]",
            ),
            # 17 x 23 = 391 pixels each: the third goes over 1000 although none does alone
            (
                {"images": [*good, good[0]], "prompts": ["a"] * 3},
                "images[2]: 23 x 17 pixels are more than the 218 left",
            ),
        ]:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = requests.post(f"{address}/score", data=data, timeout=PATIENCE_S)
            assert answer.status_code == 400, (body, answer.text)
            assert message in answer.json()["error"], answer.text
        fine = requests.post(f"{address}/score", json={"images": good, "prompts": ["a", "b"]}, timeout=PATIENCE_S)
        assert (fine.status_code, fine.json()) == (200, {"scores": [1.0, 1.0]})  # metadata may be left out
        for method, path in [("GET", "/"), ("POST", "/health")]:
            answer = requests.request(method, address + path, data=b"{}", timeout=PATIENCE_S)
            assert answer.status_code == 404
            assert "POST /score" in answer.json()["error"]
        chunked = requests.post(f"{address}/score", data=iter([b"{}"]), timeout=PATIENCE_S)
        assert chunked.status_code == 411
        assert "expected a Content-Length" in chunked.json()["error"]


def test_a_request_above_the_size_limit_is_refused_unread() -> None:
    scored: list[int] = []

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        scored.append(len(images))
        return [1.0] * len(images)

    with listening(RewardServer(reward, max_request_bytes=1000)) as address:
        with pytest.raises(RewardError, match="answered 413: the request is longer than 1000 bytes; send fewer"):
            call(built(address, retries=0), noise(4))
        # More than sockets buffer: the client still sends when the server has seen enough, and is to hear of it.
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), PATIENCE_S) as raw:
            raw.sendall(b"POST /score HTTP/1.0\r\nContent-Length: 64000000\r\n\r\n" + bytes(64_000_000))
            answer = raw.makefile("rb").read().decode()
        assert answer.startswith("HTTP/1.0 413 ")
        assert "longer than 1000 bytes" in answer
    assert scored == []


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.parametrize(
    ("number", "host", "shown"),
    [
        (signal.SIGINT, "127.0.0.1", "127.0.0.1"),
        (signal.SIGTERM, "127.0.0.1", "127.0.0.1"),
        pytest.param(
            signal.SIGINT, "::1", "[::1]", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
        ),
    ],
    ids=["Ctrl-C", "SIGTERM as the CLI maps it", "IPv6"],
)
def test_run_server_says_where_it_listens_and_ends_with_0(
    number: signal.Signals, host: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", host)
    code = (
        f"import signal, sys; signal.signal({int(number)}, signal.default_int_handler)\n"
        "from fastguard.config import RewardConfig; from fastguard.rewards.server import run_server\n"
        f"sys.exit(run_server(RewardConfig('jpeg_compressibility'), {host!r}, 0))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"reward 'jpeg_compressibility' listens on http://{shown}:")
        images = noise(2)
        assert call(built(line.split()[-1]), images) == call(built("jpeg_compressibility"), images)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 0
        assert process.stdout.read() == "reward server: stopped\n"
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 0), ("300.1.1.1", 8000), ("a..b", 8000), ("127.0.0.1", 70_000)],
    ids=["taken", "no such host", "no host's name", "no port"],
)  # fmt: skip
def test_run_server_says_in_one_line_that_it_cannot_listen(
    host: str, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with RewardServer(giving_ones) as other:
        port = port or other.server_port
        assert main(["reward-server", "jpeg_compressibility", "--host", host, "--port", str(port)]) == 2
    line = capsys.readouterr().err
    assert re.fullmatch(rf"fastguard: (cannot listen on {host}:{port}: .+; choose another .*|port must lie.*)\n", line)


def test_a_reward_server_can_stand_behind_a_pool() -> None:
    def by_index(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        return [float(data["index"]) for data in metadata]

    prompts = [Prompt(f"prompt number {i}", {"index": i}) for i in range(8)]
    with listening(RewardServer(by_index)) as address:
        rewards = [(RewardConfig(address), built(address)), (RewardConfig("x:y"), by_index)]
        with RewardPool(rewards, ScoringConfig(), prompts) as pool:
            for _ in range(3):
                pool.submit(noise(2), torch.tensor([1, 6]))
            assert pool.collect().values.tolist() == [[1, 6] * 3] * 2


# ------------------------------------------------------------------------------------------------ hostile clients


def giving_ones(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    return [1.0] * len(images)


def good_request(*headers: str) -> bytes:
    body = json.dumps({"images": encoded(noise(1)), "prompts": ["a cat"]}).encode()
    head = ["POST /score HTTP/1.1", "Host: x", *(headers or [f"Content-Length: {len(body)}"])]
    return "\r\n".join([*head, "", ""]).encode() + body


def connected(address: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), PATIENCE_S)


def received(raw: socket.socket) -> bytes:
    """All that a server sends; also what came before it reset the connection."""
    found = b""
    with suppress(ConnectionError):
        while piece := raw.recv(1 << 16):
            found += piece
    return found


def answer_to(address: str, request: bytes) -> bytes:
    """The answer to bytes after which the client sends no more."""
    with connected(address) as raw:
        with suppress(OSError):  # it may have been cut already
            raw.sendall(request)
            raw.shutdown(socket.SHUT_WR)
        return received(raw)


def test_200_clients_that_connect_at_once_are_answered(counted: Callable[[str], None]) -> None:
    if int(Path("/proc/sys/net/core/somaxconn").read_text()) < 200:
        pytest.skip("this kernel lets fewer clients wait (net.core.somaxconn)")
    server = RewardServer(giving_ones)
    with ExitStack() as stack:
        clients = []
        for _ in range(200):  # nobody accepts them yet
            raw = stack.enter_context(socket.socket())
            raw.settimeout(PATIENCE_S)
            raw.connect(server.server_address)
            clients.append(raw)
        for raw in clients:
            raw.sendall(good_request())
        with listening(server):
            answered = sum(received(raw).startswith(b"HTTP/1.0 200") for raw in clients)
    counted(f"{answered} of 200 clients at once were answered")
    assert answered == 200


@pytest.mark.parametrize(
    ("headers", "status", "message"),
    [
        (["Accept: */*"], 411, "expected a Content-Length, and no Transfer-Encoding"),
        (["Transfer-Encoding: chunked"], 411, "expected a Content-Length"),
        (["Transfer-Encoding: chunked", "Content-Length: 20"], 411, "no Transfer-Encoding"),
        (["Content-Length: +20"], 400, "expected one Content-Length in bytes, got +20"),
        (["Content-Length: -1"], 400, "got -1"),
        (["Content-Length: 2_0"], 400, "got 2_0"),
        (["Content-Length: 20, 20"], 400, "got 20, 20"),
        (["Content-Length: 20", "Content-Length: 21"], 400, "got 20, 21"),
        (["Content-Length: \u0662\u0660"], 400, "expected one Content-Length"),
        (["Content-Length: \u00b2"], 400, "expected one Content-Length"),
        (["Content-Length: "], 400, "expected one Content-Length"),
        (["Content-Length: " + "9" * 5000], 413, "longer than 256000000 bytes"),
        (["Content-Length: 100000"], 400, "the request announced 100000 bytes, and ended after "),
        (["Content-Length: 20"], 400, "the request is not JSON"),
    ],
)
def test_a_body_of_unclear_length_is_refused(headers: list[str], status: int, message: str) -> None:
    with listening(RewardServer(giving_ones)) as address:
        head, _, body = answer_to(address, good_request(*headers)).partition(b"\r\n\r\n")
        assert head.startswith(f"HTTP/1.0 {status} ".encode()), head
        assert message in json.loads(body)["error"]
        assert answer_to(address, good_request()).startswith(b"HTTP/1.0 200 ")


def test_a_client_that_waits_to_be_told_to_continue_is_answered() -> None:
    request = good_request().replace(b"Host: x", b"Host: x\r\nExpect: 100-continue")
    with listening(RewardServer(giving_ones)) as address:
        assert answer_to(address, request).startswith(b"HTTP/1.0 200 ")


def test_no_memory_is_reserved_for_a_body_that_was_only_announced() -> None:
    with listening(RewardServer(giving_ones)) as address:
        tracemalloc.start()
        try:
            assert answer_to(address, good_request("Content-Length: 200000000")).startswith(b"HTTP/1.0 400 ")
            assert tracemalloc.get_traced_memory()[1] < 10_000_000
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("start", [b"", good_request("Content-Length: 100000")], ids=["head", "body"])
def test_a_client_that_sends_a_byte_now_and_then_is_cut(start: bytes) -> None:
    with listening(RewardServer(giving_ones, receive_s=0.2)) as address, connected(address) as raw:
        raw.sendall(start)
        raw.settimeout(0.02)
        until = time.monotonic() + PATIENCE_S
        cut = False
        while not cut and time.monotonic() < until:
            try:
                raw.sendall(b"x")
                cut = raw.recv(1) == b""
            except TimeoutError:
                pass
            except ConnectionError:
                cut = True
        assert cut


def test_a_rewards_time_is_not_its_clients() -> None:
    deadlines = []

    def reward(images: Tensor, *rest: Any) -> list[float]:
        deadlines.append(len(server._deadlines))
        return [1.0] * len(images)

    server = RewardServer(reward)
    with listening(server) as address:
        assert answer_to(address, good_request()).startswith(b"HTTP/1.0 200 ")
    assert deadlines == [0]


def test_a_client_that_is_gone_when_its_answer_comes_costs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    scoring, gone = threading.Event(), threading.Event()

    def reward(images: Tensor, *rest: Any) -> list[float]:
        scoring.set()
        assert gone.wait(PATIENCE_S)
        return [1.0] * len(images)

    with listening(RewardServer(reward)) as address:
        before = threading.enumerate()
        with connected(address) as raw:
            raw.sendall(good_request())
            assert scoring.wait(PATIENCE_S)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset
        (handler,) = set(threading.enumerate()) - set(before)
        gone.set()
        handler.join(PATIENCE_S)
        assert re.fullmatch(r"reward server: 127.0.0.1 went away: .*\n", capsys.readouterr().err)
        assert answer_to(address, good_request()).startswith(b"HTTP/1.0 200 ")


def test_nothing_that_a_client_or_a_reward_says_acts_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        raise ValueError(f"cannot read {prompts[0]}")

    with listening(RewardServer(reward)) as address:
        for request in (b"GET /\x1b[2J HTTP/1\x9b.1\r\n\r\n", b"\x1b[2J / HTTP/1.1\r\n\r\n", b"POST /\x1b[2J\r\n\r\n"):
            answer_to(address, request)
        with pytest.raises(RewardError) as failure:
            call(built(address, retries=0), noise(1), ["a \x1b[31mcat\x9b \ud800\n\u202e"])
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert re.search(r"ValueError: cannot read a \\x1b\[31mcat\\x9b", err)
    assert printable(err) == err
    assert r"ValueError: cannot read a \x1b[31mcat\x9b \ud800 \u202e" in str(failure.value)
    assert str(failure.value).isprintable()


def fuzzed_requests(count: int, counted: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    """Requests mutated at random are answered or closed, and good ones are answered between them."""
    random, good, statuses = Random(0), good_request(), Counter[str]()
    with listening(RewardServer(giving_ones)) as address:
        for _ in range(count):
            answer = answer_to(address, mutated(good, random))
            status = re.match(rb"HTTP/1.0 ([245]\d\d) |\{\"error\": |$", answer)  # HTTP/0.9 has no status
            assert status, answer
            statuses["2xx" if (status[1] or b"4").startswith(b"2") else "refused or closed"] += 1
            if random.random() < 0.1:
                assert answer_to(address, good).startswith(b"HTTP/1.0 200 ")
        assert answer_to(address, good).startswith(b"HTTP/1.0 200 ")
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert printable(err) == err
    counted(f"{count} mutated requests to the reward server: {dict(statuses)}, 0 tracebacks, 0 hangs")
    assert statuses["refused or closed"] > count // 4


def test_mutated_requests_are_refused(counted: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    fuzzed_requests(60, counted, capsys)


@pytest.mark.slow
def test_many_mutated_requests_are_refused(counted: Callable[[str], None], capsys: pytest.CaptureFixture[str]) -> None:
    fuzzed_requests(2000, counted, capsys)
