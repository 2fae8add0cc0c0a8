"""Measure emoji64 and draw the pictures of its card. ``python -m zoo.card`` (after everything else).

Writes ``quality.json``, a grid of every model (``reference.png``, ``generator.png`` and those of ``flow/``),
``training.png`` and ``training.json`` (what the logs in the work folder tell, beside what it holds of other trainings).
Everything is measured through the published pipelines, as a user gets the pictures.

``--only flow`` measures the models whose name begins so and keeps the others' figures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchLCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers import CLIPModel

from zoo import data, distill, reader, reference, scorers, vae

GUIDANCE, STEPS, FLOW_GUIDANCE = 3.5, 30, 1.0  # the flow reference has guidance in it
SPLITS = reference.SPLITS
Draw = Callable[[list[str], int], Tensor]


def reference_sampler(guidance: float, steps: int) -> Draw:
    """StableDiffusionXLPipeline as it is."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(data.OUT / "reference", dtype=torch.float32)
    return lambda prompts, seed: reference.preview(pipeline, prompts, guidance, steps, seed)


def flow_sampler(guidance: float, steps: int) -> Draw:
    """StableDiffusion3Pipeline as it is."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        data.OUT / "flow/reference", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32
    )
    return _through(pipeline, guidance_scale=guidance, num_inference_steps=steps)


def flow_generator_sampler(sigmas: list[float]) -> Draw:
    """The same with the generator, at its times, without guidance."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        data.OUT / "flow/reference", text_encoder_3=None, tokenizer_3=None, dtype=torch.float32,
        transformer=SD3Transformer2DModel.from_pretrained(data.OUT / "flow/generator", torch_dtype=torch.float32),
        scheduler=FlowMatchLCMScheduler(shift=1.0),
    )  # fmt: skip
    return _through(pipeline, guidance_scale=0.0, num_inference_steps=len(sigmas), sigmas=sigmas)


def _through(pipeline: StableDiffusion3Pipeline, **settings: Any) -> Draw:
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompts: list[str], seed: int) -> Tensor:
        parts = [
            pipeline(
                prompts[start : start + 32], height=64, width=64, output_type="pt",
                generator=torch.Generator().manual_seed(seed + start), **settings,
            ).images.float()
            for start in range(0, len(prompts), 32)
        ]  # fmt: skip
        return torch.cat(parts)

    return draw


def generator_sampler() -> Draw:
    """The one-step generator with the reference's encoders and VAE."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(data.OUT / "reference", dtype=torch.float32)
    unet = UNet2DConditionModel.from_pretrained(data.OUT / "generator", torch_dtype=torch.float32)
    modules = nn.ModuleDict({k: getattr(pipeline, k) for k in ("text_encoder", "text_encoder_2")} | {"unet": unet})

    def draw(prompts: list[str], seed: int) -> Tensor:
        ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
        z = torch.randn(len(ids), unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(seed))
        found = []
        for part in (slice(i, i + 48) for i in range(0, len(ids), 48)):
            with torch.autocast("cpu", torch.bfloat16):
                embeds, pooled = reference.encode(modules, ids[part])
            found.append(distill.one_step(modules, z[part], embeds, pooled))
        return reference.decode(pipeline.vae, torch.cat(found))

    return draw


def parse(prompt: str, names: list[str]) -> tuple[int, int]:
    """The name's and the colour's number in a prompt."""
    name, colour = prompt.removesuffix(" background").split(", on a ")
    return names.index(name), list(data.COLOURS).index(colour)


@torch.no_grad()
def style_probe(judge: CLIPModel, pictures: scorers.Pictures) -> Tensor:
    """Linear map [D + 1, 3] from the judge's image vectors to the drawing's style, by least squares."""
    order = torch.randperm(pictures.whole.shape[0] * 3 * 12, generator=torch.Generator().manual_seed(0))[:1500]
    images = pictures.whole.flatten(0, 2)[order].float() / 255
    vectors = torch.cat([scorers.image_vectors(judge, part) for part in images.split(100)])
    target = torch.nn.functional.one_hot(order // 12 % 3, 3).float()
    return torch.linalg.lstsq(torch.cat([vectors, torch.ones(len(vectors), 1)], dim=1), target).solution


@torch.no_grad()
def scores(images: Tensor, prompts: list[str], models: dict[str, CLIPModel], ids: Tensor,
           names: list[str]) -> dict[str, float]:  # fmt: skip
    """The scorers' mean cosine, and the share whose name each finds among all."""
    parsed = torch.tensor([parse(p, names) for p in prompts])
    result = {}
    for label, clip in models.items():
        vectors = torch.cat([scorers.image_vectors(clip, part) for part in images.split(64)])
        words = scorers.text_vectors(clip, ids[parsed[:, 0], parsed[:, 1]])
        found = scorers.retrieve(clip, vectors, ids, parsed[:, 1])
        result[f"{label} score"] = round(float((vectors * words).sum(-1).mean()), 4)
        result[f"{label} finds the name"] = round(float((found == parsed[:, 0]).float().mean()), 4)
    return result


