"""``rewards list|check|new`` and ``divergences list`` as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from rlhf_t2i.commands.rewards import divergences_app, parse_options, rewards_app
from rlhf_t2i.errors import UsageError
from tests.rewards import builders

FAULTY = Path(__file__).parent / "faulty.py"


def invoke(app: Any, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})
    if isinstance(result.exception, UsageError):
        raise result.exception
    return result.exit_code, result.output


def test_list_has_a_row_for_every_reward_at_80_columns() -> None:
    code, output = invoke(rewards_app, "list")
    assert code == 0
    assert max(map(len, output.splitlines())) <= 80
    table, needed = ([line.split() for line in part.splitlines()] for part in output.rstrip().split("\n\n"))
    rows = {row[0]: row[1:] for row in table}
    assert rows["pickscore"][0] == "rlhf-t2i"
    assert rows["pickscore"][2:4] == ["yes", "cosine"]
    assert rows["http"][2] == "no"
    assert rows["cfg_implicit"][2] == "reference"
    assert ["pickscore", "yuvalkirstain/PickScore_v1"] in needed


def test_list_of_divergences_says_who_needs_vector_jacobian_products() -> None:
    app = typer.Typer()
    app.add_typer(divergences_app, name="divergences")
    code, output = invoke(app, "divergences", "list")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert (rows["kl"][3], rows["l2"][3], rows["pseudo_huber"][3]) == ("no", "yes", "yes")


def test_check_passes_a_reward_with_options(tmp_path: Path) -> None:
    folder = builders.write_clip(tmp_path)
    code, output = invoke(
        rewards_app, "check", "pickscore", "-o", f"model={folder}", "--options", "unit=logit", "--size", "32"
    )
    assert code == 0, output
    assert "14 passed, 0 failed, 0 skipped" in output
    assert "logit" in output
    assert "ms per image" in output


def test_check_asks_the_prompts_of_a_list() -> None:
    """A scorer that knows one kind of prompt cannot be asked about others."""
    reader = ["check", "emoji64:reader.py:Named", "-o", "probability=true"]
    assert invoke(rewards_app, *reader)[0] == 1
    code, output = invoke(rewards_app, *reader, "--prompts", "emoji64:prompts/train.txt")
    assert code == 0, output
    assert "12 passed, 0 failed, 2 skipped" in output


@pytest.mark.parametrize("text", ["", "one\none\ntwo\n"])
def test_a_list_of_too_few_prompts_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text(text, "utf-8")
    with pytest.raises(UsageError, match=r"--prompts: .*few\.txt holds (no|2 different) prompts"):
        invoke(rewards_app, "check", f"{FAULTY}:Good", "--prompts", str(tmp_path / "few.txt"))


def test_check_exits_1_and_names_what_failed() -> None:
    code, output = invoke(rewards_app, "check", f"{FAULTY}:HidesNaN", "--size", "16")
    assert code == 1
    assert "1 failed" in output
    assert any("NaN behavior" in line and "fail" in line for line in output.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "pikscore"], "unknown reward 'pikscore'; did you mean 'pickscore'"),
        (["check", "pickscore", "-o", "modle=x"], "reward 'pickscore': unknown option 'modle'; did you mean 'model'"),
        (["check", "pickscore", "-o", "model"], "--options model: write it as KEY=VALUE"),
        (["check", "pickscore", "--device", "tpu"], "--device 'tpu': cpu, cuda or auto"),
        (["new", "My-Reward"], "'My-Reward' is not a name for a reward"),
        (["new", "pickscore"], "a reward called 'pickscore' is installed already, by rlhf-t2i"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        invoke(rewards_app, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_are_yaml_scalars() -> None:
    assert parse_options(["a=1", "b=0.5", "c=true", "d=x=y", "e="]) == {
        "a": 1, "b": 0.5, "c": True, "d": "x=y", "e": None
    }  # fmt: skip


def test_new_writes_a_package_whose_test_passes_as_written(tmp_path: Path) -> None:
    code, output = invoke(rewards_app, "new", "my_reward", "--dir", str(tmp_path))
    assert code == 0
    folder = tmp_path / "rlhf-t2i-my-reward"
    assert str(folder) in output.replace("\n", "")
    assert (folder / "README.md").is_file()
    assert 'my_reward = "rlhf_t2i_my_reward:MyReward"' in (folder / "pyproject.toml").read_text()
    # Not installed here: its folder on the path is enough for its test.
    environment = os.environ | {"PYTHONPATH": str(folder)}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        env=environment, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed" in run.stdout
    code, output = invoke(rewards_app, "check", f"{folder}/rlhf_t2i_my_reward/__init__.py:MyReward", "--size", "16")
    assert code == 0, output
    with pytest.raises(UsageError, match=r"exists already"):
        invoke(rewards_app, "new", "my_reward", "--dir", str(tmp_path))


def test_the_module_imports_neither_torch_nor_ray() -> None:
    """--help must answer at once."""
    code = (
        "import sys; import rlhf_t2i.commands.rewards; assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
