"""eval: the same images whatever the batch, nothing done twice, the same bytes after a kill."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation import feature_files, identity
from rlhf_t2i.evaluation.journal import DrawnImages
from rlhf_t2i.evaluation.models import StudentModel
from rlhf_t2i.evaluation.results import read
from rlhf_t2i.evaluation.run import evaluate
from rlhf_t2i.utils.images import png
from tests import tiny
from tests.evaluation.conftest import BRIGHTNESS, REWARDS
from tests.limits import HANG_S


def assert_same(out: Path, other: Path) -> None:
    """The same results up to the rounding of batches that a kill has cut otherwise."""
    ours, theirs = (read(folder) for folder in (out, other))
    assert ours is not None
    assert theirs is not None
    assert (ours.prompts, ours.images) == (theirs.prompts, theirs.images)
    for key, metric in theirs.metrics.items():
        assert ours.metrics[key].by_prompt == pytest.approx(metric.by_prompt, abs=1e-4)
    assert np.abs(pixels(out) - pixels(other)).max() <= 1
    assert all((out / name).is_file() for name in ("table.md", "table.csv"))


def pixels(out: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in sorted((out / "images").glob("*.png"))]).astype(int)


def test_writes_images_scores_and_a_table(settings, tmp_path):
    evaluate(settings(), tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())
    assert len(data["images"]) == 10
    assert pixels(tmp_path).shape == (10, tiny.RESOLUTION, tiny.RESOLUTION, 3)
    rows = {row["metric"]: row for row in data["table"]}
    assert list(rows) == ["Brightness", "pairwise_distance", "vendi"]
    bright = rows["Brightness"]
    assert bright["low"] < bright["mean"] < bright["high"]
    assert bright["unit"] == "mean pixel"
    assert bright["mean"] == pytest.approx(np.mean(data["metrics"]["Brightness"]["by_image"]))
    assert 1 <= rows["vendi"]["mean"] <= 2
    assert "10 images of 5 prompts" in (tmp_path / "table.md").read_text()


def test_scores_are_those_of_the_pictures_on_the_disk(settings, tmp_path):
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    data = json.loads((tmp_path / "results.json").read_text())
    lengths = [len(row["prompt"]) for row in data["images"]]
    expected = pixels(tmp_path).mean((1, 2, 3)) / 255 + 0.001 * np.array(lengths)
    assert data["metrics"]["Brightness"]["by_image"] == pytest.approx(expected.tolist(), abs=1e-6)


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


def test_many_step_reference_by_the_same_command(settings, tiny_sdxl, tmp_path):
    chosen = settings(model=str(tiny_sdxl), steps=2, guidance=3.0, limit=2)
    for name, batch in (("a", 4), ("b", 1)):
        evaluate(chosen.model_copy(update={"batch_size": batch}), tmp_path / name)
    assert "2 steps, guidance 3" in (tmp_path / "a" / "table.md").read_text()
    assert np.abs(pixels(tmp_path / "a") - pixels(tmp_path / "b")).max() <= 1


def test_finished_images_and_scores_are_not_repeated(settings, tmp_path, monkeypatch):
    from rlhf_t2i.plugins import registry

    counting = f"{REWARDS}:Counting"
    cls = registry.load_class(registry.REWARDS, counting)
    evaluate(settings(metrics=[counting]), tmp_path)
    assert cls.scored == 10
    monkeypatch.setattr(StudentModel, "images", lambda *_: pytest.fail("drew an image twice"))
    # A further metric is added to the same folder; nothing that is there is done again, whatever the batches.
    evaluate(settings(metrics=[counting, BRIGHTNESS], batch_size=3), tmp_path)
    assert cls.scored == 10


def test_only_missing_damaged_and_swapped_images_are_drawn(settings, tmp_path, monkeypatch):
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    whole = pixels(tmp_path)
    shutil.copy(tmp_path / "images/00000.png", tmp_path / "images/00002.png")  # whole, and of another prompt
    (tmp_path / "images/00005.png").unlink()
    data = bytearray((file := tmp_path / "images/00008.png").read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    drawn = []
    original = StudentModel.images
    monkeypatch.setattr(StudentModel, "images", lambda self, p, keys: drawn.append(keys) or original(self, p, keys))
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    assert drawn == [[(0, "evaluation", 2), (0, "evaluation", 5), (0, "evaluation", 8)]]
    assert np.abs(pixels(tmp_path) - whole).max() <= 1


def test_a_score_counts_for_the_image_that_it_was_given_to(settings, tmp_path):
    """An image may be drawn again with other versions, and is then another one."""
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    black = png(torch.zeros(3, tiny.RESOLUTION, tiny.RESOLUTION))
    (tmp_path / "images/00003.png").write_bytes(black)
    DrawnImages(tmp_path / "drawn.jsonl").add([3], [hashlib.sha256(black).hexdigest()])
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    values = read(tmp_path).metrics["Brightness"].by_image
    expected = pixels(tmp_path).mean((1, 2, 3)) / 255
    assert expected[3] == 0
    assert values[3] == pytest.approx(0.001 * len(read(tmp_path).prompts[3]), abs=1e-6)


def test_damaged_features_and_those_of_other_images_are_computed_again(settings, tmp_path):
    evaluate(settings(metrics=["diversity"]), tmp_path)
    results = (tmp_path / "results.json").read_bytes()
    (file, *_) = sorted((tmp_path / "features").rglob("*.npy"))
    whole, one, other = file.read_bytes(), "a" * 64, "b" * 64
    for position in (0, 20, len(whole) // 2, len(whole) - 33, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        evaluate(settings(metrics=["diversity"]), tmp_path)
        assert file.read_bytes() == whole
        assert (tmp_path / "results.json").read_bytes() == results
    values = np.arange(6.0).reshape(2, 3)
    feature_files.save(file, values, [one, other])
    assert np.array_equal(feature_files.load(file, [one, other]), values)
    assert np.array_equal(np.load(file), values)
    assert feature_files.load(file, [other, one]) is None
    assert feature_files.load(tmp_path / "absent.npy", [one]) is None
    file.write_bytes(b"")
    assert feature_files.load(file, [one, other]) is None


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
        assert_same(out, tmp_path / "calm")


def test_a_damaged_record_is_refused_by_name(settings, tmp_path):
    chosen = settings(metrics=[BRIGHTNESS], limit=2)
    evaluate(chosen, tmp_path)
    for name, text, words in (
        (
            "scores.jsonl",
            'rubbish\n{"key": "k", "images": [0], "sha256": ["a"], "values": [1.0]}\n',
            "line 1 is damaged: remove the file",
        ),
        ("scores.jsonl", '{"key": "k", "images": ["0"], "sha256": ["a"], "values": [1.0]}\n', "line 1 is damaged"),
        ("scores.jsonl", '{"key": "k", "images": [0], "sha256": ["a"], "values": [1.0, 2]}\n', "line 1 is damaged"),
        ("scores.jsonl", '{"key": "k", "images": [0], "values": [1.0]}\n', "line 1 is damaged"),
        ("drawn.jsonl", '{"images": [0, 1], "sha256": ["a"]}\n', "line 1 is damaged: remove the file to draw again"),
        ("images.json", '{"identity": [], "facts": {}}', "is damaged: give another --out"),
        ("images.json", "[" * 5000, "is damaged"),
        ("cost.json", '{"seconds": "many"}', "is damaged: remove it to count"),
        ("cost.json", "{", "is damaged"),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(text)
        with pytest.raises(UsageError, match=rf"{name} {words}"):
            evaluate(chosen, tmp_path)
        (tmp_path / name).write_bytes(whole)


@pytest.mark.slow
def test_ten_random_kills_give_the_same_bytes(settings, tmp_path):
    (tmp_path / "settings.json").write_text(settings().model_dump_json())
    command = [sys.executable, "-m", "tests.evaluation.killer", str(tmp_path / "settings.json"), str(tmp_path / "a"),
               str(tmp_path / "b")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
    assert "10 killed" in done.stdout
    assert_same(tmp_path / "b", tmp_path / "a")


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
    with pytest.raises(UsageError, match="model is"):
        evaluate(chosen, tmp_path / "out")


def test_one_reward_measured_twice(settings, tmp_path):
    found = evaluate(settings(metrics=[f"one={BRIGHTNESS}", f"two={BRIGHTNESS}"]), tmp_path)
    assert list(found.metrics) == ["one", "two"]
    with pytest.raises(UsageError, match="write LABEL=NAME"):
        settings(metrics=[BRIGHTNESS, BRIGHTNESS])


def test_two_evaluations_never_share_a_folder(settings, tmp_path):
    def second(what, done, total):
        with pytest.raises(UsageError, match="another evaluation works in this folder"):
            evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)

    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path, second)


@pytest.mark.parametrize(
    ("name", "message"),
    [("Broken", r"shape \[1\], not a tensor \[4\]"), ("Columns", r"shape \[4, 2\], not a tensor \[4\]"),
     ("Unbounded", "its value is not finite")],
)  # fmt: skip
def test_what_a_reward_returns_is_checked_as_in_training(settings, tmp_path, name, message):
    """Cases B.5: two values per image were averaged without a word."""
    with pytest.raises(RunError, match=message):
        evaluate(settings(metrics=[f"{REWARDS}:{name}"]), tmp_path)
    assert (tmp_path / "failures").is_dir()
    assert not (tmp_path / "results.json").exists()


def test_another_reward_of_the_same_name_is_measured_anew(settings, tmp_path):
    """Cases B.2: scores are kept by the reward's code, options and weights."""
    plugin, weights = tmp_path / "scorer.py", tmp_path / "level.txt"
    weights.write_text("1")
    chosen = settings(metrics=[f"s={plugin}:Level"], options={"s": {"file": str(weights)}})

    def score(code: str) -> float:
        plugin.write_text(LEVEL.replace("CODE", code), "utf-8")
        for name in [name for name in sys.modules if name.startswith("rlhf_t2i_file_")]:
            del sys.modules[name]  # another process would import it anew
        return evaluate(chosen, tmp_path / "out").metrics["s"].value

    assert score("level") == 1
    assert score("level + 1") == 2
    weights.write_text("5")
    assert score("level + 1") == 6
    assert score("level") == 5


