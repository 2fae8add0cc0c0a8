"""The page for people: answers through HTTP and in a headless browser, Bradley-Terry, and who may not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from rlhf_t2i_plugins.rewards.human import bradley_terry, pairs
from rlhf_t2i_plugins.rewards.human_page import ComparisonServer

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation.run import Evaluation
from rlhf_t2i.evaluation.settings import Settings
from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.comparing import one_alone
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import checks
from tests.limits import HANG_S
from tests.report.headless import chromium

PROMPTS = ["a cat", "a cat", "a cat", "a <b>dog</b>", "a <b>dog</b>"]
BRIGHT = torch.tensor([0.1, 0.9, 0.5, 0.8, 0.2])
IMAGES = BRIGHT[:, None, None, None].expand(5, 3, 8, 8)
get, post = (partial(call, timeout=HANG_S) for call in (httpx.get, httpx.post))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation__images_per_prompt": 2, "evaluation__batch_size": 3}, "batch_size (3)"),
        ({"evaluation__images_per_prompt": 4, "evaluation__images": 9}, "images (9)"),
        ({"algorithm__rewards__0__micro_batch": 1}, "every reward's micro_batch"),
        ({"placement": "{mode: ray, groups: {a: {devices: 2, roles: [learner, assistant, reference, reward]}}}"},
         "a group of one device"),
    ],
)  # fmt: skip
def test_a_run_that_would_show_an_image_alone_is_refused_at_once(
    changes: dict[str, Any], words: str, make_recipe: Callable[..., Recipe]
) -> None:
    recipe = make_recipe(algorithm__eval_rewards="[{name: human}]", **changes)
    with pytest.raises(UsageError, match="compares the images of a prompt") as refused:
        checks.check_plugins(recipe)
    assert words in str(refused.value)
    checks.check_plugins(make_recipe(algorithm__eval_rewards="[{name: human}]"))


def test_a_surrogate_of_it_compares_too(make_recipe: Callable[..., Recipe], tiny_clip: Path) -> None:
    of = "{of: {name: human}, features: '" + str(tiny_clip) + "', images_per_prompt: 2, batch: "
    for batch, words in ((1, "multiple of images_per_prompt"), (2, "batch_size")):
        rewards = f"[{{name: surrogate, options: {of}{batch}}}}}]"
        with pytest.raises(UsageError, match=words):
            checks.check_plugins(make_recipe(algorithm__rewards=rewards, evaluation__batch_size=3))


def test_an_evaluation_that_would_show_an_image_alone_is_refused_at_once(tiny_sdxl: Path, tiny_prompts: Path) -> None:
    asked = {"prompts": str(tiny_prompts), "metrics": ["human"], "height": 16, "width": 16, "limit": 2}
    for numbers in ({"images_per_prompt": 1}, {"images_per_prompt": 2, "batch_size": 3}):
        with pytest.raises(UsageError, match="compares the images of a prompt"):
            Evaluation(Settings(model=str(tiny_sdxl), **asked, **numbers), Path("unused"), lambda *_: None)


@pytest.mark.parametrize(
    ("images", "per_prompt", "sizes", "alone"),
    [
        (8, 2, [4], False),
        (8, 2, [3], True),
        (9, 4, [4], True),
        (8, 1, [4], True),
        (8, 4, [6], False),
        (8, 4, [4, 3], True),
    ],
)
def test_who_is_alone(images: int, per_prompt: int, sizes: list[int], alone: bool) -> None:
    assert one_alone(images, per_prompt, sizes) == alone


@pytest.fixture
def reward() -> Iterator[Any]:
    built: Any = registry.reward("human", port=0)
    yield built
    built.close()


class Scoring:
    """A call of ``score`` in a thread."""

    def __init__(self, reward: Any) -> None:
        self.url = reward.url
        self._values: Future[torch.Tensor] = Future()
        threading.Thread(target=self._run, args=(reward,), daemon=True).start()

    def _run(self, reward: Any) -> None:
        try:
            self._values.set_result(reward.score(IMAGES, PROMPTS))
        except BaseException as error:
            self._values.set_exception(error)

    def result(self) -> torch.Tensor:
        return self._values.result(HANG_S)


def brightness(url: str, number: int, side: str) -> float:
    from io import BytesIO

    from PIL import Image

    return float(np.asarray(Image.open(BytesIO(get(f"{url}image/{number}/{side}.png").content))).mean())


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread or the browser does."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def test_the_brighter_image_wins_and_a_stale_answer_does_not_count(reward: Any) -> None:
    scoring = Scoring(reward)
    until(lambda: get(f"{scoring.url}next").json()["id"] is not None)
    shown = []
    while (now := get(f"{scoring.url}next").json())["id"] is not None:
        number = now["id"]
        shown.append(now["prompt"])
        left, right = (brightness(scoring.url, number, side) for side in ("left", "right"))
        answer = {"id": number, "choice": "left" if left > right else "right"}
        assert post(f"{scoring.url}answer", json=answer).status_code == 200
        assert post(f"{scoring.url}answer", json=answer).status_code == 409  # the same one twice
    values = scoring.result()
    assert shown == ["a cat"] * 3 + ["a <b>dog</b>"]
    assert values[:3].argsort().tolist() == [0, 2, 1]
    assert float(values[3]) > float(values[4])
    assert torch.allclose(values[:3].sum(), torch.zeros(()), atol=1e-6)
    assert get(f"{scoring.url}image/0/left.png").status_code == 404


def test_a_person_in_a_browser_compares_with_keys_and_clicks(reward: Any) -> None:
    scoring = Scoring(reward)
    with chromium() as browser:
        browser.session.get(scoring.url)

        def shows(prompt: str, done: str) -> None:
            until(lambda: browser.script("return document.getElementById('prompt').textContent") == prompt)
            until(lambda: browser.script("return document.getElementById('status').textContent") == done)
            until(lambda: browser.script("return document.getElementById('second').naturalWidth") == 8)

        shows("a cat", "0 of 4 done")
        browser.script("document.getElementById('left').click()")
        shows("a cat", "1 of 4 done")
        browser.script("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))")
        shows("a cat", "2 of 4 done")
        browser.script("document.getElementById('equal').click()")
        shows("a <b>dog</b>", "3 of 4 done")  # as text, not as tags
        browser.script("document.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft'}))")
        values = scoring.result()
        until(lambda: "Waiting" in browser.script("return document.getElementById('status').textContent"))
        assert browser.errors() == []
    asked = [*pairs([0, 1, 2], 8), (3, 4)]
    expected = bradley_terry(5, asked, ["left", "right", "equal", "left"], 1.0)
    for rows in ([0, 1, 2], [3, 4]):
        expected[rows] -= expected[rows].mean()
    assert np.allclose(values.numpy(), expected, atol=1e-6)


def test_only_this_page_may_answer(reward: Any) -> None:
    scoring = Scoring(reward)
    until(lambda: get(f"{scoring.url}next").json()["id"] == 0)
    body = {"id": 0, "choice": "left"}
    foreign = {"Host": "evil.example"}  # a name that its owner points at 127.0.0.1
    assert get(scoring.url, headers=foreign).status_code == 403
    assert post(f"{scoring.url}answer", json=body, headers=foreign).status_code == 403
    assert post(f"{scoring.url}answer", data=body).status_code == 403  # a form of another site
    assert post(f"{scoring.url}answer", json={"id": 0, "choice": "x" * 2000}).status_code == 403
    assert post(f"{scoring.url}answer", json=[]).status_code == 400
    assert post(f"{scoring.url}answer", json={"id": 0, "choice": "both"}).status_code == 409
    assert get(f"{scoring.url}image/../next").status_code in (200, 404)
    assert get(f"{scoring.url}next").json()["done"] == 0


def test_one_image_alone_and_a_taken_port_are_errors(reward: Any) -> None:
    with pytest.raises(ValueError, match="one image alone of the prompt 'a cat'"):
        reward.score(IMAGES[:1], PROMPTS[:1])
    port = int(reward.url.rstrip("/").rpartition(":")[2])
    with pytest.raises(RunError, match=f"cannot be served on port {port}"):
        ComparisonServer(port, "Which?")


def test_bradley_terry_finds_the_values_that_made_the_choices() -> None:
    draw, true = np.random.default_rng(0), np.array([-1.0, 0.0, 1.5])
    asked = [(a, b) for a in range(3) for b in range(3) if a != b] * 300
    chance = [1 / (1 + np.exp(true[b] - true[a])) for a, b in asked]
    answers: Any = ["left" if draw.random() < p else "right" for p in chance]
    found = bradley_terry(3, asked, answers, 1e-3)
    assert np.allclose(found - found.mean(), true - true.mean(), atol=0.25)
    assert np.allclose(bradley_terry(2, [(0, 1)], ["equal"], 1.0), 0)
    once, ten = (bradley_terry(2, [(0, 1)] * n, ["left"] * n, 1.0)[0] for n in (1, 10))
    assert 0 < once < ten < 3  # the prior bounds what one answer says


def test_few_pairs_connect_all_images_and_sides_take_turns() -> None:
    assert pairs([4, 5, 6], 2) == [(4, 5), (6, 5)]
    assert len(pairs([0, 1, 2, 3], 99)) == 6
