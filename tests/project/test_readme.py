"""README.md: its snippet draws the student's own images with plain diffusers, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import rlhf_t2i
from rlhf_t2i.cli import app
from rlhf_t2i.families import export
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Models, StudentSettings
from tests import tiny
from tests.project import pages


@pytest.mark.parametrize("steps", [1, 4])
def test_the_snippet_draws_what_sample_draws(steps: int, tiny_sdxl: Path, tmp_path: Path) -> None:
    models = Models(reference=str(tiny_sdxl), generator=str(tiny_sdxl), height=tiny.RESOLUTION, width=tiny.RESOLUTION)
    store = ModelStore(models, StudentSettings(steps=steps), torch.device("cpu"))
    export.write_model(store, store.generator_network().state_dict(), tmp_path / "OUT/model")

    ((_, source),) = pages.blocks("README.md", "python")
    assert "K = 1 " in source
    source = source.replace("K = 1 ", f"K = {steps} ").replace("OUT/model", str(tmp_path / "OUT/model"))
    torch.manual_seed(7)
    names: dict[str, Any] = {}
    exec(source, names)

    (own,) = rlhf_t2i.load(tmp_path / "OUT/model").sample(["owl, on a blue background"], seed=7)
    assert names["image"].size == own.size
    assert names["image"].tobytes() == own.tobytes()


def test_commands_and_options_exist() -> None:
    text = (pages.ROOT / "README.md").read_text("utf-8")
    used = re.findall(r"rlhf-t2i ([a-z]+)", text)
    assert {"run", "sample", "plan", "eval", "ablate", "rewards"} <= set(used)
    for command in set(used):
        shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0, command
        for line in re.findall(rf"rlhf-t2i {command}\b[^\n|]*(?:\|[^\n]*)?", text):
            for option in re.findall(r"(?<![\w-])--[a-z]+", line):
                assert option in shown.stdout, f"{command} {option}"


def test_it_fits_on_two_screens() -> None:
    assert len((pages.ROOT / "README.md").read_text("utf-8").splitlines()) <= 110


@pytest.mark.parametrize("index", ["README.md", "docs/README.md"])
def test_every_page_is_in_the_index(index: str) -> None:
    folder = (pages.ROOT / index).parent
    linked = {(folder / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", (pages.ROOT / index).read_text())}
    assert [str(page) for page in (pages.ROOT / "docs").glob("[!R]*.md") if page not in linked] == []
