"""Images and tables of each tracker, through accelerate where it has a call for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rlhf_t2i.evaluation.results import markdown_table

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

Rows = Sequence[Sequence[str | float]]


def log_image(tracker: GeneralTracker, name: str, path: Path, step: int) -> None:
    """Record an image file under a name at a step."""
    if tracker.name == "mlflow":
        tracker.log_artifact(str(path), name)
        return
    if tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(str(path))}, step=step)
        return
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    more = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
    tracker.log_images({name: pixels[None]}, step=step, **more)


def log_table(tracker: GeneralTracker, name: str, columns: Sequence[str], rows: Rows, step: int) -> None:
    """Record a table; TensorBoard shows it as Markdown text, MLflow stores ``NAME.json``."""
    if tracker.name == "wandb":
        tracker.log_table(name, columns=list(columns), data=[list(row) for row in rows], step=step)
    elif tracker.name == "tensorboard":
        tracker.log({name: _markdown(columns, rows)}, step=step)
    elif tracker.name == "mlflow":
        import mlflow

        mlflow.log_table({column: [row[i] for row in rows] for i, column in enumerate(columns)}, f"{name}.json")
    else:
        import trackio

        tracker.log({name: trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)


def _markdown(columns: Sequence[str], rows: Rows) -> str:
    cells = [[f"{cell:.5g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return markdown_table([list(columns), ["---"] * len(columns), *cells])
