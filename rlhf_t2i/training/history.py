"""What a run logged up to a checkpoint: whole and in order, or an error message that names file and line.

A checkpoint is written after the rows of its steps are on the disk. Lines after those may be damaged: a kill cuts the
last one short, a power cut can leave zeros. Their steps are repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf_t2i.errors import UsageError, option
from rlhf_t2i.evaluation import results
from rlhf_t2i.training.folder import RunFolder, RunRecord
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import jsonl
from rlhf_t2i.utils.jsonl import Row

WATCH = "watch.jsonl"
_ADVICE = "restore the file from a copy, or remove it to go on without its rows"


@dataclass(frozen=True)
class History:
    """Rows of one file.

    Attributes:
        rows: Those up to the checkpoint.
        messages: What the user should know about the others.
    """

    rows: list[Row] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


class _Event(BaseModel):
    model_config = ConfigDict(strict=True)

    step: int
    after: Annotated[list[int], Field(min_length=2, max_length=2)]
    text: str


class _Measurement(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    step: int
    reward: list[float | None]
    signals: dict[str, list[float | None]]


def check(folder: RunFolder, state: TrainState) -> list[str]:
    """Check all that a resumed run goes on from beside its checkpoint; returns what the user should know.

    Raises:
        UsageError: A file is damaged.
    """
    RunRecord.read(folder.run)
    read = [
        metrics(folder.metrics, state),
        events(folder.events, state),
        measurements(folder.evaluation / WATCH, state),
    ]
    messages = [message for found in read for message in found.messages]
    if state != TrainState() and results.read(folder.evaluation / "before") is None:
        messages.append("evaluation/before is missing: there will be no table of before and after")
    return messages


def metrics(path: Path, state: TrainState) -> History:
    """The rows of ``metrics.jsonl`` up to a state: one per step, without a gap up to the last.

    Raises:
        UsageError: A row is damaged, out of order or missing.
    """
    if not path.exists():
        lost = f"{path.name} is missing: it begins again with step {state.step + 1}"
        return History(messages=[lost] if state.step else [])
    found = _up_to(path, (state.step, 0), _numbers, lambda row: (row["step"], 0), repeats=False)
    steps = [row["step"] for row in found.rows]
    gap = next((b for a, b in pairwise(steps) if b != a + 1), None)
    if gap is not None or (steps[-1] if steps else 0) != state.step:
        missing = state.step if gap is None else gap - 1
        raise UsageError(
            f"{option('resume')}: {path} has no row of step {missing}, which the checkpoint has done: {_ADVICE}"
        )
    return found


def events(path: Path, state: TrainState) -> History:
    """The rows of ``events.jsonl`` up to a state; errors as :func:`metrics`, but for missing rows."""
    return _up_to(path, (state.step, state.round), partial(_is, _Event), lambda row: tuple(row["after"]), repeats=True)


def measurements(path: Path, state: TrainState) -> History:
    """The rows of ``evaluation/watch.jsonl`` up to a state; errors as :func:`events`.

    A run at its beginning measures again.
    """
    last = state.step if state != TrainState() else -1
    return _up_to(path, (last, 0), partial(_is, _Measurement), lambda row: (row["step"], 0), repeats=False)


def _up_to(
    path: Path,
    done: tuple[int, int],
    valid: Callable[[Row], bool],
    position: Callable[[Row], tuple[int, ...]],
    repeats: bool,
) -> History:
    """The rows at positions up to ``done``.

    Args:
        path: The file; one that is missing has no rows.
        done: Generator updates, and assistant rounds after them.
        valid: Whether a row is one of this file's.
        position: Of a row.
        repeats: Whether several rows may have one position.
    """
    rows, damaged, newer = list[Row](), list[int](), False
    last: tuple[int, ...] = (-1, -1)
    for number, row in jsonl.lines(path) if path.exists() else ():
        if row is None or not valid(row):
            damaged.append(number)
        elif position(row) > done:
            newer = True
        else:
            if damaged:
                raise UsageError(f"{option('resume')}: {path} line {damaged[0]} is damaged: {_ADVICE}")
            if newer or position(row) < last or (position(row) == last and not repeats):
                raise UsageError(
                    f"{option('resume')}: {path} line {number} (step {row['step']}) is out of order: {_ADVICE}"
                )
            rows.append(row)
            last = position(row)
    removed = f"{path.name}: removed what a kill had cut short (from line {damaged[0]})" if damaged else None
    return History(rows, [removed] if removed else [])


def _numbers(row: object) -> bool:
    """Whether a value is a number, null, or an object of such."""
    if isinstance(row, dict):
        return all(map(_numbers, row.values()))
    return row is None or (isinstance(row, int | float) and not isinstance(row, bool))


def _is(kind: type[BaseModel], row: Row) -> bool:
    try:
        kind.model_validate(row)
    except ValidationError:
        return False
    return True
