"""Append-only records of finished work: what a kill cuts short is done again, what is recorded never is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from rlhf_t2i.errors import UsageError, option
from rlhf_t2i.evaluation.results import dumps
from rlhf_t2i.utils import files, inputs
from rlhf_t2i.utils.inputs import JsonObject

Line = TypeVar("Line", bound=BaseModel)


class _Drawn(BaseModel, strict=True):
    """A line of the record of images."""

    images: list[int]
    sha256: list[str]


class _Batch(BaseModel, strict=True):
    """A line of the record of scores; the first one of a metric has the versions with which it was computed."""

    key: str
    images: list[int]
    sha256: list[str]
    values: list[float]
    versions: dict[str, str] = {}


class _Claim(BaseModel):
    """What a folder is kept for."""

    identity: dict[str, object]
    facts: dict[str, str]


class DrawnImages:
    """The SHA-256 of every image that was drawn, one JSON line per finished batch.

    Args:
        path: The file; made when absent. A last line cut short by a kill is removed.

    Raises:
        UsageError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests: dict[int, str] = {}
        _read(path, _Drawn, self._record, noun="record of images", again="draw")

    def digest(self, image: int) -> str | None:
        """Of the image as it was drawn; None if it was not."""
        return self._digests.get(image)

    def add(self, images: Sequence[int], digests: Sequence[str]) -> None:
        """Record a batch whose files are written; it is on the disk when this returns."""
        batch = _Drawn(images=list(images), sha256=list(digests))
        files.append_line(self._path, batch.model_dump())
        self._record(batch)

    def _record(self, batch: _Drawn) -> None:
        self._digests.update(zip(batch.images, batch.sha256, strict=True))


class Scores:
    """The finished scores of images, one JSON line per batch. A score counts for the image that it was given to.

    Args:
        path: The file; made when absent. A last line cut short by a kill is removed.

    Raises:
        UsageError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._values: dict[str, dict[tuple[int, str], float]] = {}
        self._versions: dict[str, dict[str, str]] = {}
        _read(path, _Batch, self._record, noun="record of scores", again="score")

    def values(self, key: str, digests: Sequence[str]) -> dict[int, float]:
        """The finished values of a metric by image, for images with these digests."""
        found = self._values.get(key, {})
        return {image: found[image, digest] for image, digest in enumerate(digests) if (image, digest) in found}

    def versions(self, key: str) -> dict[str, str]:
        """The package versions with which the first values of a metric were computed; {} for none."""
        return self._versions.get(key, {})

    def add(
        self, key: str, images: Sequence[int], digests: Sequence[str], values: Sequence[float], versions: dict[str, str]
    ) -> None:
        """Record a finished batch; it is on the disk when this returns."""
        batch = _Batch(
            key=key, images=list(images), sha256=list(digests), values=list(values),
            versions={} if key in self._versions else versions,
        )  # fmt: skip
        files.append_line(self._path, batch.model_dump(exclude_defaults=True))
        self._record(batch)

    def _record(self, batch: _Batch) -> None:
        scored = zip(batch.images, batch.sha256, strict=True)
        self._values.setdefault(batch.key, {}).update(zip(scored, batch.values, strict=True))
        self._versions.setdefault(batch.key, batch.versions)


def _read(path: Path, model: type[Line], record: Callable[[Line], None], noun: str, again: str) -> None:
    """Give the lines of a record to ``record``.

    Raises:
        UsageError: One of them is damaged; ``again`` says what is done anew without the file.
    """
    for number, line in _whole_lines(path, noun):
        try:
            record(model.model_validate_json(line))
        except ValueError:  # pydantic's is one; another one for lists that differ in length
            raise UsageError(f"{path} line {number} is damaged: remove the file to {again} again") from None


def _whole_lines(path: Path, noun: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a record and their numbers, after what a kill left of the last one was cut off."""
    if not path.exists():
        return
    data = inputs.read_bytes(path, noun, inputs.LOG)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as stream:
            stream.truncate(len(whole))
    yield from enumerate(whole.split(b"\n")[:-1], 1)


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
