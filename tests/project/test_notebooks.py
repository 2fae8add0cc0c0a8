"""The notebooks of examples/: outputs are stored, and the first runs from top to bottom."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests.project.pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored_with_pictures_and_without_paths_of_a_machine(path: Path) -> None:
    notebook = json.loads(path.read_text("utf-8"))
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))  # run once, from top to bottom
    shown = outputs(notebook)
    assert [output for output in shown if output["output_type"] == "error"] == []
    assert any("image/png" in output.get("data", {}) for output in shown)
    text = json.dumps([output for output in shown if "data" not in output])
    assert not [folder for folder in ("/tmp", "/home", "/root", "/work", "/Users") if folder in text]
    assert path.stat().st_size < 400_000


@pytest.mark.slow
def test_the_first_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason="the dev extra")
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "examples/execute_notebooks.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = module.execute(ROOT / "examples/quickstart.ipynb", steps=1)
    shown = outputs(notebook)
    assert sum("image/png" in output.get("data", {}) for output in shown) == 5
    printed = "".join(output["text"] for output in shown if output["output_type"] == "stream")
    assert "pickscore" in printed
    assert "step_000001.png" in printed
    assert (next(tmp_path.glob("*/quickstart")) / "model/model_index.json").is_file()
