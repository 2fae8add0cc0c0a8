"""Standard output and error that survive their reader: lost (``| head``, a full disk), or of a poor encoding."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterable
from typing import TextIO, cast


def survive_lost_readers() -> None:
    """Make failed writes to standard output and error silent for the rest of the process.

    Nothing that a command prints is worth a training run. After the first failure the descriptor leads to the null
    device, so that other libraries' writes and Python's last flush succeed too.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:  # closed (`>&-`): otherwise the next file opened would receive what is printed
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of an encoding (LC_ALL, PYTHONIOENCODING) that lacks characters
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _Surviving.wrap(sys.stdout), _Surviving.wrap(sys.stderr)


class _Surviving:
    """A text stream whose writes cannot fail."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @classmethod
    def wrap(cls, stream: TextIO) -> TextIO:
        return stream if stream is None or isinstance(stream, cls) else cast(TextIO, cls(stream))

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._discard()
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def close(self) -> None:
        """Only flush: a plugin that closes the process's streams must not end the run at its next line."""
        self.flush()

    def _discard(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
