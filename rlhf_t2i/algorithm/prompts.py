"""Prompt files (text, jsonl, csv) and the order in which a run consumes them."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from rlhf_t2i.algorithm import rng
from rlhf_t2i.errors import UsageError

_MAX_PROMPT = 5_000  # characters; text encoders read the first 77 tokens, some 300 characters


def read(path: str | Path, column: str = "prompt") -> list[str]:
    """Read prompts.

    Args:
        path: ``.jsonl`` (one object a line), ``.csv`` / ``.tsv`` (with a header), or plain text, one prompt a line.
        column: The object key or column that holds the prompt.

    Raises:
        UsageError: Missing, empty, binary or malformed file, with its line.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UsageError(f"data: {path} is a directory: give a prompt file")
        if not path.is_file():
            raise UsageError(f"data: no such prompt file: {path}")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"data: the prompt file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"data: {path} is not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise UsageError(f"data: {path} holds binary data, not prompts")
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        found = _jsonl(path, text, column)
    elif suffix in (".csv", ".tsv"):
        found = _table(path, text, column, "\t" if suffix == ".tsv" else ",")
    else:
        found = text.splitlines()
    prompts = [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise UsageError(f"data: {path} holds no prompts")
    longest = max(prompts, key=len)
    if len(longest) > _MAX_PROMPT:
        raise UsageError(
            f"data: {path} holds a prompt of {len(longest):,} characters ({longest[:40]!r}...), over {_MAX_PROMPT:,}: "
            "is it one prompt a line?"
        )
    return prompts


def _jsonl(path: Path, text: str, column: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            prompt = json.loads(line)[column]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            raise UsageError(f"data: {path}, line {number}: not a JSON object with the key {column!r}") from None
        if not isinstance(prompt, str):
            raise UsageError(f"data: {path}, line {number}: {column!r} is not a string")
        prompts.append(prompt)
    return prompts


def _table(path: Path, text: str, column: str, delimiter: str) -> list[str]:
    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise UsageError(f"data: {path}: {error}") from None
    if not rows or column not in rows[0]:
        raise UsageError(f"data: {path} has no column {column!r} (set data.column)")
    return [row[column] or "" for row in rows]


class PromptStream:
    """An endless stream of prompts: each epoch a fresh permutation, position i a pure function of the seed.

    Args:
        prompts: The prompts of one epoch.
        seed: The run's seed.
        purpose: Separates streams (``generator``, ``assistant``).
    """

    def __init__(self, prompts: list[str], seed: int, purpose: str) -> None:
        self._prompts, self._seed, self._purpose = prompts, seed, purpose
        self._epoch = -1
        self._order = rng.permutation(0)

    def batch(self, start: int, count: int) -> list[str]:
        """Prompts ``start .. start + count - 1`` of the stream."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> str:
        epoch, index = divmod(position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = rng.permutation(len(self._prompts), self._seed, "prompts", self._purpose, epoch)
        return self._prompts[self._order[index]]
