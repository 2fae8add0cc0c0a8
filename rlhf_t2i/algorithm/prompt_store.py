"""Prompts outside memory: one text and the offsets of its parts, in files that end with the process."""

from __future__ import annotations

import tempfile
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Final, overload

from rlhf_t2i.utils import files

_IN_MEMORY: Final = 2**24  # bytes; a longer text, or more offsets, go to a file
_BLOCK: Final = 2**14  # prompts that are written, or read in order, at once
_WIDTH: Final = 8  # bytes of an offset


class StoredPrompts(Sequence[str]):
    """A list of prompts that takes 32 MB of memory at most, however long it is.

    What does not fit is in two files of the temporary folder (``TMPDIR``) without a name, so that nothing is left of
    them even when the process is killed. Reading is safe from several threads.

    Args:
        prompts: Read once, in order.

    Raises:
        RunError: The temporary folder is full.
    """

    def __init__(self, prompts: Iterable[str]) -> None:
        self._text = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 - closed with this object
        self._offsets = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115
        self._lock, self._length = threading.Lock(), 0
        with files.disk_errors(Path(tempfile.gettempdir())):
            self._write(prompts)

    def _write(self, prompts: Iterable[str]) -> None:
        end, offsets = 0, array("Q", [0])
        for prompt in prompts:
            end += self._text.write(prompt.encode())
            offsets.append(end)
            self._length += 1
            if len(offsets) == _BLOCK:
                self._offsets.write(offsets.tobytes())
                offsets = array("Q")
        self._offsets.write(offsets.tobytes())
        self._text.flush()
        self._offsets.flush()

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """A prompt by its position, or a list of them by a slice."""
        if isinstance(index, slice):
            start, stop, step = index.indices(self._length)
            return self._block(start, stop) if step == 1 else [self[place] for place in range(start, stop, step)]
        place = index + self._length if index < 0 else index
        if not 0 <= place < self._length:
            raise IndexError(f"prompt {index} of {self._length}")
        return self._block(place, place + 1)[0]

    def __iter__(self) -> Iterator[str]:
        for start in range(0, self._length, _BLOCK):
            yield from self._block(start, min(start + _BLOCK, self._length))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # as of lists

    def _block(self, start: int, stop: int) -> list[str]:
        """Prompts ``start .. stop - 1``."""
        if start >= stop:
            return []
        with self._lock:
            self._offsets.seek(start * _WIDTH)
            offsets = array("Q", self._offsets.read((stop - start + 1) * _WIDTH))
            self._text.seek(offsets[0])
            data = self._text.read(offsets[-1] - offsets[0])
        first = offsets[0]
        return [data[a - first : b - first].decode() for a, b in pairwise(offsets)]
