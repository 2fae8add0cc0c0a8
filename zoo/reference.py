"""Train the reference diffusion of emoji64 with its text encoders. ``python -m zoo.reference`` (after zoo.vae)."""

from __future__ import annotations

import argparse
import math

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from rich.progress import track
from torch import Tensor, nn

from rlhf_t2i.algorithm.schedules import NoiseSchedule
from zoo import data, text
from zoo.training import join, load_average, train

STEPS, BATCH, VARIANTS = 20000, 24, 20
WIDTHS = (96, 160)  # of the two text encoders
TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise schedule."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def unet() -> UNet2DConditionModel:
    """SDXL's structure at 16x16 latents: attention to the prompt at 8x8, text_time embeddings."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=1,
        attention_head_dim=(4, 5),
        cross_attention_dim=sum(WIDTHS),
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 32,
        use_linear_projection=True,
        norm_num_groups=16,
    )


def build() -> nn.ModuleDict:
    """The trained networks: UNet and both text encoders."""
    tokens = text.tokenizer()
    ids = (len(tokens), tokens.eos_token_id, tokens.bos_token_id)
    return nn.ModuleDict(
        {
            "unet": unet(),
            "text_encoder": text.encoder(WIDTHS[0], *ids, projection=False),
            "text_encoder_2": text.encoder(WIDTHS[1], *ids, projection=True),
        }
    )


def encode(modules: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: both penultimate hidden states, and the projection of the second."""
    first = modules["text_encoder"](ids, output_hidden_states=True)
    second = modules["text_encoder_2"](ids, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


class Latents:
    """VAE latents of augmented composites, with the token ids of their prompts."""

    def __init__(self, world: data.World, train_split: bool = True) -> None:
        tokens = text.tokenizer()
        prompts = [data.prompt(name, colour) for name in world.names for colour in data.COLOURS]
        self.ids = tokens(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        path = data.WORK / ("latents.pt" if train_split else "latents_held_out.pt")
        if not path.is_file():
            torch.save(_encode_all(world, train_split), path)
        stored = torch.load(path, weights_only=True)
        self.latents, self.prompts, self.styles = stored["latents"], stored["prompts"], stored["styles"]

    def batch(self, generator: torch.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Latents [B, 4, 16, 16] and token ids [B, L]."""
        index = torch.randint(len(self.latents), (size,), generator=generator)
        return self.latents[index].float(), self.ids[self.prompts[index]]


@torch.no_grad()
def _encode_all(world: data.World, train_split: bool) -> dict[str, Tensor]:
    vae = AutoencoderKL.from_pretrained(data.ROOT / "reference/vae").eval()
    generator = torch.Generator().manual_seed(1 if train_split else 2)
    kept: dict[str, list[Tensor]] = {"latents": [], "prompts": [], "styles": []}
    pairs = torch.tensor(
        [[world.is_held_out_pair(i, j) for j in range(len(data.COLOURS))] for i in range(len(world.names))]
    )
    names = torch.arange(len(world.names)).repeat_interleave(3)
    styles = torch.arange(3).repeat(len(world.names))
    for _ in track(range(VARIANTS if train_split else 2), description="latents"):
        weights = (pairs if not train_split else ~pairs)[names].float() + 1e-9
        colours = torch.multinomial(weights, 1, generator=generator)[:, 0]
        for part in torch.arange(len(names)).split(171):
            images = data.compose(world.drawings[names[part], styles[part]], colours[part], generator) * 2 - 1
            with torch.autocast("cpu", torch.bfloat16):
                latents = vae.encode(images).latent_dist.mode()
            kept["latents"].append((latents.float() * vae.config.scaling_factor).half())
            kept["prompts"].append(names[part] * len(data.COLOURS) + colours[part])
            kept["styles"].append(styles[part])
    return {key: torch.cat(parts) for key, parts in kept.items()}


def loss_fn(
    modules: nn.ModuleDict,
    latents: Latents,
    schedule: NoiseSchedule,
    seed: int,
    size: int,
    dropout: float = 0.1,
    gamma: float = math.inf,
) -> Tensor:
    """Mean squared error of the predicted noise, min-SNR-weighted (arXiv 2303.09556) if ``gamma`` is finite.

    ``dropout`` of the prompts become SDXL's zero embeddings.
    """
    generator = torch.Generator().manual_seed(seed)
    x0, ids = latents.batch(generator, size)
    t = torch.randint(1000, (size,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    alpha, sigma = schedule.coefficients(t, x0)
    keep = (torch.rand(size, generator=generator) >= dropout).float()
    with torch.autocast("cpu", torch.bfloat16):
        embeds, pooled = encode(modules, ids)
        added = {"text_embeds": pooled * keep[:, None], "time_ids": torch.tensor(TIME_IDS).expand(size, -1)}
        output = modules["unet"](
            alpha * x0 + sigma * noise, t, embeds * keep[:, None, None], added_cond_kwargs=added
        ).sample
    snr = (alpha / sigma).square().flatten()
    weight = (gamma / snr).clamp(max=1).float()
    return (weight * (output.float() - noise).square().mean(dim=(1, 2, 3))).mean()


def export(modules: nn.ModuleDict) -> StableDiffusionXLPipeline:
    """Save ``reference/`` as a StableDiffusionXLPipeline in fp16."""
    tokens = text.tokenizer()
    folder = data.ROOT / "reference"
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=modules["text_encoder"],
        text_encoder_2=modules["text_encoder_2"],
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=modules["unet"],
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    return pipeline.to(torch.float32)


def preview(pipeline: StableDiffusionXLPipeline, prompts: list[str], guidance: float, steps: int = 30) -> Tensor:
    """Samples [B, 3, 64, 64] in [0, 1] with fixed noise."""
    pipeline.set_progress_bar_config(disable=True)
    out = []
    for start in range(0, len(prompts), 32):
        images = pipeline(
            prompts[start : start + 32], num_inference_steps=steps, guidance_scale=guidance, height=64, width=64,
            generator=torch.Generator().manual_seed(start), output_type="pt",
        ).images  # fmt: skip
        out.append(images.float())
    return torch.cat(out)


def main() -> None:
    """Train (or resume), then export and draw a preview."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the training (and its schedule) by then")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    world = data.load()
    latents = Latents(world)
    modules = build()
    schedule = NoiseSchedule.from_scheduler(scheduler())
    if args.export_only:
        average = load_average("reference", modules)
    else:
        average = train(
            "reference", modules, lambda step: loss_fn(modules, latents, schedule, step, BATCH, gamma=5.0),
            steps=args.steps, minutes=args.minutes, lr=args.lr, ema_decay=0.998,
        )  # fmt: skip
    if join()[0] > 0:
        return
    average.eval()
    held_out = Latents(world, train_split=False)
    with torch.no_grad():
        for name, split in (("training pairs", latents), ("held-out pairs", held_out)):
            losses = [float(loss_fn(average, split, schedule, 10**6 + i, 128, 0.0)) for i in range(8)]
            print(f"epsilon loss on {name}: {sum(losses) / len(losses):.4f}")
        pipeline = export(average)
        prompts = (data.ROOT / "prompts/train.txt").read_text("utf-8").splitlines()[:24]
        prompts += (data.ROOT / "prompts/held_out.txt").read_text("utf-8").splitlines()[:12]
        prompts += (data.ROOT / "prompts/held_out_pairs.txt").read_text("utf-8").splitlines()[:12]
        data.grid(preview(pipeline, prompts, 4.0), 12).save(data.WORK / "reference.png")
        (data.WORK / "reference_prompts.txt").write_text("\n".join(prompts) + "\n", "utf-8")


if __name__ == "__main__":
    main()
