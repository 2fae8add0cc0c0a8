"""A stranger's family runs everywhere without a change elsewhere: ``run``, ``sample``, ``eval``, ``plan``, export."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.toy import toy_family

ENTRY_POINTS = "[rlhf_t2i.families]\ntoy = toy_family:ToyFamily\n"
METADATA = "Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n"
PROMPTS = ["a red cat, smiling", "a gold whale, smiling"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The toy as an installed package: a module and its entry point in a folder of sys.path."""
    site = tmp_path / "site"
    info = site / "toy_family-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(toy_family.__file__, site / "toy_family.py")
    (info / "METADATA").write_text(METADATA, "utf-8")
    (info / "entry_points.txt").write_text(ENTRY_POINTS, "utf-8")
    monkeypatch.syspath_prepend(str(site))
    yield site
    sys.modules.pop("toy_family", None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    toy_family.make(folder / "reference", seed=0)
    toy_family.make(folder / "generator", seed=1)
    return folder


@pytest.fixture
def recipe(models: Path, tiny_clip: Path, tiny_prompts: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(**sections: Any) -> Path:
        optimizer = {"lr": 1.0e-3, "eps": 1.0e-4}
        data: dict[str, Any] = {
            "seed": 3,
            "steps": 2,
            "models": {"reference": str(models / "reference"), "generator": str(models / "generator/network")},
            "data": {"prompts": str(tiny_prompts)},
            "algorithm": {
                "cfg": {"guidance_scale": 3.0},
                "rewards": [{"name": "pickscore", "scale": 100.0, "options": {"model": str(tiny_clip)}}],
            },
            "optimization": {"batch_size": 4, "generator": dict(optimizer), "assistant": dict(optimizer)},
            "placement": "local",
            "logging": {"samples_every": 2, "sample_count": 2, "watch_every": 1, "watch_images": 4},
            "evaluation": {"images": 4, "images_per_prompt": 2, "batch_size": 4},
        }
        for key, value in sections.items():
            data[key] = {**data[key], **value} if isinstance(data.get(key), dict) else value
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(data), "utf-8")
        return path

    return write


def command(*arguments: object, code: int = 0) -> None:
    """``rlhf-t2i ARGUMENTS`` in this process."""
    from rlhf_t2i.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["rlhf-t2i", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
    assert (stop.value.code or 0) == code, arguments


STUDENTS: dict[str, dict[str, Any]] = {
    "one step": {},
    "four steps, adapters, ema": {
        "student": {"steps": 4},
        "optimization": {
            "generator": {"lr": 1.0e-3, "lora": {"rank": 2}},
            "ema": {"half_life_kimg": 0.01},
            "gradient_checkpointing": True,
            "micro_batch": 2,
        },
    },
}


@pytest.mark.parametrize("name", STUDENTS)
def test_run_sample_eval_and_export(
    name: str, installed: Path, recipe: Callable[..., Path], tiny_clip: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    steps = STUDENTS[name].get("student", {}).get("steps", 1)
    out = tmp_path / "out"
    command("run", recipe(**STUDENTS[name]), "--out", out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 2
    assert all(np.isfinite(row["assistant_loss"]) and row["grad_norm/divergence"] > 0 for row in rows)
    assert (out / "report.html").stat().st_size > 10_000

    expected = toy_family.pipeline(out / "model", PROMPTS, steps, seed=5)
    other = toy_family.pipeline(out / "model", PROMPTS, steps, seed=9)
    assert (expected - other).abs().max() > 0.01, "one image for every noise compares nothing"
    command(
        "sample",
        out,
        *(part for prompt in PROMPTS for part in ("--prompt", prompt)),
        "--seed",
        5,
        "-o",
        tmp_path / "x.png",
    )
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "x.png"))).permute(2, 0, 1) / 255
    for index, image in enumerate(expected):
        left = find(sheet, image)
        assert left is not None, f"image {index} is not in the sheet"

    command(
        "eval", out, "--prompts", tiny_prompts, "--limit", 2, "--images-per-prompt", 2, "--features", tiny_clip,
        "--metrics", "pickscore,diversity", "--set", f"pickscore.model={tiny_clip}", "--out", tmp_path / "evaluation",
    )  # fmt: skip
    results = json.loads((tmp_path / "evaluation/results.json").read_text("utf-8"))
    assert len(results["images"]) == 4
    assert Image.open(tmp_path / "evaluation" / results["images"][0]["file"]).size == (24, 16)

    again = recipe(models={"reference": str(out / "model"), "generator": str(out / "model")}, **STUDENTS[name])
    command("run", again, "--out", tmp_path / "again")


def find(sheet: torch.Tensor, image: torch.Tensor) -> tuple[int, int] | None:
    """Where an image stands in a sheet, up to a grey level."""
    height, width = image.shape[1:]
    for top in range(sheet.shape[1] - height + 1):
        for left in range(sheet.shape[2] - width + 1):
            if (sheet[:, top : top + height, left : left + width] - image).abs().max() < 0.6 / 255:
                return top, left
    return None


@pytest.mark.parametrize("name", STUDENTS)
def test_plan(name: str, installed: Path, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    command("plan", recipe(**STUDENTS[name]))
    assert "learner" in capsys.readouterr().out


def test_families_check_runs_what_needs_no_pipeline(
    installed: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("families", "check", models / "reference")
    said = " ".join(capsys.readouterr().out.split())
    assert "5 passed, 0 failed, 6 skipped" in said
    assert "the family toy has no pipeline to compare with" in " ".join(said.replace("│", " ").split())


REFUSED = {
    "vae_slicing": ({"models": {"vae_slicing": True}}, "this family's decoder has neither"),
    "steps": ({"student": {"timesteps": [900.0, 300.0]}}, "the toy pipeline draws evenly spaced steps only"),
    "range": ({"algorithm": {"timesteps": {"generator": [0, 980]}}}, "is not within the reference's 1 to 1000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused_before_anything_starts(
    name: str, installed: Path, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections, message = REFUSED[name]
    command("run", recipe(**sections), "--out", tmp_path / "out", code=2)
    said = " ".join(capsys.readouterr().err.split())
    assert message in said
    assert "starting the roles" not in said
    assert not (tmp_path / "out").exists()


def test_its_reference_is_not_drawn_in_many_steps(
    installed: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("sample", models / "reference", "--prompt", "a cat", "-o", tmp_path / "x.png", code=2)
    assert "the model family toy has no pipeline that draws in many steps" in " ".join(capsys.readouterr().err.split())


def test_without_its_package_the_model_is_refused(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("run", recipe(), "--out", tmp_path / "out", code=2)
    said = " ".join(capsys.readouterr().err.split())
    assert "'ToyPipeline' is no pipeline of a known model family; known: " in said
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_over_ray(installed: Path, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Its package is found in every process: they inherit the driver's import path."""
    groups = {
        "train": {"devices": 2, "roles": ["learner", "generator"], "threads": 1},
        "serve": {"devices": 1, "roles": ["assistant", "reference", "reward"], "threads": 1},
    }
    command("run", recipe(student={"steps": 4}), "--out", tmp_path / "local")
    path = recipe(student={"steps": 4}, placement={"mode": "ray", "groups": groups}, optimization={"zero_stage": 2})
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_t2i.cli", "run", str(path), "--out", str(tmp_path / "ray")],
        env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    local, distributed = (
        toy_family.pipeline(tmp_path / name / "model", PROMPTS, 4, seed=0) for name in ("local", "ray")
    )
    torch.testing.assert_close(distributed, local, rtol=0, atol=1e-5)
