"""Hooks of the site (mkdocs.yml): pages from outside ``docs/``, and links that work both there and on a code host.

A link to a file that the site does not hold becomes its text; one to a file that does not exist is a warning, which a
strict build refuses.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "zoo/README.md": "zoo.md",
    "zoo/emoji64/README.md": "emoji64.md",
}
"""Pages of the site that are elsewhere in the repository; the first page is docs/README.md."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
_ROLE = re.compile(r":(func|class|meth|data|attr|mod):<code>([~.]?)([^<]*)</code>")
_log = logging.getLogger("mkdocs.hooks")


def on_config(config: Any) -> Any:
    """Add pages that the navigation does not list at its end."""
    listed = str(config.nav)
    docs = (path.name for path in sorted(Path(config.docs_dir).glob("*.md")))
    more = [name for name in [*docs, *OUTSIDE.values()] if f"'{name}'" not in listed]
    if more:
        config.nav.append({"More": more})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside, and the images that they show."""
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, page, content=text))
        for bang, _, target in _LINK.findall(text):
            image = _inside(ROOT / source, target)
            own = image is not None and image.is_relative_to(config.docs_dir)
            if bang and not own and image is not None and image.is_file():
                files.append(File.generated(config, _image(image), content=image.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links out of ``docs/``, and those of the pages from outside."""
    name = page.file.src_uri
    source = ROOT / next((path for path, uri in OUTSIDE.items() if uri == name), f"docs/{name}")

    def rewritten(match: re.Match[str]) -> str:
        bang, text, target = match.groups()
        path, anchor = _inside(source, target), target.partition("#")[2]
        if path is None or (source.parent == ROOT / "docs" and path.parent == ROOT / "docs" and path.suffix == ".md"):
            return match[0]
        if not path.exists():
            _log.warning("%s links to %s, which does not exist", source.relative_to(ROOT), target)
            return text
        place = _image(path) if bang else _page(path)
        if place is None:
            return text
        relative = os.path.relpath(place, Path(name).parent)
        return f"{bang}[{text}]({relative}{'#' if anchor else ''}{anchor})"

    parts = _FENCE.split(markdown)  # odd parts are code
    return "".join(part if index % 2 else _LINK.sub(rewritten, part) for index, part in enumerate(parts))


def on_page_content(html: str, **_: Any) -> str:
    """Show the names in docstrings' Sphinx roles (``:class:`Reward```) as code."""
    return _ROLE.sub(lambda role: f"<code>{role[3].rpartition('.')[2] if role[2] else role[3]}</code>", html)


def _inside(source: Path, target: str) -> Path | None:
    """The file that a relative link of a page names; None for addresses and anchors."""
    path = target.partition("#")[0]
    return None if not path or re.match(r"[a-z]+:", path) else (source.parent / path).resolve()


def _page(path: Path) -> str | None:
    """The page of the site that shows a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name in OUTSIDE:
        return OUTSIDE[name]
    return name.removeprefix("docs/") if name.startswith("docs/") and path.suffix == ".md" else None


def _image(path: Path) -> str:
    """Where the site has an image."""
    name = path.relative_to(ROOT).as_posix()
    return name.removeprefix("docs/") if name.startswith("docs/") else f"images/{name.replace('/', '-')}"
