"""Train the reference diffusion of emoji64 with its text encoders. ``python -m zoo.reference`` (after zoo.latents).

``torchrun --nproc-per-node 2 -m zoo.reference`` trains as long as you like and continues where it was; with
``--finish 25`` it lowers the learning rate to zero in 25 minutes, in a checkpoint of its own; ``--export`` writes the
finished average, with ``--stable`` the one of the constant learning rate.
"""

from __future__ import annotations

import argparse
import functools
import math

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from zoo import data, device, latents, noise, reader, text
from zoo.training import join, load_average, train

BATCH = 48  # of a process
WIDTHS = (96, 160)  # of the two text encoders
CHANNELS = 8
TIME_IDS = (64.0, 64.0, 0.0, 0.0, 64.0, 64.0)
SPLITS = ("train", "held_out_pairs", "held_out")


def scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise schedule."""
    return EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )


def unet(channels: int = CHANNELS) -> UNet2DConditionModel:
    """SDXL's structure at 16x16 latents: attention to the prompt at 8x8, text_time embeddings."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
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


@torch.no_grad()
def warm_start(modules: nn.ModuleDict, folder: str) -> None:
    """Take over a reference on the latents of another VAE: a linear map between the two goes into the outer layers."""
    old = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(data.OUT / "reference/vae", torch_dtype=torch.float32)
    for name in ("text_encoder", "text_encoder_2"):
        modules[name].load_state_dict(getattr(old, name).state_dict())
    drawings = data.load().drawings.flatten(0, 1)[::2]
    images = data.compose(drawings, torch.arange(428) % 12, torch.Generator().manual_seed(0)).cpu()
    ours, theirs = (
        torch.cat([m.encode(x * 2 - 1).latent_dist.mode() for x in images.split(64)]) * m.config.scaling_factor
        for m in (vae, old.vae)
    )
    ours = nn.functional.pad(ours, (0, 0, 0, 0, 0, 1), value=1.0).movedim(1, -1).flatten(0, 2)
    theirs = theirs.movedim(1, -1).flatten(0, 2)
    solution = torch.linalg.lstsq(ours, theirs).solution.T  # [theirs, ours + 1]
    error = (ours @ solution.T - theirs).square().mean() / theirs.var()
    print(f"old latents from new: {1 - float(error):.3f} of the variance")
    print(solution)
    there = solution[:, :-1]
    weights = old.unet.state_dict()
    weights["conv_in.weight"] = torch.einsum("ocij,cn->onij", weights["conv_in.weight"], there)
    back = torch.linalg.pinv(there)
    weights["conv_out.weight"] = torch.einsum("no,ocij->ncij", back, weights["conv_out.weight"])
    weights["conv_out.bias"] = back @ weights["conv_out.bias"]
    modules["unet"].load_state_dict(weights)


