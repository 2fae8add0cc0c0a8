"""Functions take and return typed values; ``Any`` is for the border to libraries without types."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rlhf_t2i"
AT_MOST = 14
"""Functions whose signature names ``Any``, private ones included. Lower it when one is typed."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def names_any(function: Function) -> bool:
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    annotations = [function.returns, *(argument.annotation for argument in arguments if argument is not None)]
    nodes = [node for annotation in annotations if annotation is not None for node in ast.walk(annotation)]
    return any("Any" in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in nodes)


def test_few_signatures_name_any() -> None:
    found = [
        f"{file.relative_to(PACKAGE)}:{node.lineno} {node.name}"
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, Function) and names_any(node)
    ]
    assert len(found) <= AT_MOST, "\n".join(found)


def test_every_way_to_name_any_counts() -> None:
    texts = ["def f(*a: Any): ...", "async def f() -> dict[str, typing.Any]: ...", "def f(a: int) -> str: ..."]
    functions = [function for text in texts for function in ast.parse(text).body if isinstance(function, Function)]
    assert [names_any(function) for function in functions] == [True, True, False]
