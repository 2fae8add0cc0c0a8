"""Make emoji64's one-step generator, after zoo.reference.

1. ``python -m zoo.distill pairs --count 3000``: the reference's own samples from noise (resumable).
2. ``torchrun --nproc-per-node 2 -m zoo.distill warmup --minutes 8``: regression on them, in one step.
3. ``torchrun --nproc-per-node 2 -m zoo.distill match --minutes 15``: Diff-Instruct in plain torch, without a reward,
   when no run of this project's loop is wanted; else
   ``rlhf-t2i run zoo/recipes/distill.yaml --out zoo/work/distill`` and ``python -m zoo.distill export RUN``.
4. ``python -m zoo.distill export-match``: to ``generator``, in fp16.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from zoo import data, device, latents, noise, reader, reference, text
from zoo.training import join, load_average, train

TIMESTEP, GUIDANCE, SOLVER_STEPS = 399, 3.0, 10
MATCH_GUIDANCE, MATCH_TIMES = 3.0, (100, 980)


def teacher(stable: bool) -> nn.ModuleDict:
    """The reference."""
    return load_average("reference" if stable else "reference_finished", reference.build())


def pairs(count: int, stable: bool, part: int, parts: int) -> None:
    """Noise z and the reference's guided samples x0 [64, C, 16, 16] from it, in files of 64."""
    modules = teacher(stable)
    every = latents.prompts()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(5)).tolist()
    folder = data.WORK / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(part, math.ceil(count / 64), parts):
        path = folder / f"{number:04}.pt"
        if path.is_file():
            continue
        chosen = [order[(number * 64 + i) % len(order)] for i in range(64)]
        z = torch.randn(64, reference.CHANNELS, 16, 16, generator=torch.Generator().manual_seed(number))
        x0 = reference.sample(modules, [every[i] for i in chosen], GUIDANCE, SOLVER_STEPS, start=z)
        latents.write({"prompts": torch.tensor(chosen), "z": z.half(), "x0": x0.half()}, path)
        print(path.name, flush=True)


