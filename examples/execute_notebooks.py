"""Run the notebooks of this folder from top to bottom and store their outputs: ``make notebooks``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
_STEPS = re.compile(r"^STEPS = \d+", re.MULTILINE)


def execute(path: Path, steps: int | None = None) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; a cell that raises ends it.

    Args:
        path: The notebook; it runs in its own folder.
        steps: Training steps in place of its own, for a test.
    """
    notebook = nbformat.read(path, as_version=4)
    if steps is not None:
        for cell in notebook.cells:
            cell.source = _STEPS.sub(f"STEPS = {steps}", cell.source)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times: every run would change the file
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    for name in sys.argv[1:] or sorted(file.name for file in HERE.glob("*.ipynb")):
        print(name, flush=True)
        nbformat.write(execute(HERE / name), HERE / name)
