"""Write docs/recipes.md from the recipe's schema: ``python docs/make_recipes.py``; a test keeps the page true."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf_t2i.recipe.schema import Recipe

PAGE = Path(__file__).parent / "recipes.md"
HEAD = """# Every key of a recipe

A recipe is a YAML file. Paths that start with `./`, `../` or `~/` are relative to the recipe's folder; in `--set` they
are relative to the working directory. A model that is no path is a hub id, `org/name` or `org/name@revision`.
This page is written by `python docs/make_recipes.py` from `rlhf_t2i/recipe/schema.py`.
"""


def page() -> str:
    """The whole page; what has the same keys in several places is described once."""
    places: dict[type[BaseModel], list[str]] = {}
    for name, section in _sections("", Recipe):
        places.setdefault(section, []).append(name)
    return HEAD + "".join(_section(names, section) for section, names in places.items())


def _sections(name: str, section: type[BaseModel]) -> list[tuple[str, type[BaseModel]]]:
    found = [(name, section)]
    for key, field in section.model_fields.items():
        for inner, many in _models(field.annotation):
            found += _sections(f"{name}.{key}{many}".lstrip("."), inner)
    return found


def _models(annotation: Any, many: str = "") -> list[tuple[type[BaseModel], str]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(annotation, many)]
    origin = typing.get_origin(annotation)
    suffix = {list: "[]", dict: ".NAME"}.get(origin, many)
    return [found for part in typing.get_args(annotation) for found in _models(part, suffix)]


def _section(names: list[str], section: type[BaseModel]) -> str:
    title = " and ".join(f"`{name}`" for name in names) if all(names) else "The recipe"
    lines = [
        f"\n## {title}\n",
        f"\n{_linked((section.__doc__ or '').strip())}\n",
        "\n| key | type | default | meaning |\n|---|---|---|---|\n",
    ]
    for key, field in section.model_fields.items():
        inner = [model.__doc__ or "" for model, _ in _models(field.annotation)]
        meaning = (field.description or (inner[0].splitlines()[0] if inner else "")).replace("|", "\\|")
        lines.append(f"| `{key}` | {_type(field)} | {_default(field)} | {_linked(meaning)} |\n")
    return "".join(lines)


def _linked(text: str) -> str:
    return text.replace("algorithm.md", "[algorithm.md](algorithm.md)")


def _type(field: FieldInfo) -> str:
    return _name(field.annotation).replace("|", "\\|")


def _name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is typing.Annotated:
        return _name(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return " or ".join(_name(part) for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is list:
        return f"list of {_name(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {"str": "text", "int": "integer", "float": "number", "bool": "true / false"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) or (isinstance(value, dict) and value):
        return "see below"
    return "none" if value is None else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """As one writes it in a recipe."""
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
