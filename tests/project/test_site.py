"""The documentation's site: builds strictly, holds the reference, and loads nothing from another host."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.project.pages import ROOT

pytest.importorskip("mkdocs", reason="the docs extra")


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


@pytest.mark.slow
def test_it_builds_strictly_and_is_complete(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="the docs extra")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = {path.stem: path.read_text("utf-8") for path in tmp_path.glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("[!R]*.md")} <= set(pages)
    assert 'src="images/before_after.png"' in pages["index"]
    assert "rlhf_t2i.plugins.base.Reward.score" in pages["api"]
    assert ":class:" not in pages["api"]
    for name, page in pages.items():
        loaded = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(https?:[^"]*)"', page)
        assert loaded == [], name
        assert f'href="{name}.html"' in pages["index"] or name in ("index", "404"), f"{name} is not in the navigation"


@pytest.mark.parametrize(
    ("page", "given", "expected"),
    [
        ("python.md", "[a](../CONTRIBUTING.md#style)", "[a](contributing.md#style)"),
        ("python.md", "[a](../README.md)", "[a](overview.md)"),
        ("python.md", "[a](../plugins/rewards/hpsv3_prompt.py)", "a"),
        ("python.md", "[a](recipes.md#data)", "[a](recipes.md#data)"),
        ("python.md", "[a](https://x.org) `[b](../no.md)`", "[a](https://x.org) `[b](../no.md)`"),
        ("contributing.md", "[a](docs/rewards.md)", "[a](rewards.md)"),
        ("emoji64.md", "![a](generator.png)", "![a](images/zoo-emoji64-generator.png)"),
    ],
)
def test_links_out_of_the_folder_lead_to_pages_of_the_site(
    hooks: ModuleType, page: str, given: str, expected: str
) -> None:
    assert hooks.on_page_markdown(given, SimpleNamespace(file=SimpleNamespace(src_uri=page))) == expected


def test_a_link_to_nothing_is_a_warning(hooks: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="python.md"))
    assert hooks.on_page_markdown("[a](../nothing.py)", page) == "a"
    assert "docs/python.md links to ../nothing.py, which does not exist" in caplog.text