def encode(modules: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning: both penultimate hidden states, and the projection of the second."""
    first = modules["text_encoder"](ids, output_hidden_states=True)
    second = modules["text_encoder_2"](ids, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds


@functools.cache
def _time_ids(where: torch.device) -> Tensor:
    return torch.tensor(TIME_IDS, device=where)


def time_ids(size: int) -> Tensor:
    """SDXL's sizes and crops [B, 6]."""
    return _time_ids(device.DEVICE).expand(size, -1)


def predict(modules: nn.ModuleDict, x: Tensor, t: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    """The noise in x, in float32."""
    added = {"text_embeds": pooled, "time_ids": time_ids(len(x))}
    with device.autocast():
        return modules["unet"](x, t, embeds, added_cond_kwargs=added).sample.float()


def loss_fn(modules: nn.ModuleDict, stored: latents.Latents, seed: int, size: int, dropout: float = 0.1,
            weighted: bool = True) -> Tensor:  # fmt: skip
    """Mean squared error of the predicted noise; ``dropout`` of the prompts become SDXL's zero embeddings."""
    generator = device.generator(seed)
    x0, ids = stored.batch(generator, size)
    t = noise.timesteps(size, generator)
    target = device.randn(*x0.shape, generator=generator)
    alpha, sigma = (c[t][:, None, None, None] for c in noise.coefficients())
    keep = (device.rand(size, generator=generator) >= dropout).float()
    with device.autocast():
        embeds, pooled = encode(modules, ids)
    embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
    error = (predict(modules, alpha * x0 + sigma * target, t, embeds, pooled) - target).square().mean(dim=(1, 2, 3))
    return (error * noise.min_snr(t) if weighted else error).mean()


@torch.no_grad()
def sample(modules: nn.ModuleDict, prompts: list[str], guidance: float, steps: int, seed: int = 0,
           start: Tensor | None = None) -> Tensor:  # fmt: skip
    """Latents of prompts by DPM-Solver++ with guidance."""
    ids = device.here(text.tokenizer()(prompts, padding="max_length", return_tensors="pt").input_ids)
    if start is None:
        start = torch.randn(len(ids), CHANNELS, 16, 16, generator=torch.Generator().manual_seed(seed))
    start = device.here(start)
    with device.autocast():
        embeds, pooled = encode(modules, ids)

    def guided(x: Tensor, t: Tensor, part: slice) -> Tensor:
        words, whole = embeds[part], pooled[part]
        both = predict(modules, torch.cat([x, x]), torch.cat([t, t]), torch.cat([words, torch.zeros_like(words)]),
                       torch.cat([whole, torch.zeros_like(whole)]))  # fmt: skip
        with_prompt, without = both.chunk(2)
        return without + guidance * (with_prompt - without)

    parts = [slice(i, i + 32) for i in range(0, len(ids), 32)]
    return torch.cat([noise.solve(lambda x, t, p=part: guided(x, t, p), start[part], steps) for part in parts])


@torch.no_grad()
def decode(vae: AutoencoderKL, found: Tensor) -> Tensor:
    """Pictures [B, 3, 64, 64] in [0, 1]."""
    with device.autocast():
        parts = [vae.decode(part).sample.float() for part in (found / vae.config.scaling_factor).split(32)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def lines(split: str) -> list[str]:
    """The prompts of a split, shuffled when they were written."""
    return (data.ROOT / f"prompts/{split}.txt").read_text("utf-8").splitlines()


def evaluate(modules: nn.ModuleDict, name: str, each: int = 40, guidance: float = 3.5,
             steps: int = 14) -> dict[str, dict[str, float]]:  # fmt: skip
    """What the reader finds in samples of every split, and a picture of some."""
    vae = AutoencoderKL.from_pretrained(data.OUT / "reference/vae", torch_dtype=torch.float32).eval()
    vae.to(device.DEVICE)
    names, judge, result, shown = data.load().names, reader.load(), {}, []
    was = modules.training
    modules.eval()
    for number, split in enumerate(SPLITS):
        prompts = lines(split)[:each]
        pictures = decode(vae, sample(modules, prompts, guidance, steps, seed=number))
        result[split] = reader.report(judge, pictures, prompts, names)
        shown.append(pictures[:24])
    modules.train(was)
    grid = data.grid(torch.cat(shown), 12)
    grid.resize((grid.width * 2, grid.height * 2), 0).save(data.WORK / f"{name}.png")
    return result


def export(modules: nn.ModuleDict) -> None:
    """Save ``reference/`` as a StableDiffusionXLPipeline in fp16."""
    tokens = text.tokenizer()
    folder = data.OUT / "reference"
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


def preview(pipeline: StableDiffusionXLPipeline, prompts: list[str], guidance: float, steps: int = 30,
            seed: int = 0) -> Tensor:  # fmt: skip
    """Pictures [B, 3, 64, 64] in [0, 1] as a user of the pipeline gets them."""
    pipeline.set_progress_bar_config(disable=True)
    out = []
    for start in range(0, len(prompts), 32):
        images = pipeline(
            prompts[start : start + 32], num_inference_steps=steps, guidance_scale=guidance, height=64, width=64,
            generator=torch.Generator().manual_seed(seed + start), output_type="pt",
        ).images  # fmt: skip
        out.append(images.float())
    return torch.cat(out)


def main() -> None:
    """Train (or resume), or export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then")
    parser.add_argument("--finish", type=float, help="minutes in which to lower the learning rate to zero")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--batch", type=int, default=BATCH, help="of a process")
    parser.add_argument("--warm", help="folder of a pipeline to start from, on any VAE")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--stable", action="store_true", help="the average of the constant learning rate")
    parser.add_argument("--evaluate", type=int, default=0, help="pictures a split; only measure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    modules = build()
    checkpoint = "reference" if args.stable else "reference_finished"
    if args.export:
        export(load_average(checkpoint, modules))
        return
    if args.evaluate:
        print(evaluate(load_average(checkpoint, modules), checkpoint, args.evaluate))
        return
    if not device.on_cuda():
        modules["unet"].set_attn_processor(AttnProcessor())  # on a CPU faster in training than the fused one
    stored = latents.Latents()
    if args.warm and not (data.WORK / "reference.pt").is_file():
        warm_start(modules, args.warm)
    held_out = latents.Latents(held_out=True)

    def measure(average: nn.ModuleDict) -> dict[str, object]:
        with torch.no_grad():
            losses = {
                label: round(sum(float(loss_fn(average, s, 10**6 + i, 96, 0.0, False)) for i in range(4)) / 4, 5)
                for label, s in (("train", stored), ("held_out_pairs", held_out))
            }
        return {"epsilon_loss": losses, **evaluate(average, "reference_training")}

    train(
        "reference", modules, lambda number: loss_fn(modules, stored, number, args.batch), lr=args.lr,
        minutes=args.minutes, finish=args.finish, constant=True, muon=True, ema_decay=0.998, weight_decay=0.05,
        batch=args.batch * join()[1], evaluate=measure, evaluate_seconds=1200,
    )  # fmt: skip


if __name__ == "__main__":
    main()
