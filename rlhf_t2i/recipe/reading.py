"""Read a recipe: YAML, overrides of its keys, and where each key comes from."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.recipe import kinds, mistakes, shipped
from rlhf_t2i.recipe.mistakes import KeyPath
from rlhf_t2i.recipe.schema import Models, Recipe
from rlhf_t2i.utils import files, inputs
from rlhf_t2i.utils.inputs import Json, JsonObject

_MAX_VALUES = 100_000
_RELATIVE = ("./", "../", "~/")
_PREFIX = re.compile(r"[\w-]+[:=](?=\.\.?/|~/)")
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema: ``yes`` and ``1:30`` are text, ``1e-6`` is a number. Duplicate keys are refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != f"{_TAG}merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # A number with a leading zero is octal to YAML 1.1 and decimal to 1.2: here it is text, and so refused.
    "int": (r"[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """Quotes what :class:`_Loader` would read as another type."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@dataclass(frozen=True)
class Override:
    """A value for a key, from the command line or from Python.

    Attributes:
        key: Dotted; with ``+`` at its end the value is added to a list.
        value: The value.
        place: Where it was given, for error messages: ``--set a.b=c``.
    """

    key: str
    value: Json
    place: str

    @classmethod
    def parse(
        cls, text: str, option: str = "--set", form: str = "key.subkey=value, or key+=value to add to a list"
    ) -> Override:
        """Read an option's argument ``key=value``, the value in YAML.

        Raises:
            UsageError: It is not of that form.
        """
        key, equals, value = text.partition("=")
        place = f"{option} {mistakes.shown(text)}"
        if not equals or not all(key.strip().removesuffix("+").split(".")):
            raise UsageError(f"{place}: write it as {form}")
        return cls(key.strip(), parse_value(value, place), place)

    @property
    def path(self) -> KeyPath:
        """The key in parts; whole numbers are indices."""
        parts = self.key.removesuffix("+").split(".")
        # isdigit() also accepts digits that int() does not; an index of more digits has no entry anyway.
        return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in parts)


class RecipeFile:
    """A recipe's path and the line of every key, for error messages."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[KeyPath, int] = {}
        self.overrides: dict[KeyPath, str] = {}
        self.values = 0

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from: of the path as given, also where that is a link."""
        return self.path.absolute().parent

    def where(self, key: KeyPath) -> str:
        """``recipe.yaml, line 7`` for a key, or the place of the override that gave it or a part of it."""
        for length in range(len(key), 0, -1):
            prefix = key[:length]
            if prefix in self.overrides:
                return self.overrides[prefix]
            inside = [place for other, place in self.overrides.items() if other[:length] == prefix]
            if inside and (prefix == key or prefix not in self.lines):
                return inside[-1]
            if prefix in self.lines:
                return f"{self.path}, line {self.lines[prefix]}"
        return str(self.path)

    def replace(self, key: KeyPath, place: str) -> None:
        """Forget where a key and everything below it was given before an override."""
        for known in (self.lines, self.overrides):
            for other in [other for other in known if other[: len(key)] == key]:
                del known[other]
        self.overrides[key] = place

    def error(self, key: KeyPath, message: str) -> UsageError:
        """A sentence that begins with the key's place."""
        return UsageError(f"{self.where(key)}: {message}")


