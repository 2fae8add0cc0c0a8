"""Scorers without a gradient: a judge behind an endpoint, text in pictures, GenEval's checks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from rlhf_t2i_plugins.rewards.detector import Detection, DetectorReward, outcomes, relations
from rlhf_t2i_plugins.rewards.ocr import quoted
from scipy import ndimage
from torch import Tensor

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.plugins import registry
from rlhf_t2i.utils.images import from_pil
from tests.limits import HANG_S
from tests.rewards.test_http import Server, server

__all__ = ["server"]
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog", "a hat"]


def says(content: Any) -> tuple[int, Any, float]:
    """A chat completion."""
    text = content if isinstance(content, str) else json.dumps(content)
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, 0.0


def judge(server: Server, **options: Any) -> Any:
    defaults = {"timeout_s": HANG_S, "backoff_s": 0.01, "model": "judge-1", "concurrency": 1}
    return registry.reward("vlm_judge", url=server.url, **(defaults | options))


def test_the_judge_is_asked_with_the_rubric_the_prompt_and_the_image(server: Server) -> None:
    server.answers = [says({"score": 7}), says({"score": 2.5, "why": "blurred"}), says('{"score": 0}')]
    reward = judge(server, rubric="Grade from 0 to 10 as JSON.", question="It should show {prompt}.")
    assert reward.score(IMAGES, PROMPTS).tolist() == [7.0, 2.5, 0.0]
    first = server.requests[0]
    assert (first["model"], first["temperature"], first["response_format"]) == ("judge-1", 0, {"type": "json_object"})
    system, user = first["messages"]
    assert system == {"role": "system", "content": "Grade from 0 to 10 as JSON."}
    assert user["content"][0]["text"] == "It should show a cat."
    assert user["content"][1]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert reward.value_range == (0.0, 10.0)
    assert reward.hub_models(reward.options) == []


@pytest.mark.parametrize(
    "wrong",
    ["seven", "[7]", '{"score": "7"}', '{"score": true}', '{"score": NaN}', '{"score": 11}', "{}", '{"score": '],
)
def test_an_answer_of_another_form_is_asked_for_again_then_refused(server: Server, wrong: str) -> None:
    server.answers = [says(wrong), says({"score": 4})]
    assert judge(server).score(IMAGES[:1], PROMPTS[:1]).tolist() == [4.0]
    assert [request["seed"] for request in server.requests] == [0, 1]
    server.answers = [says(wrong)]
    with pytest.raises(RunError, match=r"did not answer with \{\"score\": 0 to 10\} in 2 attempts"):
        judge(server, attempts=2).score(IMAGES[:1], PROMPTS[:1])


def test_only_the_images_without_a_score_are_asked_for_again(server: Server) -> None:
    server.answers = [says({"score": 1}), says("?"), says({"score": 3}), says({"score": 2})]
    assert judge(server).score(IMAGES, PROMPTS).tolist() == [1.0, 2.0, 3.0]
    assert len(server.requests) == 4


def test_an_answer_that_is_no_chat_completion_is_refused(server: Server) -> None:
    server.answers = [(200, {"scores": [1]}, 0.0)]
    with pytest.raises(RunError, match="did not answer with"):
        judge(server, attempts=1).score(IMAGES[:1], PROMPTS[:1])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"url": "https://example.com/v1"}, "reward 'vlm_judge' would send prompts and images to example.com"),
        ({"url": "http://127.0.0.1:9/v1", "token_env": "MY_KEY"}, "would send the environment variable MY_KEY"),
        ({"url": "http://127.0.0.1:9/v1", "question": "Good?"}, "must hold {prompt} once"),
        ({"url": "http://127.0.0.1:9/v1", "low": 3, "high": 3}, "low 3 must be less than high 3"),
    ],
)
def test_a_judge_without_consent_or_with_a_bad_rubric_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        registry.reward("vlm_judge", model="m", **options)


def written(text: str, size: int = 160) -> Tensor:
    """Black text on white [3, size, size]."""
    picture = Image.new("RGB", (size, size), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(26)
    for number, line in enumerate(text.split("\n")):
        draw.text((10, 20 + 60 * number), line, fill="black", font=font)
    return from_pil(picture)[0]


@pytest.fixture(scope="module")
def reader() -> Any:
    pytest.importorskip("rapidocr_onnxruntime", reason="needs the ocr extra")
    pytest.importorskip("rapidfuzz", reason="needs the ocr extra")
    return registry.reward("ocr")


def test_ocr_reads_what_is_drawn(reader: Any) -> None:
    images = torch.stack([written("OPEN"), written("OPEN"), written("HELLO\nWORLD"), torch.ones(3, 160, 160)])
    prompts = ['a sign that says "open"', 'a sign that says "OVEN"', 'the words "Hello World"', 'a sign "OPEN"']
    scores = reader.score(images, prompts)
    assert scores.tolist() == [1.0, 0.75, 1.0, 0.0]
    strict = registry.reward("ocr", ignore_case=False)
    assert float(strict.score(images[:1], prompts[:1])) == 0.0


def test_ocr_refuses_prompts_without_a_quote_and_pictures_that_are_none(reader: Any) -> None:
    with pytest.raises(ValueError, match="quotes no text"):
        reader.score(written("OPEN")[None], ["it's a sign for the dogs' house"])
    with pytest.raises(ValueError, match="not finite"):
        reader.score(torch.full((1, 3, 32, 32), float("nan")), ['"x"'])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "OPEN 24h" at night', "OPEN 24h"),
        ("a cup with ‘tea’ and “milk”", "tea milk"),  # noqa: RUF001
        ("it's a shirt that says 'don't panic'", "don't panic"),
        ("the word 'hi' in the dog's bowl", "hi"),
        ("«oui»", "oui"),
    ],
)
def test_the_quoted_text_of_a_prompt(prompt: str, text: str) -> None:
    assert quoted(prompt) == text


class Squares(DetectorReward):
    """Finds squares of one color on black."""

    def detect(self, images: Tensor) -> list[list[Detection]]:
        return [self._find(image) for image in images]

    def _find(self, image: Tensor) -> list[Detection]:
        found = []
        for channel, color in enumerate(("red", "green", "blue")):
            labels, _ = ndimage.label(np.asarray(image[channel] > 0.5))
            for rows, columns in ndimage.find_objects(labels):
                box = (columns.start, rows.start, columns.stop, rows.stop)
                found.append(Detection("square", tuple(map(float, box)), 0.9, color))
        return found


def picture(*squares: tuple[int, int, int]) -> Tensor:
    """Squares of 8 pixels (channel, left, top) on black [3, 64, 64]."""
    image = torch.zeros(3, 64, 64)
    for channel, left, top in squares:
        image[channel, top : top + 8, left : left + 8] = 1
    return image


CHECKS: Sequence[dict[str, Any]] = (
    {"tag": "counting", "prompt": "two squares", "include": [{"class": "square", "count": 2}],
     "exclude": [{"class": "square", "count": 3}]},
    {"tag": "color", "prompt": "a red square", "include": [{"class": "square", "count": 1, "color": "red"}]},
    {"tag": "position", "prompt": "a red square left of a blue square", "include": [
        {"class": "square", "color": "blue"}, {"class": "square", "color": "red", "position": ["left of", 0]}]},
)  # fmt: skip


@pytest.fixture
def checks(tmp_path: Path) -> str:
    file = tmp_path / "checks.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in CHECKS), "utf-8")
    return str(file)


def test_counts_colors_and_positions_are_checked(checks: str) -> None:
    options = Squares.Options(checks=checks)
    reward = Squares(options)
    two, three = picture((0, 0, 0), (0, 30, 0)), picture((0, 0, 0), (0, 30, 0), (0, 0, 30))
    assert reward.score(torch.stack([two, three, picture()]), ["two squares"] * 3).tolist() == [1.0, 0.5, 0.5]
    red, green = picture((0, 0, 0)), picture((1, 0, 0))
    assert reward.score(torch.stack([red, green, picture()]), ["a red square"] * 3).tolist() == [1.0, 0.5, 0.0]
    left, right = picture((0, 4, 20), (2, 40, 20)), picture((2, 4, 20), (0, 40, 20))
    prompt = [CHECKS[2]["prompt"]] * 2
    assert reward.score(torch.stack([left, right]), prompt).tolist() == pytest.approx([1.0, 0.8])
    strict = Squares(Squares.Options(checks=checks, strict=True))
    assert strict.score(torch.stack([left, right]), prompt).tolist() == [1.0, 0.0]
    assert Squares(Squares.Options(checks=checks, confidence=0.95)).score(red[None], ["a red square"]).item() == 0.0
    with pytest.raises(ValueError, match="no checks for the prompt 'a cat'"):
        reward.score(red[None], ["a cat"])


def test_a_color_that_no_detector_tells_is_an_error(checks: str) -> None:
    reward = Squares(Squares.Options(checks=checks))
    with pytest.raises(ValueError, match="the detector tells no color, and 'a red square' asks for red"):
        outcomes([Detection("square", (0, 0, 8, 8))], reward._checks["a red square"])


def test_positions_follow_genevals_rule() -> None:
    here = Detection("a", (0, 0, 10, 10))
    assert relations(here, Detection("b", (30, 0, 40, 10))) == {"left of"}
    assert relations(Detection("b", (30, 0, 40, 10)), here) == {"right of"}
    assert relations(here, Detection("b", (30, 30, 40, 40))) == {"left of", "above"}
    assert relations(here, Detection("b", (1, 1, 11, 11))) == set()  # within a tenth of their sizes


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such file of checks"),
        ("\n", "holds no checks"),
        ('{"prompt": "x", "include": []}\n', r"line 1: not a line of GenEval's metadata"),
        ('{"prompt": "x", "include": [{"class": "a", "position": ["near", 0]}]}\n', "line 1: not a line of GenEval"),
        ("{\n", "line 1: not a line of GenEval"),
    ],
)
def test_checks_that_cannot_be_read_are_refused(tmp_path: Path, content: str | None, sentence: str) -> None:
    file = tmp_path / "checks.jsonl"
    if content is not None:
        file.write_text(content, "utf-8")
    with pytest.raises(UsageError, match=sentence):
        Squares.preflight(Squares.Options(checks=str(file)))
