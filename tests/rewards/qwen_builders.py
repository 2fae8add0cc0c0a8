"""Small Qwen2-VL and HPSv3 folders with weights by the formula, in the layouts in which the real ones are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rlhf_t2i_plugins.rewards import hpsv3_prompt
from safetensors.torch import save_file

from tests.rewards import builders
from tests.rewards.fixtures import formula, tiny_qwen

WORDS = "Yes\nNo\nMaybe\nDoes this figure show Please answer yes or no. You are a helpful assistant. system user"
VISION_2_5 = {
    **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "in_chans": 3, "hidden_act": "silu"},
    **{"out_hidden_size": 64, "patch_size": tiny_qwen.PATCH, "spatial_patch_size": tiny_qwen.PATCH},
    **{"spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2},
    # Windows of two by two merged tokens in the first layer.
    **{"window_size": 4 * tiny_qwen.PATCH, "fullatt_block_indexes": [1]},
}


def write_vlm(folder: Path, kind: str = "qwen2_vl", **changes: Any) -> Path:
    """A folder like Qwen/Qwen2-VL-7B-Instruct, or Qwen2.5-VL's for ``qwen2_5_vl``."""
    import transformers

    config = tiny_qwen.write_base(folder, WORDS) | changes | {"model_type": kind}
    if kind == "qwen2_5_vl":
        config["vision_config"] = VISION_2_5
    cls = getattr(transformers, {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[kind] + "ForConditionalGeneration")
    model = cls(cls.config_class(**config))
    formula.fill(model)
    model.save_pretrained(folder)
    return folder


def write_hpsv3(folder: Path) -> Path:
    """A folder like MizzenAI/HPSv3 with the oracle's weights, and its base model's in ``base``.

    As published: the body in bf16, the head in float32.
    """
    tiny_qwen.write_base(folder / "base", hpsv3_prompt.QUESTION + hpsv3_prompt.ENDING + "\n\nEND\n")
    shapes = builders.fixture_json("hpsv3")["shapes"]
    dtypes = {name: torch.float32 if name.startswith("rm_head") else torch.bfloat16 for name in shapes}
    state = {name: formula.weight(name, shape).to(dtypes[name]) for name, shape in shapes.items()}
    save_file(state, folder / "HPSv3.safetensors")
    return folder


def hpsv3_options(folder: Path) -> dict[str, str]:
    """The options of the reward ``hpsv3`` for :func:`write_hpsv3`'s folder."""
    return {"model": str(folder), "base": str(folder / "base")}


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    """8-bit pictures [count, 3, height, width] in [0, 1]."""
    stacked = torch.stack([torch.from_numpy(formula.image(height, width, seed)) for seed in range(count)])
    return stacked.permute(0, 3, 1, 2).float() / 255
