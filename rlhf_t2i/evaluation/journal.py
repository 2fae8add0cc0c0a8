"""An append-only record of finished scores: what a kill cuts short is scored again, what is recorded never is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError

from rlhf_t2i.errors import UsageError, option
from rlhf_t2i.evaluation.results import dumps
from rlhf_t2i.utils import files, inputs
from rlhf_t2i.utils.inputs import JsonObject


class _Batch(BaseModel, strict=True):
    """A line of the journal; the first one of a metric has the versions with which it was computed."""

    key: str
    images: list[int]
    values: list[float]
    versions: dict[str, str] = {}


class _Claim(BaseModel):
    """What a folder is kept for."""

    identity: dict[str, object]
    facts: dict[str, str]


class Journal:
    """One JSON line per finished batch.

    Args:
        path: The file; made when absent. A last line cut short by a kill is removed.

    Raises:
        UsageError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, dict[int, float]] = {}
        self._versions: dict[str, dict[str, str]] = {}
        if path.exists():
            self._read()

    def values(self, key: str) -> Mapping[int, float]:
        """The finished values of a metric, by image."""
        return self._values.get(key, {})

    def versions(self, key: str) -> dict[str, str]:
        """The package versions with which the first values of a metric were computed; {} for none."""
        return self._versions.get(key, {})

    def add(self, key: str, images: Sequence[int], values: Sequence[float], versions: dict[str, str]) -> None:
        """Record a finished batch; it is on the disk when this returns."""
        first = key not in self._versions
        batch = _Batch(key=key, images=list(images), values=list(values), versions=versions if first else {})
        files.append_line(self._path, batch.model_dump(exclude_defaults=True))
        self._record(batch)

    def _read(self) -> None:
        data = inputs.read_bytes(self._path, "record of scores", inputs.LOG)
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self._path.open("r+b") as stream:
                stream.truncate(len(whole))
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            try:
                self._record(_Batch.model_validate_json(line))
            except ValueError:  # pydantic's is one; another one for images and values that differ in number
                raise UsageError(f"{self._path} line {number} is damaged: remove the file to score again") from None

    def _record(self, batch: _Batch) -> None:
        self._values.setdefault(batch.key, {}).update(zip(batch.images, batch.values, strict=True))
        self._versions.setdefault(batch.key, batch.versions)


def claim(
    out: Path, name: str, identity: Mapping[str, object], facts: Mapping[str, str] | None = None
) -> Mapping[str, str]:
    """Keep a folder for one piece of work: written on the first visit, compared on every later one.

    Args:
        out: The folder.
        name: The file that holds the identity.
        identity: What the work depends on.
        facts: Recorded on the first visit, but not compared.

    Returns:
        The facts of the first visit.

    Raises:
        UsageError: The folder holds other work; names the first setting that differs.
    """
    path = out / name
    now: JsonObject = json.loads(dumps(identity))
    if not path.exists():
        files.write_atomic(path, dumps({"identity": now, "facts": facts or {}}))
        return facts or {}
    try:
        data = _Claim.model_validate(inputs.read_json(path, "record of settings"))
    except ValidationError:
        raise UsageError(f"{path} is damaged: give another {option('out')}") from None
    there, recorded = data.identity, data.facts
    for key in now | there:
        if there.get(key) != now.get(key):
            raise UsageError(
                f"{option('out')} {out} holds other work: {key} is {there.get(key)!r} there and {now.get(key)!r} now; "
                f"give another {option('out')}"
            )
    return recorded
