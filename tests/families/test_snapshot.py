"""What an export needs of hub models is fetched before training, and no more than it needs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import snapshot, sources
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training import run

PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "vae")
# Of stabilityai/stable-diffusion-xl-base-1.0, where one file of each kind tells enough.
NEEDED = [
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "tokenizer/vocab.json",
    "tokenizer_2/merges.txt", "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder_2/model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
]  # fmt: skip
NOT_NEEDED = [
    "sd_xl_base_1.0.safetensors", "README.md", "unet/diffusion_pytorch_model.safetensors", "unet/model.onnx",
    "text_encoder/model.fp16.safetensors", "text_encoder/flax_model.msgpack", "text_encoder/openvino_model.bin",
    "text_encoder/model.onnx", "vae_1_0/diffusion_pytorch_model.safetensors", "vae_decoder/model.onnx",
    "vae/diffusion_pytorch_model.fp16.safetensors", "vae/model.fp16-00001-of-00002.safetensors",
]  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot's folder of tiny/sdxl in a hub cache of one index; the hub itself refuses."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub/models--tiny--sdxl/snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({name: ["x", "Y"] for name in (*PARTS, "unet", "scheduler")}))
    return folder


def test_the_files_that_are_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, set[str]] = {}

    def download(name: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> None:
        found = filter_repo_objects(
            [*NEEDED, *NOT_NEEDED], allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked[f"{name}@{revision}"] = set(found)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    snapshot.fetch(sources.parse(f"tiny/sdxl@{cache.name}"), "unet", None)
    assert asked == {f"tiny/sdxl@{cache.name}": set(NEEDED)}


def test_without_the_hub_its_cache_will_do_and_nothing_else(cache: Path) -> None:
    source = sources.parse(f"tiny/sdxl@{cache.name}")
    snapshot.fetch(sources.parse(f"tiny/sdxl@{cache.name}"), "unet", None)
    assert snapshot.folder(source, sources.INDEX) == cache
    with pytest.raises(UsageError, match="tiny/decoder cannot be read from the hub"):
        snapshot.fetch(source, "unet", sources.parse("tiny/decoder"))


def test_a_run_fetches_before_it_writes(
    cache: Path, make_recipe: Callable[..., Recipe], tiny_sdxl: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_sdxl, cache, dirs_exist_ok=True)
    recipe = make_recipe(models__reference=f"tiny/sdxl@{cache.name}", models__vae="tiny/decoder")
    (tmp_path / "hub/models--tiny--decoder/refs").mkdir(parents=True)
    with pytest.raises(UsageError, match="tiny/decoder cannot be read from the hub"):
        run.run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("files", "copied"),
    [
        (["config.json", "model.safetensors", "model.fp16.safetensors", "model.bin", "model.onnx_data"],
         ["config.json", "model.safetensors"]),
        (["config.json", "model.fp16.safetensors"], ["config.json", "model.safetensors"]),
        (["m.fp16-00001-of-00001.safetensors", "m.safetensors.index.fp16.json"],
         ["m-00001-of-00001.safetensors", "m.safetensors.index.json"]),
    ],
    ids=["every format", "fp16 alone", "fp16 alone, in shards"],
)  # fmt: skip
def test_the_copy_of_a_part(files: list[str], copied: list[Any], tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    for name in files:
        (tmp_path / "part" / name).write_text(f'{{"names": "{files[0]}"}}' if name.endswith(".json") else "")
    snapshot.copy_part(tmp_path / "part", tmp_path / "copy")
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == copied
    assert not any(".fp16" in file.read_text() for file in (tmp_path / "copy").glob("*.json"))
