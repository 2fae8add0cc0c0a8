"""Paths on the command line and of Python functions: ``~``, and the empty text of a variable that is not set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import click
import pytest
import typer

import rlhf_t2i
from rlhf_t2i.cli import app
from rlhf_t2i.commands.output import given_path
from rlhf_t2i.errors import UsageError


def paths(group: typer.Typer) -> Iterator[tuple[str, Any]]:
    """Every parameter of a command that is a path, and what its annotation says."""
    for command in group.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if get_origin(hint) is Annotated and Path in (get_args(hint)[0], *get_args(get_args(hint)[0])):
                yield f"{command.callback.__name__} {name}", get_args(hint)[1]
    for below in group.registered_groups:
        assert below.typer_instance is not None
        yield from paths(below.typer_instance)


def test_every_path_has_the_same_parser() -> None:
    """Also that of a command to come: without the parser it writes into a folder named ``~``."""
    found = dict(paths(app))
    assert {"run_command recipe", "run_command out", "eval_command real", "sample_command output", "new directory"} <= (
        found.keys()
    )
    assert {name for name, info in found.items() if info.parser is not given_path} == set()


def test_a_home_folder_is_found_and_an_empty_text_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert given_path("~/runs") == tmp_path / "runs"
    assert given_path(Path("a/b")) == Path("a/b")
    (tmp_path / "loop").symlink_to("loop")
    for text, sentence in (
        ("", "is empty: is a variable not set"), ("~nobody9/x", "no user has that home folder"), ("-", "name a file"),
        ("x" * 300, "File name too long"), ("x" * 250, "over 240 bytes"), ("é" * 125, "over 240 bytes"),
        (f"{tmp_path}/loop/x", "symbolic links"), ("a\0b", "zero byte"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=sentence):
            given_path(text)
    (tmp_path / "recipe.yaml").write_text("steps: 1\n", "utf-8")
    for call in (
        lambda: rlhf_t2i.evaluate("x/y", prompts=["a"], metrics="clip", out=""),
        lambda: app(["run", str(tmp_path / "recipe.yaml"), "--out", ""], standalone_mode=False),
    ):
        with pytest.raises(UsageError, match="is empty"):
            call()


@pytest.mark.parametrize("text", ["x" * 300, "loop", "a\0b"])
@pytest.mark.parametrize(
    "command",
    [
        ("sample", "MODEL", "--prompt", "a"), ("eval", "MODEL", "--prompts", "p.txt"), ("push", "MODEL", "a/b"),
        ("families", "check", "MODEL"), ("rewards", "new", "mine", "--model", "MODEL"),
        ("rewards", "new", "mine", "--dir", "MODEL"), ("recipes", "copy", "quickstart", "MODEL"),
        ("init", "--reference", "MODEL", "--prompts", "p.txt"), ("demo", "--out", "MODEL"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_path_that_no_file_can_have_is_one_sentence(
    command: tuple[str, ...], text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also as a model's name, in every command that takes one (cases G.9)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a cat\n", "utf-8")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(
        (UsageError, click.UsageError), match=r"too long|symbolic links|zero byte|null byte|control characters"
    ):
        app([text if word == "MODEL" else word for word in command], standalone_mode=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loop", "p.txt"]


def test_the_evaluation_of_the_folder_above_stays_out_of_the_working_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cases G.4, from Python."""
    written = []
    monkeypatch.setattr("rlhf_t2i.evaluation.run.evaluate", lambda settings, folder, *more: written.append(folder))
    (tmp_path / "model/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model/below")
    rlhf_t2i.evaluate("..", prompts=["a"], metrics="diversity", images_per_prompt=2, progress=False)
    assert written == [Path("evaluations/model")]
