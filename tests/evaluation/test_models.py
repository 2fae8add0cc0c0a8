"""Drawing in this process: the same images as a plain diffusers call, and refusals in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.evaluation.models import MAX_SEED, load, resolved
from rlhf_t2i.evaluation.settings import Drawing
from rlhf_t2i.families.export import write_model
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.recipe.schema import Models, StudentSettings
from tests import tiny
from tests.families.test_oracle import MODELS, SIDES
from tests.limits import HANG_S

PROMPTS = ["a red cat, smiling", "a gold whale"]


def exported(folder: Path, out: Path, height: int = tiny.RESOLUTION, **student: Any) -> Path:
    models = Models(reference=str(folder), generator=str(folder), height=height, width=tiny.RESOLUTION)
    store = ModelStore(models, StudentSettings(**student), torch.device("cpu"))
    write_model(store, store.generator_network().state_dict(), out / "model")
    return out


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("height", [16, 24])
def test_sample_draws_what_a_plain_pipeline_draws(
    steps: int, height: int, tiny_sdxl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = exported(tiny_sdxl, tmp_path, height, steps=steps)
    ours = load(str(out)).sample(PROMPTS, seed=5)
    said = capfd.readouterr()
    assert said.out + said.err == "", "the libraries' progress bars and advice are not for who draws an image"
    pipe: Any = DiffusionPipeline.from_pretrained(out / "model")
    pipe.set_progress_bar_config(disable=True)
    for index, prompt in enumerate(PROMPTS):
        theirs = pipe(
            prompt, num_inference_steps=steps, guidance_scale=0, height=height, width=16,
            generator=torch.Generator().manual_seed(5 + index),
        ).images[0]  # fmt: skip
        assert ours[index].size == theirs.size == (16, height)
        assert np.abs(np.asarray(ours[index]).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    assert ours[1].tobytes() == load(str(out / "model")).sample(PROMPTS[1:], seed=6)[0].tobytes()


@pytest.mark.parametrize("name", ["flux schnell", "qwen_image"])
def test_sample_draws_a_packed_schedulers_noise(name: str, tmp_path: Path) -> None:
    """These pipelines draw the noise between steps from torch's global generator, in their scheduler's layout."""
    out = exported(MODELS[name](tmp_path / "reference"), tmp_path, steps=4)
    pipe: Any = DiffusionPipeline.from_pretrained(out / "model")
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    theirs = pipe(PROMPTS[0], num_inference_steps=4, guidance_scale=0, height=16, width=16).images[0]
    (ours,) = load(str(out)).sample(PROMPTS[0], seed=5)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_an_evaluations_noise_is_keyed_by_sample(tiny_sdxl: Path, tmp_path: Path) -> None:
    model = load(str(exported(tiny_sdxl, tmp_path, steps=4)))
    keys = [(0, "evaluation", index) for index in range(3)]
    prompts = [*PROMPTS, "a bee"]
    together = model.images(prompts, keys)
    apart = torch.cat([model.images([prompt], [key]) for prompt, key in zip(prompts, keys, strict=True)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-5)
    other = model.images(prompts, [(1, "evaluation", index) for index in range(3)])
    assert (together - other).abs().max() > 0.05


def test_a_many_step_model_draws_as_its_pipeline(tiny_sdxl: Path) -> None:
    model = load(Drawing(model=str(tiny_sdxl), steps=3, guidance=2.0))
    assert model.description == "3 steps, guidance 2, 16 x 16 px"
    pipe: Any = DiffusionPipeline.from_pretrained(tiny_sdxl)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    theirs = pipe(PROMPTS[0], num_inference_steps=3, guidance_scale=2.0, generator=generator).images[0]
    (ours,) = model.sample(PROMPTS[:1], seed=3)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


OWN_CALLS: dict[str, dict[str, Any]] = {
    "pixart sigma": {"guidance_scale": 2.0, "clean_caption": False, "use_resolution_binning": False},
    "sd3": {"guidance_scale": 2.0},
    "flux dev": {"guidance_scale": 2.0},
    "flux2_klein": {"guidance_scale": 2.0},
    "z_image": {"guidance_scale": 2.0},
    "sana": {"guidance_scale": 2.0, "use_resolution_binning": False},
    "qwen_image": {"true_cfg_scale": 2.0, "negative_prompt": " "},
}


@pytest.mark.parametrize("name", OWN_CALLS)
def test_a_many_step_model_of_any_family_draws_as_its_pipeline(name: str, tmp_path: Path) -> None:
    folder, side = MODELS[name](tmp_path), SIDES.get(name, 16)
    model = load(Drawing(model=str(folder), steps=3, guidance=2.0, height=side, width=side))
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompt=PROMPTS[0], num_inference_steps=3, height=side, width=side,
        generator=torch.Generator().manual_seed(3), **OWN_CALLS[name],
    ).images[0]  # fmt: skip
    (ours,) = model.sample(PROMPTS[0], seed=3)
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    keys = [(0, index) for index in range(2)]
    alone = [model.images([prompt], [key]) for prompt, key in zip(PROMPTS, keys, strict=True)]
    torch.testing.assert_close(model.images(PROMPTS, keys), torch.cat(alone), rtol=0, atol=1e-4)


def test_how_a_model_is_drawn(tiny_sdxl: Path, tmp_path: Path) -> None:
    out = exported(tiny_sdxl, tmp_path, timesteps=[749, 249])
    own = resolved(Drawing(model=str(out)))
    assert own.student is not None
    assert (own.student.timesteps, own.height, own.width) == ([749.0, 249.0], 16, 16)
    assert resolved(Drawing(model=str(out), steps=4)).student is None
    chosen = resolved(Drawing(model=str(tiny_sdxl), student=StudentSettings(timesteps=[249])))
    assert load(chosen).description == "1 step at t = 249, 16 x 16 px"
    reference = resolved(Drawing(model=str(tiny_sdxl)))
    assert (reference.student, reference.steps) == (None, 50)
    network = resolved(
        Drawing(model=f"{tiny_sdxl}/unet", base=str(tiny_sdxl), student=StudentSettings(timesteps=[399]))
    )
    assert network.base == str(tiny_sdxl)
    with pytest.raises(UsageError, match="give a generator"):
        resolved(Drawing(model=f"{tiny_sdxl}/unet", base=str(tiny_sdxl)))
    with pytest.raises(UsageError, match="no such model"):
        resolved(Drawing(model="./nowhere"))


def test_an_unfinished_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: 1\n")
    with pytest.raises(UsageError, match="has not finished"):
        load(str(tmp_path))


def test_a_pipeline_of_several_dtypes_is_drawn(tiny_sdxl: Path, tmp_path: Path) -> None:
    """A float32 run's export beside its reference's float16 encoders and VAE, as emoji64's and SDXL's often are."""
    (whole,) = load(str(exported(tiny_sdxl, tmp_path / "a"))).sample(PROMPTS[:1])
    folder = exported(tiny_sdxl, tmp_path / "b") / "model"
    (folder / "manifest.json").unlink()  # the changes are ours
    for file in (*folder.glob("text_encoder*/*.safetensors"), *folder.glob("vae/*.safetensors")):
        save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})
    for file in folder.glob("text_encoder*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"dtype": "float16"}), "utf-8")
    (mixed,) = load(str(folder)).sample(PROMPTS[:1])
    assert np.abs(np.asarray(whole).astype(int) - np.asarray(mixed).astype(int)).max() < 13


@pytest.mark.parametrize("prompt", ["caf\udce9", "a\0b"])
def test_a_prompt_that_no_tokenizer_reads_is_one_sentence(prompt: str, tiny_sdxl: Path) -> None:
    """A terminal that is not in UTF-8 hands such text to ``sample``."""
    with pytest.raises(UsageError, match=r"^prompt 2: .* which no tokenizer reads"):
        load(Drawing(model=str(tiny_sdxl), student=StudentSettings())).sample(["a cat", prompt])


@pytest.mark.parametrize(("length", "works"), [(0, False), (-5, False), ("x", False), (10**30, True)])
def test_a_tokenizer_of_a_many_step_model_has_a_length(
    length: object, works: bool, tiny_sdxl: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_sdxl, tmp_path / "model")
    config = folder / "tokenizer/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"model_max_length": length}), "utf-8")
    model = load(Drawing(model=str(folder), steps=1))
    if works:
        assert len(model.sample("a cat " * 100)) == 1
        return
    with pytest.raises(UsageError, match=r"model/tokenizer: model_max_length is .*, not a positive number"):
        model.sample("a cat")


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 2**64])
def test_a_seed_out_of_range_is_one_sentence(seed: int, tiny_sdxl: Path) -> None:
    with pytest.raises(UsageError, match="no such seed"):
        load(Drawing(model=str(tiny_sdxl), student=StudentSettings())).sample(PROMPTS, seed)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", '{"timesteps": []}', '{"timesteps": ["x"]}', '{"timesteps": [399], "height": -1}',
        '{"timesteps": [200, 399], "transition": "stochastic", "input": "unit", "height": 16, "width": 16}',
    ],
)  # fmt: skip
def test_a_damaged_student_file_is_one_sentence(text: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_sdxl, tmp_path / "model")
    (tmp_path / "model" / "student.json").write_text(text)
    with pytest.raises(UsageError, match=r"student\.json is damaged"):
        load(str(tmp_path))


def test_an_image_that_is_not_finite_is_never_saved(tiny_sdxl: Path, tmp_path: Path) -> None:
    folder = exported(tiny_sdxl, tmp_path) / "model"
    (folder / "manifest.json").unlink()  # the change is ours
    (file,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(file)
    weights["conv_out.bias"] *= float("nan")
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(RunError, match="not finite"):
        load(str(folder)).sample(PROMPTS)


def test_sample_on_a_full_disk_leaves_nothing(tiny_sdxl: Path, tmp_path: Path) -> None:
    """Cases G.6, with a limit on the size of files in place of a full disk."""
    out = exported(tiny_sdxl, tmp_path)
    code = (
        "import resource, sys; from rlhf_t2i import cli; import diffusers, transformers;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200)); cli.main()"
    )
    (tmp_path / "here").mkdir()
    command = [sys.executable, "-c", code, "sample", str(out), "--prompt", "a", "-o", str(tmp_path / "here/a.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "could not be written: File too large; what was written before is intact"
    )
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.parametrize("prompts", [None, 3, [1, 2], ["a", None], {"a": 1}, b"cat"])
def test_prompts_that_are_no_strings_are_refused_before_anything_loads(prompts: Any, tiny_sdxl: Path) -> None:
    with pytest.raises(UsageError, match="prompts are a string, or a list of strings"):
        load(Drawing(model=str(tiny_sdxl), student=StudentSettings())).sample(prompts)


@pytest.mark.parametrize("key", ["reference", "generator", "vae"])
def test_a_run_s_folder_as_a_recipe_s_model_is_told_apart(key: str, tiny_sdxl: Path, tmp_path: Path) -> None:
    """Commands that draw take a run's folder; a recipe names the model in it."""
    finished, begun = exported(tiny_sdxl, tmp_path / "finished"), tmp_path / "begun"
    begun.mkdir()
    for folder in (finished, begun):
        (folder / "recipe.yaml").write_text("steps: 1\n")
    for folder, words in ((finished, f"it is a run's folder: give {finished}/model"), (begun, "has not finished")):
        models = Models.model_validate({"reference": str(tiny_sdxl), "generator": str(tiny_sdxl), key: str(folder)})
        with pytest.raises(UsageError, match=words):
            ModelStore(models, StudentSettings(), torch.device("cpu")).check()
