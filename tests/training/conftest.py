"""A tiny recipe and, for the Ray tests, one Ray instance for the whole session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_t2i import recipe_io
from rlhf_t2i.recipe import Recipe


@pytest.fixture(scope="session")
def ray_instance() -> Iterator[None]:
    """A small Ray instance, shared: starting one takes seconds."""
    ray = pytest.importorskip("ray")
    from rlhf_t2i.cluster.ray_cluster import start_local_ray

    start_local_ray(8)
    yield
    ray.shutdown()


@pytest.fixture
def make_recipe(tmp_path: Path, tiny_sdxl: Path, tiny_clip: Path, tiny_prompts: Path) -> Callable[..., Recipe]:
    """Build a tiny recipe; keyword arguments are ``--set`` overrides with ``__`` for dots."""

    def build(**overrides: Any) -> Recipe:
        text = f"""
seed: 3
steps: 3
models: {{reference: {tiny_sdxl}, generator: {tiny_sdxl}/unet, resolution: 16}}
data: {{prompts: {tiny_prompts}}}
algorithm:
  cfg: {{scale: 3.0}}
  rewards: [{{name: pickscore, scale: 100, options: {{model: {tiny_clip}}}}}]
optimisation:
  batch_size: 4
  generator: {{lr: 1.0e-3, eps: 1.0e-4}}
  assistant: {{lr: 1.0e-3, eps: 1.0e-4}}
placement: local
logging: {{samples_every: 2, sample_count: 4}}
checkpoints: {{every: 2}}
evaluation: {{images: 8, images_per_prompt: 2, batch_size: 4}}
"""
        path = tmp_path / "recipe.yaml"
        path.write_text(text, "utf-8")
        return recipe_io.load(path, [f"{k.replace('__', '.')}={v}" for k, v in overrides.items()])

    return build
