"""Places where nothing can be written: one sentence in every command, before anything is loaded, and nothing left."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_t2i.cli import app
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.recipe import shipped
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools import starting
from rlhf_t2i.utils import files, targets

COMMANDS = [
    ("sample", "MODEL", "--prompt", "a", "-o", "TARGET.png"),
    ("eval", "MODEL", "--prompts", "p.txt", "--out", "TARGET"),
    ("eval", "SHIPPED:table1", "--out", "TARGET"),
    ("init", "TARGET", "--reference", "MODEL", "--prompts", "p.txt"),
    ("recipes", "copy", "quickstart", "TARGET"),
    ("rewards", "new", "mine", "--dir", "TARGET"),
    ("run", "recipe.yaml", "--out", "TARGET"),
    ("run", "recipe.yaml", "--out", "TARGET", "--resume"),
    ("ablate", "SHIPPED:emoji64/ablation_table2", "--out", "TARGET"),
    ("encode", "recipe.yaml", "--set", "models.embeddings=TARGET"),
]


@pytest.mark.parametrize("place", ["/proc/1/x", "/sys/x", "FILE/x", "GONE/x"])
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_impossible_target_is_one_sentence(
    command: tuple[str, ...], place: str, make_recipe: Callable[..., Recipe], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    make_recipe()
    monkeypatch.chdir(tmp_path)
    for name, text in (("p.txt", "a cat\n"), ("file", "mine")):
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    target = place.replace("FILE", str(tmp_path / "file")).replace("GONE", str(tmp_path / "gone"))
    given = [word.replace("TARGET", target) for word in command]
    given = [str(shipped.recipe_path(w.removeprefix("SHIPPED:"))) if w.startswith("SHIPPED:") else w for w in given]
    with pytest.raises(UsageError, match=r"cannot be written: |is a file|does not exist") as refused:
        app(given, standalone_mode=False)
    assert target.removesuffix("/x") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_to_be_and_one_that_is_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a/b/c"):
        targets.check_folder(path, "--out")
    targets.check_file(tmp_path / "a.png", "-o")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match=r"^-o \S+ is a folder: name a file$"):
        targets.check_file(tmp_path, "-o")


def test_of_several_files_all_are_written_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = files.write_atomic, list[Path]()

    def fail_late(path: Path, data: str) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    monkeypatch.setattr(files, "write_atomic", fail_late)
    with pytest.raises(RunError, match="could not be written: No space left"):
        starting.copy_recipe("emoji64/ablation_table2", tmp_path)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_becomes_a_file_is_one_sentence(tmp_path: Path) -> None:
    """While something is written, by another program."""
    (tmp_path / "images").write_text("mine")
    with pytest.raises(RunError, match="images could not be written: File exists"), files.disk_errors(tmp_path):
        (tmp_path / "images").mkdir()
