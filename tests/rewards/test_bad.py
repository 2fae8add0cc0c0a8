"""One mistake in a first reward is one row of ``rewards check``, or one sentence, with the author's file and line."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rlhf_t2i import cli
from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import process_state, registry
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.tools.findings import Finding
from rlhf_t2i.tools.reward_check import check_reward

FILE = Path(__file__).with_name("bad.py")


def line_of(cls: str) -> int | None:
    """The line marked ``# here`` in a class."""
    lines = FILE.read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"class {cls}("))
    for number, line in enumerate(lines[start + 1 :], start + 2):
        if line.startswith("class "):
            return None
        if line.endswith("# here"):
            return number
    return None


def findings(cls: str) -> list[Finding]:
    return check_reward(registry.reward(f"{FILE}:{cls}"), torch.device("cpu"), size=32)


@pytest.mark.parametrize(
    ("cls", "row", "words"),
    [
        ("Typo", "shape", "AttributeError: 'Tensor' object has no attribute 'maen'"),
        ("NoReturn", "shape", "score returned a NoneType, not a tensor [3]"),
        ("OneNumber", "shape", "score returned shape [], not a tensor [3]"),
        ("Processor", "has a gradient", "rlhf_t2i.plugins.preprocessing"),
        ("Detached", "has a gradient", "rlhf_t2i.plugins.preprocessing"),
        ("InPlace", "input unchanged", "score writes into its images"),
        (
            "Global",
            "process unchanged",
            "torch.set_default_dtype, torch.set_num_threads, torch.manual_seed, os.ch",
        ),
        ("GradientOff", "has a gradient", "no gradient reaches its input"),
        ("Exits", "shape", "called sys.exit(None)"),
        ("Latents", "shape", "IndexError: index 7 is out of bounds"),
        ("Unbatched", "shape", "score returned a list, not a tensor [3]"),
        ("Late", "shape", "score returned a coroutine, not a tensor [3]"),
        ("Column", "shape", "score returned shape [3, 1], not a tensor [3]"),
        ("Exhausted", "shape", "RecursionError"),
        ("Foreign", "shape", "GeneratorExit"),
    ],
)
def test_one_mistake_is_one_row(cls: str, row: str, words: str) -> None:
    found = findings(cls)
    if cls == "Processor":  # it does not read the prompt either, which is a second mistake
        found = [f for f in found if f.name != "sees the prompt"]
    fails = [f for f in found if f.outcome == "fail"]
    assert [f.name for f in fails] == [row], [(f.name, f.detail) for f in fails]
    assert words in fails[0].detail
    assert "\n" not in fails[0].detail
    assert "detach().numpy() instead" not in fails[0].detail
    line = line_of(cls)
    if line is not None:
        assert f"bad.py:{line}: " in fails[0].detail
    if row == "shape":
        assert all(f.outcome == "skip" for f in found[1:])
        assert all(f.detail == "not run, since 'shape' failed" for f in found[1:])


def test_what_a_reward_changes_of_the_process_is_undone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a run it would change its neighbors' numbers, and whether SIGTERM writes a checkpoint."""
    monkeypatch.chdir(tmp_path)

    def state() -> list[object]:
        return [
            torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_device(),
            torch.initial_seed(), Path.cwd(), signal.getsignal(signal.SIGTERM),
        ]  # fmt: skip

    before = state()
    with process_state.observed() as seen:
        rewards = {name: registry.reward(f"{FILE}:{name}") for name in ("Global", "GlobalWhenBuilt")}
    assert seen == ["torch.set_default_device", "torch.set_grad_enabled"]
    assert state() == before
    drawn = torch.random.get_rng_state()
    RewardRole(rewards, None, device=torch.device("cpu")).score_images(torch.rand(2, 3, 8, 8), ["a", "b"])
    assert state() == before
    assert not torch.equal(torch.random.get_rng_state(), drawn)  # the images were drawn: no change that is undone


def test_a_change_made_when_it_is_built_is_a_row() -> None:
    result = CliRunner().invoke(cli.app, ["rewards", "check", f"{FILE}:GlobalWhenBuilt", "--size", "16"])
    assert result.exit_code == 1
    assert "process unchanged" in result.output
    assert "torch.set_default_device" in result.output
    assert "1 failed" in result.output


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        ("NoInit", "its __init__ must call super().__init__(options)"),
        ("ModuleBeforeInit", "call super().__init__(options) first"),
        ("NoOptions", "write its __init__ as `def __init__(self, options=None)`"),
        ("WrongOptions", "its Options must be a subclass of rlhf_t2i.plugins.Options"),
        ("NeedsPackage", "needs a_package_that_is_not_there, which is not installed"),
        ("ExitsWhenBuilt", "called sys.exit(0)"),
        ("OptionsRaise", "OSError: the disk is gone"),
        ("RequiresText", "requires must be a tuple of texts"),
        ("RangeBackwards", "value_range must be two numbers, the smaller first"),
        ("RangeOfOne", "value_range must be two numbers, the smaller first"),
    ],
)
def test_a_reward_that_cannot_be_built_is_one_sentence(cls: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        registry.reward(f"{FILE}:{cls}")
    assert words in str(caught.value)
    assert f"bad.py:{cls}'" in str(caught.value)
    assert "\n" not in str(caught.value)
    line = line_of(cls)
    if line is not None:
        assert f"bad.py:{line}: " in str(caught.value)


@pytest.mark.parametrize(
    "text", ["import sys\nsys.exit(0)\n", "raise KeyError('x')\n", "def f(:\n", "import nowhere\n"]
)
def test_a_file_that_ends_the_process_or_does_not_import(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UsageError, match=r"mine.py:Mine' cannot be imported: ") as caught:
        registry.reward(f"{tmp_path}/mine.py:Mine")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError):  # the second time, too: no half-imported module stays behind
        registry.reward(f"{tmp_path}/mine.py:Mine")


@pytest.mark.parametrize(("cls", "code"), [("Exits", 1), ("ExitsWhenBuilt", 2)])
def test_sys_exit_0_is_no_success(cls: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["rlhf-t2i", "rewards", "check", f"{FILE}:{cls}", "--size", "16"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == code


def test_the_table_shows_the_authors_line_and_no_traceback() -> None:
    result = CliRunner().invoke(
        cli.app, ["rewards", "check", f"{FILE}:Typo", "--size", "16"], env={"COLUMNS": "200"}
    )  # fmt: skip
    assert result.exit_code == 1
    assert "1 failed" in result.output
    assert re.search(rf"shape +│? *fail.*bad\.py:{line_of('Typo')}", result.output)
    assert "Traceback" not in result.output
