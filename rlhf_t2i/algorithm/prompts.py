"""The prompts of a run, from wherever people have them, and the order in which a run consumes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np

from rlhf_t2i.algorithm import prompt_formats, prompt_hub, rng
from rlhf_t2i.algorithm.prompt_store import StoredPrompts
from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import files

_MAX_PROMPT: Final = 5_000  # characters; text encoders read the first 77 tokens, some 300 characters
_MAX_TOTAL: Final = 2**36  # bytes of all prompts: a packed file of a few MB must not fill the disk
_NO_TEXT: Final = re.compile("[\0\ud800-\udfff]")
_NO_REVISIONS: Final[Mapping[str, str]] = MappingProxyType({})


def stream(
    path: str | Path, column: str = "prompt", place: str = "data: ", revisions: Mapping[str, str] = _NO_REVISIONS
) -> Iterator[str]:
    """Prompts one after another, each checked.

    Args:
        path: A file, whose suffix tells its format: ``.txt``: one prompt per line. ``.jsonl``: one object per line.
            ``.json``: an array of strings or of objects. ``.csv``: with a header. ``.tsv``: with a header, no quoting.
            ``.parquet``. Each also with ``.gz``. Or a folder of such files, read in the order of their names. Or
            ``hf://datasets/org/name[@revision][:split]``.
        column: The object key or column that holds the prompt.
        place: Prefix of the error message.
        revisions: Commits of hub datasets, as the recipe's ``revisions``.

    Raises:
        UsageError: Missing, empty, binary or malformed file, with its line; an unknown suffix.
    """
    if str(path).startswith(prompt_hub.PREFIX):
        found: Iterator[str] = prompt_hub.prompts(str(path), column, revisions, place)
    else:
        path = files.expanded(str(path))
        found = (text for file in _files(path, place) for text in prompt_formats.prompts(file, column, place))
    empty = True
    for prompt in _checked(found, f"{place}{path}"):
        empty = False
        yield prompt
    if empty:
        raise UsageError(f"{place}{path} holds no prompts")


def read(
    path: str | Path, column: str = "prompt", place: str = "data: ", revisions: Mapping[str, str] = _NO_REVISIONS
) -> StoredPrompts:
    """Read prompts; as many as the disk holds, for memory holds none of a long list.

    Args and errors as of :func:`stream`.

    Raises:
        RunError: The temporary folder is full.
    """
    return StoredPrompts(stream(path, column, place, revisions))


def exists(path: str) -> bool:
    """Whether a local file or folder is there; a dataset of the hub counts as one that is."""
    return path.startswith(prompt_hub.PREFIX) or files.expanded(path).exists()


def _files(path: Path, place: str) -> list[Path]:
    """The file, or the files of a folder by name; hidden ones are left out.

    Raises:
        UsageError: The folder is empty.
    """
    try:
        if not path.is_dir():
            return [path]
    except (OSError, ValueError):  # a name that no system takes: opening it says so
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if not file.is_dir() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise UsageError(f"{place}{path} is a folder without files: give files of prompts, {prompt_formats.KNOWN}")
    return found


def _checked(found: Iterator[str], where: str) -> Iterator[str]:
    """The prompts without white space around them, and without those that are empty.

    Raises:
        UsageError: One that no tokenizer reads, or that is no prompt by its length.
    """
    number = total = empty = 0
    for raw in found:
        prompt = raw.strip().strip("\ufeff").strip()  # the byte order marks of files that were joined
        if not prompt:
            empty += 1
            prompt_formats.check_empty(empty, where)
            continue
        number, empty = number + 1, 0
        total += len(prompt)
        if len(prompt) > _MAX_PROMPT:
            raise UsageError(
                f"{where} holds a prompt of {len(prompt):,} characters ({prompt[:40]!r}...), over {_MAX_PROMPT:,}: "
                "is it one prompt per line?"
            )
        check_text(prompt, f"{where}, prompt {number}")
        if total > _MAX_TOTAL:
            raise UsageError(f"{where} holds over {_MAX_TOTAL:,} characters of prompts: is it the right file?")
        yield prompt


def check_text(prompt: str, where: str) -> None:
    """Refuse a prompt that no tokenizer reads; bytes of the command line that are no UTF-8 are such text.

    Raises:
        UsageError: It holds a zero character or half a surrogate pair.
    """
    if _NO_TEXT.search(prompt):
        raise UsageError(
            f"{where}: {prompt[:40]!r} holds a zero character or half a surrogate pair, which no tokenizer reads: "
            "remove it"
        )


class PromptStream:
    """An endless stream of prompts: each epoch a fresh permutation, position i a pure function of the seed.

    Args:
        prompts: The prompts of one epoch.
        seed: The run's seed.
        purpose: Separates streams (``generator``, ``assistant``).
    """

    SHUFFLED: Final = 2**22
    """Up to this many prompts an epoch's order is an array, of 32 MB at most. Beyond it each position is computed."""

    def __init__(self, prompts: Sequence[str], seed: int, purpose: str) -> None:
        self._prompts, self._seed, self._purpose = prompts, seed, purpose
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, start: int, count: int) -> list[str]:
        """Prompts ``start .. start + count - 1`` of the stream."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> str:
        length = len(self._prompts)
        epoch, index = divmod(position, length)
        key = (self._seed, "prompts", self._purpose, epoch)
        if length > self.SHUFFLED:
            return self._prompts[rng.permuted(index, length, *key)]
        if epoch != self._epoch:
            self._epoch, self._order = epoch, rng.permutation(length, *key)
        return self._prompts[int(self._order[index])]
