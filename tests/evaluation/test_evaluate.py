"""eval: the same images whatever the batch, nothing done twice, the same bytes after a kill."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation import sampler as sampler_module
from rlhf_t2i.evaluation.run import evaluate
from rlhf_t2i.evaluation.sampler import Sampler, resolve
from tests import tiny
from tests.evaluation.conftest import BRIGHTNESS, REWARDS

TABLES = ("results.json", "table.md", "table.csv")


def tables(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in TABLES}


def pixels(out: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in sorted((out / "images").glob("*.png"))]).astype(int)


def test_writes_images_scores_and_a_table(settings, tmp_path):
    found = evaluate(settings(), tmp_path)
    data = json.loads(found.path.read_text())
    assert len(data["images"]) == 10
    assert pixels(tmp_path).shape == (10, tiny.RESOLUTION, tiny.RESOLUTION, 3)
    rows = {row["metric"]: row for row in data["table"]}
    assert list(rows) == [BRIGHTNESS, "pairwise_distance", "vendi"]
    bright = rows[BRIGHTNESS]
    assert bright["low"] < bright["mean"] < bright["high"]
    assert bright["unit"] == "mean pixel"
    assert bright["mean"] == pytest.approx(np.mean(data["metrics"][BRIGHTNESS]["by_image"]))
    assert 1 <= rows["vendi"]["mean"] <= 2
    assert "10 images of 5 prompts" in (tmp_path / "table.md").read_text()


def test_scores_are_those_of_the_pictures_on_the_disk(settings, tmp_path):
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())
    lengths = [len(row["prompt"]) for row in data["images"]]
    expected = pixels(tmp_path).mean((1, 2, 3)) / 255 + 0.001 * np.array(lengths)
    assert data["metrics"][BRIGHTNESS]["by_image"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_image_i_depends_on_the_seed_and_i_alone(settings, tmp_path):
    one, two, other = settings(batch_size=1), settings(batch_size=10), settings(seed=1)
    for index, chosen in enumerate((one, two, other)):
        evaluate(chosen, tmp_path / str(index))
    # Convolutions of another batch size may round differently in the last bit, so a pixel may move by one level.
    assert np.abs(pixels(tmp_path / "0") - pixels(tmp_path / "1")).max() <= 1
    assert np.abs(pixels(tmp_path / "0") - pixels(tmp_path / "2")).max() > 5


def test_fewer_prompts_give_the_first_images(settings, tmp_path):
    evaluate(settings(), tmp_path / "a")
    evaluate(settings(limit=2), tmp_path / "b")
    assert np.abs(pixels(tmp_path / "a")[:4] - pixels(tmp_path / "b")).max() <= 1


def test_one_step_images_equal_plain_diffusers(run_folder_with_model, settings):
    from diffusers import LCMScheduler, StableDiffusionXLPipeline

    from rlhf_t2i.algorithm import rng

    chosen = resolve(settings())
    sampler = Sampler(chosen, seed=0, device=torch.device("cpu"), precision="fp32")
    ours = sampler.images([3, 4], ["a red cat", "a blue dog"])
    pipeline = StableDiffusionXLPipeline.from_pretrained(run_folder_with_model / "model")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = rng.normal(tiny.LATENTS, [(0, "evaluation", 3), (0, "evaluation", 4)])
    theirs = pipeline(
        ["a red cat", "a blue dog"], num_inference_steps=1, timesteps=[399], guidance_scale=0.0, latents=noise,
        height=tiny.RESOLUTION, width=tiny.RESOLUTION, output_type="pt",
    ).images  # fmt: skip
    assert torch.allclose(ours, theirs.float(), atol=1e-4)


def test_many_step_reference_by_the_same_command(settings, tiny_sdxl, tmp_path):
    chosen = settings(model=str(tiny_sdxl), steps=2, guidance=3.0, limit=2, resolution=tiny.RESOLUTION)
    for name, batch in (("a", 4), ("b", 1)):
        evaluate(chosen.model_copy(update={"batch_size": batch}), tmp_path / name)
    assert "2 steps, guidance 3" in (tmp_path / "a" / "table.md").read_text()
    assert np.abs(pixels(tmp_path / "a") - pixels(tmp_path / "b")).max() <= 1


def test_how_a_model_is_sampled(settings, tiny_sdxl, run_folder_with_model):
    assert resolve(settings()).timestep == 399
    assert resolve(settings(steps=4)).timestep is None
    reference = resolve(settings(model=str(tiny_sdxl)))
    assert (reference.timestep, reference.steps, reference.resolution) == (None, 50, tiny.RESOLUTION)
    assert resolve(settings(model=str(tiny_sdxl), timestep=249)).words.startswith("1 step at t=249")
    unet = resolve(settings(model=str(tiny_sdxl / "unet"), base=str(tiny_sdxl), timestep=399))
    assert unet.base == str(tiny_sdxl)
    with pytest.raises(UsageError, match="give its --timestep"):
        resolve(settings(model=str(tiny_sdxl / "unet"), base=str(tiny_sdxl)))
    with pytest.raises(UsageError, match="no such model"):
        resolve(settings(model="./nowhere"))


def test_an_unfinished_run_folder_is_refused(settings, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps: 1\n")
    with pytest.raises(UsageError, match="has not finished"):
        resolve(settings(model=str(tmp_path)))


def test_finished_images_and_scores_are_not_repeated(settings, tmp_path, monkeypatch):
    from rlhf_t2i.plugins import registry

    counting = f"{REWARDS}:Counting"
    cls = registry.load_class(registry.REWARDS, counting)
    evaluate(settings(metrics=[counting]), tmp_path)
    assert cls.scored == 10
    monkeypatch.setattr(sampler_module.Sampler, "images", lambda *_: pytest.fail("drew an image twice"))
    # A further metric is added to the same folder; nothing that stands is done again.
    evaluate(settings(metrics=[counting, BRIGHTNESS]), tmp_path)
    assert cls.scored == 10


def test_only_the_missing_images_are_drawn(settings, tmp_path, monkeypatch):
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    (tmp_path / "images" / "00005.png").unlink()
    drawn = []
    original = sampler_module.Sampler.images
    monkeypatch.setattr(sampler_module.Sampler, "images", lambda self, i, p: drawn.append(i) or original(self, i, p))
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    assert drawn == [[4, 5, 6, 7]]


class Stop(Exception):
    pass


def test_stopping_after_any_batch_gives_the_same_bytes(settings, tmp_path):
    chosen = settings()
    evaluate(chosen, tmp_path / "calm")
    calls = []
    for stop in range(1, 10):

        def progress(what, done, total, stop=stop):
            calls.append(what)
            if len(calls) == stop:
                raise Stop

        calls.clear()
        out = tmp_path / f"stopped{stop}"
        with pytest.raises(Stop):
            evaluate(chosen, out, progress)
        with (out / "scores.jsonl").open("a") as stream:
            stream.write('{"key": "cut sho')
        evaluate(chosen, out)
        assert tables(out) == tables(tmp_path / "calm")


@pytest.mark.slow
def test_ten_random_kills_give_the_same_bytes(settings, tmp_path):
    (tmp_path / "settings.json").write_text(settings().model_dump_json())
    command = [sys.executable, "-m", "tests.evaluation.killer", str(tmp_path / "settings.json"), str(tmp_path / "a"),
               str(tmp_path / "b")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "10 killed" in done.stdout
    assert tables(tmp_path / "a") == tables(tmp_path / "b")


def test_another_evaluation_in_the_folder_is_refused(settings, tmp_path):
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    with pytest.raises(UsageError, match="seed is 0 there and 7 now"):
        evaluate(settings(metrics=[BRIGHTNESS], seed=7), tmp_path)


def test_other_weights_in_the_same_place_are_refused(settings, run_folder_with_model, tmp_path):
    shutil.copytree(run_folder_with_model, tmp_path / "run")
    chosen = settings(model=str(tmp_path / "run"), metrics=[BRIGHTNESS])
    evaluate(chosen, tmp_path / "out")
    weights = tmp_path / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(UsageError, match="weights is"):
        evaluate(chosen, tmp_path / "out")


def test_one_reward_measured_twice(settings, tmp_path):
    found = evaluate(settings(metrics=[f"one={BRIGHTNESS}", f"two={BRIGHTNESS}"]), tmp_path)
    assert [row["metric"] for row in found.rows] == ["one", "two"]
    with pytest.raises(UsageError, match="write LABEL=NAME"):
        settings(metrics=[BRIGHTNESS, BRIGHTNESS])


def test_two_evaluations_never_share_a_folder(settings, tmp_path):
    def second(what, done, total):
        with pytest.raises(UsageError, match="another evaluation works in this folder"):
            evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)

    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path, second)


def test_a_reward_of_the_wrong_length_stops_the_run(settings, tmp_path):
    with pytest.raises(RunError, match="gave 1 scores for 4 images"):
        evaluate(settings(metrics=[f"{REWARDS}:Broken"]), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["picksore"]}, "did you mean 'pickscore'"),
        ({"metrics": ["diversity"], "images_per_prompt": 1}, "--images-per-prompt 2"),
        ({"metrics": ["fid"]}, "--real"),
        ({"metrics": ["frechet_clip"], "real": "/nowhere"}, "no such folder"),
        ({"metrics": ["class_entropy"]}, "--classes"),
        ({"timestep": 399, "steps": 4}, "not both"),
        ({"batch_size": 0}, "batch_size"),
        ({"options": {"clip": {"model": "x"}}}, "not among the metrics"),
        ({"prompts": "./nowhere.txt"}, "no such prompt file"),
        ({"model": "./nowhere"}, "no such model"),
    ],
)
def test_bad_settings_are_one_sentence(settings, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        evaluate(settings(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_inception_that_is_not_there(settings, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    for index in range(3):
        Image.new("RGB", (20, 30), (index * 50, 9, 9)).save(real / f"{index}.png")
    chosen = settings(metrics=["fid"], real=str(real), inception=str(tmp_path / "absent.pth"))
    with pytest.raises(UsageError, match="no Inception weights"):
        evaluate(chosen, tmp_path / "out")
