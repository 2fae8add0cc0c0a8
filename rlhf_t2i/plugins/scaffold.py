"""``rlhf-t2i rewards new``: a small installable package with a reward, its entry point, its test and its README."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Literal

from rlhf_t2i.errors import UsageError
from rlhf_t2i.utils import files, targets


@dataclass(frozen=True)
class Scaffold:
    """What is written.

    Attributes:
        reward: ``own``: a small example. ``classifier``, ``pair``: around a transformers model.
        words: What its templates need beyond names: ``model``, ``hf_class``, ``license``; of a classifier ``label``,
            of a pair ``inputs``.
        example: Options of the example in the README.
    """

    reward: Literal["own", "classifier", "pair"] = "own"
    words: Mapping[str, str] = field(default_factory=dict)
    example: str = "target: 0.6"

    @property
    def test(self) -> str:
        """The template of its test."""
        return "test_own.py.in" if self.reward == "own" else "test_model.py.in"


_OWN = Scaffold()


def write_package(name: str, parent: Path, scaffold: Scaffold = _OWN) -> Path:
    """Write the package ``parent/rlhf-t2i-NAME`` and return its folder.

    Raises:
        UsageError: The name is not a Python name in lower case, or the folder exists, or ``parent`` is a file.
        RunError: It could not be written; nothing of it is left.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,49}", name):
        raise UsageError(f"{name!r} is not a name for a reward: lower-case letters, digits and _, e.g. my_reward")
    package = f"rlhf-t2i-{name.replace('_', '-')}"
    folder = parent / package
    if os.path.lexists(folder):
        raise UsageError(f"{folder} exists already: choose another name or another --dir")
    targets.check_folder(parent, "--dir")
    # The prefix keeps the import name from hiding another module (a reward called "random", say).
    module = f"rlhf_t2i_{name}"
    camel = "".join(part.capitalize() for part in name.split("_"))
    words = {"name": name, "package": package, "module": module, "cls": camel, "options": f"{camel}Options"}
    words |= {"example": scaffold.example, **scaffold.words}
    with files.atomic_dir(folder) as aside:
        for template, place in (
            (f"reward_{scaffold.reward}.py.in", f"{module}/__init__.py"),
            (scaffold.test, f"tests/test_{name}.py"),
            ("README.md.in", "README.md"),
            ("pyproject.toml.in", "pyproject.toml"),
        ):
            text = (Path(__file__).parent / "template" / template).read_text("utf-8")
            target = aside / place
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(Template(text).substitute(words), "utf-8")
    return folder
