"""An append-only record of finished work: what a kill cuts short is done again, what stands is never repeated."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import files


class Journal:
    """Lines ``{"key": ..., "batch": b, "values": [...]}`` in one file.

    Args:
        path: The file; made when absent. A last line cut short by a kill is cut off.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done: dict[tuple[str, int], list[Any]] = {}
        if path.is_file():
            self._read()

    def get(self, key: str, batch: int) -> list[Any] | None:
        """The values of a batch, or None when it is still to do."""
        return self._done.get((key, batch))

    def put(self, key: str, batch: int, values: Sequence[Any]) -> None:
        """Record a finished batch; on the disk before this returns."""
        line = json.dumps({"key": key, "batch": batch, "values": list(values)}) + "\n"
        with self.path.open("ab") as stream:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
        self._done[key, batch] = list(values)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as stream:
                stream.truncate(len(whole))
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                self._done.setdefault((row["key"], int(row["batch"])), row["values"])
            except (ValueError, KeyError, TypeError):
                raise UsageError(f"{self.path} is damaged: remove it to score again") from None


def dumps(data: Any) -> str:
    """JSON that any reader takes: numbers that are none become null, and the same data gives the same bytes."""
    return json.dumps(files.finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def claim(out: Path, name: str, identity: dict[str, Any]) -> None:
    """Keep a folder for one piece of work: written on the first visit, compared on every later one.

    Raises:
        UsageError: The folder holds other work; names the first setting that differs.
    """
    path = out / name
    identity = json.loads(dumps(identity))
    if not path.is_file():
        files.write_atomic(path, dumps(identity))
        return
    try:
        there = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise UsageError(f"{path} is damaged: give another --out") from None
    for key in identity:
        if there.get(key) != identity[key]:
            raise UsageError(
                f"--out {out} holds other work: {key} is {there.get(key)!r} there and {identity[key]!r} now; "
                "give another --out"
            )
