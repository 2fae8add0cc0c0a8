"""SDXL and PickScore with random weights in their published folder layouts, at full size or small enough for a CPU."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_t2i.families import sources

Config = dict[str, Any]

_TOKENIZER = Path(__file__).parents[1] / "zoo/emoji64/reference/tokenizer"
_CONTEXT = 77


@dataclass(frozen=True)
class Sizes:
    """The configurations of a pipeline's parts and of the reward, and the resolution in pixels."""

    parts: Mapping[str, Config]
    clip: Config
    resolution: int


_SDXL, _PICKSCORE = (
    sources.parse(name) for name in ("stabilityai/stable-diffusion-xl-base-1.0", "yuvalkirstain/PickScore_v1")
)
_PARTS = {
    part: sources.read_json(_SDXL, f"{part}/config.json") for part in ("unet", "vae", "text_encoder", "text_encoder_2")
}
_SCHEDULER = sources.read_json(_SDXL, "scheduler/scheduler_config.json")
CLIP_H = sources.read_json(_PICKSCORE, "config.json")
FULL = Sizes({**_PARTS, "scheduler": _SCHEDULER}, CLIP_H, 1024)
"""The published architectures."""


def small(channels: int = 32, vae_channels: int = 16, resolution: int = 64) -> Sizes:
    """SDXL's layout with a UNet of ``channels`` at its first level, for a CPU."""
    unet = {
        **_PARTS["unet"],
        "sample_size": resolution // 8,
        "block_out_channels": [channels, 2 * channels, 4 * channels],
        "attention_head_dim": [2, 4, 8],
        "transformer_layers_per_block": [1, 1, 2],
        "norm_num_groups": 16,
        "cross_attention_dim": 128,
        "projection_class_embeddings_input_dim": 64 + 6 * 256,
    }
    widths = [vae_channels, *[2 * vae_channels] * 3]
    vae = {**_PARTS["vae"], "block_out_channels": widths, "sample_size": resolution, "norm_num_groups": 8}
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**tower, "vocab_size": 2048, "projection_dim": 64}
    parts = {
        "unet": unet,
        "vae": vae,
        "text_encoder": {**_PARTS["text_encoder"], **text},
        "text_encoder_2": {**_PARTS["text_encoder_2"], **text},
        "scheduler": _SCHEDULER,
    }
    clip = {
        **CLIP_H,
        "projection_dim": 64,
        "text_config": {**CLIP_H["text_config"], **tower, "vocab_size": 2048},
        "vision_config": {**CLIP_H["vision_config"], **tower, "image_size": 56},
    }
    return Sizes(parts, clip, resolution)


def build(folder: Path, sizes: Sizes, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Write a pipeline, a one-step generator as DMD2's bare state dict, a reward and prompts.

    Args:
        folder: Where; made when absent.
        sizes: Of the networks.
        device: Where random weights are drawn: a GPU does 2.6 billion in a moment.
        dtype: Of the files.

    Returns:
        Overrides of a recipe by dotted key.
    """
    pipeline, clip = folder / "reference", folder / "pickscore"
    unet = sizes.parts["unet"]
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        seed = len(name)
        _random(sizes.parts[name], device, dtype, seed).save_pretrained(pipeline / name)
    _tokenizers(pipeline)
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler/scheduler_config.json").write_text(json.dumps(sizes.parts["scheduler"]), "utf-8")
    (pipeline / "model_index.json").write_text(json.dumps(_INDEX), "utf-8")
    generator = folder / "dmd2_sdxl_1step_unet_fp16.bin"
    state = _random(unet, device, torch.float16, seed=1).state_dict()
    torch.save({name: value.cpu() for name, value in state.items()}, generator)
    _reward(clip, sizes.clip, device, dtype)
    prompts = folder / "prompts.txt"
    nouns, places = (
        ("fox", "whale", "clock", "tree", "robot", "river"),
        ("at night", "in snow", "by the sea", "indoors"),
    )
    lines = [f"a {n} {p}, picture {i}" for i in range(64) for n in nouns for p in places]
    prompts.write_text("\n".join(lines) + "\n", "utf-8")
    return {
        "models.reference": str(pipeline),
        "models.generator": str(generator),
        "models.height": sizes.resolution,
        "models.width": sizes.resolution,
        "data.prompts": str(prompts),
        "data.held_out": None,
        "algorithm.rewards": [
            {"name": "pickscore", "scale": 100.0, "options": {"model": str(clip), "unit": "cosine"}, "micro_batch": 1}
        ],
    }


def _random(config: Config, device: str, dtype: torch.dtype, seed: int) -> Any:
    """A network with its own random initialization, from a configuration alone."""
    import diffusers
    import transformers

    torch.manual_seed(seed)
    with torch.device(device):
        name = config.get("_class_name") or config["architectures"][0]
        if hasattr(diffusers, name):
            network = getattr(diffusers, name).from_config(config)
        else:
            kind = transformers.CLIPConfig if name == "CLIPModel" else transformers.CLIPTextConfig
            network = getattr(transformers, name)(kind(**_with_special_tokens(config)))
    return network.to(dtype)


def _with_special_tokens(config: Config) -> Config:
    """CLIP finds a prompt's end by the id of its tokenizer's last token."""
    tokens = json.loads((_TOKENIZER / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    ids = {item["content"]: item["id"] for item in tokens}
    special = {"bos_token_id": ids["<|startoftext|>"], "eos_token_id": ids["<|endoftext|>"], "pad_token_id": 1}
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **special}}
    return {**config, **special}


def _tokenizers(pipeline: Path) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        _tokenizer(pipeline / name)


def _tokenizer(folder: Path) -> None:
    """The zoo's tokenizer with the context length of the published ones."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_TOKENIZER / "tokenizer.json", folder)
    config = json.loads((_TOKENIZER / "tokenizer_config.json").read_text("utf-8"))
    text = json.dumps({**config, "model_max_length": _CONTEXT})
    (folder / "tokenizer_config.json").write_text(text, "utf-8")


def _reward(folder: Path, config: Config, device: str, dtype: torch.dtype) -> None:
    from transformers import CLIPImageProcessor

    _random(config, device, dtype, seed=2).save_pretrained(folder)
    _tokenizer(folder)
    size = config["vision_config"]["image_size"]
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)


_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
