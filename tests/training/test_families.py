"""Runs in one process on families whose networks, prompts or decoders are unlike Stable Diffusion's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import rlhf_t2i
from rlhf_t2i.families import registry, sources
from tests import tiny
from tests.families.test_oracle import MODELS, SIDES


@pytest.mark.parametrize(
    ("name", "generator", "lora"),
    [("sana", "sana_sprint", False), ("qwen_image", "qwen_image", True)],
)
def test_a_run_exports_what_it_trained(
    name: str, generator: str, lora: bool, tiny_clip: Path, tiny_prompts: Path, tmp_path: Path
) -> None:
    folder, side = MODELS[name](tmp_path / "reference"), SIDES.get(name, 16)
    start = folder if generator == name else MODELS[generator](tmp_path / "generator")
    network: dict[str, Any] = {"lr": 1e-2} | ({"lora": {"rank": 2}} if lora else {})
    recipe = tiny.recipe_dict(
        folder,
        tiny_prompts,
        models={"reference": str(folder), "generator": str(start), "height": side, "width": side},
        student={"steps": 2},
        algorithm={
            "cfg": {"guidance_scale": 3.0},
            "rewards": [{"name": "pickscore", "scale": 100, "options": {"model": str(tiny_clip)}}],
        },
        optimization={"batch_size": 2, "generator": network, "assistant": network, "gradient_checkpointing": lora},
        evaluation={"images": 2, "images_per_prompt": 2},
    )
    rlhf_t2i.train(recipe, out=str(tmp_path / "out"))
    metrics = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text("utf-8").splitlines()]
    assert len(metrics) == 2
    for key in ("grad_norm/reward", "grad_norm/divergence", "param_grad_norm/generator", "assistant_loss"):
        assert all(line[key] > 0 for line in metrics), key

    again, before = (registry.find(sources.parse(str(path))) for path in (tmp_path / "out/model", start))
    assert type(again) is type(before)
    assert again.schedule(side, side).default_law() == before.schedule(side, side).default_law()
    (ours,) = rlhf_t2i.load(str(tmp_path / "out")).sample("a red cat", seed=1)
    torch.manual_seed(1)  # Qwen-Image's scheduler draws from it
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "out/model")
    own = {"use_resolution_binning": False, "generator": torch.Generator().manual_seed(1)} if name == "sana" else {}
    theirs = pipe("a red cat", num_inference_steps=2, height=side, width=side, **own).images[0]
    assert np.asarray(ours).std() > 5
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
