"""The published architectures, as the configurations in their hub repositories: for planning and full-size benchmarks.

Nothing here is loaded or downloaded; counts on the meta device equal the published checkpoints' (tests/families).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

_BLOCKS_XL: Config = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
}
_BLOCKS_15: Config = {
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
}

SDXL_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    **_BLOCKS_XL,
}
"""2,567,463,684 parameters."""

SD15_UNET: Config = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    **_BLOCKS_15,
}
"""859,520,964 parameters."""

VAE: Config = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
"""83,653,863 parameters (SDXL and SD1.5, which differ in weights and scaling factor)."""

SD15_VAE: Config = {**VAE, "sample_size": 512, "scaling_factor": 0.18215}

CLIP_L_TEXT: Config = {
    "architectures": ["CLIPTextModel"],
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
"""123,060,480 parameters: SDXL's first text encoder and SD1.5's."""

CLIP_BIGG_TEXT: Config = {
    "architectures": ["CLIPTextModelWithProjection"],
    "vocab_size": 49408,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
"""694,659,840 parameters: SDXL's second text encoder."""

CLIP_H: Config = {
    "architectures": ["CLIPModel"],
    "projection_dim": 1024,
    "text_config": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    },
}
"""986,109,441 parameters: PickScore_v1 and HPSv2."""

_SCHEDULER: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class Family:
    """The parts of a published pipeline by the folder names that diffusers gives them."""

    parts: Mapping[str, Config]
    resolution: int


SDXL = Family(
    {
        "unet": SDXL_UNET,
        "vae": VAE,
        "text_encoder": CLIP_L_TEXT,
        "text_encoder_2": CLIP_BIGG_TEXT,
        "scheduler": _SCHEDULER,
    },
    1024,
)
SD15 = Family(
    {"unet": SD15_UNET, "vae": SD15_VAE, "text_encoder": CLIP_L_TEXT, "scheduler": _SCHEDULER},
    512,
)

PUBLISHED: Mapping[str, Family] = {
    "stabilityai/stable-diffusion-xl-base-1.0": SDXL,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": SD15,
    "runwayml/stable-diffusion-v1-5": SD15,
}
"""Hub repositories whose architecture is known here, so that a plan needs no network."""


PUBLISHED_VAES: Mapping[str, Config] = {"madebyollin/sdxl-vae-fp16-fix": VAE}
"""Hub repositories that hold a VAE alone."""


def count_parameters(config: Config) -> int:
    """Parameters of the network a configuration describes, counted on the meta device (no memory).

    Args:
        config: A diffusers configuration with ``_class_name``, or a transformers one with ``architectures``.

    Raises:
        ValueError: The class is not one of this project's.
    """
    return sum(p.numel() for p in build_on_meta(config).parameters())


def build_on_meta(config: Config) -> Any:
    """The network of a configuration without memory behind it."""
    import torch

    name = config.get("_class_name") or (config.get("architectures") or ["?"])[0]
    with torch.device("meta"):
        if name in ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny"):
            import diffusers

            return getattr(diffusers, name).from_config(config)
        if name in ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"):
            import transformers

            kind = transformers.CLIPConfig if name == "CLIPModel" else transformers.CLIPTextConfig
            return getattr(transformers, name)(kind(**config))
    raise ValueError(f"{name} is not an architecture this project builds")


def unet_inputs(config: Config, size: int, batch: int = 1, context: int = 77, dtype: Any = None) -> dict[str, Any]:
    """Arguments of a UNet's forward without memory behind them.

    Args:
        config: The UNet's configuration.
        size: Latent height and width.
        batch: Samples.
        context: Text tokens.
        dtype: Of what is not a timestep; torch's default when absent.

    Returns:
        By name; ``sample`` is [batch, C, size, size].
    """
    import torch

    with torch.device("meta"):
        added = None
        if config.get("addition_embed_type") == "text_time":
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            added = {
                "text_embeds": torch.empty(batch, pooled, dtype=dtype),
                "time_ids": torch.empty(batch, 6, dtype=dtype),
            }
        return {
            "sample": torch.empty(batch, config["in_channels"], size, size, dtype=dtype),
            "timestep": torch.empty(batch, dtype=torch.long),
            "encoder_hidden_states": torch.empty(batch, context, config["cross_attention_dim"], dtype=dtype),
            "added_cond_kwargs": added,
            "return_dict": False,
        }
