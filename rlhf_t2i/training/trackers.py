"""Experiment trackers beside metrics.jsonl, through accelerate; chosen by ``logging.trackers``."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.training import tracker_media

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "rlhf-t2i"
"""Name of the project or experiment in every tracker."""


def check(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed, and one that would write everything twice.

    Raises:
        UsageError: A package is missing, or a tracker is named twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"logging.trackers names {name} twice: leave one out")
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"logging.trackers: {name} is not installed: pip install 'rlhf-t2i[{name}]'")


class Trackers:
    """Sends metrics, images and tables to trackers.

    One that fails is reported once and not used any more: it never ends a run.

    Args:
        names: Of ``tensorboard``, ``wandb``, ``mlflow``, ``trackio``.
        out: The run's folder. A resumed run continues its own curves.
        warn: Receives the message about a tracker that failed.
    """

    def __init__(self, names: Sequence[str], out: Path, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._active: dict[str, GeneralTracker] = {}
        for name in names:
            self._call(name, partial(self._open, name, out))

    def _open(self, name: str, out: Path) -> None:
        self._active[name] = _start(name, out)

    def log(self, step: int, metrics: Mapping[str, object]) -> None:
        """Record a row of metrics.jsonl; nested objects become ``outer/inner``, and only finite numbers are sent."""
        values = {key: value for key, value in scalars(metrics) if key != "step"}
        for name, tracker in list(self._active.items()):
            self._call(name, partial(tracker.log, values, step=step))

    def log_image(self, name: str, path: Path, step: int) -> None:
        """Record an image file."""
        for tracker_name, tracker in list(self._active.items()):
            self._call(tracker_name, partial(tracker_media.log_image, tracker, name, path, step))

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[str | float]], step: int) -> None:
        """Record a table."""
        for tracker_name, tracker in list(self._active.items()):
            self._call(tracker_name, partial(tracker_media.log_table, tracker, name, columns, rows, step))

    def close(self) -> None:
        """Flush and close."""
        for name, tracker in list(self._active.items()):
            self._call(name, tracker.finish)
        self._active.clear()

    def _call(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except (Exception, SystemExit) as error:
            self._active.pop(name, None)
            self._warn(f"{name} failed and is not used any more ({first_line(error)}); metrics.jsonl is complete")


def scalars(metrics: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a row, nested keys joined by slashes."""
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield prefix + key, float(value)


def _start(name: str, out: Path) -> GeneralTracker:
    """A started accelerate tracker. Nothing leaves the machine unless the tracker's own settings say so."""
    from accelerate import PartialState, tracking

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    PartialState()  # the trackers' own logging requires it
    start = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}[name]
    tracker = start(tracking, out)
    tracker.start()
    return tracker


def _tensorboard(tracking: ModuleType, out: Path) -> GeneralTracker:
    return tracking.TensorBoardTracker("tensorboard", logging_dir=out)


def _wandb(tracking: ModuleType, out: Path) -> GeneralTracker:
    mode = os.environ.get("WANDB_MODE", "offline")
    return tracking.WandBTracker(PROJECT, name=out.name, dir=str(out), id=_identity(out), resume="allow", mode=mode)


def _trackio(tracking: ModuleType, out: Path) -> GeneralTracker:
    return tracking.TrackioTracker(PROJECT, name=f"{out.name}-{_identity(out)}", resume="allow")


def _mlflow(tracking: ModuleType, out: Path) -> GeneralTracker:
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        (out / "mlflow").mkdir(exist_ok=True)
        mlflow.set_tracking_uri(f"sqlite:///{out / 'mlflow/mlflow.db'}")
    query = {"experiment_names": [PROJECT], "filter_string": f"tags.run = '{_identity(out)}'"}
    earlier = mlflow.search_runs(**query, output_format="list")
    return tracking.MLflowTracker(
        PROJECT,
        logging_dir=str(out / "mlflow/artifacts"),
        run_id=earlier[0].info.run_id if earlier else None,
        run_name=out.name,
        tags={"run": _identity(out)},
    )


def _identity(out: Path) -> str:
    """The same for the same folder, so that a resumed run continues its own curves."""
    from rlhf_t2i.utils import fingerprints

    return fingerprints.of_text(str(out))
