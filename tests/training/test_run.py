"""A whole run in one process: its files, resuming bit for bit, a full disk, and the model that it exports."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_t2i.cluster.local import LocalCluster
from rlhf_t2i.errors import RunError, Stopped, UsageError
from rlhf_t2i.families import export
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Checkpoints, Recipe
from rlhf_t2i.roles.learner import LearnerRole
from rlhf_t2i.training import checkpoints, run
from rlhf_t2i.training.callbacks import TrainCallback
from rlhf_t2i.training.loop import Trainer
from rlhf_t2i.training.state import TrainState

MakeRecipe = Callable[..., Recipe]


def metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the machine."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k not in ("timing", "memory")} for row in rows]


def model_bytes(out: Path) -> bytes:
    return (out / "model/unet/diffusion_pytorch_model.safetensors").read_bytes()


def test_leaves_the_documented_files(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run.run(make_recipe(), out)
    assert (result.out, result.model, result.state.step) == (out, out / "model", 3)
    for name in ("recipe.yaml", "run.json", "samples/step_000000.png", "samples/step_000003.png"):
        assert (out / name).stat().st_size > 0, name
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"reward/pickscore", "grad_norm/reward", "grad_norm/divergence", "grad_cosine", "assistant_loss"} <= set(
        rows[0]
    )
    assert not any("loss/divergence" in row for row in rows)  # its expectation is zero: no progress signal
    after = json.loads((out / "evaluation/after/results.json").read_text("utf-8"))
    assert len(after["metrics"]["pickscore"]["by_image"]) == len(after["images"]) == 8
    assert len(after["metrics"]["latent_distance"]["by_prompt"]) == 4
    assert all((out / "evaluation/after" / image["file"]).is_file() for image in after["images"])
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step_000002", "step_000003"]


class StopAt(TrainCallback):
    """Sends SIGTERM to this process once ``rounds`` assistant rounds and ``step`` steps are done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, rounds: int) -> None:
        original = Trainer._stop_if_requested

        def stop(trainer: Trainer) -> None:
            if (trainer.state.step, trainer.state.round) == (step, rounds):
                signal.raise_signal(signal.SIGTERM)
            original(trainer)

        monkeypatch.setattr(Trainer, "_stop_if_requested", stop)


