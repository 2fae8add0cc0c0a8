"""A table of models: the paper's Table 1 on tiny stand-ins, row for row; timings, continuing, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlhf_t2i.cli import app
from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation.models import load
from rlhf_t2i.evaluation.settings import Drawing
from rlhf_t2i.tools import model_table
from tests import tiny, tiny_families

TABLE1 = Path(__file__).parents[2] / "recipes/table1.yaml"


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path, tiny_sd3: Path) -> dict[str, str]:
    """Tiny random models in place of the published ones, by hub id."""
    folder = tmp_path_factory.mktemp("models")
    found = {
        "stabilityai/stable-diffusion-xl-base-1.0": tiny_sdxl,
        "stabilityai/stable-diffusion-3.5-large": tiny_sd3,
        "black-forest-labs/FLUX.1-dev": tiny_families.make_flux(folder / "flux"),
        "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin": tiny.make_generator_bin(tiny_sdxl, folder / "dmd2.bin"),
    }
    return {name: str(path) for name, path in found.items()}


@pytest.fixture(scope="module")
def table(
    tmp_path_factory: pytest.TempPathFactory, stand_ins: dict[str, str], tiny_sdxl: Path, tiny_clip: Path
) -> Path:
    """recipes/table1.yaml with its models and metrics replaced, everything else as it is."""
    keys = yaml.safe_load(TABLE1.read_text())
    folder = tmp_path_factory.mktemp("table")
    keys["evaluation"] |= {
        "prompts": str(tiny.make_prompts(folder)), "metrics": ["pickscore"], "precision": "fp32", "limit": 2,
        "options": {"pickscore": {"unit": "cosine", "model": str(tiny_clip)}},
    }  # fmt: skip
    keys["timed_images"] = 1
    for row in keys["rows"]:
        for key in ("model", "base"):
            if key in row:
                row[key] = stand_ins.get(row[key], f"{tiny_sdxl}/unet")
        row |= {"height": 16, "width": 16} | ({"steps": 2} if "steps" in row else {})
    file = folder / "table1.yaml"
    file.write_text(yaml.safe_dump(keys))
    return file


def test_every_row_is_drawn_scored_and_timed(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    first = CliRunner().invoke(app, ["eval", str(table), "--out", str(out)])
    assert first.exit_code == 0, first.output
    text = (out / "table.md").read_text()
    names = [row["name"] for row in yaml.safe_load(TABLE1.read_text())["rows"]]
    data = json.loads((out / "table.json").read_text())
    assert list(data) == names
    assert len(names) == 10
    for name in names:
        assert len(list((out / name / "images").iterdir())) == 2
        assert data[name]["timing"]["seconds"] > 0
        assert data[name]["timing"]["memory"] is None  # of a CPU
    assert "| DI*, one step | " in text
    assert "(0.2304)" in text  # the paper's, beside ours
    assert "(118.64)" in text
    # The same structure and steps with other weights: DMD2's stand-in is a network of its own.
    assert data["dmd2"]["metrics"]["pickscore"] != data["sim"]["metrics"]["pickscore"]

    monkeypatch.setattr(model_table, "measure", lambda *_: pytest.fail("timed again"))
    again = CliRunner().invoke(app, ["eval", str(table), "--out", str(out)])
    assert again.exit_code == 0, again.output
    assert (out / "table.md").read_text() == text


def test_a_network_is_drawn_in_many_steps_by_its_bases_pipeline(tmp_path: Path, tiny_sdxl: Path) -> None:
    """SDXL-DPO is a UNet alone."""
    other = tiny.make_sdxl(tmp_path / "other", seed=5)
    size = {"height": 16, "width": 16, "steps": 2}
    keys = [(0, "evaluation", 0)]
    drawn = load(Drawing(model=f"{other}/unet", base=str(tiny_sdxl), **size)).images(["a cat"], keys)
    base, whole = (load(Drawing(model=str(model), **size)).images(["a cat"], keys) for model in (tiny_sdxl, other))
    assert not drawn.equal(base)
    assert not drawn.equal(whole)  # whose text encoders are others


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rows": []}, "rows: must not be empty"),
        ({"evaluation": {"prompts": "x", "model": "y"}}, "'model' comes from the rows"),
        ({"rows": [{"name": "a", "label": "A", "model": "/nowhere"}]}, "row 'a': no such model: /nowhere"),
        ({"rows": [{"name": "a", "label": "A", "model": "x/y"}] * 2}, "two rows are called 'a'"),
        ({"rows": [{"name": "table.md", "label": "A", "model": "x/y"}]}, "no row can be called 'table.md'"),
        ({"rows": [{"name": "a", "label": "A", "model": "x/y", "paper": {"clp": 1}}]}, "did you mean 'clip'?"),
        ({"labels": {"pikscore": "PickScore"}}, "labels: unknown metric 'pikscore'; did you mean 'pickscore'?"),
        ({"unknown": 1}, "unknown"),
        ({"evaluation": {"prompts": "x", "metrics": ["clp"]}}, "row 'sdxl': metrics: unknown metric 'clp'; did you"),
        (
            {"evaluation": {"prompts": "x", "metrics": ["diversity"]}},
            "compares images of one prompt: give images_per_prompt 2",
        ),
        (
            {"evaluation": {"prompts": "x", "metrics": ["fid"]}},
            "metrics fid compares with real images: give their folder with real",
        ),
        (
            {"rows": [{"name": "a", "label": "A", "model": "x/y", "steps": 4, "student": {"steps": 2}}]},
            "row 'a': steps is for a many-step model, student.timesteps for a few-step",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_drawn(
    table: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(table.read_text()) | change))
    result = CliRunner().invoke(app, ["eval", str(file), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UsageError)
    assert sentence in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_options_of_one_model_are_refused(table: Path) -> None:
    result = CliRunner().invoke(app, ["eval", str(table), "--steps", "3"])
    assert "--steps is for one model" in str(result.exception)
    assert "--prompts is missing" in str(CliRunner().invoke(app, ["eval", "zoo/emoji64/generator"]).exception)


def test_a_labeled_reward_file_is_beside_the_table(table: Path, tmp_path: Path) -> None:
    keys = yaml.safe_load(table.read_text())
    keys["evaluation"] |= {"metrics": ["colored=./color.py:Color", "~/other.py:Other", "clip"], "options": {}}
    file = tmp_path / "table.yaml"
    file.write_text(yaml.safe_dump(keys))
    chosen = model_table.load(file)[1]["sdxl"]
    assert chosen.named == {
        "colored": f"{tmp_path}/color.py:Color",
        "Other": f"{Path.home()}/other.py:Other",
        "clip": "clip",
    }


def test_the_shipped_table_is_sound() -> None:
    table, settings = model_table.load(TABLE1, limit=3)
    assert len(settings) == len(table.rows) == 10
    assert {chosen.limit for chosen in settings.values()} == {3}
    assert all(row.paper.keys() == {"image_reward", "aesthetic", "pickscore", "clip"} for row in table.rows)
