"""Tiny random models of the flow-matching families, in the published folder layouts; images are 16 x 16 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests import tiny

WIDTH = 32


def make_z_image(folder: Path, seed: int = 0) -> Path:
    """A ZImagePipeline folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(seed)
    encoder, tokenizer = _qwen3()
    network = ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[1024, 16, 16],
    )  # fmt: skip
    _randomize(network.all_final_layer)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny.make_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=network,
    )
    return tiny.save(pipeline, folder)


def make_pixart(folder: Path, seed: int = 0, alpha: bool = True) -> Path:
    """A PixArtAlphaPipeline folder (with micro-conditions), or a PixArtSigmaPipeline folder."""
    from diffusers import (
        DPMSolverMultistepScheduler,
        PixArtAlphaPipeline,
        PixArtSigmaPipeline,
        PixArtTransformer2DModel,
    )

    torch.manual_seed(seed)
    network = PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, caption_channels=WIDTH, sample_size=128 if alpha else 8,
    )  # fmt: skip
    tokenizer = tiny.make_tokenizer()
    tokenizer.model_max_length = 512
    pipeline = (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02),
        vae=tiny.make_vae(scaling_factor=0.18215),
        text_encoder=tiny.make_t5(),
        tokenizer=tokenizer,
        transformer=network,
    )
    return tiny.save(pipeline, folder)


def make_flux(folder: Path, seed: int = 0, guidance: bool = True) -> Path:
    """A FluxPipeline folder: dev (with embedded guidance) or schnell."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    network = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=tiny.WIDTH, axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance,
    )  # fmt: skip
    _randomize(network.proj_out)
    tokenizer = tiny.make_tokenizer()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=guidance),
        vae=tiny.make_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=tiny.make_text_encoder(projection=False),
        tokenizer=tokenizer,
        text_encoder_2=tiny.make_t5(),
        tokenizer_2=tokenizer,
        transformer=network,
    )
    return tiny.save(pipeline, folder)


def make_flux2_klein(folder: Path, seed: int = 0) -> Path:
    """A Flux2KleinPipeline folder."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    torch.manual_seed(seed)
    encoder, tokenizer = _qwen3(layers=28)
    network = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    _randomize(network.proj_out)
    vae = AutoencoderKLFlux2(
        latent_channels=4, block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=network,
        is_distilled=False,
    )
    return tiny.save(pipeline, folder)


def make_sana(folder: Path, seed: int = 0, sprint: bool = False) -> Path:
    """A folder of a SanaPipeline in the layout of SANA-1.5, or of a SanaSprintPipeline of the same parts."""
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaSprintPipeline,
        SanaTransformer2DModel,
        SCMScheduler,
    )
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(seed)
    tokenizer = tiny.make_tokenizer()
    tokenizer.model_max_length = 4096  # letter by letter, the pipeline's instruction is long
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
    )  # fmt: skip
    blocks, channels, scales = ("ResBlock", "EfficientViTBlock"), (8, 8), ((), (5,))
    # In this order: the parts that both pipelines have are of one draw.
    encoder, vae = Gemma2Model(config), AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=channels, decoder_block_out_channels=channels, encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        downsample_block_type="conv", upsample_block_type="interpolate", scaling_factor=0.41407,
    )  # fmt: skip
    network = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
        sample_size=8, qk_norm="rms_norm_across_heads", guidance_embeds=sprint,
    )  # fmt: skip
    solver = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    pipeline = (SanaSprintPipeline if sprint else SanaPipeline)(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=vae,
        transformer=network,
        scheduler=SCMScheduler() if sprint else DPMSolverMultistepScheduler(**solver),
    )
    return tiny.save(pipeline, folder)


def make_qwen_image(folder: Path, seed: int = 0) -> Path:
    """A QwenImagePipeline folder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    tokenizer = tiny.make_tokenizer()
    text = {
        "vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    network = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    _randomize(network.proj_out)
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        vae=make_qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
        transformer=network,
    )
    return tiny.save(pipeline, folder)


def make_qwen_vae() -> Any:
    """The video autoencoder of Qwen-Image; one of its two levels is also halved in time."""
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.3, -0.2, 0.1, -0.4], latents_std=[1.5, 0.8, 2.0, 1.2],
    )  # fmt: skip


def _qwen3(layers: int = 2) -> tuple[Any, Any]:
    """A text encoder of Qwen3's architecture, and a tokenizer with a chat template."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny.make_tokenizer()
    tokenizer.model_max_length = 512
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    return Qwen3ForCausalLM(config), tokenizer


def _randomize(module: torch.nn.Module) -> None:
    """A fresh transformer's last layer is zero: every image would be its noise."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.1)
