"""The page on which a person compares images: served on loopback, to the browser of this machine alone."""

from __future__ import annotations

import html
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal, cast

from rlhf_t2i.errors import RunError

Answer = Literal["left", "right", "equal"]
_ANSWERS = ("left", "right", "equal")
_LONGEST_BODY = 1024
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Compare images</title>
<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark }
body { font: 16px system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; text-align: center }
.pair { display: flex; gap: 1rem; justify-content: center }
.pair button { padding: .5rem; flex: 1; max-width: 32rem }
.pair img { width: 100%; image-rendering: auto }
#prompt { font-size: 1.25rem }
</style></head><body>
<h1>QUESTION</h1>
<p id="prompt"></p>
<div class="pair" id="pair" hidden>
<button id="left"><img id="first" alt="left image"></button>
<button id="right"><img id="second" alt="right image"></button>
</div>
<p><button id="equal" hidden>Equally good</button></p>
<p id="status" role="status">Waiting for images. This page asks again by itself.</p>
<p>Keys: left arrow, right arrow, and = for equally good.</p>
<script>
let current = null;
const get = id => document.getElementById(id);
async function next() {
  current = await (await fetch("/next")).json();
  const ready = current.id !== null;
  get("pair").hidden = get("equal").hidden = !ready;
  get("status").textContent = ready ? `${current.done} of ${current.total} done` :
    "Waiting for images. This page asks again by itself.";
  get("prompt").textContent = ready ? current.prompt : "";
  if (!ready) { setTimeout(next, 1000); return; }
  get("first").src = `/image/${current.id}/left.png`;
  get("second").src = `/image/${current.id}/right.png`;
}
async function choose(choice) {
  if (!current || current.id === null) return;
  const body = JSON.stringify({id: current.id, choice});
  current = null;
  await fetch("/answer", {method: "POST", headers: {"Content-Type": "application/json"}, body});
  next();
}
for (const choice of ["left", "right", "equal"]) get(choice).onclick = () => choose(choice);
document.onkeydown = event => {
  const choice = {ArrowLeft: "left", ArrowRight: "right", "=": "equal"}[event.key];
  if (choice) choose(choice);
};
next();
</script></body></html>
"""


@dataclass(frozen=True)
class Comparison:
    """Two images of a prompt, as PNG files."""

    prompt: str
    left: bytes
    right: bytes


class ComparisonServer:
    """Shows comparisons one by one and collects the answers.

    Args:
        port: On 127.0.0.1; 0 takes any free one.
        question: Above the images.

    Raises:
        RunError: The port is taken.
    """

    def __init__(self, port: int, question: str) -> None:
        self._page = _PAGE.replace("QUESTION", html.escape(question)).encode()
        self._changed = threading.Condition()
        self._asked: list[Comparison] = []
        self._answers: list[Answer] = []
        self._first = 0  # the number of the first comparison of this call: old answers of a page are ignored
        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), _handler(self))
        except OSError as error:
            raise RunError(f"the page for comparisons cannot be served on port {port}: {error.strerror}") from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """End the server."""
        self._server.shutdown()
        self._server.server_close()

    def ask(self, comparisons: Sequence[Comparison]) -> list[Answer]:
        """Show the comparisons and wait for all answers, in their order."""
        with self._changed:
            self._asked, self._answers = list(comparisons), []
            while len(self._answers) < len(self._asked):
                self._changed.wait(1.0)  # a signal is served between
            answers, self._asked, self._answers = self._answers, [], []
            self._first += len(answers)
            return answers

    def page(self) -> bytes:
        """The page itself."""
        return self._page

    def next(self) -> dict[str, object]:
        """What to show now; its id is null while there is nothing."""
        with self._changed:
            done, total = len(self._answers), len(self._asked)
            if done == total:
                return {"id": None}
            return {"id": self._first + done, "prompt": self._asked[done].prompt, "done": done, "total": total}

    def image(self, number: int, side: str) -> bytes | None:
        """The PNG file of a comparison that is asked now; None of any other."""
        with self._changed:
            index = number - self._first
            if side not in ("left", "right") or not 0 <= index < len(self._asked):
                return None
            return self._asked[index].left if side == "left" else self._asked[index].right

    def answer(self, number: object, choice: object) -> bool:
        """Take an answer to the comparison that is shown; False for any other, or an unknown choice."""
        with self._changed:
            waiting = len(self._answers) < len(self._asked)
            if not waiting or number != self._first + len(self._answers) or choice not in _ANSWERS:
                return False
            self._answers.append(cast(Answer, choice))
            self._changed.notify_all()
            return True


def _handler(server: ComparisonServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._is_own():
                return self._send(403, b"", "text/plain")
            if self.path == "/":
                return self._send(200, server.page(), "text/html; charset=utf-8")
            if self.path == "/next":
                return self._send(200, json.dumps(server.next()).encode(), "application/json")
            parts = self.path.strip("/").split("/")
            if len(parts) == 3 and parts[0] == "image" and parts[1].isascii() and parts[1].isdigit():
                image = server.image(int(parts[1][:12]), parts[2].removesuffix(".png"))
                if image is not None:
                    return self._send(200, image, "image/png")
            return self._send(404, b"", "text/plain")

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            # Another site's page can send a form here, but no JSON without asking first, which is not answered.
            wanted = self.path == "/answer" and self.headers.get("Content-Type") == "application/json"
            if not self._is_own() or not wanted or not length.isdigit() or int(length) > _LONGEST_BODY:
                return self._send(403, b"", "text/plain")
            try:
                body = json.loads(self.rfile.read(int(length)))
                taken = server.answer(body["id"], body["choice"])
            except (ValueError, KeyError, TypeError):
                return self._send(400, b"", "text/plain")
            return self._send(200 if taken else 409, b"{}", "application/json")

        def _is_own(self) -> bool:
            """Whether the request was made to this address: a name that someone points at 127.0.0.1 is refused."""
            return self.headers.get("Host") in (f"127.0.0.1:{server.port}", f"localhost:{server.port}")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return Handler