def load(path: str | Path, overrides: Sequence[str | Override] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: The YAML file. Relative paths inside are relative to its folder, see :attr:`RecipeFile.folder`.
        overrides: Values by key, or texts ``a.b=c`` of ``--set``, c in YAML; relative paths in them are relative to
            the working directory.

    Raises:
        UsageError: One sentence naming the file, the line, the key and the nearest valid key.
    """
    data, source = read(path)
    kinds.check(data, source.path, "run")
    return build(data, overrides, source)


def build(
    data: Mapping[str, Json], overrides: Sequence[str | Override] = (), source: RecipeFile | None = None
) -> Recipe:
    """Validate a recipe's keys.

    Args:
        data: The keys.
        overrides: See :func:`load`.
        source: The file that the keys come from. Without one, paths are relative to the working directory.

    Raises:
        UsageError: One sentence naming the key, its place and the nearest valid key.
    """
    source = source or RecipeFile(Path("recipe"))
    keys = {name: resolve_paths(value, source.folder, (name,)) for name, value in data.items()}
    for override in overrides:
        _apply(keys, Override.parse(override) if isinstance(override, str) else override, source)
    try:
        recipe = Recipe.model_validate(keys)
    except ValidationError as error:
        raise mistakes.explain(error, Recipe, keys, source.where) from None
    recipe._where = source.where
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that :func:`load` reads back."""
    return yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def models(place: str, **values: object) -> Models:
    """The section ``models`` of values that are not in a recipe.

    Raises:
        UsageError: A value is wrong; ``place`` says whose it is.
    """
    try:
        return Models.model_validate(values)
    except ValidationError as error:
        raise mistakes.explain(error, Models, values, place) from None


def quoted(text: str) -> str:
    """A text as one writes it in a recipe, inside braces, too; quoted where YAML would read it otherwise."""
    try:
        if yaml.load(f"{{a: {text}}}", Loader=_Loader) == {"a": text}:
            return text
    except yaml.YAMLError:
        pass
    inside = yaml.dump([text], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10_000)
    return inside.strip()[1:-1]


def read(path: str | Path, noun: str = "recipe") -> tuple[JsonObject, RecipeFile]:
    """Read a YAML file whose keys are to be validated: its data, and the place of every key.

    Args:
        path: The file.
        noun: What it is called in error messages.

    Raises:
        UsageError: No such file, or no YAML mapping of a recipe's size; names the file and the line.
    """
    path = Path(path)
    source = RecipeFile(path)
    text = inputs.read_text(path, noun, inputs.RECIPE)
    try:
        data = _parse(text, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML: {first_line(error)}") from None
    if not isinstance(data, dict):
        raise UsageError(f"{path}: a {noun} is a mapping of keys to values, not {mistakes.kind(data)}")
    return data, source


def parse_value(text: str, place: str) -> Json:
    """Read a YAML value that comes from elsewhere than a recipe.

    Args:
        text: The YAML.
        place: Where it was given, for the sentence of an error.

    Raises:
        UsageError: Not YAML, or anchors that contain themselves or expand without bounds.
    """
    try:
        return _parse(text, RecipeFile(Path(place)))
    except (yaml.YAMLError, ValueError, RecursionError):
        raise UsageError(f"{place}: the value is not valid YAML") from None


def _parse(text: str, source: RecipeFile) -> Json:
    """The data of a YAML text, counted before anything is built: merged anchors expand while it is built."""
    node = yaml.compose(text, Loader=_Loader)
    if node is not None:
        _collect_lines(node, (), source, set())
    value: Json = yaml.load(text, Loader=_Loader)
    return value


def _collect_lines(node: yaml.Node, key: KeyPath, source: RecipeFile, above: set[int]) -> None:
    if id(node) in above:
        raise source.error(key, "an anchor refers to itself: a recipe cannot contain itself")
    source.lines.setdefault(key, node.start_mark.line + 1)
    source.values += 1  # visits, not lines: keys given twice share theirs, and are refused later
    if source.values > _MAX_VALUES:
        raise source.error((), "its anchors expand to over 100,000 values: write a shorter recipe")
    _check_tag(node, key, source)
    if isinstance(node, yaml.MappingNode):
        for child_key, child in node.value:
            if not isinstance(child_key, yaml.ScalarNode):
                raise source.error(key, "keys must be plain words")
            if child_key.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                # YAML reads 1 and null as values of other types.
                source.lines[(*key, child_key.value)] = child_key.start_mark.line + 1
                raise source.error(
                    (*key, child_key.value), f"unknown key {child_key.value!r}: keys must be plain words"
                )
            source.lines[(*key, child_key.value)] = child_key.start_mark.line + 1
            _collect_lines(child, (*key, child_key.value), source, above | {id(node)})
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _collect_lines(child, (*key, index), source, above | {id(node)})


def _check_tag(node: yaml.Node, key: KeyPath, source: RecipeFile) -> None:
    """Refuse tags that build objects or dates, and values that are not what their tag says (``!!bool x``)."""
    name = node.tag.removeprefix(_TAG)
    fits = name in ("str", "seq", "map") or (
        isinstance(node, yaml.ScalarNode) and name in _SCALARS and re.fullmatch(_SCALARS[name][0], node.value)
    )
    if not fits:
        source.lines.setdefault(key, node.start_mark.line + 1)
        value = repr(node.value) if isinstance(node, yaml.ScalarNode) else "a collection"
        raise source.error(key, f"not valid YAML for a recipe: {mistakes.shown(f'{value} with the tag {node.tag}')}")


def _apply(data: JsonObject, override: Override, source: RecipeFile) -> None:
    """Put an override's value into the data."""
    path, place = override.path, override.place
    value = resolve_paths(override.value, Path.cwd(), path)
    target: Json = data
    for depth, part in enumerate(path[:-1]):
        target = _inside(target, part, path[:depth], place)
    if isinstance(target, dict):
        name = str(path[-1])
        target[name] = _changed(target.get(name), value, override, source)
    else:
        entries, index = _entry(target, path[-1], path[:-1], place)
        entries[index] = _changed(entries[index], value, override, source)


def _inside(target: Json, part: str | int, above: KeyPath, place: str) -> Json:
    """What is at a part of a key; an empty section is made where there is nothing to go into."""
    if isinstance(target, dict):
        found = target.get(str(part))
        if not isinstance(found, dict | list):
            found = target[str(part)] = {}
        return found
    entries, index = _entry(target, part, above, place)
    return entries[index]


def _entry(target: Json, part: str | int, above: KeyPath, place: str) -> tuple[list[Json], int]:
    """A list and the index of one of its entries."""
    name = ".".join(map(str, above))
    if not isinstance(target, list):
        raise UsageError(f"{place}: {mistakes.shown(name)} holds no keys")
    if not isinstance(part, int) or part >= len(target):
        raise UsageError(
            f"{place}: {mistakes.shown(repr(part))} is not one of the {len(target)} entries "
            f"(0 is the first; {mistakes.shown(f'{name}+=... adds one')})"
        )
    return target, part


def _changed(before: Json, value: Json, override: Override, source: RecipeFile) -> Json:
    """The value; or the list that was there, or is the schema's default, with the value or values added."""
    path = override.path
    if not override.key.endswith("+"):
        source.replace(path, override.place)
        return value
    here = before if before is not None else mistakes.default(Recipe, path) or []
    if not isinstance(here, list):
        raise UsageError(f"{override.place}: {'.'.join(map(str, path))} is not a list")
    added = value if isinstance(value, list) else [value]
    for index in range(len(here), len(here) + len(added)):
        source.overrides[(*path, index)] = override.place
    return [*here, *added]


def resolve_paths(value: Json, folder: Path, key: KeyPath = ()) -> Json:
    """The value with its paths absolute.

    A path is a string that starts with ./, ../ or ~/, also behind a benchmark's name (``parti:./prompts.tsv``) or a
    label (``mine=./score.py:Mine``); ``models.embeddings`` and the files under ``data``, but for ``hf://...``; and a
    model that exists relative to the folder (otherwise it is a hub id). ``emoji64:NAME`` is a shipped file, see
    :func:`rlhf_t2i.recipe.shipped.resolve`.

    Raises:
        UsageError: emoji64 is not installed, or has no such file.
    """
    if isinstance(value, dict):
        return {name: resolve_paths(child, folder, (*key, name)) for name, child in value.items()}
    if isinstance(value, list):
        return [resolve_paths(child, folder, (*key, index)) for index, child in enumerate(value)]
    if not isinstance(value, str) or not value or "\0" in value or len(value) > 4096:
        return value
    inside = shipped.resolve(value, f"{'.'.join(map(str, key))}: ")
    if inside != value:
        return inside
    prefix = _PREFIX.match(value)
    if prefix is not None:
        return f"{prefix[0]}{_absolute(value.removeprefix(prefix[0]), folder, key)}"
    explicit = value.startswith(_RELATIVE)
    file = key in (("data", "prompts"), ("data", "held_out"), ("models", "embeddings")) and not value.startswith(
        "hf://"
    )
    model = key[:1] == ("models",) or key[-1:] == ("model",)
    if explicit or file or (model and (value.startswith("~") or os.path.exists(folder / value))):  # noqa: PTH110
        return _absolute(value, folder, key)
    return value


def _absolute(path: str, folder: Path, key: KeyPath) -> str:
    try:
        return str(files.absolute(path, folder))
    except UsageError as error:
        raise UsageError(f"{'.'.join(map(str, key))}: {error}") from None