@pytest.mark.parametrize("stop", [(1, 0), (1, 1), (2, 1), (0, 1)])
def test_resume_is_bit_identical(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: tuple[int, int]
) -> None:
    recipe = make_recipe(
        algorithm__assistant_steps=2,
        optimization__micro_batch=2,
        optimization__ema="{half_life_kimg: 0.01}",
        steps=3,
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run.run(recipe, whole)
    with monkeypatch.context() as patch:
        callback = StopAt(patch, *stop)
        with pytest.raises(Stopped) as stopped:
            run.run(recipe, broken, callback=callback)
    assert stopped.value.exit_code == 143
    run.run(recipe, broken, resume=True)
    assert model_bytes(broken) == model_bytes(whole)
    assert metrics(broken) == metrics(whole)
    for name in (
        "samples/step_000003.png",
        "evaluation/after/results.json",
        "checkpoints/step_000003/assistant/local.pt",
    ):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


def test_damaged_checkpoint_is_named_and_an_older_one_used(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.run(make_recipe(), out)
    newest = out / "checkpoints/step_000003/learner/local.pt"
    newest.write_bytes(newest.read_bytes()[:-10])
    folder, progress, warnings = checkpoints.find(out)
    assert folder.name == "step_000002"
    assert progress.step == 2
    assert "step_000003" in warnings[0]
    assert "learner/local.pt" in warnings[0]
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="no whole checkpoint"):
        checkpoints.find(out)


def test_a_run_that_died_before_its_first_checkpoint_starts_again(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run.run(make_recipe(), whole)
    run.run(make_recipe(steps=1), broken)
    for folder in ("checkpoints", "model"):
        shutil.rmtree(broken / folder)
    run.run(make_recipe(), broken, resume=True)
    assert model_bytes(broken) == model_bytes(whole)
    assert metrics(broken) == metrics(whole)


def test_what_a_crash_left_of_the_last_lines_is_cut_off(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A kill leaves half a line; a power cut may leave zeros, or bytes that are no text."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    watched = {"logging__watch_every": 1, "logging__watch_images": 4}
    run.run(make_recipe(**watched), whole)
    run.run(make_recipe(**watched, steps=2), broken)
    (broken / "events.jsonl").write_text('{"step": 2, "after": [2, 0], "text": "kept"}\n', "utf-8")
    files = ("metrics.jsonl", "events.jsonl", "evaluation/watch.jsonl")
    for name, rest in zip(files, (b'{"step": 3, "rew', bytes(40), b'{"step": 3\xff\xfe'), strict=True):
        with (broken / name).open("ab") as file:
            file.write(rest)
    run.run(make_recipe(**watched), broken, resume=True)
    assert metrics(broken) == metrics(whole)
    assert (broken / files[2]).read_bytes() == (whole / files[2]).read_bytes()
    assert [json.loads(line)["text"] for line in (broken / files[1]).read_text("utf-8").splitlines()] == ["kept"]


@pytest.mark.parametrize(
    ("holds", "sentence"),
    [
        (None, "holds no run"),
        ({}, "holds no run"),
        ({"thesis.txt": "mine"}, "holds no run"),
        ({"recipe.yaml": "seed: 3\nsteps: 3\nmod"}, r"out/recipe\.yaml"),
        ({"recipe.yaml": ""}, r"out/recipe\.yaml"),
    ],
)
def test_there_must_be_a_run_to_resume(
    make_recipe: MakeRecipe, tmp_path: Path, holds: dict[str, str] | None, sentence: str
) -> None:
    out = tmp_path / "out"
    if holds is not None:
        out.mkdir()
        for name, text in holds.items():
            (out / name).write_text(text, "utf-8")
    with pytest.raises(UsageError, match=sentence):
        run.run(make_recipe(), out, resume=True)
    assert out.exists() == (holds is not None)
    assert {path.name: path.read_text("utf-8") for path in out.glob("*")} == (holds or {})


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """As on a full disk, writing fails part of the way, in torch's and safetensors' own writers as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [10_000, 100_000])
def test_a_full_disk_keeps_the_last_checkpoint(make_recipe: MakeRecipe, tmp_path: Path, size: int) -> None:
    cluster = LocalCluster(make_recipe())
    checkpoints.begin(cluster, tmp_path, TrainState(1, 0, 1), Checkpoints()).wait()
    with no_file_over(size), pytest.raises(RunError, match=r"step_000002 could not be written: .*; what was .* intact"):
        checkpoints.begin(cluster, tmp_path, TrainState(2, 0, 2), Checkpoints()).wait()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]
    assert checkpoints.find(tmp_path)[1].step == 1


def test_a_full_disk_keeps_the_exported_model(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", make_recipe(steps=1)
    run.run(recipe, out)
    before = model_bytes(out)
    weights = LocalCluster(recipe).call_all("learner", LearnerRole.weights, "raw")[0]
    with no_file_over(100_000), pytest.raises(RunError, match=r"out/model could not be written: .* intact"):
        export.write_model(ModelStore(recipe.models, recipe.student, torch.device("cpu")), weights, out / "model")
    assert model_bytes(out) == before
    assert not list(out.glob(".writing-*"))


def test_a_disk_that_is_full_for_metrics_is_a_sentence_too(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", str(self))

    out, opened = tmp_path / "out", Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: (full if path.name == "metrics.jsonl" else opened)(path, *a, **k)
    )
    with pytest.raises(RunError, match=r"metrics\.jsonl could not be written: No space left on device"):
        run.run(make_recipe(), out)


def test_refuses_a_folder_with_another_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run.run(make_recipe(steps=1), out)
    before = sorted(p.name for p in out.iterdir())
    with pytest.raises(UsageError, match="already holds a run"):
        run.run(make_recipe(steps=1), out)
    with pytest.raises(UsageError, match="seed"):
        run.run(make_recipe(steps=1, seed=4), out, resume=True)
    assert sorted(p.name for p in out.iterdir()) == before


@pytest.mark.parametrize("stored", ["float32", "float16"])
def test_model_loads_in_diffusers_and_equals_sample(
    make_recipe: MakeRecipe, tmp_path: Path, tiny_sdxl: Path, stored: str
) -> None:
    """Also where the reference's encoders are float16, as published: by themselves they would stay so."""
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from rlhf_t2i.evaluation import models
    from rlhf_t2i.utils import images

    reference = tmp_path / "reference"
    shutil.copytree(tiny_sdxl, reference)
    if stored == "float16":
        for name, cls in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
            cls.from_pretrained(reference / name).half().save_pretrained(reference / name)
            assert json.loads((reference / name / "config.json").read_text())["dtype"] == "float16"
    out = tmp_path / "out"
    run.run(make_recipe(steps=1, models__reference=str(reference)), out)
    pipeline = StableDiffusionXLPipeline.from_pretrained(out / "model")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red cat", num_inference_steps=1, guidance_scale=0.0, height=16, width=16,
        generator=torch.Generator().manual_seed(5), output_type="pt",
    ).images.float()  # fmt: skip
    model = models.load(str(out))
    ours = model.image("a red cat", torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert model.sample(["a red cat"], seed=5)[0].tobytes() == images.to_pil(ours[0]).tobytes()
