"""Explain a validation error in one sentence: the place, the key, what is wrong with it, and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rlhf_t2i.errors import UsageError, printable

KeyPath = tuple[str | int, ...]
_SELF_EXPLAINING = ("value_error", "assertion_error", "too_short")


def explain(
    error: ValidationError, schema: type[BaseModel], place: str | Callable[[KeyPath], str], noun: str = "key"
) -> UsageError:
    """The first problem of a validation error, as a sentence.

    Unknown keys come first, since they are usually the cause of the others.

    Args:
        error: What pydantic raised.
        schema: The model that was validated.
        place: Where the values come from, or a function that tells it for a key (a file and its line).
        noun: What a key is called here (``option`` of a plugin).
    """
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key: KeyPath = tuple(first["loc"])
    name = shown(".".join(map(str, key)))

    def at(key: KeyPath) -> str:
        return place if isinstance(place, str) else place(key)

    if first["type"] == "extra_forbidden":
        valid = valid_keys(schema, key[:-1])
        return UsageError(f"{at(key)}: unknown {noun} {name!r}; {hint(str(key[-1]), valid, f'valid {noun}s here')}")
    if first["type"] == "missing":
        return UsageError(f"{at(key[:-1])}: the {noun} {name!r} is missing")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "too_short":
        message = f"needs at least {first['ctx']['min_length']}, but has {first['ctx']['actual_length']}"
    given = "" if first["type"] in _SELF_EXPLAINING else f", not {kind(first['input'])}"
    return UsageError(f"{at(key)}: {f'{name}: ' if name else ''}{message}{given}")


def hint(name: str, valid: Iterable[str], otherwise: str = "known") -> str:
    """``did you mean 'steps'?``, or all valid names after ``otherwise``."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise}: {', '.join(names) or 'none'}"


def valid_keys(schema: type[BaseModel], key: KeyPath) -> list[str]:
    """The keys of the section at ``key``."""
    section: Any = schema
    for part in key:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            section = next(_sections(field.annotation), section)
    return list(section.model_fields)


def default(schema: type[BaseModel], key: KeyPath) -> object:
    """The default value of a key; None if it has none."""
    section: Any = schema
    field = None
    for part in key:
        field = section.model_fields.get(part) if isinstance(part, str) else None
        section = next(_sections(field.annotation), section) if field is not None else section
    return None if field is None or field.is_required() else field.get_default(call_default_factory=True)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def shown(text: str) -> str:
    """User input shortened to one line, with control characters escaped."""
    line = printable(text)
    return line if len(line) <= 200 else line[:197] + "..."


def kind(value: object) -> str:
    """A short description of a bad value."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of over 4,300 digits.
        return "a number of thousands of digits"
    return shown(text if len(text) <= 60 else text[:57] + "...")
