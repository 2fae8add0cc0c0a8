"""Prompt embeddings on disk: the encoders' own bits, for every family; a run with them loads no encoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import rlhf_t2i
from rlhf_t2i.algorithm import prompts
from rlhf_t2i.cli import app
from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.families import embeddings
from rlhf_t2i.families.embeddings import EmbeddingFolder
from rlhf_t2i.families.pipeline import PipelineFamily
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.training.callbacks import TrainCallback
from tests import tiny, tiny_families
from tests.families.test_sampling import store

PROMPTS = ["a red cat, smiling", "", "dog " * 20, "Ünïcode ✓ 🦊"]
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sdxl": tiny.make_sdxl,
    "sd15": tiny.make_sd15,
    "sd3": tiny.make_sd3,
    "pixart": tiny_families.make_pixart,
    "flux": tiny_families.make_flux,
    "flux2": tiny_families.make_flux2_klein,
    "z_image": tiny_families.make_z_image,
}


def filled(model: Path, root: Path, **changes: Any) -> ModelStore:
    built = store(model, embeddings=str(root), **changes)
    assert built.embeddings is not None
    built.encode_missing(built.embeddings.missing(PROMPTS), lambda done, total: None)
    return built


@pytest.mark.parametrize(("family", "precision"), [*((family, "fp32") for family in FAMILIES), ("z_image", "bf16")])
def test_stored_conditioning_is_the_encoders_bit_for_bit(family: str, precision: str, tmp_path: Path) -> None:
    model = FAMILIES[family](tmp_path / "model")
    encoded = store(model, precision=precision).conditioner
    stored = filled(model, tmp_path / "cache", precision=precision)
    assert "text_encoders" not in vars(stored)  # freed
    for wanted, found in (
        (encoded.encode(PROMPTS), stored.conditioner.encode(PROMPTS)),
        (encoded.unconditional(2), stored.conditioner.unconditional(2)),
    ):
        assert wanted.tensors.keys() == found.tensors.keys()
        for name, tensor in wanted.tensors.items():
            assert tensor.dtype == found.tensors[name].dtype
            assert torch.equal(tensor, found.tensors[name]), name
    assert "text_encoders" not in vars(stored)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, tiny_sdxl: Path) -> EmbeddingFolder:
    found = filled(tiny_sdxl, tmp_path_factory.mktemp("cache")).embeddings
    assert found is not None
    return found


def test_padding_and_half_precision_take_no_room(tmp_path: Path) -> None:
    folder = EmbeddingFolder(tmp_path, "x")
    folder.prepare()
    row = {
        "embeds": torch.nn.functional.pad(torch.ones(3, 8), (0, 0, 0, 509)),
        "exact": torch.rand(4),
        "mask": torch.arange(512) < 3,
        "scale": torch.tensor(3.5),
    }
    folder.write("a", row)
    (file,) = folder.folder.iterdir()
    assert file.stat().st_size < 1500
    assert {name: tuple(t.shape) for name, t in load_file(file).items()}["embeds"] == (3, 8)
    for name, tensor in folder.read("a").items():
        assert torch.equal(tensor, row[name])
        assert tensor.dtype == row[name].dtype


def test_what_is_missing_or_damaged_is_named(cached: EmbeddingFolder) -> None:
    assert cached.missing(PROMPTS) == []
    assert cached.missing(["new", "new", PROMPTS[0]]) == ["new"]
    with pytest.raises(RunError, match="no embedding of 'new': encode the prompts"):
        cached.read("new")
    for file in sorted(cached.folder.iterdir())[:2]:
        whole = file.read_bytes()
        for position in [*range(0, 400, 7), *range(400, len(whole), len(whole) // 50)]:
            file.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
            with pytest.raises(RunError, match="is damaged: delete it"):
                [cached.read(entry) for entry in [embeddings.UNCONDITIONAL, *PROMPTS]]
        file.write_bytes(whole)


def test_other_encoders_sizes_and_precisions_have_folders_of_their_own(tmp_path: Path, tiny_sdxl: Path) -> None:
    other = tiny.make_sdxl(tmp_path / "other", seed=9)
    stores = [
        store(tiny_sdxl, embeddings=str(tmp_path)),
        store(tiny_sdxl, embeddings=str(tmp_path), precision="bf16"),
        store(tiny_sdxl, embeddings=str(tmp_path), width=tiny.RESOLUTION * 2),
        store(other, embeddings=str(tmp_path)),
    ]
    assert len({built.embeddings.folder for built in stores if built.embeddings}) == 4


def test_a_file_is_refused_as_a_folder(tmp_path: Path, tiny_sdxl: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UsageError, match=r"models\.embeddings: .*/file is a file: name a folder"):
            store(tiny_sdxl, embeddings=str(place)).check()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"models\.embeddings: .*/link is a link to .*/gone, which does not exist"):
        store(tiny_sdxl, embeddings=str(tmp_path / "link/below")).check()


def test_a_folder_that_cannot_be_created_is_refused_before_encoders_are_loaded(
    tiny_sdxl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = store(tiny_sdxl, embeddings="/proc/nope")
    assert built.embeddings is not None
    monkeypatch.setattr(type(built.family), "load_conditioner", lambda *_: pytest.fail("encoders are loaded"))
    with pytest.raises(UsageError, match=r"models\.embeddings: /proc/nope/\w+ cannot be written: No such file"):
        built.encode_missing(["a"], lambda done, total: None)


def test_an_empty_file_is_written_again(tiny_sdxl: Path, tmp_path: Path) -> None:
    found = filled(tiny_sdxl, tmp_path).embeddings
    assert found is not None
    first = min(found.folder.iterdir())
    first.write_bytes(b"")
    assert len(found.missing(PROMPTS)) == 1


def recipe(tmp_path: Path, tiny_sdxl: Path, tiny_prompts: Path, **models: Any) -> dict[str, Any]:
    found = tiny.recipe_dict(
        tiny_sdxl, tiny_prompts, logging={"sample_count": 1}, evaluation={"images": 2, "images_per_prompt": 2}
    )
    found["models"] |= models
    return found


def weights(out: Path) -> dict[str, Tensor]:
    (file,) = (out / "model/unet").glob("*.safetensors")
    return load_file(file)


def test_a_run_with_embeddings_is_the_same_and_loads_no_encoder(
    tmp_path: Path, tiny_sdxl: Path, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rlhf_t2i.train(recipe(tmp_path, tiny_sdxl, tiny_prompts), tmp_path / "plain")
    keys = recipe(tmp_path, tiny_sdxl, tiny_prompts, embeddings=str(tmp_path / "cache"))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(keys), "utf-8")
    first, again = (CliRunner().invoke(app, ["encode", str(file)]) for _ in range(2))
    assert first.exit_code == again.exit_code == 0, first.output
    assert "encoded 25 prompts, wrote" in first.output  # and the unconditional branch
    assert "nothing to do" in again.output
    assert "Loading weights" not in first.output  # bars of transformers beside our own

    def refuse(*_: object) -> None:
        raise AssertionError("a text encoder is loaded")

    monkeypatch.setattr(PipelineFamily, "text_encoder", refuse)
    rlhf_t2i.train(keys, tmp_path / "stored")
    plain, stored = weights(tmp_path / "plain"), weights(tmp_path / "stored")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in plain.items())


def test_a_run_encodes_what_is_missing_before_its_roles_start(
    tmp_path: Path, tiny_sdxl: Path, tiny_prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(prompts, "stream", stream := MagicMock(wraps=prompts.stream))

    class Phases(TrainCallback):
        def on_phase(self, text: str) -> None:
            said.append(text)

    keys = recipe(tmp_path, tiny_sdxl, tiny_prompts, embeddings=str(tmp_path / "cache"))
    rlhf_t2i.train(keys, tmp_path / "out", callback=Phases())
    assert said[:4] == [
        "checking the inputs", "encoding prompts, 0 of 25", "encoding prompts, 25 of 25", "starting the roles"
    ]  # fmt: skip
    assert stream.call_count == 1  # a long list is read once

    said.clear()
    keys["data"] = {"prompts": str(tiny.make_prompts(tmp_path, "others.txt", start=3))}
    with pytest.raises(UsageError, match="resume=True: the recipe has changed"):
        rlhf_t2i.train(keys, tmp_path / "out", resume=True, callback=Phases())
    assert said == ["checking the inputs"]


def test_encode_without_a_folder_is_a_sentence(tmp_path: Path, tiny_sdxl: Path, tiny_prompts: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(tmp_path, tiny_sdxl, tiny_prompts)), "utf-8")
    result = CliRunner().invoke(app, ["encode", str(file)])
    assert isinstance(result.exception, UsageError)
    assert "models.embeddings: names no folder" in str(result.exception)


def test_a_plan_leaves_the_encoders_out(tmp_path: Path, tiny_sdxl: Path, tiny_prompts: Path) -> None:
    plain = rlhf_t2i.plan(recipe(tmp_path, tiny_sdxl, tiny_prompts))
    stored = rlhf_t2i.plan(recipe(tmp_path, tiny_sdxl, tiny_prompts, embeddings=str(tmp_path)))
    assert "text encoders" in {role.role for role in plain.groups[0].roles}
    assert "text encoders" not in {role.role for role in stored.groups[0].roles}
