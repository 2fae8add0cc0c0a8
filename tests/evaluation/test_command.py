"""The command line of eval."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from rlhf_t2i.commands.evaluate import eval_command, metric_options
from rlhf_t2i.errors import UsageError
from tests.evaluation.conftest import BRIGHTNESS


def test_command_prints_the_table(run_folder_with_model, tiny_prompts, tmp_path):
    app = typer.Typer()
    app.command()(eval_command)
    arguments = [str(run_folder_with_model), "--prompts", str(tiny_prompts), "--limit", "2", "--metrics", BRIGHTNESS,
                 "--timesteps", "749,249", "--out", str(tmp_path / "out")]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "mean pixel" in result.output
    assert "2 steps at t = 749, 249" in (tmp_path / "out" / "table.md").read_text()
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["images"]) == 2


@pytest.mark.parametrize(("model", "name"), [("..", "parent"), (".", "child"), ("../child/", "child")])
def test_the_default_folder_is_below_evaluations(model, name, tmp_path, monkeypatch):
    """Cases E.4: evaluations/.. is the working folder."""
    found = []
    monkeypatch.setattr(
        "rlhf_t2i.evaluation.run.evaluate", lambda settings, out, progress: found.append(out) or exit(0)
    )
    folder = tmp_path / "parent" / "child"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    app = typer.Typer()
    app.command()(eval_command)
    CliRunner().invoke(app, [model, "--prompts", "x.txt"])
    assert found == [Path("evaluations") / name]


def test_metric_options():
    assert metric_options(["pickscore.model=./p", "a.py:B.n=3"]) == {"pickscore": {"model": "./p"}, "a.py:B": {"n": 3}}
    for text in ("pickscore", "pickscore=3", ".x=1", "a.b=[", "a.=1"):
        with pytest.raises(UsageError, match="--set"):
            metric_options([text])


def test_module_imports_no_torch():
    code = "import sys, rlhf_t2i.commands.evaluate; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
