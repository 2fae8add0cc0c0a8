"""The HTTP scorer against a server on loopback: the protocol, retries, time-outs, and answers that are wrong."""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.plugins import consent, registry
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.roles.reward_failure import RewardFailure
from tests.limits import HANG_S
from tests.rewards.builders import Identity

HELD = -1.0
"""A delay: until the next request."""


class Server:
    """Answers each request with the next of a list of (status, body, delay); the last one repeats."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any, float]] = []
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.location = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.headers.append(self.headers)
                status, body, delay = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if delay == HELD:
                    number = len(outer.requests)
                    while len(outer.requests) == number:
                        time.sleep(0.01)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    if outer.location:
                        self.send_header("Location", outer.location)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up, as it should

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.server.shutdown()
    running.server.server_close()


IMAGES = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
GOOD = (200, {"scores": [1.5, -2]}, 0.0)


def reward(server: Server, **options: Any) -> Any:
    return registry.reward("http", url=server.url, **({"timeout_s": HANG_S, "backoff_s": 0.01} | options))


def test_it_sends_prompts_and_exact_png_images(server: Server) -> None:
    server.answers = [GOOD]
    scores = reward(server).score(IMAGES, ["a", "b"])
    assert scores.tolist() == [1.5, -2.0]
    (request,) = server.requests
    assert request["prompts"] == ["a", "b"]
    sent = np.asarray(Image.open(io.BytesIO(base64.b64decode(request["images"][1]))))
    assert np.array_equal(sent, (IMAGES[1].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def test_it_retries_after_a_server_error_and_a_time_out(server: Server) -> None:
    server.answers = [(503, {}, 0.0), (200, {}, HELD), GOOD]
    # Many retries: on a busy machine a good answer may be late, too.
    assert reward(server, timeout_s=0.3, retries=100).score(IMAGES, ["a", "b"]).tolist() == [1.5, -2.0]
    assert len(server.requests) >= 3


def test_it_gives_up_with_the_last_reason(server: Server) -> None:
    server.answers = [(500, {}, 0.0)]
    with pytest.raises(RunError, match=r"no answer in 3 attempts: status 500"):
        reward(server, retries=2).score(IMAGES, ["a", "b"])
    assert len(server.requests) == 3


def test_a_closed_port_is_an_error_too() -> None:
    closed = registry.reward("http", url="http://127.0.0.1:9/", retries=1, backoff_s=0)
    with pytest.raises(RunError, match=r"no answer in 2 attempts: ConnectError"):
        closed.score(IMAGES, ["a", "b"])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, b"unknown prompt", 0.0), "answered 400: unknown prompt"),
        ((200, b"<html>", 0.0), "did not answer with JSON"),
        ((200, {"scores": [1.0]}, 0.0), "did not answer .*2 numbers"),
        ((200, {"scores": [1.0, "high"]}, 0.0), "did not answer .*2 numbers"),
        ((200, [1.0, 2.0], 0.0), "did not answer .*2 numbers"),
    ],
)
def test_a_wrong_answer_is_not_repeated(server: Server, answer: tuple[int, Any, float], message: str) -> None:
    server.answers = [answer]
    with pytest.raises(RunError, match=message):
        reward(server).score(IMAGES, ["a", "b"])
    assert len(server.requests) == 1


def test_a_nan_from_the_server_stops_the_run(server: Server) -> None:
    server.answers = [(200, b'{"scores": [1.0, NaN]}', 0.0)]
    role = RewardRole({"remote": reward(server)}, Identity(), device=torch.device("cpu"))
    with pytest.raises(RewardFailure, match=r"'remote' failed on the prompt 'b': its value is not finite"):
        role.score(IMAGES, ["a", "b"])


def test_the_token_comes_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [GOOD]
    monkeypatch.setenv("SCORER_TOKEN", "secret")
    monkeypatch.setenv(consent.VARIABLES["tokens"], "SCORER_TOKEN")
    reward(server, token_env="SCORER_TOKEN").score(IMAGES, ["a", "b"])
    assert server.headers[0]["Authorization"] == "Bearer secret"
    monkeypatch.delenv("SCORER_TOKEN")
    with pytest.raises(UsageError, match=r"SCORER_TOKEN is not set"):
        reward(server, token_env="SCORER_TOKEN")


@pytest.mark.parametrize("token", ["secret\n", "sec\nret", "sécret"], ids=["line end", "two lines", "accent"])
def test_a_token_that_no_header_takes_is_not_shown(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An HTTP client's error quotes it, and would be kept in failures/."""
    monkeypatch.setenv("SCORER_TOKEN", token)
    monkeypatch.setenv(consent.VARIABLES["tokens"], "SCORER_TOKEN")
    with pytest.raises(UsageError, match="SCORER_TOKEN holds a character that no HTTP header can hold") as caught:
        registry.reward("http", url="http://127.0.0.1:9/", token_env="SCORER_TOKEN")
    assert "ret" not in str(caught.value)


