"""``rlhf-t2i rewards new``: a small installable package with a reward, its entry point, its test and its README."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from rlhf_t2i.errors import UsageError

_PYPROJECT = Template("""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$package"
version = "0.1.0"
description = "The reward $name for rlhf-t2i."
requires-python = ">=3.11"
dependencies = ["rlhf-t2i"]

# How rlhf-t2i finds it: recipes say `name: $name`.
[project.entry-points."rlhf_t2i.rewards"]
$name = "$module:$cls"

[tool.setuptools]
packages = ["$module"]
""")

_REWARD = Template('''\
"""The reward $name."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from rlhf_t2i import plugins


class $options(plugins.Options):
    """What a recipe may set under `options:`; anything else is refused by name."""

    target: float = Field(0.5, ge=0, le=1, description="the mean brightness that is best")


class $cls(plugins.Reward):
    """How close an image's mean brightness is to a target. Replace this with your own idea."""

    Options = $options
    options: $options
    unit = "brightness"
    value_range = (-1.0, 0.0)
    uses_prompt = False  # delete this line once score() reads the prompts
    license = "Apache-2.0"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images [B, 3, H, W] in [0, 1] for B prompts: a tensor [B], larger is better.

        Torch operations only, so that the gradient passes; no mean over the batch, so that samples stay independent.
        Load models in __init__ (after super().__init__(options)): they are moved, frozen and put in eval mode for you.
        """
        brightness = images.mean(dim=(1, 2, 3))
        return -(brightness - self.options.target).square()
''')

_TEST = Template('''\
"""The contract of a reward, checked as `rlhf-t2i rewards check` does, and what this one means."""

import torch
from $module import $cls, $options

from rlhf_t2i.tools.reward_check import check_reward


def test_it_keeps_the_contract() -> None:
    findings = check_reward($cls($options()), torch.device("cpu"), size=32)
    assert [f for f in findings if f.outcome == "fail"] == []


def test_it_prefers_the_target_brightness() -> None:
    reward = $cls($options(target=0.7))
    dark, right = (torch.full((1, 3, 8, 8), level) for level in (0.2, 0.7))
    assert reward.score(right, [""]) > reward.score(dark, [""])
''')

_README = Template("""\
# $package

The reward `$name` for rlhf-t2i.

    pip install -e .
    rlhf-t2i rewards list
    rlhf-t2i rewards check $name --options target=0.6
    python -m pytest

In a recipe:

    algorithm:
      rewards:
        - name: $name
          scale: 10
          options: {target: 0.6}
""")


def write_package(name: str, parent: Path) -> Path:
    """Write the package ``parent/rlhf-t2i-NAME`` and return its folder.

    Raises:
        UsageError: The name is not a Python name in lower case, or the folder exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,49}", name):
        raise UsageError(f"{name!r} is not a name for a reward: lower-case letters, digits and _, e.g. my_reward")
    package = f"rlhf-t2i-{name.replace('_', '-')}"
    folder = parent / package
    if folder.exists():
        raise UsageError(f"{folder} exists already: choose another name or another --dir")
    # The prefix keeps the import name from hiding another module (a reward called "random", say).
    module = f"rlhf_t2i_{name}"
    camel = "".join(part.capitalize() for part in name.split("_"))
    words = {"name": name, "package": package, "module": module, "cls": camel, "options": f"{camel}Options"}
    files = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{module}/__init__.py": _REWARD,
        f"tests/test_{name}.py": _TEST,
    }
    for path, template in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(template.substitute(words), "utf-8")
    return folder
