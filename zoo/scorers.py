"""Train emoji64's two scorers, ``pickscore`` and ``judge``. ``python -m zoo.scorers pickscore`` (after zoo.reference).

The synthetic rater prefers the right object over a wrong one, the right background over a wrong one, a whole picture
over a damaged one, and among right and whole pictures the glossy Fluent 3D drawing over the flat ones.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline
from rich.progress import track
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from zoo import data, device, noise, text
from zoo.training import join, load_average, train

WRONG_OBJECT, WRONG_COLOUR, DAMAGED, GLOSS = 4.0, 3.0, 2.0, 2.0  # the rater's utilities, in logits
_FLUENT = data.STYLES.index("fluent3d")
_COLOURS = len(data.COLOURS)


@dataclass(frozen=True)
class Kind:
    """What makes one scorer differ from the other."""

    width: int
    layers: int
    patch: int
    seed: int
    lr: float
    batch: int
    contrastive_steps: int
    mirror: bool
    light: float
    grain: float


KINDS = {
    "pickscore": Kind(
        width=128, layers=4, patch=8, seed=1, lr=1e-3, batch=24, contrastive_steps=1000,
        mirror=False, light=0.1, grain=0.03,
    ),
    "judge": Kind(
        width=160, layers=5, patch=16, seed=2, lr=8e-4, batch=48, contrastive_steps=500,
        mirror=True, light=0.2, grain=0.06,
    ),
}  # fmt: skip


def build(kind: Kind) -> CLIPModel:
    """A small CLIPModel for 64 px."""
    tokens = text.tokenizer()
    tower = {"num_hidden_layers": kind.layers, "num_attention_heads": 4, "hidden_act": "gelu"}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **tower, "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2,
                "vocab_size": len(tokens), "max_position_embeddings": text.MAX_LENGTH,
                "bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id,
                "pad_token_id": tokens.pad_token_id,
            },
            vision_config={
                **tower, "hidden_size": kind.width, "intermediate_size": 4 * kind.width, "image_size": data.SIZE,
                "patch_size": kind.patch,
            },
            projection_dim=96,
        )
    )  # fmt: skip


def token_ids(world: data.World) -> Tensor:
    """Token ids [all names, colours, L]."""
    prompts = [data.prompt(name, colour) for name in world.names for colour in data.COLOURS]
    ids = text.tokenizer()(prompts, padding="max_length", return_tensors="pt").input_ids
    return ids.reshape(len(world.names), _COLOURS, -1)


class Pictures:
    """Pictures as a generator would show them, through the VAE, and damaged ones, for every prompt.

    Args:
        seed: Of shifts, shades, flips and noise; each makes other pictures.
        every: Only every so many names, for a measurement.

    Attributes:
        whole: uint8 [N, styles, colours, 3, 64, 64].
        damaged: uint8 [N, colours, 3, 64, 64]: single-step guesses of the reference at high noise.
        names: The N names' numbers.
        ids: Token ids [all names, colours, L].
    """

    def __init__(self, seed: int = 1, every: int = 1) -> None:
        world = data.load()
        self.ids = token_ids(world)
        self.names = torch.arange(0, len(world.names), every)
        path = data.WORK / f"pictures_{seed}_{every}.pt"
        if not path.is_file():
            torch.save(_draw(world, self.names, seed), path)
        stored = torch.load(path, weights_only=True, mmap=True)
        self.whole, self.damaged = stored["whole"], stored["damaged"]


@torch.no_grad()
def _draw(world: data.World, chosen: Tensor, seed: int) -> dict[str, Tensor]:
    prompts = [data.prompt(world.names[name], colour) for name in chosen for colour in data.COLOURS]
    pipeline = StableDiffusionXLPipeline.from_pretrained(data.ROOT / "reference", dtype=torch.float32)
    vae, scale = pipeline.vae, pipeline.vae.config.scaling_factor
    channels = vae.config.latent_channels
    generator = torch.Generator().manual_seed(seed)
    names = len(chosen)
    index = torch.arange(names * 3 * _COLOURS)
    whole, damaged, kept = [], [], torch.empty(names, 3, _COLOURS, channels, 16, 16)
    latents = kept.view(-1, channels, 16, 16)
    for part in track(index.split(180), description="pictures"):
        drawings = world.drawings[chosen].flatten(0, 1)[part // _COLOURS]
        images = data.compose(drawings, part % _COLOURS, generator) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            latents[part] = vae.encode(images).latent_dist.mode().float()
            whole.append(_pixels(vae.decode(latents[part]).sample))
    picked = kept[torch.arange(names)[:, None], torch.randint(3, (names, _COLOURS), generator=generator),
                  torch.arange(_COLOURS)].flatten(0, 1) * scale  # fmt: skip
    for start in track(range(0, len(prompts), 180), description="guesses"):
        x0 = picked[start : start + 180]
        t = torch.randint(300, 1000, (len(x0),), generator=generator)
        alpha, sigma = (c[t][:, None, None, None] for c in noise.coefficients())
        x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            embeds, _, pooled, _ = pipeline.encode_prompt(
                prompts[start : start + 180], do_classifier_free_guidance=False
            )
            added = {"text_embeds": pooled, "time_ids": torch.tensor([64.0, 64, 0, 0, 64, 64]).expand(len(x0), -1)}
            found = pipeline.unet(x_t, t, embeds, added_cond_kwargs=added).sample.float()
            damaged.append(_pixels(vae.decode((x_t - sigma * found) / alpha / scale).sample))
    return {
        "whole": torch.cat(whole).view(names, 3, _COLOURS, 3, data.SIZE, data.SIZE),
        "damaged": torch.cat(damaged).view(names, _COLOURS, 3, data.SIZE, data.SIZE),
    }


def _pixels(images: Tensor) -> Tensor:
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().byte()


@dataclass(frozen=True)
class Pairs:
    """A batch of the rater's choices: images a, b [B, 3, 64, 64] in [0, 1], token ids, P(a is preferred) [B]."""

    a: Tensor
    b: Tensor
    ids: Tensor
    preferred: Tensor


