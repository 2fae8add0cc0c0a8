"""Tiny random models in the published folder layouts: a training step on them takes milliseconds.

Architectures, schedulers and file names are those of SDXL, SD1.5 and PickScore; only the sizes differ. Latents are
4x8x8 for images of 16x16.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

RESOLUTION = 16
LATENTS = (4, 8, 8)
WIDTH = 16
CONTEXT = 77

_ANIMALS = ("cat", "dog", "fox", "owl", "bee", "frog", "whale", "horse")
_COLORS = ("red", "blue", "green", "gold")


def make_sdxl(folder: Path, seed: int = 0, variant: str | None = None, max_shard_size: str = "10GB") -> Path:
    """A StableDiffusionXLPipeline folder.

    Args:
        folder: Where to write; made when absent.
        seed: Of the random weights.
        variant: ``fp16`` writes ``*.fp16.safetensors`` in half precision only.
        max_shard_size: Small values (``100KB``) shard the UNet's safetensors.
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    torch.manual_seed(seed)
    pipeline = StableDiffusionXLPipeline(
        vae=make_vae(scaling_factor=0.13025),
        text_encoder=make_text_encoder(projection=False),
        text_encoder_2=make_text_encoder(projection=True),
        tokenizer=make_tokenizer(),
        tokenizer_2=make_tokenizer(pad_token="!"),
        unet=sdxl_unet(),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading", steps_offset=1),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    return save(pipeline, folder, variant, max_shard_size)


def make_sd15(folder: Path, seed: int = 0, variant: str | None = None, max_shard_size: str = "10GB") -> Path:
    """A StableDiffusionPipeline folder in SD1.5's layout, without the safety checker."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    torch.manual_seed(seed)
    pipeline = StableDiffusionPipeline(
        vae=make_vae(scaling_factor=0.18215),
        text_encoder=make_text_encoder(projection=False),
        tokenizer=make_tokenizer(),
        unet=sd15_unet(),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return save(pipeline, folder, variant, max_shard_size)


def make_sd3(folder: Path, seed: int = 0, t5: bool = True) -> Path:
    """A StableDiffusion3Pipeline folder in SD3's layout, with or without its third text encoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=8, qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=make_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=make_text_encoder(projection=True),
        tokenizer=tokenizer,
        text_encoder_2=make_text_encoder(projection=True),
        tokenizer_2=make_tokenizer(pad_token="!"),
        text_encoder_3=make_t5() if t5 else None,
        tokenizer_3=tokenizer if t5 else None,
    )  # fmt: skip
    # A fresh transformer's last layer is zero: every image would be its noise.
    with torch.no_grad():
        for parameter in pipeline.transformer.proj_out.parameters():
            parameter.normal_(0, 0.1)
    return save(pipeline, folder, None, "10GB")


def make_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIPModel with its processor in PickScore's layout."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(seed)
    tower = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = make_tokenizer()
    config = CLIPConfig(
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, **_special(tokenizer)},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
        projection_dim=WIDTH,
    )
    model = CLIPModel(config).eval()
    # Random towers see every image alike; larger weights make the score depend on the picture.
    with torch.no_grad():
        model.visual_projection.weight.mul_(4)
        model.vision_model.embeddings.patch_embedding.weight.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def make_prompts(folder: Path, name: str = "prompts.txt", start: int = 0, count: int = 24) -> Path:
    """A text file of up to 32 distinct prompts, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    every = [f"a {color} {animal}, smiling" for color in _COLORS for animal in _ANIMALS]
    (folder / name).write_text("\n".join(every[start : start + count]) + "\n", "utf-8")
    return folder / name


def make_generator_bin(pipeline: Path, file: Path, seed: int = 1) -> Path:
    """A bare UNet state dict as DMD2 publishes it (``dmd2_sdxl_1step_unet_fp16.bin``): half precision, no config."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(pipeline, subfolder="unet"))
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.half() for name, value in unet.state_dict().items()}, file)
    return file


def recipe_dict(pipeline: Path, prompts: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that trains ``pipeline`` in one process for two steps; ``changes`` replace top-level sections."""
    recipe: dict[str, Any] = {
        "steps": 2,
        "models": {"reference": str(pipeline), "generator": str(pipeline), "height": RESOLUTION, "width": RESOLUTION},
        "data": {"prompts": str(prompts)},
        "optimization": {"batch_size": 2},
        "placement": {"mode": "local"},
    }
    return {**recipe, **changes}


def make_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """A real byte-level CLIPTokenizer with a few merges; SDXL's second one pads with ``!`` (id 0)."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>"), ("r", "e"), ("re", "d</w>")]
    pieces = [*symbols, *(f"{s}</w>" for s in symbols), *("".join(pair) for pair in merges)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=CONTEXT)


def sdxl_unet() -> Any:
    """SDXL's architecture, two levels of 8 and 16 channels (about 70,000 parameters)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **_UNET,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=[1, 2],
        use_linear_projection=True,
        transformer_layers_per_block=[1, 1],
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )


def sd15_unet() -> Any:
    """SD1.5's architecture, two levels of 8 and 16 channels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**_UNET, cross_attention_dim=WIDTH, attention_head_dim=2)


SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
_UNET: dict[str, Any] = {
    "sample_size": LATENTS[1],
    "in_channels": LATENTS[0],
    "out_channels": LATENTS[0],
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


def make_vae(scaling_factor: float, shift_factor: float | None = None) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENTS[0],
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=RESOLUTION,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def make_t5() -> Any:
    """A T5 encoder of width 32."""
    from transformers import T5Config, T5EncoderModel

    vocabulary = len(make_tokenizer())
    return T5EncoderModel(T5Config(vocab_size=vocabulary, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=8))


def make_text_encoder(projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = make_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        projection_dim=WIDTH,
        hidden_act="gelu" if projection else "quick_gelu",
        **_special(tokenizer),
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _special(tokenizer: Any) -> dict[str, int]:
    return {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}


def save(pipeline: Any, folder: Path, variant: str | None = None, max_shard_size: str = "10GB") -> Path:
    """Save a pipeline, in half precision alone for the variant ``fp16``."""
    if variant == "fp16":
        pipeline = pipeline.to(torch.float16)
    pipeline.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
    # Published folders keep null for what a pipeline goes without; so does save_pretrained. Fail here, not later.
    json.loads((folder / "model_index.json").read_text("utf-8"))
    return folder
