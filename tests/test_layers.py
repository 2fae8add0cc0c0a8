"""The folders of the package are layers: a lower one never imports a higher one."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_lower_layers_never_import_higher_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("importlinter", reason="the dev extra")
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    assert lint_imports(no_cache=True) == 0, capsys.readouterr().out


def test_every_folder_says_what_belongs_in_it() -> None:
    folders = sorted(file.parent for file in (ROOT / "rlhf_t2i").rglob("__init__.py"))
    assert len(folders) > 10
    silent = [str(folder) for folder in folders if not (folder / "__init__.py").read_text("utf-8").startswith('"""')]
    assert silent == []


def test_the_architecture_page_repeats_each_folders_sentence() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8").replace("`", "")
    for file in sorted((ROOT / "rlhf_t2i").glob("*/__init__.py")):
        first = file.read_text("utf-8").split('"""')[1].splitlines()[0].replace("`", "")
        row = next((line for line in page.splitlines() if line.startswith("|") and f"{file.parent.name}/" in line), "")
        assert row.endswith(f"| {first} |"), f"docs/architecture.md: the row of {file.parent.name}/ should say: {first}"


def test_no_module_is_longer_than_400_lines() -> None:
    files = [*(ROOT / "rlhf_t2i").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]
    assert len(files) > 200
    assert [str(file) for file in files if len(file.read_text("utf-8").splitlines()) > 400] == []