def one_step(modules: nn.ModuleDict, z: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    """x0 [B, C, 16, 16]."""
    alpha, sigma = (float(c[TIMESTEP]) for c in noise.coefficients())
    return (z - sigma * reference.predict(modules, z, torch.full((len(z),), TIMESTEP), embeds, pooled)) / alpha


@torch.no_grad()
def conditions(modules: nn.ModuleDict) -> tuple[Tensor, Tensor]:
    """The text encoders' answers to every prompt."""
    ids = text.tokenizer()(latents.prompts(), padding="max_length", return_tensors="pt").input_ids
    with torch.autocast("cpu", torch.bfloat16):
        parts = [reference.encode(modules, part) for part in ids.split(114)]
    embeds, pooled = (torch.cat(part).float() for part in zip(*parts, strict=True))
    return embeds, pooled


def evaluate(unet: nn.Module, embeds: Tensor, pooled: Tensor, name: str, each: int = 96) -> dict[str, Any]:
    """What the reader finds in the generator's pictures of every split."""
    vae = AutoencoderKL.from_pretrained(data.OUT / "reference/vae", torch_dtype=torch.float32).eval()
    every = {prompt: i for i, prompt in enumerate(latents.prompts())}
    names, judge, result, shown = data.load().names, reader.load(), {}, []
    for number, split in enumerate(reference.SPLITS):
        prompts = reference.lines(split)[:each]
        index = torch.tensor([every[p] for p in prompts])
        z = torch.randn(len(index), reference.CHANNELS, 16, 16, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            x0 = one_step(nn.ModuleDict({"unet": unet}), z, embeds[index], pooled[index])
        pictures = reference.decode(vae, x0)
        result[split] = reader.report(judge, pictures, prompts, names)
        shown.append(pictures[:24])
    grid = data.grid(torch.cat(shown), 12)
    grid.resize((grid.width * 2, grid.height * 2), 0).save(data.WORK / f"{name}.png")
    return result


def warmup(minutes: float, batch: int, stable: bool, lr: float) -> None:
    """Regress the reference's samples from their noise in one step (as DMD2 starts), on every name."""
    source = teacher(stable)
    embeds, pooled = conditions(source)
    parts = [torch.load(path, weights_only=True) for path in sorted((data.WORK / "pairs").glob("*.pt"))]
    stored = {key: torch.cat([part[key] for part in parts]) for key in ("prompts", "z", "x0")}
    modules = nn.ModuleDict({"unet": source["unet"].requires_grad_(True).train()})
    modules["unet"].set_attn_processor(AttnProcessor())

    def loss(number: int) -> Tensor:
        index = torch.randint(len(stored["z"]), (batch,), generator=torch.Generator().manual_seed(number))
        where = stored["prompts"][index]
        x0 = one_step(modules, stored["z"][index].float(), embeds[where], pooled[where])
        return F.smooth_l1_loss(x0, stored["x0"][index].float(), beta=0.3)

    average = train("warmup", modules, loss, minutes=minutes, lr=lr, muon=True, ema_decay=0.99, warmup=30,
                    batch=batch * join()[1])  # fmt: skip
    if join()[0] == 0:
        print(evaluate(average["unet"], embeds, pooled, "warmup"))
        average["unet"].save_pretrained(data.WORK / "warm_generator")


def match(minutes: float, batch: int, stable: bool) -> None:
    """Diff-Instruct: the generator follows the difference of the reference's and its own student's pictures."""
    real = teacher(stable)
    embeds, pooled = conditions(real)
    warm = load_average("warmup", nn.ModuleDict({"unet": reference.unet()}))["unet"]
    modules = nn.ModuleDict({"unet": warm, "fake": copy.deepcopy(real["unet"])}).requires_grad_(True).train()
    for unet in (*modules.values(), real["unet"]):
        unet.set_attn_processor(AttnProcessor())
    fake = nn.ModuleDict({"unet": modules["fake"]})
    every = {prompt: i for i, prompt in enumerate(latents.prompts())}
    allowed = torch.tensor([every[p] for p in reference.lines("train")])

    def noised(x0: Tensor, generator: torch.Generator, low: int, high: int) -> tuple[Tensor, ...]:
        t = low + (noise.timesteps(len(x0), generator) * (high - low) / noise.STEPS).long()
        eps = torch.randn(x0.shape, generator=generator)
        alpha, sigma = (c[t][:, None, None, None] for c in noise.coefficients())
        return t, eps, alpha, sigma, alpha * x0 + sigma * eps

    def loss(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        where = allowed[torch.randint(len(allowed), (batch,), generator=generator)]
        z = torch.randn(batch, reference.CHANNELS, 16, 16, generator=generator)
        words, whole = embeds[where], pooled[where]
        x0 = one_step(modules, z, words, whole)
        with torch.no_grad():
            t, _, alpha, sigma, x_t = noised(x0.detach(), generator, *MATCH_TIMES)
            both = reference.predict(real, torch.cat([x_t, x_t]), torch.cat([t, t]),
                                     torch.cat([words, 0 * words]), torch.cat([whole, 0 * whole]))  # fmt: skip
            with_prompt, without = both.chunk(2)
            true = (x_t - sigma * (without + MATCH_GUIDANCE * (with_prompt - without))) / alpha
            own = (x_t - sigma * reference.predict(fake, x_t, t, words, whole)) / alpha
            gradient = (own - true) / (x0 - true).abs().mean(dim=(1, 2, 3), keepdim=True)
        follow = (x0 * gradient).mean()
        t, eps, _, _, x_t = noised(x0.detach(), generator, 0, noise.STEPS)
        student = (reference.predict(fake, x_t, t, words, whole) - eps).square().mean(dim=(1, 2, 3))
        return follow + (student * noise.min_snr(t)).mean()

    def make(modules: nn.ModuleDict) -> list[torch.optim.Optimizer]:
        groups = [
            {"params": list(modules["unet"].parameters()), "scale": 0.35},
            {"params": list(modules["fake"].parameters())},
        ]
        return [torch.optim.AdamW(groups, lr=2e-4, betas=(0.0, 0.99), weight_decay=0.0)]

    train("match", modules, loss, minutes=minutes, lr=2e-4, ema_decay=0.98, warmup=20, batch=batch * join()[1],
          constant=True, make=make, evaluate=lambda a: evaluate(a["unet"], embeds, pooled, "match"),
          evaluate_seconds=300)  # fmt: skip


def main() -> None:
    """One of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stable", action="store_true", help="the reference before its learning rate was lowered")
    commands = parser.add_subparsers(dest="command", required=True)
    pair = commands.add_parser("pairs")
    pair.add_argument("--count", type=int, default=3000)
    pair.add_argument("--part", type=int, default=0, help="of --parts processes that share the work")
    pair.add_argument("--parts", type=int, default=1)
    for name in ("warmup", "match"):
        one = commands.add_parser(name)
        one.add_argument("--minutes", type=float, default=math.inf)
        one.add_argument("--batch", type=int, default=32, help="of a process")
    commands.add_parser("export-match")
    commands.add_parser("export").add_argument("run", type=Path)
    args = parser.parse_args()
    device.cpu_only(parser)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.command == "pairs":
        pairs(args.count, args.stable, args.part, args.parts)
    elif args.command == "warmup":
        warmup(args.minutes, args.batch, args.stable, lr=5e-4)
    elif args.command == "match":
        match(args.minutes, args.batch, args.stable)
    elif args.command == "export-match":
        modules = load_average("match", nn.ModuleDict({"unet": reference.unet(), "fake": reference.unet()}))
        modules["unet"].half().save_pretrained(data.OUT / "generator")
    else:
        unet = UNet2DConditionModel.from_pretrained(args.run / "model/unet", torch_dtype=torch.float32)
        unet.half().save_pretrained(data.OUT / "generator")


if __name__ == "__main__":
    main()
