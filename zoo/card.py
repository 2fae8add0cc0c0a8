"""Measure emoji64 and draw the grids of its card. ``python -m zoo.card`` (after everything else).

Writes ``zoo/emoji64/quality.json``, ``reference.png`` and ``generator.png``.
"""

from __future__ import annotations

import argparse
import json
import math

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from rlhf_t2i.families.conditioning import Conditioner
from rlhf_t2i.families.networks import LatentDecoder, one_step
from torch import Tensor
from transformers import CLIPModel

from rlhf_t2i.algorithm.schedules import NoiseSchedule
from zoo import data, reference, scorers

GUIDANCE, STEPS = 4.0, 30
SPLITS = ("train", "held_out_pairs", "held_out")
Scorers = dict[str, CLIPModel]


class OneStep:
    """The shipped generator."""

    def __init__(self, pipeline: StableDiffusionXLPipeline, folder: str) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
        tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
        self.conditioner = Conditioner(tokenizers, [pipeline.text_encoder, pipeline.text_encoder_2], data.SIZE, True)
        self.decoder = LatentDecoder(pipeline.vae)
        self.schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)

    @torch.no_grad()
    def __call__(self, prompts: list[str], seed: int = 0) -> Tensor:
        """Images [B, 3, 64, 64] in [0, 1]."""
        z = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        images = []
        for start in range(0, len(prompts), 48):
            part = slice(start, start + 48)
            cond = self.conditioner.encode(prompts[part])
            x0 = one_step(self.unet, z[part], cond, 399, self.schedule, torch.bfloat16)
            images.append(self.decoder.decode(x0))
        return torch.cat(images)


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
    return torch.linalg.lstsq(_with_one(vectors), target).solution


def _with_one(vectors: Tensor) -> Tensor:
    return torch.cat([vectors, torch.ones(len(vectors), 1)], dim=1)


@torch.no_grad()
def measure(images: Tensor, prompts: list[str], models: Scorers, pictures: scorers.Pictures, probe: Tensor,
            names: list[str]) -> dict[str, float]:  # fmt: skip
    """Scores, the share whose name the scorers find among all names, and the entropy of styles in bits (max 1.585)."""
    parsed = torch.tensor([parse(p, names) for p in prompts])
    result = {}
    for label, clip in models.items():
        vectors = torch.cat([scorers.image_vectors(clip, part) for part in images.split(64)])
        words = scorers.text_vectors(clip, pictures.ids[parsed[:, 0], parsed[:, 1]])
        found = scorers.retrieve(clip, vectors, pictures.ids, parsed[:, 1])
        result[f"{label} score"] = float((vectors * words).sum(-1).mean())
        result[f"{label} finds the name"] = float((found == parsed[:, 0]).float().mean())
        if label == "judge":
            share = torch.bincount((_with_one(vectors) @ probe).argmax(1), minlength=3).float() / len(images)
            result["style entropy"] = float(-(share * share.clamp(min=1e-9).log2()).sum())
            result |= {f"share {style}": float(s) for style, s in zip(data.STYLES, share, strict=True)}
    return {key: round(value, 4) for key, value in result.items()}


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


def _reference(pipeline: StableDiffusionXLPipeline, prompts: list[str], split: str) -> Tensor:
    """Samples of the reference, kept in zoo/work while its weights stay the same."""
    path = data.WORK / f"card_{split}_{len(prompts)}.pt"
    weights = data.ROOT / "reference/unet/diffusion_pytorch_model.safetensors"
    if not path.is_file() or path.stat().st_mtime < weights.stat().st_mtime:
        torch.save(reference.preview(pipeline, prompts, GUIDANCE, STEPS), path)
    return torch.load(path, weights_only=True)


def main() -> None:
    """Measure, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40, help="of the reference, a split")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = data.load().names
    pipeline = StableDiffusionXLPipeline.from_pretrained(data.ROOT / "reference", dtype=torch.float32)
    generator = OneStep(pipeline, str(data.ROOT / "generator"))
    models = {k: CLIPModel.from_pretrained(data.ROOT / k, dtype=torch.float32).eval() for k in scorers.KINDS}
    pictures = scorers.Pictures()
    probe = style_probe(models["judge"], pictures)
    quality: dict[str, dict[str, dict[str, float]]] = {"reference": {}, "generator": {}}
    shown: dict[str, list[Tensor]] = {"reference": [], "generator": []}
    captions: list[str] = []
    for split in SPLITS:
        lines = (data.ROOT / f"prompts/{split}.txt").read_text("utf-8").splitlines()
        for label, count in (("reference", args.images), ("generator", 4 * args.images)):
            prompts = lines[:count]
            with torch.autocast("cpu", torch.bfloat16):
                images = generator(prompts) if label == "generator" else _reference(pipeline, prompts, split)
            quality[label][split] = measure(images.float(), prompts, models, pictures, probe, names)
            shown[label].append(images[:20].float())
        captions += lines[:20]
        print(split, {k: v[split] for k, v in quality.items()}, flush=True)
    (data.ROOT / "quality.json").write_text(json.dumps(quality, indent=1) + "\n", "utf-8")
    for label, parts in shown.items():
        captioned(torch.cat(parts), captions, 10).save(data.ROOT / f"{label}.png", optimize=True)


if __name__ == "__main__":
    main()
