"""The formats of prompt files, each read as a stream: text, jsonl, JSON arrays, csv, tsv, parquet, and ``.gz`` of each.

Nothing here holds more of a file than a line, an entry of an array, or a row group of a parquet file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Final, cast

from rlhf_t2i.errors import UsageError, first_line, option
from rlhf_t2i.utils import inputs

KNOWN: Final = ".txt (one prompt per line), .jsonl, .json (an array), .csv, .tsv or .parquet, also with .gz behind it"
_TEXT: Final = (".txt", ".text", ".prompts")
_LINE: Final = 2**20  # characters of a line or of an entry of an array: the other columns may be long
_CHUNK: Final = 2**16
_BLANK: Final = " \t\r\n"
_SPACE: Final = re.compile(f"[{_BLANK}]*")
_BATCH: Final = 2**12  # rows of a parquet file


def prompts(path: Path, column: str, place: str) -> Iterator[str]:
    """The prompts of a file as they are, the empty ones included.

    Args:
        path: The file; its suffix tells its format.
        column: The object key or column that holds the prompt.
        place: Prefix of the error message.

    Raises:
        UsageError: Missing, binary or malformed file, with its line; an unknown suffix.
    """
    suffix = format_of(path)
    if suffix in (".csv", ".tsv"):
        yield from (row[column] or "" for row in rows(path, column, place, tabs=suffix == ".tsv"))
    elif suffix == ".parquet":
        yield from _parquet(path, column, place)
    elif suffix == ".jsonl":
        yield from _jsonl(path, column, place)
    elif suffix == ".json":
        yield from _json(path, column, place)
    elif suffix in _TEXT:
        with _opened(path, place) as lines:
            yield from lines
    else:
        with _binary(path, place):  # first whether it is a file at all
            pass
        raise UsageError(
            f"{place}{path}: the suffix {suffix!r} names no format of prompts: rename or convert it to {KNOWN}"
        )


def format_of(path: Path) -> str:
    """The suffix that tells the format, in lower case: ``.jsonl`` of ``a.jsonl.gz``."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def rows(path: Path, column: str, place: str, *, tabs: bool) -> Iterator[dict[str, str]]:
    """The rows of a csv or tsv file by the names of its header.

    A tsv has no quoting: PartiPrompts.tsv holds the prompt ``"G I G G L E"`` with its quotes. Only a field that doubles
    the quotes inside it, as in ``"say ""hi"" to"``, is read as quoted.

    Raises:
        UsageError: Malformed, or without the column.
    """
    with _opened(path, place) as lines:
        if tabs:
            reader = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, restval="")
        else:
            reader = csv.DictReader(lines, strict=True)
        csv.field_size_limit(_LINE)
        try:
            names = list(reader.fieldnames or ())
            _check_column(path, column, names, place)
            for row in reader:
                if None in row:  # the rest of a prompt with a comma that nobody quoted
                    raise UsageError(
                        f"{place}{path}, line {reader.line_num}: has {len(names) + len(row[None])} fields, the header "
                        f"{len(names)}: write a text that holds the delimiter or a quote in double quotes"
                    )
                yield {name: _unquoted(value) for name, value in row.items()} if tabs else row
        except csv.Error as error:
            # DictReader's own line_num is that of the last row that it could read.
            raise UsageError(f"{place}{path}, line {reader.reader.line_num}: {error}") from None


def _check_column(path: Path, column: str, names: list[str], place: str) -> None:
    if column not in names:
        raise _no_column(path, column, names, place)
    if names.count(column) > 1:
        raise UsageError(f"{place}{path} has {names.count(column)} columns {column!r}: rename or remove one")


def _no_column(path: Path, column: str, names: list[str], place: str) -> UsageError:
    named = ", ".join(name for name in names if name)[:200]
    return UsageError(
        f"{place}{path} has no column {column!r} (it has: {named or 'none'}); data.column or {option('column')} "
        "names it"
    )


def _unquoted(field: str) -> str:
    if isinstance(field, str) and '""' in field[1:-1] and re.fullmatch('"(?:[^"]|"")*"', field):
        return field[1:-1].replace('""', '"')
    return field


def _jsonl(path: Path, column: str, place: str) -> Iterator[str]:
    with _opened(path, place) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    item = json.loads(line)
                except (ValueError, RecursionError):
                    item = None
                if not isinstance(item, dict):
                    raise UsageError(f"{place}{path}, line {number}: not a JSON object with the key {column!r}")
                yield _value(item, column, f"{place}{path}, line {number}")


def _json(path: Path, column: str, place: str) -> Iterator[str]:
    with _binary(path, place) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        for number, item in enumerate(_array(text, f"{place}{path}"), 1):
            yield item if isinstance(item, str) else _value(item, column, f"{place}{path}, entry {number}")


def _value(item: object, column: str, place: str) -> str:
    if not isinstance(item, dict) or column not in item:
        raise UsageError(f"{place}: not a JSON object with the key {column!r}")
    if not isinstance(item[column], str):
        raise UsageError(f"{place}: {column!r} is not a string")
    return item[column]


