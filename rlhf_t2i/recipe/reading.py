"""Read a recipe: YAML, ``--set`` overrides, and errors that name the key, the line and the nearest valid key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files

KeyPath = tuple[str | int, ...]
_MAX_BYTES = 1_000_000
_MAX_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-6`` as a number (YAML 1.2) and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


class Source:
    """The recipe's file and the line of every key, for error messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[KeyPath, int] = {}
        self.overrides: dict[KeyPath, str] = {}
        self.values = 0

    def where(self, key: KeyPath) -> str:
        """``recipe.yaml, line 7`` for a key, or ``--set a.b=c`` where an override gave it."""
        for length in range(len(key), -1, -1):
            prefix = key[:length]
            if prefix in self.overrides:
                return f"--set {shown(self.overrides[prefix])}"
            if prefix in self.lines:
                return f"{self.path}, line {self.lines[prefix]}"
        return str(self.path)

    def error(self, key: KeyPath, message: str) -> UsageError:
        """A sentence that begins with the key's place."""
        return UsageError(f"{self.where(key)}: {message}")


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: The YAML file. Relative paths inside are relative to its folder.
        overrides: ``a.b=c`` settings, c in YAML; relative paths in them are relative to the working directory.

    Raises:
        UsageError: One sentence naming the file, the line, the key and the nearest valid key.
    """
    data, source = read(path)
    if {"base", "rows"} <= data.keys():
        raise UsageError(f"{source.path} is an ablation of several runs: give it to `rlhf-t2i ablate`")
    data = _resolve_paths(data, source.path.resolve().parent)
    for override in overrides:
        _apply_override(data, override, source)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise _explain(error, data, source) from None


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that :func:`load` reads back."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True, width=120)


def read(path: str | Path) -> tuple[dict[str, Any], Source]:
    """Read a YAML file whose keys are to be validated: its data, and the place of every key.

    Raises:
        UsageError: No such file, or no YAML mapping of a recipe's size; names the file and the line.
    """
    path = Path(path)
    source = Source(path)
    if path.is_dir():
        raise UsageError(f"{path} is a directory: give the recipe's YAML file")
    if not path.is_file():
        raise UsageError(f"no such recipe: {path}")
    if path.stat().st_size > _MAX_BYTES:
        raise UsageError(f"{path} has {path.stat().st_size} bytes: a recipe is a short YAML file")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        data = _parse(text, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values, not {_kind(data)}")
    return data, source


def parse_value(text: str, place: str) -> Any:
    """Read a YAML value that comes from elsewhere than a recipe.

    Args:
        text: The YAML.
        place: Where it was given, for the sentence of an error.

    Raises:
        UsageError: Not YAML, or anchors that contain themselves or expand without bounds.
    """
    try:
        return _parse(text, Source(Path(place)))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError(f"{place}: the value is not valid YAML") from None


def _parse(text: str, source: Source) -> Any:
    """The data of a YAML text, counted before anything is built: merged anchors expand while it is built."""
    node = yaml.compose(text, Loader=_Loader)
    if node is not None:
        _collect_lines(node, (), source, set())
    return yaml.load(text, Loader=_Loader)


def shown(text: str) -> str:
    """What was typed, short and on one line, without what a terminal would obey."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= 200 else line[:197] + "..."


def _collect_lines(node: yaml.Node, key: KeyPath, source: Source, above: set[int]) -> None:
    if id(node) in above:
        raise source.error(key, "an anchor refers to itself: a recipe cannot contain itself")
    source.lines.setdefault(key, node.start_mark.line + 1)
    source.values += 1  # visits, not lines: keys given twice share theirs, and are refused later
    if source.values > _MAX_VALUES:
        raise source.error((), "its anchors expand to over 100,000 values: write a shorter recipe")
    if isinstance(node, yaml.MappingNode):
        for child_key, child in node.value:
            if not isinstance(child_key, yaml.ScalarNode):
                raise source.error(key, "keys must be plain words")
            if child_key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                # YAML reads no, on, 1 and 2020-01-01 as values of other types.
                source.lines[(*key, child_key.value)] = child_key.start_mark.line + 1
                raise source.error(
                    (*key, child_key.value), f"unknown key {child_key.value!r}: keys must be plain words"
                )
            source.lines[(*key, child_key.value)] = child_key.start_mark.line + 1
            _collect_lines(child, (*key, child_key.value), source, above | {id(node)})
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _collect_lines(child, (*key, index), source, above | {id(node)})


