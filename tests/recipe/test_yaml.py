"""YAML as version 1.2 reads it, values added to lists, links kept, and files that are none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools import model_table
from rlhf_t2i.tools.ablation import schema
from tests.recipe.base import BASE


@pytest.mark.parametrize(
    ("text", "value"),
    [("12", 12), ("-3", -3), ("0", 0), ("0x1F", 31), ("0o17", 15), ("1e-6", 1e-6), ("1.5", 1.5), (".5", 0.5),
     ("5.", 5.0), ("true", True), ("False", False), ("~", None), ("", None), ("null", None),
     # Text in YAML 1.2, numbers, truth values or dates in 1.1; a leading zero is refused as a number, too.
     ("010", "010"), ("1:30", "1:30"), ("4_0", "4_0"), ("0b11", "0b11"), ("yes", "yes"), ("off", "off"), ("no", "no"),
     ("2020-01-01", "2020-01-01"), ("=", "=")],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    found = reading.parse_value(text, "here")
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["010", "1:30", "4_0"])
def test_numbers_of_yaml_1_1_are_refused(text: str, recipe: Path) -> None:
    recipe.write_text(BASE.replace("steps: 10", f"steps: {text}"), "utf-8")
    with pytest.raises(UsageError, match=f"line 2: steps: must be a whole number, not '{text}'"):
        reading.load(recipe)


@pytest.mark.parametrize(
    "value",
    ["!!bool x", "!!timestamp x", "!!timestamp 2020-01-01", "!!int x", "!!float x", "!!null x", "!!binary x",
     "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!foreign x", "!!int [1]"],
)  # fmt: skip
def test_a_value_is_what_its_tag_says_or_is_refused(value: str, recipe: Path) -> None:
    recipe.write_text(BASE.replace("seed: 1", f"seed: {value}"), "utf-8")
    with pytest.raises(UsageError, match=r"line 1: not valid YAML") as caught:
        reading.load(recipe)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):
        reading.load(recipe, [f"steps={value}"])


@pytest.mark.parametrize("label", ["1e-6", "0o17", "yes", "1:30", "010", "~", "<<", "true", "5.", "2020-01-01"])
def test_a_dumped_text_stays_text(label: str, recipe: Path) -> None:
    data = reading.parse_value(BASE, "BASE")
    data["algorithm"]["rewards"][0]["label"] = label
    recipe.write_text(reading.dump(Recipe.model_validate(data)), "utf-8")
    assert reading.load(recipe).algorithm.rewards[0].label == label


def test_a_reward_is_added(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    loaded = reading.load(
        recipe,
        [
            "algorithm.rewards+={name: aesthetic, scale: 3, options: {model: model}}",
            "algorithm.rewards+=[{name: hpsv2}, {name: ./mine.py:Mine}]",
            "algorithm.rewards.1.scale=4",
        ],
    )
    rewards = loaded.algorithm.rewards
    assert [(r.name, r.scale) for r in rewards[:3]] == [("pickscore", 100), ("aesthetic", 4), ("hpsv2", 1)]
    assert rewards[1].options == {"model": str(tmp_path / "model")}
    assert rewards[3].name == f"{tmp_path}/mine.py:Mine"


def test_a_list_that_the_recipe_leaves_out_starts_from_its_default(recipe: Path) -> None:
    with pytest.raises(UsageError, match=r"optimization.assistant.betas: must have 2 or fewer entries"):
        reading.load(recipe, ["optimization.assistant.betas+=0.5"])
    loaded = reading.load(recipe, ["optimization.generator.lora={rank: 4}", "optimization.generator.lora.targets+=ff"])
    assert loaded.optimization.generator.lora is not None
    assert loaded.optimization.generator.lora.targets == ["ff"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.rewards.1={name: clip}", "1 is not one of the 1 entries (0 is the first; algorithm.rewards+=..."),
        ("algorithm.rewards+={nme: clip}", "unknown key 'algorithm.rewards.1.nme'; did you mean 'name'?"),
        ("steps+=3", "steps is not a list"),
        ("+=3", "key+=value to add to a list"),
    ],
)
def test_what_cannot_be_added(override: str, words: str, recipe: Path) -> None:
    with pytest.raises(UsageError) as caught:
        reading.load(recipe, [override])
    assert str(caught.value).startswith(f"--set {override}: ")
    assert words in str(caught.value)


def test_links_keep_their_names(recipe: Path, tmp_path: Path) -> None:
    """The hub's cache links ``name.jsonl`` to a file named by its hash: the name tells the format."""
    (tmp_path / "blobs").mkdir()
    for name in ("prompts.txt", "held_out.txt"):
        (tmp_path / "blobs" / name[:3]).write_text("a cat\n")
        (tmp_path / name).symlink_to(tmp_path / "blobs" / name[:3])
    loaded = reading.load(recipe)
    assert loaded.data.prompts == str(tmp_path / "prompts.txt")
    assert loaded.data.held_out == str(tmp_path / "held_out.txt")


@pytest.mark.parametrize("kind", ["run", "eval", "ablate"])
def test_paths_in_a_linked_recipe_start_beside_the_link(
    kind: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches of the hub, git-annex and DVC link every file to one named by its hash, with nothing beside it."""
    (tmp_path / "blobs").mkdir()
    text = {
        "run": recipe.read_text("utf-8"),
        "eval": "{title: t, evaluation: {prompts: ./prompts.txt, metrics: [clip]}, "
        "rows: [{name: a, label: A, model: ./m}]}",
        "ablate": "{title: t, base: ./prompts.txt, evaluation: {}, initial: a, rows: [{name: a, label: A}]}",
    }[kind]
    (tmp_path / "blobs" / "a1b2").write_text(text, "utf-8")
    recipe.unlink()
    recipe.symlink_to("blobs/a1b2")
    (tmp_path / "prompts.txt").write_text("a cat\n", "utf-8")
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path.parent)
    given = Path(tmp_path.name) / recipe.name
    if kind == "run":
        found = reading.load(given).data.prompts
    elif kind == "eval":
        found = model_table.load(given)[0].evaluation["prompts"]
    else:
        found = schema.load(given).base
    assert found == str(tmp_path / "prompts.txt")


def test_a_path_through_a_link_to_elsewhere_is_not_shortened(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "near").symlink_to(tmp_path / "far" / "deep")
    (tmp_path / "far" / "p.txt").write_text("x")
    recipe.write_text(BASE.replace("./prompts.txt", "./near/../p.txt"), "utf-8")
    assert Path(reading.load(recipe).data.prompts).read_text() == "x"


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(100_000_000_000)
    for path, words in [
        (tmp_path / "loop", "cannot be read: Too many levels"),
        (tmp_path / "pipe", "is not a regular file"),
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path / "sparse", "100,000,000,000 bytes"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (tmp_path / "a\0b", "zero byte"),
        (tmp_path, "is a directory"),
    ]:
        with pytest.raises(UsageError, match=words) as caught:
            reading.load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 2000, "~nobody-of-that-name/x"])
def test_names_that_no_file_has(name: str, recipe: Path) -> None:
    for key in ("models.reference", "data.prompts", "algorithm.rewards.0.options.model"):
        try:
            reading.load(recipe, [f"{key}={name}"])
        except UsageError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is legal
