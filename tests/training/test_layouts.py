"""Two steps through the command line from small random models in every published folder layout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_t2i import cli
from tests import tiny

LR = 1e-3
SAFETENSORS = "unet/diffusion_pytorch_model.safetensors"


def train(folder: Path, pipeline: Path, clip: Path, generator: str | None = None) -> Path:
    """``rlhf-t2i run`` as a user types it, in this process; returns the run's folder."""
    recipe = tiny.recipe_dict(
        pipeline,
        tiny.make_prompts(folder),
        steps=100,
        algorithm={"rewards": [{"name": "pickscore", "scale": 100.0, "options": {"model": str(clip)}}]},
        optimization={"batch_size": 2, "generator": {"lr": LR}, "assistant": {"lr": LR}},
        logging={"sample_count": 1},
        evaluation={"images": 2, "images_per_prompt": 2, "batch_size": 2},
    )
    recipe["models"]["generator"] = generator or str(pipeline)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), "utf-8")
    out = folder / "out"
    arguments = ["rlhf-t2i", "run", str(folder / "recipe.yaml"), "--out", str(out), "--set", "steps=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 0
    return out


def check(out: Path, start: dict[str, torch.Tensor], pipeline_class: str) -> None:
    """Finite measurements, weights two Adam steps from where they should have started, a folder diffusers loads."""
    import diffusers

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        for name in ("reward/pickscore", "divergence", "grad_norm/divergence", "assistant_loss"):
            assert torch.isfinite(torch.tensor(row[name])), name
    pipeline: Any = getattr(diffusers, pipeline_class).from_pretrained(out / "model")
    trained = pipeline.unet.state_dict()
    assert trained.keys() == start.keys()
    moved = max(float((trained[name].float() - start[name].float()).abs().max()) for name in start)
    assert 0 < moved < 3 * LR


def weights(pipeline: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet", variant=variant).state_dict()


@pytest.mark.parametrize(
    ("make", "pipeline_class"),
    [(tiny.make_sdxl, "StableDiffusionXLPipeline"), (tiny.make_sd15, "StableDiffusionPipeline")],
)
def test_pipeline_folders(make: Callable[..., Path], pipeline_class: str, tmp_path: Path, tiny_clip: Path) -> None:
    pipeline = make(tmp_path / "model")
    assert (pipeline / SAFETENSORS).is_file()
    assert (pipeline / "text_encoder_2").is_dir() == (make is tiny.make_sdxl)
    check(train(tmp_path, pipeline, tiny_clip), weights(pipeline), pipeline_class)


def test_dmd2_bin(tmp_path: Path, tiny_sdxl: Path, tiny_clip: Path) -> None:
    file = tiny.make_generator_bin(tiny_sdxl, tmp_path / "dmd2_sdxl_1step_unet_fp16.bin", seed=5)
    start = torch.load(file, weights_only=True)
    assert float((start["conv_in.weight"] - weights(tiny_sdxl)["conv_in.weight"]).abs().max()) > 10 * LR
    check(train(tmp_path, tiny_sdxl, tiny_clip, generator=str(file)), start, "StableDiffusionXLPipeline")


@pytest.mark.parametrize("shards", ["10GB", "60KB"])
def test_fp16_variants_alone(shards: str, tmp_path: Path, tiny_clip: Path) -> None:
    """What stays after ``huggingface-cli download --include '*.fp16.*'``; the export is a plain folder."""
    pipeline = tiny.make_sdxl(tmp_path / "model", variant="fp16", max_shard_size=shards)
    assert {".fp16" in file.name for file in pipeline.rglob("*.safetensors")} == {True}
    assert len(list((pipeline / "unet").glob("*.safetensors"))) == 1 or shards == "60KB"
    out = train(tmp_path, pipeline, tiny_clip)
    check(out, weights(pipeline, "fp16"), "StableDiffusionXLPipeline")
    assert not list((out / "model").rglob("*.fp16*"))


def test_sharded_safetensors(tmp_path: Path, tiny_clip: Path) -> None:
    pipeline = tiny.make_sdxl(tmp_path / "model", max_shard_size="100KB")
    index = json.loads((pipeline / f"{SAFETENSORS}.index.json").read_text("utf-8"))
    assert len(set(index["weight_map"].values())) > 2
    check(train(tmp_path, pipeline, tiny_clip), weights(pipeline), "StableDiffusionXLPipeline")