def test_it_cannot_train() -> None:
    assert registry.load_class(registry.REWARDS, "http").differentiable is False


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "http://", "https://[::1", "http://host:99999/", "http://h/\x1b[31m", "http://h/a b"]
)
def test_it_needs_a_web_address(url: str) -> None:
    with pytest.raises(UsageError, match=r"reward 'http': url: ") as caught:
        registry.reward("http", url=url)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["header", "body"])
def test_a_server_that_drips_is_given_up_in_time(part: str) -> None:
    """A byte every 50 ms: no single read times out."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n" + b"\r\n" * (part == "body"))
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        slow = registry.reward("http", url=f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout_s=0.5, retries=0)
        with pytest.raises(RunError, match=r"no answer in 1 attempts: not done within 0.5 s"):
            slow.score(IMAGES, ["a", "b"])
        thread.join(HANG_S)
        assert not thread.is_alive()  # the connection is closed


def test_a_status_of_three_hundred_without_an_address_is_an_answer(server: Server) -> None:
    server.answers = [(304, {}, 0.0)]
    with pytest.raises(RunError, match="answered 304"):
        reward(server).score(IMAGES, ["a", "b"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("home", [True, False])
def test_a_redirect_is_not_followed(status: int, home: bool, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures, prompts and the token are for the host that the recipe names."""
    other = Server()
    target = server.url + "/moved" if home else other.url
    server.answers, other.answers = [(status, {}, 0.0)], [GOOD]
    server.location = target
    monkeypatch.setenv("SCORER_TOKEN", "secret")
    monkeypatch.setenv(consent.VARIABLES["tokens"], "SCORER_TOKEN")
    try:
        with pytest.raises(RunError, match=f"redirects to {target}, which is not followed"):
            reward(server, token_env="SCORER_TOKEN").score(IMAGES, ["a", "b"])
        assert (len(server.requests), len(other.requests)) == (1, 0)
    finally:
        other.server.shutdown()
        other.server.server_close()


@pytest.mark.parametrize(
    "body", [b'{"scores": [1, ' + b" " * 10_000_000 + b"2]}", b"[" * 5000], ids=["10 MB of spaces", "5 KB of brackets"]
)
def test_an_answer_longer_than_its_scores_is_refused(body: bytes, server: Server) -> None:
    server.answers = [(200, body, 0.0)]
    with pytest.raises(RunError, match="answered with over 4224 bytes"):
        reward(server).score(IMAGES, ["a", "b"])
    assert len(server.requests) == 1


# Named, because pytest would make the names from the bytes, and a gzip file holds the second it was written in.
TRAPS = {
    "nesting": b"[" * 4000,
    "huge number": b'{"scores": [1, 1' + b"0" * 400 + b"]}",
    "gzip": gzip.compress(b"[1, 2]"),
}


@pytest.mark.parametrize("body", TRAPS.values(), ids=TRAPS)
def test_short_answers_that_are_traps(body: bytes, server: Server) -> None:
    server.answers = [(200, body, 0.0)]
    with pytest.raises(RunError, match=r"did not answer with JSON|number too large"):
        reward(server).score(IMAGES, ["a", "b"])


def test_an_error_page_is_shown_short_and_without_control_characters(server: Server) -> None:
    server.answers = [(404, b"\x1b[31mno\n" + b"x" * 1_000_000, 0.0)]
    with pytest.raises(RunError, match=r"answered 404:  \[31mno x{100}") as caught:
        reward(server).score(IMAGES, ["a", "b"])
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)
    assert server.headers[0]["Accept-Encoding"] == "identity"
