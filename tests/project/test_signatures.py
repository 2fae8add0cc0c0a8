"""Public functions take and return typed values; ``Any`` is for the border to libraries and to parsed files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rlhf_t2i"
BORDERS = ("families", "engines", "cluster")
"""Folders that wrap diffusers, DeepSpeed and Ray, whose objects have no types."""
AT_MOST = 45
"""Lower it when a signature is typed; 43 were left when this test was written."""


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, f"{prefix}{node.name}.")


def names_any(function: ast.FunctionDef) -> bool:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    annotations = [function.returns, *(argument.annotation for argument in arguments if argument is not None)]
    nodes = (node for annotation in annotations if annotation is not None for node in ast.walk(annotation))
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in nodes)


def test_few_public_signatures_name_any() -> None:
    found = [
        f"{file.relative_to(PACKAGE)}:{function.lineno} {name}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] not in BORDERS
        for name, function in public(ast.parse(file.read_text("utf-8")).body)
        if names_any(function)
    ]
    assert len(found) <= AT_MOST, "\n".join(found)
