"""The recipe that distills emoji64's generator: it runs, it watches the reader, and its result is exported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_t2i.recipe import reading, shipped
from rlhf_t2i.training import run
from zoo import data, distill

SHORT = [
    "steps=2",
    "optimization.batch_size=4",
    "algorithm.assistant_warmup=1",
    "logging={samples_every: 9, sample_count: 2, watch_every: 1, watch_images: 4}",
    "evaluation={images: 4, images_per_prompt: 2}",
]


@pytest.mark.parametrize(
    "variant",
    [[], ["algorithm.divergence={name: l2, options: {alpha: 1.2}}", "student.timesteps=[999, 749, 499, 249]"]],
    ids=["Diff-Instruct, one step", "SiD, four steps"],
)
def test_the_recipe_distills(variant: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    run.run(reading.load(shipped.recipe_path("emoji64/distill"), [*SHORT, *variant]), out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 <= row["watch/named"] <= 1
        assert row["watch/noto"] + row["watch/twemoji"] + row["watch/glossy"] == pytest.approx(1)
    monkeypatch.setattr(data, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill", "export", str(out)])
    distill.main()
    weights = load_file(tmp_path / "generator/diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert weights["conv_in.weight"].shape[1] == 8
