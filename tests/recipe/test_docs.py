"""The pages: docs/recipes.md says what the schema says, links lead somewhere, named sections exist."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

from rlhf_t2i.recipe import reading

ROOT = Path(__file__).parents[2]
FOLDERS = ("rlhf_t2i", "plugins", "tests", "recipes", "docs", "zoo", "examples", "benchmarks")
SECTION = re.compile(r"algorithm\.md\)?`?,? (?:sections? )?(\d(?:\.\d)?)(?: (?:and|to) (\d(?:\.\d)?))?")


def texts(*suffixes: str) -> Iterator[tuple[Path, str]]:
    files = [*ROOT.glob("*.md"), *(file for name in FOLDERS for file in (ROOT / name).rglob("*"))]
    for file in files:
        if file.suffix in suffixes and file.is_file() and "work" not in file.relative_to(ROOT).parts:
            yield file, file.read_text("utf-8")


def test_page_is_current() -> None:
    module = runpy.run_path(str(ROOT / "docs/make_recipes.py"))
    assert (ROOT / "docs/recipes.md").read_text("utf-8") == module["page"](), "run: python docs/make_recipes.py"


def test_links_between_pages_lead_somewhere() -> None:
    links = [
        (file, target)
        for file, text in texts(".md")
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        if not target.startswith("http")
    ]
    assert len(links) > 20
    assert [f"{file}: {target}" for file, target in links if not (file.parent / target).exists()] == []


def test_the_sections_that_code_and_recipes_name_exist() -> None:
    page = (ROOT / "docs/algorithm.md").read_text("utf-8")
    there = set(re.findall(r"^(?:#+ |- \*\*)(\d(?:\.\d)?)", page, re.MULTILINE))
    named = {
        number
        for _, text in texts(".py", ".yaml", ".md")
        for pair in SECTION.findall(text)
        for number in pair
        if number
    }
    assert len(named) > 10
    assert named - there == set()


def test_the_readmes_recipe_is_one(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text("utf-8").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    recipe = reading.load(tmp_path / "recipe.yaml")
    shipped = reading.load(ROOT / "recipes/quickstart.yaml")
    assert (recipe.models, recipe.data, recipe.steps) == (shipped.models, shipped.data, shipped.steps)
    assert recipe.algorithm.model_dump() == shipped.algorithm.model_dump()


def test_every_page_activates_the_environment_before_its_first_command() -> None:
    """A command copied from the middle of the documentation is found."""
    command = re.compile(r"^(?:    |\$ )?(?:\w+=\S+ )?(?:rlhf-t2i|python|pip|sbatch|pytest) (?!3)", re.MULTILINE)
    missing = []
    for file, text in texts(".md"):
        found = [
            block.start() + place.start()
            for block in re.finditer(r"^```.*?^```|(?:^    .*\n)+", text, re.MULTILINE | re.DOTALL)
            if (place := command.search(block[0]))
        ]
        if found and "activate" not in text[: found[0]] and "tests" not in file.parts:
            missing.append(str(file.relative_to(ROOT)))
    assert missing == []
