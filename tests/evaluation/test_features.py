"""Features, Frechet distance, CLIP score and class entropy against independent implementations."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf_t2i.errors import UsageError
from rlhf_t2i.evaluation import features
from rlhf_t2i.evaluation.features import ClipFeatures, Probe
from rlhf_t2i.evaluation.run import evaluate
from rlhf_t2i.plugins import registry
from rlhf_t2i.utils import images as image_files
from rlhf_t2i.utils import stats


def pictures(folder, count, seed=0):
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return folder


def test_clip_features_agree_with_transformers(tiny_clip, tmp_path):
    from transformers import CLIPImageProcessorPil, CLIPModel

    folder = pictures(tmp_path / "p", 3)
    paths = sorted(folder.iterdir())
    ours = ClipFeatures(str(tiny_clip), torch.device("cpu"))(image_files.read(paths))
    processor = CLIPImageProcessorPil.from_pretrained(tiny_clip)
    inputs = processor(images=[Image.open(path) for path in paths], return_tensors="pt")
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(tiny_clip).get_image_features(**inputs).pooler_output
    assert torch.allclose(ours, theirs, atol=1e-4)


class PooledClip(torch.nn.Module):
    """A CLIPModel with the method results torchmetrics expects: tensors, as transformers returned before 5.0."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels):
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def get_text_features(self, ids, mask):
        return self.model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


def test_clip_score_agrees_with_torchmetrics(tmp_path):
    clip_score = pytest.importorskip("torchmetrics.multimodal.clip_score")
    from transformers import AutoProcessor, CLIPModel

    emoji64 = Path(__file__).parents[2] / "zoo/emoji64"  # trained: its cosines differ between prompts
    with Image.open(emoji64 / "data/noto.png") as sheet:
        for index in range(3):
            drawing = sheet.convert("RGBA").crop((64 * index, 0, 64 * index + 64, 64))
            Image.alpha_composite(Image.new("RGBA", (64, 64), "red"), drawing).convert("RGB").save(
                tmp_path / f"{index}.png"
            )
    names = json.loads((emoji64 / "data/names.json").read_text("utf-8"))[:3]
    images, prompts = image_files.read(sorted(tmp_path.iterdir())), [f"{name}, on a red background" for name in names]
    judge = emoji64 / "judge"
    parts = PooledClip(CLIPModel.from_pretrained(judge, dtype=torch.float32)), AutoProcessor.from_pretrained(judge)
    metric = clip_score.CLIPScore(lambda: parts)
    theirs = []
    with torch.no_grad():
        ours = 100 * registry.reward("clip", model=str(judge)).score(images, prompts)
        for image, text in zip((images * 255).round().byte(), prompts, strict=True):
            metric.reset()
            metric.update(image, text)
            theirs.append(float(metric.compute()))
    assert ours.min() > 10  # torchmetrics raises negative scores to zero
    assert ours.tolist() == pytest.approx(theirs, abs=1e-3)


def test_frechet_distance_agrees_with_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")

    class Flat(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.double().flatten(1) / 255

    metric = fid.FrechetInceptionDistance(feature=Flat(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    rng = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (60, 3, 2, 2), generator=rng, dtype=torch.uint8)
    fake = torch.randint(0, 200, (50, 3, 2, 2), generator=rng, dtype=torch.uint8)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    ours = stats.frechet_distance(fake.flatten(1).double().numpy() / 255, real.flatten(1).double().numpy() / 255)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-6)


def test_fid_with_inceptions_own_network(settings, tmp_path, monkeypatch):
    """Random weights in the published file's layout: the path from pictures to the distance, without the download."""
    fidelity = pytest.importorskip("torch_fidelity", exc_type=ImportError)
    weights = tmp_path / features.INCEPTION_FILE
    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
    torch.save(network.state_dict(), weights)
    real = pictures(tmp_path / "real", 8)
    found = evaluate(settings(metrics=["fid"], real=str(real), inception=str(weights)), tmp_path / "out")
    (row,) = found.table
    assert "InceptionV3 pool3" in row["unit"]

    def pool3(folder):
        images = [np.array(Image.open(path).convert("RGB")) for path in sorted(folder.rglob("*.png"))]
        with torch.no_grad():
            batches = [network(torch.from_numpy(image).permute(2, 0, 1)[None])[0] for image in images]
        return torch.cat(batches).double().numpy()

    expected = stats.frechet_distance(pool3(tmp_path / "out" / "images"), pool3(real))
    assert row["mean"] == pytest.approx(expected, rel=1e-3)


def test_frechet_clip_names_its_features(settings, tiny_clip, tmp_path):
    real = pictures(tmp_path / "real", 8)
    chosen = settings(metrics=["frechet_clip"], features=str(tiny_clip), real=str(real))
    found = evaluate(chosen, tmp_path / "out")
    (row,) = found.table
    assert row["mean"] > 0
    assert f"CLIP {tiny_clip.parent.name}/{tiny_clip.name}" in row["unit"]
    assert "10 against 8 real" in row["unit"]
    assert row["low"] is None


def test_class_entropy_by_hand():
    # Features of length 1 and a steep probe: each image is surely of one class.
    probe = Probe(["a", "b", "c"], 100 * np.eye(3), np.zeros(3))
    own = np.eye(3)[[0, 1, 0, 0]]  # prompt one: a and b; prompt two: a twice
    found, overall = features.class_entropy(probe, own, ["p", "p", "q", "q"], "test")
    assert found.by_prompt == pytest.approx([math.log(2), 0], abs=1e-9)
    assert found.shares == pytest.approx({"a": 0.75, "b": 0.25, "c": 0}, abs=1e-9)
    assert overall.value == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    flat = Probe(["a", "b", "c"], 0.01 * np.eye(3), np.zeros(3), hard=True)
    assert features.class_entropy(flat, own, ["p", "p", "q", "q"], "test")[0].by_prompt == pytest.approx(
        found.by_prompt
    )


def test_class_entropy_with_labels_and_with_a_probe(settings, tiny_clip, tmp_path):
    clip = str(tiny_clip)
    chosen = settings(metrics=["class_entropy"], features=clip, classes="a red thing|a blue thing")
    row, _ = evaluate(chosen, tmp_path / "labels").table
    assert 0 <= row["mean"] <= math.log(2)
    probe = {"labels": ["x", "y"], "weight": np.zeros((2, 16)).tolist(), "bias": [0, 0]}
    (tmp_path / "probe.json").write_text(json.dumps(probe))
    chosen = settings(metrics=["class_entropy"], features=clip, classes=str(tmp_path / "probe.json"))
    row, _ = evaluate(chosen, tmp_path / "probe").table
    assert row["mean"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("text", ["{", "{}", '{"labels": ["a", "b"], "weight": [[1]], "bias": [0, 0]}'])
def test_a_damaged_probe(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UsageError, match="--classes"):
        Probe.read(tmp_path / "p.json")


@pytest.mark.parametrize("name", ["absent.json", "pipe.json"])
def test_a_probe_that_is_no_file_is_refused_at_once(name, tmp_path):
    """Cases G.8: reading a pipe never ends."""
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(UsageError, match="--classes: "):
        Probe.read(tmp_path / name)


def test_features_that_are_not_there(settings, tmp_path):
    with pytest.raises(UsageError, match="no such model"):
        evaluate(settings(metrics=["diversity"], features="./nowhere"), tmp_path / "out")
