"""A recipe given to another command than its own: the error names the right one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_t2i.cli import app
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import kinds, reading, shipped

TABLE, GRID, RUN = "table1", "emoji64/ablation_table2", "quickstart"
WORDS = {
    "run": r"is the recipe of one run: give it to `rlhf-t2i run`$",
    "ablate": r"is an ablation of several runs: give it to `rlhf-t2i ablate`$",
    "eval": r"is a table of several models: give it to `rlhf-t2i eval`$",
}


@pytest.mark.parametrize("name", shipped.recipe_names())
def test_every_shipped_recipe_tells_its_command(name: str) -> None:
    data, source = reading.read(shipped.recipe_path(name))
    command = kinds.command_of(data)
    assert command is not None
    kinds.check(data, source.path, command)
    expected = "eval" if name.startswith("table") else "ablate" if "ablation" in name else "run"
    assert command == expected


@pytest.mark.parametrize(
    ("command", "name", "right"),
    [
        ("eval", RUN, "run"), ("ablate", RUN, "run"), ("run", GRID, "ablate"), ("run", TABLE, "eval"),
        ("eval", GRID, "ablate"), ("ablate", TABLE, "eval"), ("plan", TABLE, "eval"), ("encode", GRID, "ablate"),
    ],
)  # fmt: skip
def test_another_commands_recipe_is_named(
    command: str, name: str, right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=WORDS[right]):
        app([command, str(shipped.recipe_path(name))], standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_says_nothing_is_judged_by_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("colour: red\n")
    with pytest.raises(UsageError, match=r"line 1: unknown key 'colour'"):
        reading.load(file)