def _array(file: io.TextIOWrapper, where: str) -> Iterator[object]:
    """The entries of a JSON array, one after the other: the json module reads arrays only whole."""
    chunks = iter(lambda: file.read(_CHUNK), "")
    decoder, place = json.JSONDecoder(), 1
    buffer = next((text for chunk in chunks if (text := chunk.lstrip(_BLANK))), "")
    if not buffer.startswith("["):
        raise UsageError(f"{where} is not a JSON array of prompts: write [...], or one JSON object per line as .jsonl")
    first = True
    while True:
        try:
            item, end = _next(decoder, buffer, place, first)
            # A word or number at the end of what was read may go on; a prompt ends with a quote or brace.
            if end == len(buffer) and not isinstance(item, str | dict | list | _End):
                raise IndexError
        except (ValueError, IndexError) as error:
            more = "" if len(buffer) - place > _LINE else next(chunks, "")
            if not more:
                raise UsageError(f"{where} is not valid JSON") from error
            buffer, place = buffer[place:] + more, 0
            continue
        except RecursionError:
            raise UsageError(f"{where} is not valid JSON") from None
        if isinstance(item, _End):
            if any(chunk.strip(_BLANK) for chunk in chain([buffer[end:]], chunks)):
                raise UsageError(f"{where} is not valid JSON: it goes on after its array")
            return
        yield item
        place, first = end, False


class _End:
    """The end of an array."""


def _next(decoder: json.JSONDecoder, buffer: str, place: int, first: bool) -> tuple[object, int]:
    """The entry of an array that begins at ``place``, behind its comma, and where it ends.

    Raises:
        ValueError: Not JSON, or not all of the entry is in the buffer.
        IndexError: The buffer ends here.
    """
    place = _skip(buffer, place)
    if buffer[place] == "]":
        return _End(), place + 1
    if not first:
        if buffer[place] != ",":
            raise ValueError("no comma")
        place = _skip(buffer, place + 1)
    return decoder.raw_decode(buffer, place)


def _skip(buffer: str, place: int) -> int:
    space = _SPACE.match(buffer, place)
    return place if space is None else space.end()


def _parquet(path: Path, column: str, place: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f"{place}{path}: reading parquet needs pyarrow: pip install 'rlhf-t2i[parquet]', or convert it to .jsonl"
        ) from None
    with _binary(path, place) as file, ExitStack() as stack:
        if path.name.lower().endswith(".gz"):  # a parquet file is read from its end
            packed, file = file, stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(packed, file)
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            _check_column(path, column, names, place)
            kind = table.schema_arrow.field(column).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UsageError(f"{place}{path}: the column {column!r} holds {kind}, not strings")
            for batch in table.iter_batches(_BATCH, columns=[column]):
                yield from (value or "" for value in batch.column(0).to_pylist())
        except (pyarrow.ArrowException, OSError) as error:
            raise UsageError(f"{place}{path} is not a whole parquet file: {first_line(error)}") from None


@contextmanager
def _opened(path: Path, place: str) -> Iterator[Iterator[str]]:
    """The lines of a UTF-8 file, with their ends."""
    # Lines end at line feeds and carriage returns; str.splitlines also splits at U+2028, form feeds and others.
    with _binary(path, place) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        yield _lines(text, f"{place}{path}")


def _lines(text: io.TextIOWrapper, where: str) -> Iterator[str]:
    number = empty = 0
    while line := _line(text, where, number):
        number += 1
        empty = empty + 1 if line.isspace() else 0
        check_empty(empty, where)
        if "\0" in line:
            raise UsageError(f"{where} holds binary data, not prompts")
        if len(line) == _LINE and line[-1] not in "\r\n":
            raise UsageError(f"{where}, line {number}: over {_LINE:,} characters: is it one prompt per line?")
        yield line


def check_empty(count: int, where: str) -> None:
    """Refuse a file of empty lines, or of rows without a prompt: it may be packed small, and be endless.

    Raises:
        UsageError: There are too many in a row.
    """
    if count > inputs.EMPTY_LINES:
        raise UsageError(f"{where} holds over {inputs.EMPTY_LINES:,} empty lines in a row: is it a list of prompts?")


def _line(text: io.TextIOWrapper, where: str, number: int) -> str:
    try:
        return text.readline(_LINE)
    except UnicodeDecodeError:
        after = f" after line {number}" if number else ""
        raise UsageError(f"{where} is not UTF-8 text{after}: save it as UTF-8") from None


@contextmanager
def _binary(path: Path, place: str) -> Iterator[IO[bytes]]:
    """A regular file, unpacked if its name ends in ``.gz``; errors while it is read are sentences."""
    with inputs.open_regular(path, "prompt file", inputs.PROMPTS, place) as file:
        try:
            packed = path.name.lower().endswith(".gz")
            unpacked = inputs.Unpacked(file, f"{place}{path}", inputs.PROMPTS) if packed else file
            yield cast("IO[bytes]", unpacked)
        except UnicodeDecodeError:
            raise UsageError(f"{place}{path} is not UTF-8 text: save it as UTF-8") from None
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise UsageError(f"{place}{path} is no whole gzip file: unpack it, or compress it again") from None
