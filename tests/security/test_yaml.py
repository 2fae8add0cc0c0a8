"""No YAML that the commands read runs code, and none takes for ever."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_t2i import cli
from rlhf_t2i.tools.report.page import _recipe
from tests.recipe.base import BASE

TAGS = [
    "!!python/object/apply:os.mkdir ['{ran}']",
    "!!python/object/new:os.mkdir ['{ran}']",
    "!!python/object/apply:subprocess.check_call [[mkdir, '{ran}']]",
    "!!python/name:os.mkdir",
    "!!python/module:os",
]


def ended(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which a command refuses its arguments, exit code 2."""
    monkeypatch.setattr("sys.argv", ["rlhf-t2i", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    printed = capsys.readouterr()
    assert stopped.value.code == 2, printed.err
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1, printed.err
    assert "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("command", ["run", "plan", "ablate"])
@pytest.mark.parametrize("where", ["whole", "inside"])
def test_recipes(
    command: str, tag: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ran, out, file = tmp_path / "ran", tmp_path / "out", tmp_path / "recipe.yaml"
    text = tag.format(ran=ran)
    file.write_text(text if where == "whole" else BASE.replace("seed: 1", f"seed: {text}"), "utf-8")
    more = [] if command == "plan" else ["--out", str(out)]
    sentence = ended([command, str(file), *more], monkeypatch, capsys)
    assert "recipe.yaml" in sentence
    assert "YAML" in sentence
    assert not ran.exists()
    assert not out.exists()


@pytest.mark.parametrize("tag", [*TAGS, "!!timestamp 2020-99-99", "[" * 3000])
def test_values_on_the_command_line(
    tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran, file = tmp_path / "ran", tmp_path / "recipe.yaml"
    file.write_text(BASE, "utf-8")
    value = tag.format(ran=ran)
    for arguments in (
        ["run", str(file), "--out", str(tmp_path / "out"), "--set", f"seed={value}"],
        ["rewards", "check", "pickscore", "--options", f"model={value}"],
        ["eval", str(tmp_path), "--prompts", str(file), "--metrics", "pickscore", "--set", f"pickscore.model={value}"],
    ):
        assert "YAML" in ended(arguments, monkeypatch, capsys)
    assert not ran.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tag", TAGS)
def test_the_report_of_a_strangers_run(tag: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(tag.format(ran=tmp_path / "ran"), "utf-8")
    assert _recipe(tmp_path / "recipe.yaml", [])[1] is None
    assert not (tmp_path / "ran").exists()


BOMBS = {
    "lists": ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)],
    "merges": ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 30)],
    "one key many times": ["a0: &a0 {k: 1}"]
    + [f"a{i}: &a{i} {{{', '.join([f'k: *a{i - 1}'] * 10)}}}" for i in range(1, 30)],
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("command", ["run", "ablate"])
def test_anchors_that_expand_exponentially_are_refused_at_once(
    command: str, bomb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("\n".join(BOMBS[bomb]), "utf-8")
    assert "100,000" in ended([command, str(file), "--out", str(tmp_path / "out")], monkeypatch, capsys)
    assert not (tmp_path / "out").exists()
