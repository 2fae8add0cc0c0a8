"""Make emoji64's generators, after zoo.reference and zoo.flow.

1. ``python -m zoo.distill pairs --count 6016``: the reference's own samples from noise (resumable).
2. ``torchrun --nproc-per-node 2 -m zoo.distill warmup --minutes 20``: regression on them, in one step.
3. ``rlhf-t2i run recipes/emoji64/distill.yaml --set models.generator=ZOO_WORK/warm_generator --out RUN``:
   Diff-Instruct by this project's own loop.
4. ``python -m zoo.distill export RUN``: to ``generator``, in fp16.

The flow sister's, which draws in one step or four, likewise: ``pairs --flow``, ``warmup --flow``, then
recipes/emoji64/distill_flow.yaml, and ``export --flow RUN``.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from zoo import data, device, flow, latents, noise, reader, reference, text
from zoo.training import join, load_average, train

TIMESTEP, GUIDANCE, SOLVER_STEPS, FLOW_STEPS = 399, 3.0, 12, 20


def teacher() -> nn.ModuleDict:
    """The networks of the exported reference, in float32."""
    modules = reference.build()
    pipeline = StableDiffusionXLPipeline.from_pretrained(data.OUT / "reference", torch_dtype=torch.float32)
    for name, module in modules.items():
        module.load_state_dict(getattr(pipeline, name).state_dict())
    return modules.to(device.DEVICE).eval().requires_grad_(False)


def pairs(count: int, part: int, parts: int, of_flow: bool = False) -> None:
    """Noise z and the reference's guided samples x0 [64, C, 16, 16] from it, in files of 64."""
    modules = load_average("flow_finished", flow.build()) if of_flow else teacher()
    every = latents.prompts()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(5)).tolist()
    folder = _pairs(of_flow)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(part, math.ceil(count / 64), parts):
        path = folder / f"{number:04}.pt"
        if path.is_file():
            continue
        chosen = [order[(number * 64 + i) % len(order)] for i in range(64)]
        z = torch.randn(64, reference.CHANNELS, 16, 16, generator=torch.Generator().manual_seed(number))
        prompts = [every[i] for i in chosen]
        x0 = (flow.sample(modules, prompts, FLOW_STEPS, start=z) if of_flow else
              reference.sample(modules, prompts, GUIDANCE, SOLVER_STEPS, start=z))  # fmt: skip
        latents.write({"prompts": torch.tensor(chosen), "z": z.half(), "x0": x0.half().cpu()}, path)
        print(path.name, flush=True)


def _pairs(of_flow: bool) -> Path:
    return data.WORK / ("flow_pairs" if of_flow else "pairs")


