"""The app: the same noise for every model, scores as the rewards give them, and nothing that leaves the machine."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import torch
from typer.testing import CliRunner

import rlhf_t2i
from rlhf_t2i.cli import app as cli
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import export
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe import reading
from rlhf_t2i.tools import app
from rlhf_t2i.tools.side_by_side import RewardSpec, SideBySide, open_models
from tests.limits import HANG_S
from tests.report.headless import chromium

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path, tiny_clip: Path, tiny_prompts: Path) -> Path:
    """A run's folder whose exported generator differs from the initial one."""
    out = tmp_path_factory.mktemp("app") / "night <1>"
    out.mkdir()
    reward = {"name": "pickscore", "options": {"model": str(tiny_clip)}}
    rewards = [reward, {"name": "cfg_implicit"}]
    recipe = reading.build({
        "steps": 1, "data": {"prompts": str(tiny_prompts)}, "algorithm": {"rewards": rewards},
        "models": {"reference": str(tiny_sdxl), "generator": f"{tiny_sdxl}/unet", "height": 16, "width": 16},
    })  # fmt: skip
    (out / "recipe.yaml").write_text(reading.dump(recipe), "utf-8")
    store = ModelStore(recipe.models, recipe.student, CPU)
    weights = {name: weight * 1.05 for name, weight in store.generator_network().state_dict().items()}
    export.write_model(store, weights, out / "model")
    return out


@pytest.fixture(scope="module")
def board(finished: Path) -> SideBySide:
    return open_models([str(finished)], {}, CPU)


def test_a_run_gives_the_generator_before_and_after_and_its_rewards(board: SideBySide) -> None:
    assert list(board.models) == ["night <1>, before", "night <1>, after"]
    assert list(board.rewards) == ["pickscore"]  # cfg_implicit scores latents
    assert len(board.prompts) == 4


def test_pictures_and_scores_are_those_of_sample_and_reward(
    board: SideBySide, finished: Path, tiny_clip: Path, tiny_sdxl: Path
) -> None:
    drawn = board.draw("a red owl", 5, ["pickscore"])
    (aligned,) = rlhf_t2i.load(finished).sample("a red owl", seed=5)
    assert drawn["night <1>, after"].image.tobytes() == aligned.tobytes()
    assert drawn["night <1>, before"].image.tobytes() != aligned.tobytes()
    score = rlhf_t2i.reward("pickscore", model=str(tiny_clip)).score(aligned, "a red owl").item()
    assert drawn["night <1>, after"].scores == {"pickscore": pytest.approx(score, abs=1e-6)}
    again = board.draw("a red owl", 5, [])
    assert {name: picture.image.tobytes() for name, picture in again.items()} == {
        name: picture.image.tobytes() for name, picture in drawn.items()
    }


def test_models_of_one_name_are_told_apart(finished: Path) -> None:
    several = open_models([str(finished), str(finished / "model"), str(finished / "model")], {}, CPU)
    assert list(several.models)[1:] == ["night <1>, after", "model", "model 2"]


def test_what_cannot_be_shown_is_refused(board: SideBySide, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="write a prompt first"):
        board.draw("  ", 0, [])
    with pytest.raises(UsageError, match="no such seed: -1"):
        board.draw("an owl", -1, [])
    with pytest.raises(UsageError, match=r"no such reward: 'pikscore'.*pickscore"):
        board.draw("an owl", 0, ["pikscore"])
    with pytest.raises(UsageError, match="scores latents"):
        open_models([], {"mine": RewardSpec("cfg_implicit")}, CPU)
    with pytest.raises(UsageError, match="no such model"):
        open_models([str(tmp_path / "none")], {}, CPU)


def test_without_gradio_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(cli, ["app", "anything"])
    assert "pip install 'rlhf-t2i[app]'" in str(result.exception)


def test_the_command_opens_what_it_is_given(finished: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = list[tuple[SideBySide, int | None]]()
    monkeypatch.setattr(app, "check", lambda: None)
    monkeypatch.setattr(app, "serve", lambda board, port: served.append((board, port)))
    arguments = ["app", str(finished), str(finished / "model"), "--metrics", "mine=clip", "--port", "7999"]
    result = CliRunner().invoke(cli, [*arguments, "--set", f"mine.model={tiny_clip}", "--device", "cpu"])
    assert result.exception is None
    ((board, port),) = served
    assert port == 7999
    assert list(board.models) == ["night <1>, before", "night <1>, after", "model"]
    assert board.rewards["mine"] == RewardSpec("clip", {"model": str(tiny_clip)})
    for wrong, sentence in ((["--set", "other.model=x"], "'other' is not among --metrics"),
                            (["--precision", "fp8"], "--precision 'fp8'")):  # fmt: skip
        assert sentence in str(CliRunner().invoke(cli, [*arguments, *wrong]).exception)


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses to which this process opens connections."""
    opened, connect = list[str](), socket.socket.connect

    def recorded(self: socket.socket, address: Any) -> None:
        opened.append(str(address[0] if isinstance(address, tuple) else address))
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", recorded)
    return opened


@pytest.mark.slow
def test_in_a_browser(board: SideBySide, addresses: list[str], tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the app extra")
    page = app.serve(board, block=False)
    try:
        with chromium() as browser:
            browser.visit(page.local_url, 1200, "light")
            _wait(browser, "return document.querySelector('#draw') !== null")
            browser.script("document.querySelector('#draw').click()")
            _wait(browser, "return document.querySelectorAll('#pictures img').length === 2")
            size = "i => `${i.naturalWidth}x${i.naturalHeight}`"
            drawn = browser.script(f"return [...document.querySelectorAll('#pictures img')].map({size})")
            names = browser.script("return [...document.querySelectorAll('#pictures h3')].map(e => e.textContent)")
            scores = browser.script("return [...document.querySelectorAll('#pictures dd')].map(e => e.textContent)")
            asked = {urlparse(url).hostname for url in browser.requests() if not url.startswith("blob:")}
            assert drawn == ["16x16", "16x16"]
            assert names == ["night <1>, before", "night <1>, after"]
            assert scores[0].lstrip("\N{MINUS SIGN}").startswith("0.")
            assert scores[3][0] in "+\N{MINUS SIGN}"
            assert browser.errors() == []
            assert asked == {"127.0.0.1"}
    finally:
        page.close()
    assert set(addresses) <= {"127.0.0.1", "localhost", "::1"}


def _wait(browser: Any, condition: str) -> None:
    ends = time.monotonic() + HANG_S
    while not browser.script(condition):
        assert time.monotonic() < ends, condition
        time.sleep(0.2)


def test_the_server_answers_this_machine_alone(board: SideBySide) -> None:
    pytest.importorskip("gradio", reason="the app extra")
    import httpx

    page = app.serve(board, block=False)
    try:
        with httpx.Client(trust_env=False, timeout=HANG_S) as client:
            answer = client.get(page.local_url)
            assert answer.status_code == 200
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            # What a foreign page would send after it has pointed its own name to 127.0.0.1.
            assert client.get(page.local_url, headers={"Host": "evil.example"}).status_code == 400
        assert page.server_name == "127.0.0.1"
        with pytest.raises(UsageError, match="--port"):
            app.serve(board, port=page.server_port, block=False)
    finally:
        page.close()
