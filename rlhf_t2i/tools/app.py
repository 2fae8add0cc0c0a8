"""A web page on loopback that draws with several models side by side (Gradio, the extra ``app``)."""

from __future__ import annotations

import base64
import html
import importlib.util
import os
import secrets
from typing import TYPE_CHECKING

from rlhf_t2i.errors import RunError, UsageError, first_line
from rlhf_t2i.tools.side_by_side import Picture, SideBySide
from rlhf_t2i.utils import images, numbers

if TYPE_CHECKING:
    import gradio
    from starlette.middleware import Middleware
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = "127.0.0.1"
_MOST_SEEDS = 4
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; font-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; worker-src 'self' blob:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'self'"
)
"""The browser loads nothing from another machine, whatever Gradio's page asks for."""
_CSS = """
.gradio-container { max-width: 1100px !important; margin: 0 auto !important; }
footer { display: none !important; }
.seed-row {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 140px), 1fr)); gap: 16px; margin: 0 0 20px;
}
.seed-row figure { margin: 0; min-width: 0; }
.seed-row h3 { margin: 0 0 6px; font-size: 0.95rem; font-weight: 600; overflow-wrap: anywhere; }
.seed-row img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 8px; }
.seed-row dl { display: grid; grid-template-columns: 1fr auto auto; gap: 2px 12px; margin: 8px 0 0; font-size: 0.9rem; }
.seed-row dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.seed-row .up { color: #1a7f4b; } .seed-row .down { color: #b3372f; }
.dark .seed-row .up { color: #5fcf95; } .dark .seed-row .down { color: #f08a80; }
.seed-note { color: var(--body-text-color-subdued); font-size: 0.85rem; margin: 0 0 8px; }
"""


def check() -> None:
    """Refuse to start without Gradio.

    Raises:
        UsageError: It is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("the app needs Gradio: pip install 'rlhf-t2i[app]'")


def serve(board: SideBySide, port: int | None = None, block: bool = True) -> gradio.Blocks:
    """Serve the page on 127.0.0.1 until Ctrl-C.

    Args:
        board: Models and rewards.
        port: Of the server; the first free one from 7860 when None.
        block: Return only when the server has stopped.

    Returns:
        The page; its ``local_url`` is the address.

    Raises:
        UsageError: The port is taken.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # Gradio asks its own server whether it has started; a proxy of the environment could not.
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), HOST, "localhost"]))
    import gradio

    page = build(board)
    try:
        page.launch(
            server_name=HOST, server_port=port, share=False, inbrowser=False, quiet=True, ssr_mode=False, pwa=False,
            enable_monitoring=False, mcp_server=False, footer_links=[], prevent_thread_lock=True, css=_CSS,
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
            app_kwargs={"middleware": _middleware(), "docs_url": None, "redoc_url": None},
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--port: {first_line(error)}") from None
    if block:
        print(f"Open {page.local_url} (Ctrl-C stops it; only this machine can reach it)", flush=True)
        page.block_thread()
    return page


def build(board: SideBySide) -> gradio.Blocks:
    """The page: prompt, seed and rewards, and below them one picture per model."""
    import gradio

    def draw(prompt: str, seed: float, count: float, rewards: list[str]) -> str:
        try:
            seeds = [int(seed) + index for index in range(int(count))]
            rows = [_row(board.draw(prompt, number, rewards), number, prompt) for number in seeds]
        except (UsageError, RunError) as error:
            raise gradio.Error(html.escape(str(error)), print_exception=False) from None
        return "".join(rows)

    with gradio.Blocks(title="rlhf-t2i", analytics_enabled=False) as page:
        gradio.Markdown("## The same prompt and noise, side by side")
        with gradio.Row():
            first = board.prompts[0] if board.prompts else ""
            prompt = gradio.Textbox(first, label="Prompt", scale=6, min_width=320, elem_id="prompt", autofocus=True)
            seed = gradio.Number(0, label="Seed of all models", precision=0, minimum=0, scale=2, elem_id="seed")
            count = gradio.Slider(1, _MOST_SEEDS, 1, step=1, label="Seeds", scale=2)
        labels = list(board.rewards)
        rewards = gradio.CheckboxGroup(
            labels, value=labels, label="Scores under the pictures", visible=bool(labels), elem_id="rewards"
        )
        with gradio.Row():
            button = gradio.Button("Draw", variant="primary", elem_id="draw")
            other = gradio.Button("Draw with another seed", elem_id="reseed")
        if len(board.prompts) > 1:
            gradio.Examples(board.prompts, prompt, label="Prompts of the run")
        shown = gradio.HTML(elem_id="pictures", padding=False)
        given = [prompt, seed, count, rewards]
        gradio.on([button.click, prompt.submit], draw, given, shown, api_visibility="private")
        other.click(lambda: secrets.randbelow(2**31), None, seed, api_visibility="private").then(
            draw, given, shown, api_visibility="private"
        )
    return page


def _row(drawn: dict[str, Picture], seed: int, prompt: str) -> str:
    """The pictures of one seed; scores after the first one's say how far they are from it."""
    first = next(iter(drawn.values()))
    figures = []
    for name, picture in drawn.items():
        uri = f"data:image/png;base64,{base64.b64encode(images.png(picture.image)).decode()}"
        scores = "".join(
            _score(label, value, None if picture is first else first.scores[label])
            for label, value in picture.scores.items()
        )
        figures.append(
            f'<figure><h3>{html.escape(name)}</h3><img src="{uri}" alt="{html.escape(prompt, quote=True)}">'
            f"<dl>{scores}</dl></figure>"
        )
    return f'<p class="seed-note">seed {seed}</p><div class="seed-row">{"".join(figures)}</div>'


def _score(label: str, value: float, before: float | None) -> str:
    change = "" if before is None else numbers.signed(value - before)
    kind = "" if before is None or value == before else "up" if value > before else "down"
    return f'<dt>{html.escape(label)}</dt><dd>{numbers.number(value)}</dd><dd class="{kind}">{change}</dd>'


def _middleware() -> list[Middleware]:
    """Answer only requests for this machine's own names, and forbid the page to load anything from elsewhere."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    return [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]), Middleware(_SamePage)]


class _SamePage:
    """Adds the page's content security policy to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        await self._app(scope, receive, with_policy)
