"""docs/python.md: every snippet runs, in order."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import rlhf_t2i
from rlhf_t2i.tools import starting
from tests.project import pages


@pytest.mark.slow
def test_every_snippet_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starting.copy_recipe("quickstart", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = pages.run("docs/python.md")

    printed = capsys.readouterr().out
    assert "did you mean 'batch_size'" in printed
    assert not (tmp_path / "runs/wrong").exists()
    assert {row.key for row in names["result"].table} >= {"pickscore", "judge"}
    assert all(path.exists() for path in (names["result"].model, names["result"].report, names["result"].metrics))
    assert names["owl"].size == (64, 64)
    assert (tmp_path / "owl.png").is_file()
    assert names["scores"].shape == (2,)
    assert float(names["images"].grad.abs().max()) > 0
    assert len(list((tmp_path / "evaluations/notebook/images").iterdir())) == 4
    assert names["plan"].groups
    assert float(names["x0"].grad.abs().max()) > 0
    assert torch.isfinite(names["loss"]).all()


def test_the_page_shows_every_function() -> None:
    page = (pages.ROOT / "docs/python.md").read_text("utf-8")
    names = [name for name in rlhf_t2i.__all__ if not inspect.isclass(getattr(rlhf_t2i, name))]
    assert len(names) == 9
    assert [name for name in [*names, "FlowSchedule", "VPSchedule"] if f"rl.{name}" not in page] == []
