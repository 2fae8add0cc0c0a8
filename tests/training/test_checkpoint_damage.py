"""Any damage to a checkpoint or an exported model is named before it is used."""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import models
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.schema import Checkpoints, Recipe
from rlhf_t2i.training import checkpoints, run
from rlhf_t2i.training.state import TrainState
from rlhf_t2i.utils import fingerprints, manifest
from tests import tiny
from tests.training.test_checkpoint import Written, save


def test_any_flipped_bit_in_any_file_is_named(tmp_path: Path) -> None:
    """All bits of all files but large ones; those go through the same digest."""
    state = TrainState(2, 1, 5, [{"loss": 0.5, "grad_norm": float("inf")}], 1, {"generator": 1}, [0.25])
    folder = checkpoints.begin(Written(), tmp_path, state, Checkpoints()).wait()  # type: ignore[arg-type]
    accepted = []
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        whole = file.read_bytes()
        for bit in range(8 * len(whole)):
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            if manifest.damage(folder) != f"{file.relative_to(folder)} has changed":
                accepted.append((file.name, bit))
        file.write_bytes(whole[:-1])
        assert manifest.damage(folder) == f"{file.relative_to(folder)} has changed"
        file.write_bytes(whole)
    assert accepted == []
    assert checkpoints.find(tmp_path) == (folder, state, [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path, tiny_prompts: Path) -> Path:
    """A run of one step; whoever damages it mends it."""
    folder = tmp_path_factory.mktemp("trained")
    data = tiny.recipe_dict(tiny_sdxl, tiny_prompts, steps=1, evaluation={"images": 2}, logging={"sample_count": 2})
    (folder / "recipe.yaml").write_text(json.dumps(data), "utf-8")
    run.run(reading.load(folder / "recipe.yaml"), folder / "out")
    return folder / "out"


def test_a_flipped_bit_in_weights_and_states_is_named(trained: Path) -> None:
    """A sample of the bits of all files, each file with its share: most are those of the large ones."""
    draw, accepted = random.Random(0), []
    for folder in (trained / "checkpoints/step_000001", trained / "model"):
        listed = {folder / name: entry["bytes"] for name, entry in manifest.read(folder)["files"].items()}
        assert listed.keys() == {file for file in folder.rglob("*") if file.is_file()} - {folder / manifest.NAME}
        for file in draw.choices(list(listed), list(listed.values()), k=100):
            position, bit = draw.randrange(listed[file]), 1 << draw.randrange(8)
            with flipped(file, position, bit):
                if manifest.damage(folder, fingerprints.of_file) != f"{file.relative_to(folder)} has changed":
                    accepted.append((file.name, position, bit))
        assert manifest.damage(folder) is None
    assert accepted == []


@contextlib.contextmanager
def flipped(file: Path, position: int, bit: int) -> Iterator[None]:
    """A file of which one bit is flipped in the block."""

    def flip() -> None:
        with file.open("r+b") as opened:
            opened.seek(position)
            (byte,) = opened.read(1)
            opened.seek(position)
            opened.write(bytes([byte ^ bit]))

    flip()
    try:
        yield
    finally:
        flip()


def test_a_damaged_model_is_refused_wherever_it_is_read(trained: Path, make_recipe: Callable[..., Recipe]) -> None:
    model, weights = trained / "model", "unet/diffusion_pytorch_model.safetensors"
    sentence = f"model: {weights} has changed, says its manifest.json: take a whole copy, or remove that file"
    recipes = [
        make_recipe(models__generator=str(model / "unet")),
        make_recipe(models__reference=str(model)),
        make_recipe(models__vae=str(model / "vae")),
    ]
    with flipped(model / weights, 5000, 4):
        for read in [
            *[partial(run.run, recipe, trained.parent / "other") for recipe in recipes],
            partial(models.load, str(trained)),
        ]:
            with pytest.raises(UsageError, match=re.escape(sentence)):
                read()
    assert not (trained.parent / "other").exists()
    models.load(str(trained))
    (model / weights).rename(model / "away")
    try:
        with pytest.raises(UsageError, match=r"safetensors is missing, says its manifest\.json"):
            models.load(str(trained))
    finally:
        (model / "away").rename(model / weights)


def test_an_export_without_its_steps_is_one_sentence(trained: Path, tmp_path: Path) -> None:
    """Its pipeline would be asked for 50 steps, and its scheduler has one."""
    model = Path(shutil.copytree(trained / "model", tmp_path / "model"))
    (model / "student.json").unlink()
    with pytest.raises(UsageError, match=r"student\.json is missing, says its manifest\.json"):
        models.load(str(model))
    (model / "manifest.json").unlink()
    with pytest.raises(
        UsageError, match=r"does not draw in 50 steps .* put its student\.json beside model_index\.json"
    ):
        models.load(str(model)).sample("a cat")


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": 2.0}, {"step": True}, {"round": None}, {"rewards": [float("nan")]}, {"rewards": {}},
        {"reports": [1]}, {"reports": [{"loss": "x"}]}, {"bad_in_a_row": {"generator": -1}}, {"more": 1},
    ],
)  # fmt: skip
def test_a_state_that_no_run_has_is_damage(tmp_path: Path, change: dict[str, Any]) -> None:
    """Also under a manifest that is whole: a value of another kind must not be found out steps later."""
    save(tmp_path, 1, None, Checkpoints())
    folder = tmp_path / "checkpoints/step_000001"
    content = manifest.read(folder)
    (folder / "manifest.json").write_text(manifest.render(content | {"state": content["state"] | change}), "utf-8")
    with pytest.raises(UsageError, match="step_000001 is damaged"):
        checkpoints.find(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"files": {}}', "[" * 100_000])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1, None, Checkpoints())
    (tmp_path / "checkpoints/step_000001/manifest.json").write_text(content, "utf-8")
    with pytest.raises(UsageError, match=r"step_000001 is damaged \(manifest\.json has changed\)"):
        checkpoints.find(tmp_path)


def test_a_checkpoint_under_another_ones_name_is_damage(tmp_path: Path) -> None:
    save(tmp_path, 1, None, Checkpoints())
    (tmp_path / "checkpoints/step_000001").rename(tmp_path / "checkpoints/step_000007")
    with pytest.raises(UsageError, match=r"step_000007 is damaged \(it holds step_000001\)"):
        checkpoints.find(tmp_path)
