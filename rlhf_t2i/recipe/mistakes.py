"""Explain a validation error in one sentence: the place, the key, what is wrong with it, and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import UnionType
from typing import Annotated, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
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
    key, problems = _worst(schema, error.errors())
    name = shown(".".join(map(str, key)))
    where = place if isinstance(place, str) else place(key)
    if problems[0]["type"] == "extra_forbidden":
        valid = valid_keys(schema, key[:-1])
        return UsageError(f"{where}: unknown {noun} {name!r}; {hint(str(key[-1]), valid, f'valid {noun}s here')}")
    if problems[0]["type"] == "missing":
        return UsageError(f"{where}: the {noun} {name!r} is missing")
    return UsageError(f"{where}: {f'{name}: ' if name else ''}{_message(problems)}")


def hint(name: str, valid: Iterable[str], otherwise: str = "known") -> str:
    """``did you mean 'steps'?``, or all valid names after ``otherwise``."""
    names = list(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"{otherwise}: {', '.join(names) or 'none'}"


def valid_keys(schema: type[BaseModel], key: KeyPath) -> list[str]:
    """The keys of the section at ``key``."""
    sections = [section for section in _types_at(schema, key) if _is_model(section)]
    return [name for section in sections for name in section.model_fields]


def default(schema: type[BaseModel], key: KeyPath) -> object:
    """The default value of a key; None if it has none."""
    fields = [field for section in _types_at(schema, key[:-1]) if (field := _field(section, key[-1]))]
    return next((field.get_default(call_default_factory=True) for field in fields if not field.is_required()), None)


def key_of(schema: type[BaseModel], location: KeyPath) -> KeyPath:
    """The key of pydantic's location, which also names the members of unions that it tried."""
    key: KeyPath = ()
    for part in location:
        types = list(_types_at(schema, key))
        tried = len(types) > 1 and not any(_children(found, part) for found in types)
        if not tried and part != "[key]":
            key = (*key, part)
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


def _worst(schema: type[BaseModel], problems: Sequence[ErrorDetails]) -> tuple[KeyPath, list[ErrorDetails]]:
    """The key to speak of and its problem; several where each member of a union wanted another type."""
    found = [(key_of(schema, problem["loc"]), problem) for problem in problems]
    key, first = next((pair for pair in found if pair[1]["type"] == "extra_forbidden"), found[0])
    if first["type"] == "extra_forbidden" or len(list(_types_at(schema, key))) < 2:
        return key, [first]
    deepest = max((other for other, _ in found if other[: len(key)] == key), key=len)
    same = [problem for other, problem in found if other == deepest]
    return deepest, [problem for problem in same if problem["type"] not in _WRONG_TYPES][:1] or same


def _message(problems: Sequence[ErrorDetails]) -> str:
    """What is wrong with a value, and what was given."""
    problem = problems[0]
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


def _types_at(schema: object, key: KeyPath) -> Iterator[type]:
    """The types that the value of a key may have, None left out."""
    if key:
        for found in _members(schema):
            for child in _children(found, key[0]):
                yield from _types_at(child, key[1:])
    else:
        yield from _members(schema)


def _members(annotation: object) -> Iterator[type]:
    """The members of a union, or the one type of another annotation."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _members(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif annotation is not type(None):
        yield annotation  # type: ignore[misc]  # also list[int] and Literal["a"]


def _children(annotation: type, part: str | int) -> list[object]:
    """The annotation of an entry or a key; [] where there is no such one."""
    if (field := _field(annotation, part)) is not None:
        return [field.annotation]
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is dict and isinstance(part, str):
        return [arguments[1]]
    return [arguments[0]] if origin in (list, tuple) and isinstance(part, int) else []


def _field(section: type, name: str | int) -> FieldInfo | None:
    return section.model_fields.get(name) if _is_model(section) and isinstance(name, str) else None


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