def _apply_override(data: dict[str, Any], override: str, source: Source) -> None:
    name, equals, text = override.partition("=")
    place = f"--set {shown(override)}"
    if not equals or not name or any(not part for part in name.split(".")):
        raise UsageError(f"{place}: write it as key.subkey=value")
    value = parse_value(text, place)
    # isdigit() also takes digits that int() does not; an index of more digits has no entry anyway.
    parts: list[str | int] = [int(p) if re.fullmatch("[0-9]{1,9}", p) else p for p in name.split(".")]
    value = _resolve_paths(value, Path.cwd(), tuple(parts))
    target: Any = data
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            if not isinstance(part, int) or part >= len(target):
                raise UsageError(
                    f"{place}: {shown(repr(part))} is not one of the {len(target)} entries (0 is the first)"
                )
        elif isinstance(target, dict):
            part = str(part)
            if not last and not isinstance(target.get(part), dict | list):
                target[part] = {}
        else:
            raise UsageError(f"{place}: {shown('.'.join(map(str, parts[:depth])))} holds no keys")
        if last:
            target[part] = value
        else:
            target = target[part]
    source.overrides[tuple(parts)] = override


def _resolve_paths(value: Any, folder: Path, key: KeyPath = ()) -> Any:
    """The value with its paths absolute.

    A path is a string that starts with ./, ../ or ~/; anything under ``data`` that names a file; and a model that
    exists relative to the folder (otherwise it is a hub id).
    """
    if isinstance(value, dict):
        return {name: _resolve_paths(child, folder, (*key, name)) for name, child in value.items()}
    if isinstance(value, list):
        return [_resolve_paths(child, folder, (*key, index)) for index, child in enumerate(value)]
    if not isinstance(value, str) or not value or "\0" in value or len(value) > 4096:
        return value
    explicit = value.startswith(("./", "../", "~/"))
    file = key in (("data", "prompts"), ("data", "held_out"))
    model = key[:1] == ("models",) or key[-1:] == ("model",)
    if explicit or file or (model and (value.startswith("~") or (folder / value).exists())):
        return str((folder / files.expanded(value)).resolve())
    return value


def _explain(error: ValidationError, data: Any, source: Source) -> UsageError:
    """The first problem as one sentence; unknown keys first, since they are usually the cause of the others."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    key: KeyPath = tuple(part for part in first["loc"])
    name = ".".join(str(part) for part in key)
    if first["type"] == "extra_forbidden":
        valid = _valid_keys(key[:-1])
        close = difflib.get_close_matches(str(key[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(valid)}"
        return source.error(key, f"unknown key {shown(name)!r}; {hint}")
    if first["type"] == "missing":
        return source.error(key[:-1], f"the key {name!r} is missing")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    given = "" if first["type"] == "value_error" else f", not {_kind(first['input'])}"
    return source.error(key, f"{shown(name) or 'the recipe'}: {message}{given}")


def _valid_keys(key: KeyPath) -> list[str]:
    """The keys of the section at ``key``."""
    section: Any = Recipe
    for part in key:
        if isinstance(part, int) or not (isinstance(section, type) and issubclass(section, BaseModel)):
            continue
        field = section.model_fields.get(part)
        if field is not None:
            section = next(iter(_sections(field.annotation)), section)
    return list(section.model_fields)


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)


def _kind(value: Any) -> str:
    """A short description of a bad value."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of over 4,300 digits.
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
