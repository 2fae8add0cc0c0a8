"""``rlhf-t2i rewards new``: a small installable package with a reward, its entry point, its test and its README."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from rlhf_t2i.errors import UsageError


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
    places = {"reward.py": f"{module}/__init__.py", "test.py": f"tests/test_{name}.py"}
    for template in (Path(__file__).parent / "template").glob("*.in"):
        target = folder / places.get(template.stem, template.stem)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(Template(template.read_text("utf-8")).substitute(words), "utf-8")
    return folder