def captioned(images: Tensor, prompts: list[str], columns: int) -> Image.Image:
    """A grid with each prompt under its picture."""
    rows, cell, text = math.ceil(len(images) / columns), data.SIZE * 2 + 4, 26
    sheet = Image.new("RGB", (columns * cell, rows * (cell + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        left, top = index % columns * cell, index // columns * (cell + text)
        tile = data.grid(image[None], 1).crop((0, 0, data.SIZE, data.SIZE)).resize((cell - 4, cell - 4))
        sheet.paste(tile, (left, top))
        name, colour = prompt.removesuffix(" background").split(", on a ")
        draw.text((left + 2, top + cell - 3), f"{name[:21]}\n{colour}", fill="black", font_size=10, spacing=1)
    return sheet.quantize(256)


def trainings(folder: Path) -> dict[str, Any]:
    """Of every log: the commands, steps, samples, seconds and a thinned loss curve."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        losses = [row for row in rows if "loss" in row]
        if not losses:
            continue
        last = losses[-1]
        found[path.stem] = {
            "starts": [{k: v for k, v in row.items() if k != "event"} for row in rows if "event" in row],
            **{key: last.get(key) for key in ("step", "samples", "cpu_seconds", "seconds")},
            "curve": [(row["step"], row["loss"]) for row in losses[:: max(1, len(losses) // 80)]],
            "evaluations": [row for row in rows if "train" in row],
        }
    return found


def plot(found: dict[str, Any], path: Path) -> None:
    """Loss curves, and the names the reader found, over the steps of each training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.2 * math.ceil(len(found) / 3)), layout="constrained")
    for index, (name, one) in enumerate(found.items()):
        axes = figure.add_subplot(math.ceil(len(found) / 3), 3, index + 1)
        axes.plot(*zip(*one["curve"], strict=True), color="#1f77b4", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_ylabel("loss", fontsize=8)
        axes.tick_params(labelsize=7)
        if one["evaluations"]:
            right = axes.twinx()
            right.plot([e["step"] for e in one["evaluations"]],
                       [e["held_out_pairs"]["names"] for e in one["evaluations"]],
                       color="#d95f02", marker="o", markersize=3, linewidth=1)  # fmt: skip
            right.set_ylim(0, 1)
            right.set_ylabel("names read", fontsize=8, color="#d95f02")
            right.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=96, help="of each model, a split")
    parser.add_argument("--guidance", type=float, default=GUIDANCE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default="", help="models whose name begins so")
    args = parser.parse_args()
    torch.set_num_threads(1)
    world, judge = data.load(), reader.load()
    decoder = AutoencoderKL.from_pretrained(data.OUT / "reference/vae", torch_dtype=torch.float32).eval()
    models = {k: CLIPModel.from_pretrained(data.ROOT / k, dtype=torch.float32).eval() for k in scorers.KINDS}
    ids = scorers.token_ids(world)
    samplers: dict[str, Callable[[], Draw]] = {
        "reference": lambda: reference_sampler(args.guidance, args.steps),
        "generator": generator_sampler,
        "flow/reference": lambda: flow_sampler(FLOW_GUIDANCE, args.steps),
        "flow/generator, one step": lambda: flow_generator_sampler([1.0]),
        "flow/generator, four steps": lambda: flow_generator_sampler([1.0, 0.75, 0.5, 0.25]),
    }
    written = data.OUT / "quality.json"
    quality: dict[str, Any] = json.loads(written.read_text("utf-8")) if args.only else {}
    quality |= {
        "vae psnr": vae.psnr(decoder, world),
        "reader": {"true drawings": reader.check(judge, world), "through the vae": reader.check(judge, world, decoder)},
    }
    for label, make in samplers.items():
        if not label.startswith(args.only):
            continue
        draw, shown, captions = make(), [], []
        key, guidance = ("flow settings", FLOW_GUIDANCE) if label.startswith("flow") else ("settings", args.guidance)
        quality[key] = {"images a split": args.images, "guidance": guidance, "euler steps": args.steps}
        quality[label] = {}
        for number, split in enumerate(SPLITS):
            prompts = reference.lines(split)[: args.images]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                images = draw(prompts, 1000 * number).float()
            quality[label][split] = reader.report(judge, images, prompts, world.names)
            quality[label][split] |= scores(images, prompts, models, ids, world.names)
            shown.append(images[:20])
            captions += prompts[:20]
            print(label, split, quality[label][split], flush=True)
        picture = data.OUT / f"{label.replace(', ', '_').replace(' ', '_')}.png"
        captioned(torch.cat(shown), captions, 10).save(picture, optimize=True)
    written.write_text(json.dumps(quality, indent=1) + "\n", "utf-8")
    logs = data.OUT / "training.json"
    found = json.loads(logs.read_text("utf-8")) | trainings(data.WORK)
    logs.write_text(json.dumps(found) + "\n", "utf-8")
    plot(found, data.OUT / "training.png")


if __name__ == "__main__":
    main()