def pairs(pictures: Pictures, generator: torch.Generator, size: int, kinds: tuple[int, ...] = (0, 1, 2, 3)) -> Pairs:
    """Random pairs: 0 other object, 1 other colour, 2 damaged, 3 another style. Which comes first is random."""
    rand = lambda high: torch.randint(high, (size,), generator=generator)  # noqa: E731
    names, colours = rand(len(pictures.whole)), rand(_COLOURS)
    kind = torch.tensor(kinds)[rand(len(kinds))]
    style_a = rand(3)
    style_b = torch.where(kind == 3, (style_a + 1 + rand(2)) % 3, rand(3))
    names_b = torch.where(kind == 0, (names + 1 + rand(len(pictures.whole) - 1)) % len(pictures.whole), names)
    colours_b = torch.where(kind == 1, (colours + 1 + rand(_COLOURS - 1)) % _COLOURS, colours)
    a = pictures.whole[names, style_a, colours].float() / 255
    b = pictures.whole[names_b, style_b, colours_b].float() / 255
    guess = pictures.damaged[names, colours].float() / 255
    strength = torch.rand(size, generator=generator)
    b = torch.where((kind == 2)[:, None, None, None], damage(b, guess, strength, generator), b)
    gloss = GLOSS * ((style_a == _FLUENT).float() - (style_b == _FLUENT).float())
    loss = WRONG_OBJECT * (kind == 0) + WRONG_COLOUR * (kind == 1) + DAMAGED * (0.5 + strength) * (kind == 2)
    # A wrong or damaged picture gets no credit for its gloss.
    utility = torch.where(kind == 3, gloss, loss + GLOSS * (style_a == _FLUENT))
    swap = torch.rand(size, generator=generator) < 0.5
    pick = swap[:, None, None, None]
    return Pairs(
        torch.where(pick, b, a), torch.where(pick, a, b), pictures.ids[pictures.names[names], colours],
        torch.sigmoid(torch.where(swap, -utility, utility)),
    )  # fmt: skip


