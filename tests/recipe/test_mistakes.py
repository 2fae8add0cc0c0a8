"""One explainer for every pydantic model: recipes, ablations, evaluations and plugins' options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import settings
from rlhf_t2i.plugins import registry
from rlhf_t2i.recipe import mistakes, reading
from rlhf_t2i.tools.ablation import schema
from tests.recipe.base import BASE

ABLATION = """\
title: x
base: ./base.yaml
evaluation: {}
initial: a
rows:
  - {name: a, label: A}
"""


def recipe(folder: Path, old: str, new: str) -> None:
    (folder / "recipe.yaml").write_text(BASE.replace(old, new, 1), "utf-8")
    reading.load(folder / "recipe.yaml")


def ablation(folder: Path, old: str, new: str) -> None:
    (folder / "recipe.yaml").write_text(ABLATION.replace(old, new, 1), "utf-8")
    schema.load(folder / "recipe.yaml")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda f: recipe(f, "steps:", "stepz:"), "recipe.yaml, line 2: unknown key 'stepz'; did you mean 'steps'?"),
        (
            lambda f: recipe(f, "  vae:", "  vea:"),
            "recipe.yaml, line 7: unknown key 'models.vea'; did you mean 'vae'?",
        ),
        (lambda f: recipe(f, "  prompts: ./prompts.txt\n", ""), "the key 'data.prompts' is missing"),
        (lambda f: recipe(f, "steps: 10", "steps: many"), "line 2: steps: must be a whole number, not 'many'"),
        (lambda f: ablation(f, "label:", "lable:"), "line 6: unknown key 'rows.0.lable'; did you mean 'label'?"),
        (lambda f: ablation(f, "title: x\n", ""), "the key 'title' is missing"),
        (lambda f: ablation(f, "initial: a", "initial: b"), "initial names 'b'; known: a"),
        (
            lambda _: settings.build({"model": "x", "prompts": "y", "limt": 3}),
            "evaluation: unknown key 'limt'; did you mean 'limit'?",
        ),
        (lambda _: settings.build({"model": "x"}), "evaluation: the key 'prompts' is missing"),
        (
            lambda _: settings.build({"model": "x", "prompts": "y", "limit": 0}),
            "evaluation: limit: must be at least 1, not 0",
        ),
        (
            lambda _: registry.reward("pickscore", modle="x"),
            "reward 'pickscore': unknown option 'modle'; did you mean 'model'?",
        ),
        (lambda _: registry.reward("http"), "reward 'http': the option 'url' is missing"),
        (
            lambda _: registry.divergence("kl", c=1),
            "divergence 'kl': unknown option 'c'; valid options here: none",
        ),
        (
            lambda _: registry.divergence("pseudo_huber", c=-1),
            "divergence 'pseudo_huber': c: must be greater than 0, not -1",
        ),
        (lambda _: registry.reward("clip", open_clip="x"), "reward 'clip': open_clip and pretrained go together"),
    ],
)
def test_a_sentence_names_the_place_the_key_and_the_nearest_key(
    make: Callable[[Path], None], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        make(tmp_path)
    assert str(caught.value).endswith(sentence)
    assert "\n" not in str(caught.value)


def test_nobody_else_explains_validation_errors() -> None:
    """``error.errors()`` is read in one module alone."""
    package = Path(mistakes.__file__).parents[1]
    readers = [file.name for file in sorted(package.rglob("*.py")) if ".errors()" in file.read_text("utf-8")]
    assert readers == ["mistakes.py"]


ODD: dict[str, object] = {"long": "x" * 1000, "escape": "a\x1b[31mb", "digits": 10**5000, "map": {"a": 1}, "none": None}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_bad_values_are_shown_short_and_plain(value: object) -> None:
    text = mistakes.kind(value)
    assert len(text) <= 60
    assert text.isprintable()
