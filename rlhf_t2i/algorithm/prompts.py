"""Prompt files (text, jsonl, json, csv, tsv) and the order in which a run consumes them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_t2i.algorithm import rng
from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import inputs

_MAX_PROMPT = 5_000  # characters; text encoders read the first 77 tokens, some 300 characters
_TEXT = (".txt", ".text", ".prompts")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


def read(path: str | Path, column: str = "prompt", place: str = "data: ") -> list[str]:
    """Read prompts.

    Args:
        path: The file; its suffix tells its format. ``.txt``: one prompt per line. ``.jsonl``: one object per line.
            ``.json``: an array of strings or of objects. ``.csv``: with a header. ``.tsv``: with a header, no quoting.
        column: The object key or column that holds the prompt.
        place: Prefix of the error message.

    Raises:
        UsageError: Missing, empty, binary or malformed file, with its line; an unknown suffix.
    """
    path = Path(path)
    text = inputs.read_text(path, "prompt file", inputs.PROMPTS, place)
    if "\0" in text:
        raise UsageError(f"{place}{path} holds binary data, not prompts")
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        lines = _jsonl(path, text, column, place)
    elif suffix == ".json":
        lines = _json(path, text, column, place)
    elif suffix in (".csv", ".tsv"):
        lines = (row[column] or "" for row in rows(path, text, column, place))
    elif suffix in _TEXT:
        lines = iter(_lines(text))
    else:
        raise UsageError(
            f"{place}{path}: the suffix {suffix!r} names no format of prompts: "
            f"rename it to .txt (one prompt per line), .jsonl, .json, .csv or .tsv"
        )
    prompts = [prompt.strip() for prompt in lines if prompt.strip()]
    if not prompts:
        raise UsageError(f"{place}{path} holds no prompts")
    _check(path, prompts, place)
    return prompts


def _check(path: Path, prompts: list[str], place: str) -> None:
    longest = max(prompts, key=len)
    if len(longest) > _MAX_PROMPT:
        raise UsageError(
            f"{place}{path} holds a prompt of {len(longest):,} characters ({longest[:40]!r}...), over {_MAX_PROMPT:,}: "
            "is it one prompt per line?"
        )
    for number, prompt in enumerate(prompts, 1):
        if _NO_TEXT.search(prompt):
            raise UsageError(
                f"{place}{path}, prompt {number}: {prompt[:40]!r} holds a zero character or half a surrogate pair, "
                "which no tokenizer reads: remove it"
            )


def _lines(text: str) -> list[str]:
    """Lines between line feeds and carriage returns; ``splitlines`` also splits at U+2028, form feeds and others."""
    return re.split("\r\n|\n|\r", text)


def _jsonl(path: Path, text: str, column: str, place: str) -> Iterator[str]:
    for number, line in enumerate(_lines(text), 1):
        if line.strip():
            try:
                item = json.loads(line)
            except (ValueError, RecursionError):
                item = None
            if not isinstance(item, dict):
                raise UsageError(f"{place}{path}, line {number}: not a JSON object with the key {column!r}")
            yield _value(item, column, f"{place}{path}, line {number}")


def _json(path: Path, text: str, column: str, place: str) -> Iterator[str]:
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        raise UsageError(f"{place}{path} is not valid JSON") from None
    if not isinstance(items, list):
        raise UsageError(f"{place}{path} is not a JSON array of prompts")
    for number, item in enumerate(items, 1):
        yield item if isinstance(item, str) else _value(item, column, f"{place}{path}, entry {number}")


def _value(item: object, column: str, place: str) -> str:
    if not isinstance(item, dict) or column not in item:
        raise UsageError(f"{place}: not a JSON object with the key {column!r}")
    if not isinstance(item[column], str):
        raise UsageError(f"{place}: {column!r} is not a string")
    return item[column]


def rows(path: Path, text: str, column: str, place: str = "data: ") -> list[dict[str, str]]:
    """The rows of a csv or tsv file by the names of its header.

    A tsv has no quoting: PartiPrompts.tsv holds the prompt ``"G I G G L E"`` with its quotes. Only a field that doubles
    the quotes inside it, as in ``"say ""hi"" to"``, is read as quoted.

    Raises:
        UsageError: Malformed, or without the column.
    """
    tabs = path.suffix.lower() == ".tsv"
    source = io.StringIO(text, newline="")
    try:
        if tabs:
            reader = csv.DictReader(source, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
        else:
            reader = csv.DictReader(source, strict=True)
        table = list(reader)
    except csv.Error as error:
        raise UsageError(f"{place}{path}: {error}") from None
    if not table or column not in table[0]:
        named = ", ".join(name for name in (reader.fieldnames or ()) if name)[:200]
        raise UsageError(
            f"{place}{path} has no column {column!r} (it has: {named or 'none'}); data.column or --column names it"
        )
    return [{name: _unquoted(value) for name, value in row.items()} for row in table] if tabs else table


def _unquoted(field: str) -> str:
    if isinstance(field, str) and '""' in field[1:-1] and re.fullmatch('"(?:[^"]|"")*"', field):
        return field[1:-1].replace('""', '"')
    return field


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
