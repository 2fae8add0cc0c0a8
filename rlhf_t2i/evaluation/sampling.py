"""Sampling an exported one-step generator with plain diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_t2i.errors import UsageError, first_line
from rlhf_t2i.families import sources
from rlhf_t2i.families.export import StudentFile
from rlhf_t2i.utils.device import default_device
from rlhf_t2i.utils.quiet import quietly


@quietly()
def sample(model: str, prompts: Sequence[str], seed: int = 0, timestep: int | None = None) -> Tensor:
    """Images [B, 3, H, W] in [0, 1]: one LCMScheduler step at the model's timestep, guidance 0.

    Args:
        model: A run's folder, a diffusers pipeline folder, or a hub id.
        prompts: B prompts.
        seed: Image i uses the noise of ``seed + i``, whatever the others are.
        timestep: Overrides the model's own (399 where it names none).

    Raises:
        UsageError: The model is missing or damaged.
    """
    from diffusers import DiffusionPipeline, LCMScheduler

    source = sources.parse(model)
    if source.is_local and (Path(source.location) / "model/model_index.json").is_file():
        source = sources.parse(str(Path(source.location) / "model"))
    sources.pipeline_index(source)
    student = StudentFile.read(Path(source.location)) if source.is_local else None
    try:
        # In one dtype: by itself transformers takes each encoder's own, and float16 encoders do not fit a float32 UNet.
        pipeline: Any = DiffusionPipeline.from_pretrained(source.location, dtype=torch.float32, **source.kwargs)
    except Exception as error:
        raise UsageError(f"{model} cannot be loaded: {first_line(error)}") from error
    pipeline.to(default_device())
    steps: dict[str, Any] = {"num_inference_steps": len(student.timesteps) if student else 1}
    if student is None or timestep is not None:
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        steps = {"num_inference_steps": 1, "timesteps": [399 if timestep is None else timestep]}
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for index, prompt in enumerate(prompts):
        images.append(
            pipeline(
                prompt,
                **steps,
                guidance_scale=0.0,
                height=student.height if student else None,
                width=student.width if student else None,
                generator=torch.Generator().manual_seed(seed + index),
                output_type="pt",
            ).images.float()
        )
    return torch.cat(images).cpu()