def one_step(modules: nn.ModuleDict, z: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    """x0 [B, C, 16, 16]."""
    alpha, sigma = (c[TIMESTEP] for c in noise.coefficients())
    t = torch.full((len(z),), TIMESTEP, device=z.device)
    return (z - sigma * reference.predict(modules, z, t, embeds, pooled)) / alpha


@torch.no_grad()
def conditions(modules: nn.ModuleDict) -> tuple[Tensor, Tensor]:
    """The text encoders' answers to every prompt."""
    ids = device.here(text.tokenizer()(latents.prompts(), padding="max_length", return_tensors="pt").input_ids)
    with device.autocast():
        parts = [reference.encode(modules, part) for part in ids.split(114)]
    embeds, pooled = (torch.cat(part).float() for part in zip(*parts, strict=True))
    return embeds, pooled


def evaluate(unet: nn.Module, embeds: Tensor, pooled: Tensor, name: str, each: int = 96) -> dict[str, Any]:
    """What the reader finds in the generator's pictures of every split."""
    vae = AutoencoderKL.from_pretrained(data.OUT / "reference/vae", torch_dtype=torch.float32).eval()
    vae.to(device.DEVICE)
    every = {prompt: i for i, prompt in enumerate(latents.prompts())}
    names, judge, result, shown = data.load().names, reader.load(), {}, []
    for number, split in enumerate(reference.SPLITS):
        prompts = reference.lines(split)[:each]
        index = device.here(torch.tensor([every[p] for p in prompts]))
        z = device.here(
            torch.randn(len(index), reference.CHANNELS, 16, 16, generator=torch.Generator().manual_seed(number))
        )
        with torch.no_grad():
            x0 = one_step(nn.ModuleDict({"unet": unet}), z, embeds[index], pooled[index])
        pictures = reference.decode(vae, x0)
        result[split] = reader.report(judge, pictures, prompts, names)
        shown.append(pictures[:24])
    grid = data.grid(torch.cat(shown), 12)
    grid.resize((grid.width * 2, grid.height * 2), 0).save(data.WORK / f"{name}.png")
    return result


def stored_pairs(of_flow: bool = False) -> dict[str, Tensor]:
    """All pairs on the device: numbers of prompts [N], z and x0 [N, C, 16, 16] in fp16."""
    parts = [torch.load(path, weights_only=True) for path in sorted(_pairs(of_flow).glob("*.pt"))]
    return {key: device.here(torch.cat([part[key] for part in parts])) for key in ("prompts", "z", "x0")}


def loss_fn(modules: nn.ModuleDict, stored: dict[str, Tensor], embeds: Tensor, pooled: Tensor, seed: int,
            size: int) -> Tensor:  # fmt: skip
    """Distance of the generator's outputs from the reference's samples from the same noise."""
    index = device.randint(len(stored["z"]), size, device.generator(seed))
    where = stored["prompts"][index]
    x0 = one_step(modules, stored["z"][index].float(), embeds[where], pooled[where])
    return F.smooth_l1_loss(x0, stored["x0"][index].float(), beta=0.3)


def warmup(minutes: float, batch: int, lr: float) -> None:
    """Regress the reference's samples from their noise in one step (as DMD2 starts), on every name."""
    source = teacher()
    embeds, pooled = conditions(source)
    stored = stored_pairs()
    modules = nn.ModuleDict({"unet": source["unet"].requires_grad_(True).train()})
    if not device.on_cuda():
        modules["unet"].set_attn_processor(AttnProcessor())  # on a CPU faster in training than the fused one
    average = train(
        "warmup", modules, lambda number: loss_fn(modules, stored, embeds, pooled, number, batch), minutes=minutes,
        lr=lr, muon=True, ema_decay=0.99, warmup=30, batch=batch * join()[1],
        evaluate=lambda found: evaluate(found["unet"], embeds, pooled, "warmup_training"), evaluate_seconds=600,
    )  # fmt: skip
    if join()[0] == 0:
        print(evaluate(average["unet"], embeds, pooled, "warmup"))
        average["unet"].cpu().save_pretrained(data.WORK / "warm_generator")


def flow_loss(net: Callable[..., Any], stored: dict[str, Tensor], known: tuple[Tensor, Tensor], seed: int,
              size: int) -> Tensor:  # fmt: skip
    """The same for the flow sister: half of the batch from its noise alone, half at the later of four steps."""
    generator = device.generator(seed)
    index = device.randint(len(stored["z"]), size, generator)
    z, x0 = stored["z"][index].float(), stored["x0"][index].float()
    s = 1 - (device.randint(6, size, generator) - 2).clamp(min=0) / 4
    mix = s[:, None, None, None]
    start = torch.where(mix == 1, z, x0.lerp(device.randn(*x0.shape, generator=generator), mix))
    embeds, pooled = (part[stored["prompts"][index]] for part in known)
    return F.smooth_l1_loss(start - mix * flow.predict(net, start, s, embeds, pooled), x0, beta=0.3)


def warmup_flow(minutes: float, batch: int, lr: float) -> None:
    """Regress the reference's samples from their noise, in one step and in the later ones of four."""
    known, stored = flow.conditions(latents.prompts()), stored_pairs(of_flow=True)
    modules = load_average("flow_finished", flow.build()).requires_grad_(True).train()
    net = modules["transformer"].to(device.DEVICE)
    compiled = net if device.on_cuda() else torch.compile(net, dynamic=False)
    average = train(
        "warmup_flow", modules, lambda number: flow_loss(compiled, stored, known, number, batch), minutes=minutes,
        lr=lr, muon=True, ema_decay=0.99, warmup=30, batch=batch * join()[1],
    )  # fmt: skip
    if join()[0] == 0:
        average["transformer"].cpu().save_pretrained(data.WORK / "warm_flow_generator")


def main() -> None:
    """One of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    pair = commands.add_parser("pairs")
    pair.add_argument("--flow", action="store_true", help="of the flow sister")
    pair.add_argument("--count", type=int, default=3000)
    pair.add_argument("--part", type=int, default=0, help="of --parts processes that share the work")
    pair.add_argument("--parts", type=int, default=1)
    warm = commands.add_parser("warmup")
    warm.add_argument("--minutes", type=float, default=math.inf)
    warm.add_argument("--batch", type=int, default=32, help="of a process")
    warm.add_argument("--flow", action="store_true", help="the flow sister's")
    export = commands.add_parser("export")
    export.add_argument("run", type=Path)
    export.add_argument("--flow", action="store_true", help="the flow sister's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if args.command == "pairs":
        pairs(args.count, args.part, args.parts, args.flow)
    elif args.command == "warmup":
        (warmup_flow if args.flow else warmup)(args.minutes, args.batch, lr=5e-4)
    else:
        cls, part = (SD3Transformer2DModel, "transformer") if args.flow else (UNet2DConditionModel, "unet")
        network = cls.from_pretrained(args.run / "model" / part, torch_dtype=torch.float32)
        network.half().save_pretrained(data.OUT / ("flow/generator" if args.flow else "generator"))


if __name__ == "__main__":
    main()
