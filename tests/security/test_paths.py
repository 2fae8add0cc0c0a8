"""A name in a recipe or in a model's folder never becomes a path out of the run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_t2i import cli
from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import models
from rlhf_t2i.families import sources
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.plugins.scaffold import write_package
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.reward_failure import save_sample
from rlhf_t2i.tools.ablation import schema
from rlhf_t2i.tools.ablation.page import slug
from rlhf_t2i.utils import files
from tests.recipe.base import parsed, put
from tests.security.hostile import edit

NAMES = ["../../x", "/etc/x", "..", ".", "a/../../x", "~/x", "..\\x", "x" * 200, "a\nb", "con: {x}", "$HOME", "`id`"]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", NAMES)
def test_a_failing_reward_saves_below_the_failures_folder(name: str, tmp_path: Path) -> None:
    failures = tmp_path / "out" / "failures"
    target = save_sample(failures, name, "a cat\0\n", "it broke", torch.rand(3, 4, 4), torch.rand(4, 2, 2), None)
    assert target.parent == failures
    assert target.resolve().is_relative_to(failures.resolve())
    assert {path for path in tree(tmp_path) if not path.startswith("out/failures")} == {"out"}


@pytest.mark.parametrize("name", NAMES)
def test_titles_become_file_names(name: str) -> None:
    assert "/" not in slug(name)
    assert slug(name) not in ("..", ".")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_hostile_names_writes_into_its_folder_alone(
    name: str, make_recipe: Callable[..., Recipe], tmp_path: Path, tiny_clip: Path
) -> None:
    """A whole tiny run; a name that is refused writes nothing at all."""
    recipe = make_recipe(steps=1, evaluation__images=2, logging__sample_count=1).model_dump()
    recipe["algorithm"]["rewards"][0]["label"] = name
    recipe["algorithm"]["eval_rewards"] = [
        {"name": "pickscore", "label": f"{name[:190]}/e", "options": {"model": str(tiny_clip)}}
    ]
    file = tmp_path / "hostile" / "recipe.yaml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(recipe), "utf-8")
    out, before = tmp_path / "deep" / "down" / "out", tree(tmp_path)
    try:
        loaded = reading.load(file)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is legal
        assert tree(tmp_path) == before
        return
    from rlhf_t2i.training import run

    run.run(loaded, out)
    assert (out / "model" / "model_index.json").is_file()
    assert {p for p in tree(tmp_path) - before if not p.startswith("deep/down/out/")} == {
        "deep", "deep/down", "deep/down/out",
    }  # fmt: skip


@pytest.mark.parametrize(
    "at",
    [("algorithm", "rewards", 0, "label"), ("algorithm", "divergence", "name"), ("data", "prompts"),
     ("models", "reference"), ("models", "vae"), ("data", "column")],
    ids=lambda at: ".".join(map(str, at)),
)  # fmt: skip
@pytest.mark.parametrize("bad", ["a\0b", "a\x1b[31mb", "a\x7fb", "\x00", "../\x00"])
def test_control_characters_are_refused(at: tuple[Any, ...], bad: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(put(parsed(), at, bad)), "utf-8")
    with pytest.raises(UsageError, match="control characters") as caught:
        reading.load(file)
    assert "\n" not in str(caught.value)
    assert bad not in str(caught.value)


def test_a_group_is_named_without_control_characters(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    groups = {"a\0b": {"roles": ["learner", "generator", "assistant", "reference", "reward"]}}
    file.write_text(yaml.safe_dump(put(parsed(), ("placement", "groups"), groups)), "utf-8")
    with pytest.raises(UsageError, match="control characters"):
        reading.load(file)


@pytest.mark.parametrize("name", [*NAMES, "a\0b", "", "A", "x" * 81])
def test_rows_of_an_ablation_are_plain_names(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        schema.Variant.model_validate({"name": name, "label": "x"})


@pytest.mark.parametrize("name", NAMES)
def test_a_new_reward_has_a_plain_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a name for a reward"):
        write_package(name, tmp_path / "here")
    assert tree(tmp_path) == set()


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", "..", "a\0b", ""])
def test_the_parts_of_a_pipeline_are_plain_names(
    name: str, make_recipe: Callable[..., Recipe], tiny_sdxl: Path, tmp_path: Path
) -> None:
    """The export copies every part that model_index.json names."""
    folder = tmp_path / "models" / "pipeline"
    shutil.copytree(tiny_sdxl, folder)
    (tmp_path / "evil").mkdir()  # what ../../evil names, beside a models folder of the same depth
    edit(folder / "model_index.json", **{name: ["diffusers", "AutoencoderKL"]})
    recipe, before = make_recipe(models__reference=str(folder)), tree(tmp_path)
    for refused in (
        lambda: ModelStore(recipe.models, recipe.student, torch.device("cpu")).check(),
        lambda: models.load(str(folder)).sample(["a cat"]),
    ):
        with pytest.raises(UsageError, match=r"model_index\.json is damaged: .* is no name of a folder"):
            refused()
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "text",
    ["org/name@../../x", "org/name@a\0b", "org/name@/x", "org/name@a b", "org/na\0me", "org/..", "org/na:me", "o/n@.",
     "o/n@a//b", "o/n/../x.bin", "o/n/a\0.bin", "o/-n", "o/n--m"],
)  # fmt: skip
def test_hub_ids_and_revisions_stay_below_the_cache(text: str) -> None:
    """The hub's client makes paths of them."""
    with pytest.raises(UsageError) as caught:
        sources.parse(text)
    assert "\n" not in str(caught.value)


def test_a_whole_folder_never_follows_a_link_out(tmp_path: Path) -> None:
    """OUT/model as a link to elsewhere: what it points to stays."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (tmp_path / "model").symlink_to(elsewhere)
    with files.atomic_dir(tmp_path / "model") as folder:
        (folder / "new").write_text("y")
    assert tree(elsewhere) == {"precious"}
    assert tree(tmp_path) == {"elsewhere", "elsewhere/precious", "model", "model/new"}
    assert not (tmp_path / "model").is_symlink()


@pytest.mark.parametrize("suffix", ["", "/x", "/../x.txt"])
def test_sample_writes_only_the_picture_it_is_told(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf-t2i", "sample", "x/y", "--prompt", "p", "-o", f"{tmp_path}{suffix}"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "-o" in capsys.readouterr().err
    assert tree(tmp_path) == set()
