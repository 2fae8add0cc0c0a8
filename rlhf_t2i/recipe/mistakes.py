"""Explain a validation error in one sentence: the place, the key, what is wrong with it, and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from rlhf_t2i.errors import UsageError, printable

KeyPath = tuple[str | int, ...]

_WRONG_TYPES = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping of keys to values"),
    "string_type": "text",
    "literal_error": "{expected}",
}
_WRONG_VALUES = {
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have {min_length} or more characters",
    "string_too_long": "must have {max_length} or fewer characters",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have {max_length} or fewer entries",
    "string_pattern_mismatch": "must match the pattern {pattern}",
}
"""What pydantic's errors mean, in words without its types and classes; its own words for those that are not here."""


def explain(
    error: ValidationError,
    schema: type[BaseModel],
    data: object,
    place: str | Callable[[KeyPath], str],
    noun: str = "key",
) -> UsageError:
    """The first problem of a validation error, as a sentence.

    Unknown keys come first, since they are usually the cause of the others.

    Args:
        error: What pydantic raised.
        schema: The model that was validated.
        data: The values that it was given.
        place: Where the values come from, or a function that tells it for a key (a file and its line).
        noun: What a key is called here (``option`` of a plugin).
    """
    found = [(_key(problem["loc"], problem["type"], data), problem) for problem in error.errors()]
    key, first = next((pair for pair in found if pair[1]["type"] == "extra_forbidden"), found[0])
    name = shown(".".join(map(str, key)))
    where = place if isinstance(place, str) else place(key)
    if first["type"] == "extra_forbidden":
        valid = valid_keys(schema, key[:-1])
        return UsageError(f"{where}: unknown {noun} {name!r}; {hint(str(key[-1]), valid, f'valid {noun}s here')}")
    if first["type"] == "missing":
        return UsageError(f"{where}: the {noun} {name!r} is missing")
    # Where a value may have several types, pydantic tried each: what is wrong further inside says most.
    key = max((other for other, _ in found if other[: len(key)] == key), key=len)
    name = shown(".".join(map(str, key)))
    message = _message([problem for other, problem in found if other == key])
    return UsageError(f"{where}: {f'{name}: ' if name else ''}{message}")


def place(error: ValidationError) -> str:
    """Where the first problem of a file that no user writes is: its key with dots; "" for the whole file."""
    return ".".join(map(str, error.errors()[0]["loc"]))


def hint(name: str, valid: Iterable[str], otherwise: str = "known") -> str:
    """``did you mean 'steps'?``, or all valid names after ``otherwise``."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise}: {', '.join(names) or 'none'}"


def valid_keys(schema: type[BaseModel], key: KeyPath) -> list[str]:
    """The keys of the section at ``key``."""
    section = schema
    for part in key:
        field = section.model_fields.get(str(part))
        if field is not None:
            section = next(_sections(field.annotation), section)
    return list(section.model_fields)


def default(schema: type[BaseModel], key: KeyPath) -> object:
    """The default value of a key; None if it has none."""
    for part in key[:-1]:
        field = schema.model_fields.get(str(part))
        schema = next(_sections(field.annotation), schema) if field is not None else schema
    field = schema.model_fields.get(str(key[-1]))
    return None if field is None or field.is_required() else field.get_default(call_default_factory=True)


def _sections(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _key(location: KeyPath, problem: str, data: object) -> KeyPath:
    """The key of pydantic's location, which also names the types that it tried and sections it made of a word."""
    key: KeyPath = ()
    for index, part in enumerate(location):
        absent = index == len(location) - 1 and problem == "missing"
        if isinstance(data, Mapping) and (part in data or absent):
            key, data = (*key, part), data.get(part)
        elif isinstance(data, list | tuple) and isinstance(part, int):
            key, data = (*key, part), data[part]
    return key


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


def _message(problems: Sequence[ErrorDetails]) -> str:
    """What is wrong with a value, and what was given; several problems where each of its types has one."""
    problem = next((one for one in problems if one["type"] not in _WRONG_TYPES), problems[0])
    name, context, given = problem["type"], problem.get("ctx", {}), kind(problem["input"])
    if name in _WRONG_TYPES:
        types = dict.fromkeys(_WRONG_TYPES[one["type"]].format_map(one.get("ctx", {})) for one in problems)
        return f"must be {' or '.join(types)}, not {given}"
    if context.get("min_length") == 1:
        return "must not be empty"
    if name in _WRONG_VALUES:
        limits = {key: f"{value:g}" if isinstance(value, float) else value for key, value in context.items()}
        return f"{_WRONG_VALUES[name].format_map(limits)}, not {limits.get('actual_length', given)}"
    if name in ("value_error", "assertion_error"):
        message = problem["msg"].partition(", ")[2]
        return message[:1].lower() + message[1:]
    return f"{problem['msg'].replace('Input should', 'must', 1)}, not {given}"
