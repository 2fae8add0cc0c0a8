"""What ships beside the code: recipes by name, ``emoji64:NAME`` in every place that takes a model or prompts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_t2i.cli import app
from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import benchmarks
from rlhf_t2i.evaluation import settings as evaluation_settings
from rlhf_t2i.families import sources
from rlhf_t2i.recipe import reading, shipped
from rlhf_t2i.tools import starting

ZOO = Path(__file__).parents[2] / "zoo" / "emoji64"


@pytest.fixture
def without_emoji64(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the package were installed without its extra ``demo``."""
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "site-packages" / "rlhf_t2i")
    monkeypatch.setattr(shipped, "find_spec", lambda name: None)


def test_the_prefix_names_the_same_file_everywhere() -> None:
    assert sources.parse("emoji64:judge").location == str(ZOO / "judge")
    assert len(benchmarks.load("emoji64").prompts) == len((ZOO / "prompts/held_out.txt").read_text().splitlines())
    built = evaluation_settings.build(
        {
            "model": "emoji64:generator", "prompts": "emoji64", "metrics": ["pickscore"],
            "options": {"pickscore": {"model": "emoji64:pickscore"}},
        }
    )  # fmt: skip
    assert built.model == str(ZOO / "generator")
    assert built.options == {"pickscore": {"model": str(ZOO / "pickscore")}}
    recipe = reading.build(
        {"steps": 1, "models": {"reference": "emoji64:reference", "generator": "emoji64:generator"},
         "data": {"prompts": "emoji64:prompts/train.txt"}}
    )  # fmt: skip
    assert recipe.models.reference == str(ZOO / "reference")
    assert recipe.data.prompts == str(ZOO / "prompts" / "train.txt")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refrence", "did you mean 'reference'"),
        ("../emoji64/reference", "no such file"),
        ("/etc/passwd", "no such file"),
        ("", "no such file"),
        ("x" * 4000, "no such file"),
        ("reference:Network", "no such file"),
        ("painter.py:Named", "no such file"),
    ],
)
def test_only_its_own_files_can_be_named(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        reading.build({"models": {"reference": f"emoji64:{name}"}})
    assert str(caught.value).startswith("models.reference: emoji64:")


@pytest.mark.usefixtures("without_emoji64")
def test_without_the_extra_one_sentence_names_it() -> None:
    quickstart = ZOO.parents[1] / "recipes" / "quickstart.yaml"
    with pytest.raises(UsageError, match=r"models\.reference: .* pip install 'rlhf-t2i\[demo\]'"):
        reading.load(quickstart)
    with pytest.raises(UsageError, match=r"--prompts: .*rlhf-t2i\[demo\]"):
        benchmarks.load("emoji64")
    with pytest.raises(UsageError, match=r"rlhf-t2i\[demo\]"):
        sources.parse("emoji64:judge")


def test_every_recipe_is_listed_with_one_line() -> None:
    shown = CliRunner().invoke(app, ["recipes"])
    assert shown.exit_code == 0
    lines = shown.stdout.split("\n\n")[0].splitlines()
    assert len(lines) == len(list(shipped.recipes_folder().rglob("*.yaml"))) > 15
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)
    assert CliRunner().invoke(app, ["recipes", "show", "sd15/sim"]).stdout.startswith("# Score implicit matching")
    with pytest.raises(UsageError, match="did you mean 'quickstart'"):
        shipped.recipe_path("quickstrt")


@pytest.mark.parametrize("name", shipped.recipe_names())
def test_a_copy_is_read_where_it_lands(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_t2i.tools import model_table
    from rlhf_t2i.tools.ablation import schema

    monkeypatch.chdir(tmp_path)
    command, written, missing = starting.copy_recipe(name, Path())
    if command == "ablate":
        ablation = schema.load(written[0])
        assert ablation.rows
        assert written[1].read_text("utf-8") == shipped.recipe_path(written[1].stem).read_text("utf-8")
    elif command == "eval":
        assert model_table.load(written[0])[1]
    else:
        copied, original = reading.load(written[0]), reading.load(shipped.recipe_path(name))
        assert (copied.models, copied.algorithm) == (original.models, original.algorithm)
        assert bool(missing) == (not Path(original.data.prompts).is_file())
    # The same copy again is no conflict; another file is never overwritten.
    assert starting.copy_recipe(name, Path())[1] == written
    written[0].write_text("steps: 1\n")
    with pytest.raises(UsageError, match="is another file"):
        starting.copy_recipe(name, Path())
    assert written[0].read_text() == "steps: 1\n"


@pytest.mark.parametrize("place", ["link", "pipe", "/dev/full"])
def test_a_copy_replaces_no_link_and_reads_no_device(place: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere.yaml")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="exists and is another file"):
        starting.copy_recipe("quickstart", tmp_path / place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"]


@pytest.mark.usefixtures("without_emoji64")
def test_a_copy_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "recipes_folder", lambda: ZOO.parents[1] / "recipes")
    _, written, missing = starting.copy_recipe("quickstart", tmp_path)
    assert written == [tmp_path / "quickstart.yaml"]
    assert "rlhf-t2i[demo]" in missing[0]
