"""Files that would write a file named ``ran`` if anything in them were executed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any


class Payload:
    """An object whose unpickling makes a folder."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.ran),)


def source(ran: Path) -> str:
    """A module that makes the folder when it is imported."""
    names = ("EvilConfig", "EvilModel", "EvilTokenizer", "EvilPipeline", "EvilUNet")
    return f"import os\nos.mkdir({str(ran)!r})\n" + "".join(f"class {name}: pass\n" for name in names)


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    data |= changes
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), "utf-8")


def clip_with_code(clip: Path, folder: Path, ran: Path) -> Path:
    """A CLIP folder whose configuration asks for its own classes."""
    shutil.copytree(clip, folder)
    (folder / "evil.py").write_text(source(ran), "utf-8")
    edit(
        folder / "config.json", model_type="evil", architectures=["EvilModel"],
        auto_map={"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel"},
    )  # fmt: skip
    return folder


def tokenizer_with_code(folder: Path, ran: Path) -> Path:
    """Make a tokenizer's folder ask for its own class."""
    (folder / "evil.py").write_text(source(ran), "utf-8")
    edit(
        folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": ["evil.EvilTokenizer", None]},
    )  # fmt: skip
    return folder