LEVEL = """
from pathlib import Path
from rlhf_t2i import plugins
from tests.limits import HANG_S

class Named(plugins.Options):
    file: str

class Level(plugins.Reward):
    Options = Named

    def score(self, images, prompts):
        level = float(Path(self.options.file).read_text())
        return images.new_full([len(prompts)], CODE)
"""


def test_changed_package_versions_are_told(settings, tmp_path, monkeypatch):
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path)
    assert evaluate(settings(metrics=[BRIGHTNESS]), tmp_path).notes == []
    monkeypatch.setattr(identity, "versions", lambda: {"torch": "9.9"})
    notes = evaluate(settings(metrics=[BRIGHTNESS]), tmp_path).notes
    assert len(notes) == 2
    assert all(f"torch {torch.__version__} (now 9.9)" in note for note in notes)


def test_a_full_disk_is_one_sentence(settings, tmp_path):
    """Cases G.6, with a limit on the size of files in place of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (300, 700):  # too small for the folder's identity, and for an image
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(RunError, match="could not be written: File too large"):
                evaluate(settings(metrics=[BRIGHTNESS]), tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        left = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.stat().st_size]
        assert [path.name for path in left if path.suffix != ".json"] == []
        assert all(json.loads(path.read_text()) for path in left)
    evaluate(settings(metrics=[BRIGHTNESS]), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["picksore"]}, "did you mean 'pickscore'"),
        ({"metrics": ["diversity"], "images_per_prompt": 1}, "--images-per-prompt 2"),
        ({"metrics": ["fid"]}, "--real"),
        ({"metrics": ["frechet_clip"], "real": "/nowhere"}, "no such folder"),
        ({"metrics": ["class_entropy"]}, "--classes"),
        ({"student": {"timesteps": [399]}, "steps": 4}, "not both"),
        ({"metrics": ["cfg_implicit"]}, "scores latents"),
        ({"height": 17}, "not a multiple"),
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
