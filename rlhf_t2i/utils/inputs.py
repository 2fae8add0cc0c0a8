"""Read files that a user or a stranger wrote: regular files of a bounded size, and a sentence for everything else."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
from pathlib import Path
from typing import IO, Final, TypeAlias

from rlhf_t2i.errors import UsageError

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
"""A value of a JSON or YAML file."""
JsonObject: TypeAlias = dict[str, Json]

RECIPE: Final = 1_000_000
CONFIG: Final = 64_000_000
BENCHMARK: Final = 2_000_000_000
PROMPTS: Final = 64_000_000_000
SOURCE: Final = 10_000_000
LOG: Final = 8_000_000_000
EMPTY_LINES: Final = 1_000_000
_RATIO: Final = 200
_SMALL: Final = 2**26
"""Most bytes of a recipe, of a model's JSON file (tokenizers are the largest), of a benchmark's list, which is read
whole, of a file of prompts, which is not, of Python, and of a log with a row per step; most empty lines in a row. A
packed file may have ``_RATIO`` times its size unpacked, and always ``_SMALL`` bytes: text packs ten times smaller,
nothing but empty lines a thousand times."""


def open_regular(path: Path, noun: str, limit: int, place: str = "") -> IO[bytes]:
    """Open a regular file to read.

    Args:
        path: The file; links are followed.
        noun: What it should be, for the error message: ``recipe``.
        limit: Most bytes it may have.
        place: Prefix of the error message: ``data: ``.

    Raises:
        UsageError: It is missing, not a regular file (a pipe or a device never ends), too large, or unreadable.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UsageError(f"{place}{path} is a directory: give a {noun}")
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{place}{path} is not a regular file: give a {noun}")
        if status.st_size > limit:
            raise UsageError(
                f"{place}{path} has {status.st_size:,} bytes: a {noun} has at most {limit:,}; is it the right file?"
            )
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{place}no such {noun}: {path}") from None
    except OSError as error:
        raise UsageError(f"{place}the {noun} {str(path)[:200]} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{place}no such {noun}: the path holds a zero byte") from None


class Unpacked(io.BufferedIOBase):
    """What a ``.gz`` file holds, as far as a file of its size may.

    Args:
        file: The packed file.
        name: Of it, for the error message.
        limit: Most bytes.

    Raises:
        UsageError: It holds more; while it is read.
    """

    def __init__(self, file: IO[bytes], name: str, limit: int) -> None:
        self._file, self._name, self._count = gzip.GzipFile(fileobj=file), name, 0
        self._limit = min(limit, max(_RATIO * os.fstat(file.fileno()).st_size, _SMALL))

    def readable(self) -> bool:
        """True."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """As :meth:`io.BufferedIOBase.read`."""
        return self._counted(self._file.read(-1 if size is None else size))

    def read1(self, size: int = -1) -> bytes:
        """As :meth:`io.BufferedIOBase.read1`."""
        return self._counted(self._file.read1(size))

    def _counted(self, data: bytes) -> bytes:
        self._count += len(data)
        if self._count > self._limit:
            raise UsageError(f"{self._name} unpacks to over {self._limit:,} bytes: is it a packed list of prompts?")
        return data


def read_bytes(path: Path, noun: str, limit: int, place: str = "") -> bytes:
    """The content of a regular file; arguments and errors as :func:`open_regular`."""
    try:
        with open_regular(path, noun, limit, place) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"{place}the {noun} {str(path)[:200]} cannot be read: {error.strerror}") from None
    if len(data) > limit:  # /proc and the like state a size of 0
        raise UsageError(f"{place}{path} has over {limit:,} bytes: is it a {noun}?")
    return data


def read_text(path: Path, noun: str, limit: int, place: str = "") -> str:
    """The text of a UTF-8 file, without a byte order mark; arguments and errors as :func:`read_bytes`."""
    data = read_bytes(path, noun, limit, place)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{place}{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def read_json(path: Path, noun: str, limit: int = CONFIG, place: str = "") -> Json:
    """The value of a JSON file; arguments and errors as :func:`read_bytes`.

    Raises:
        UsageError: Besides, it is not valid JSON.
    """
    text = read_text(path, noun, limit, place)
    try:
        value: Json = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{place}{path} is damaged: not valid JSON") from None
    return value
