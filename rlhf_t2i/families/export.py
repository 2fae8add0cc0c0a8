"""Write the aligned generator as a diffusers pipeline folder that plain diffusers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_t2i.families import snapshot, sources
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.utils import files, manifest

ONE_STEP = "one_step.json"


def write_pipeline(recipe: Recipe, weights: dict[str, Tensor], target: Path) -> None:
    """Export ``StableDiffusionXLPipeline`` (or SD1.5's) with LCMScheduler; whole or absent.

    Tokenizers and the weights of text encoders and VAE are the reference's own files. The UNet is float32 after a
    float32 run and float16 after a bf16 one, which is what published one-step models use.

    Args:
        recipe: The run's recipe.
        weights: The UNet's state dict in float32.
        target: The folder.
    """
    from diffusers import LCMScheduler, UNet2DConditionModel

    source = sources.parse(recipe.models.reference)
    reference = snapshot.pipeline_folder(source)
    with files.atomic_dir(target) as folder:
        index = sources.pipeline_index(sources.ModelRef(str(reference)))
        for name in snapshot.copied_parts(index):
            snapshot.copy_part(reference / name, folder / name)
            _load_in_float32(folder / name / "config.json")
        if recipe.models.vae:
            _replace_vae(recipe.models.vae, folder, index)
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(reference / "unet"))
        dtype = torch.float32 if recipe.optimization.precision == "fp32" else torch.float16
        unet.load_state_dict({k: v.to(dtype) for k, v in weights.items()}, strict=True, assign=True)
        unet.save_pretrained(folder / "unet")
        scheduler = json.loads((reference / "scheduler/scheduler_config.json").read_text("utf-8"))
        kept = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "prediction_type", "trained_betas")
        LCMScheduler(**{k: scheduler[k] for k in kept if scheduler.get(k) is not None}).save_pretrained(
            folder / "scheduler"
        )
        index["scheduler"] = ["diffusers", "LCMScheduler"]
        files.write_json(folder / "model_index.json", index)
        files.write_json(
            folder / ONE_STEP,
            {"timestep": recipe.models.generator_timestep, "resolution": recipe.models.resolution},
        )
        manifest.write(folder)


def _replace_vae(text: str, folder: Path, index: dict[str, Any]) -> None:
    """The VAE the run decoded with takes the reference's place."""
    source = sources.parse(text)
    path = snapshot.network_folder(source)
    shutil.rmtree(folder / "vae", ignore_errors=True)
    snapshot.copy_part(path, folder / "vae")
    index["vae"] = ["diffusers", json.loads((path / "config.json").read_text("utf-8"))["_class_name"]]


def _load_in_float32(config: Path) -> None:
    """Let transformers load an encoder as diffusers loads the UNet: by itself it takes the dtype of the stored weights.

    Who asks a pipeline for another dtype still gets it, everywhere.
    """
    if not config.is_file():
        return
    data = json.loads(config.read_text("utf-8"))
    if "architectures" in data:  # of transformers
        data.pop("torch_dtype", None)  # the key's name before transformers 5
        files.write_json(config, data | {"dtype": "float32"})