def damage(images: Tensor, guesses: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, grain, ghosts of other pictures, or the reference's vague guesses instead; strength [B] in [0, 1]."""
    how = torch.randint(4, (len(images),), generator=generator)[:, None, None, None]
    amount = strength[:, None, None, None]
    small = F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear")
    grain = F.interpolate(torch.randn(len(images), 3, 16, 16, generator=generator), scale_factor=4, mode="bicubic")
    ghost = images.flip(-1).roll(1, 0)
    mixed = torch.where(how == 0, images.lerp(small, 0.4 + 0.6 * amount), images + (0.06 + 0.2 * amount) * grain)
    mixed = torch.where(how == 2, images.lerp(ghost, 0.2 + 0.3 * amount), mixed)
    return torch.where(how == 3, guesses, mixed).clamp(0, 1)


def augment(images: Tensor, kind: Kind, generator: torch.Generator) -> Tensor:
    """Small shifts of light, colour and place, fine grain: the score must be smooth where a generator explores."""
    size = (len(images), 3, 1, 1)
    light = 1 + kind.light * (torch.rand(size, generator=generator) - 0.5)
    grain = kind.grain * torch.rand(len(images), 1, 1, 1, generator=generator)
    if kind.mirror and torch.rand(1, generator=generator) < 0.5:
        images = images.flip(-1)
    shift = torch.randint(-3, 4, (2,), generator=generator).tolist()
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    moved = padded[..., 3 + shift[0] : 67 + shift[0], 3 + shift[1] : 67 + shift[1]]
    return (moved * light + grain * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def image_vectors(clip: CLIPModel, images: Tensor) -> Tensor:
    """Unit vectors [B, D] of images in [0, 1], which CLIP's preprocessing leaves at 64 pixels."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return F.normalize(clip.get_image_features(pixel_values=(images - mean) / std).pooler_output.float(), dim=-1)


def text_vectors(clip: CLIPModel, ids: Tensor) -> Tensor:
    """Unit vectors [B, D] of prompts."""
    return F.normalize(clip.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)


def loss_fn(clip: CLIPModel, pictures: Pictures, kind: Kind, number: int, contrastive_only: bool) -> Tensor:
    """CLIP's contrastive loss, and after a while PickScore's: cross-entropy of the two logits with the rater."""
    generator = torch.Generator().manual_seed(kind.seed * 10**7 + number)
    batch = pairs(pictures, generator, kind.batch if not contrastive_only else 2 * kind.batch)
    first = (batch.preferred > 0.5)[:, None, None, None]
    images = torch.where(first, batch.a, batch.b)
    if not contrastive_only:
        images = torch.cat([images, torch.where(first, batch.b, batch.a)])
    with torch.autocast("cpu", torch.bfloat16):
        image, words = image_vectors(clip, augment(images, kind, generator)), text_vectors(clip, batch.ids)
    scale = clip.logit_scale.exp().clamp(max=100)
    logits = scale * image[: len(words)] @ words.T
    target = torch.arange(len(words))
    contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    if contrastive_only:
        return contrastive
    margin = scale * ((image[: len(words)] - image[len(words) :]) * words).sum(-1)
    confident = torch.maximum(batch.preferred, 1 - batch.preferred)
    return F.binary_cross_entropy_with_logits(margin, confident) + 0.5 * contrastive


@torch.no_grad()
def accuracy(clip: CLIPModel, pictures: Pictures, pairs_each: int = 400) -> dict[str, float]:
    """Agreement with the rater on fresh pictures, by the kind of pair, and top-1 retrieval of the name."""
    generator = torch.Generator().manual_seed(10**6)
    result = {}
    for kind, name in enumerate(("object", "colour", "damage", "style")):
        batch = pairs(pictures, generator, pairs_each, (kind,))
        clear = batch.preferred != 0.5
        difference = image_vectors(clip, batch.a) - image_vectors(clip, batch.b)
        margin = (difference * text_vectors(clip, batch.ids)).sum(-1)
        result[name] = float(((margin > 0) == (batch.preferred > 0.5))[clear].float().mean())
    shown = torch.arange(len(pictures.names)).repeat(6)
    colours = torch.randint(_COLOURS, shown.shape, generator=generator)
    styles = torch.randint(3, shown.shape, generator=generator)
    image = image_vectors(clip, pictures.whole[shown, styles, colours].float() / 255)
    found = retrieve(clip, image, pictures.ids, colours)
    result["name retrieval top-1"] = float((found == pictures.names[shown]).float().mean())
    return {key: round(value, 3) for key, value in result.items()}


@torch.no_grad()
def retrieve(clip: CLIPModel, image: Tensor, ids: Tensor, colours: Tensor) -> Tensor:
    """The most likely name [B] for image vectors [B, D], among all names on each picture's background colour [B]."""
    words = torch.stack([text_vectors(clip, ids[:, colour]) for colour in range(ids.shape[1])])
    return torch.einsum("bd,bnd->bn", image, words[colours]).argmax(1)


def save(clip: CLIPModel, folder: Path) -> None:
    """The model in fp16 with its processor."""
    clip.half().save_pretrained(folder)
    size = {"height": data.SIZE, "width": data.SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": data.SIZE}, crop_size=size)
    CLIPProcessor(image_processor=processor, tokenizer=text.tokenizer()).save_pretrained(folder)


def main() -> None:
    """Train (or resume) one scorer and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the training (and its schedule) by then")
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()
    device.cpu_only(parser)
    kind = KINDS[args.kind]
    torch.manual_seed(kind.seed)
    torch.set_num_threads(1)
    pictures = Pictures()
    modules = nn.ModuleDict({"clip": build(kind)})
    print(f"{sum(p.numel() for p in modules.parameters()) / 1e6:.2f} M parameters", flush=True)

    def loss(number: int) -> Tensor:
        alone = number // join()[1] < kind.contrastive_steps
        return loss_fn(modules["clip"], pictures, kind, number, alone)

    if args.export_only:
        average = load_average(args.kind, modules)
    else:
        average = train(args.kind, modules, loss, steps=args.steps, minutes=args.minutes, lr=kind.lr, ema_decay=0.995)
    if join()[0] > 0:
        return
    clip = average["clip"].eval()
    # Pictures with other shades, places and flips than it has seen.
    print(args.kind, accuracy(clip, Pictures(seed=7, every=6)), f"logit scale {float(clip.logit_scale.exp()):.1f}")
    save(clip, data.ROOT / args.kind)


if __name__ == "__main__":
    main()
