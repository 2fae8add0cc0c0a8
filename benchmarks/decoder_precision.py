"""What a coarser decoder changes in a reward and its gradient, beside the 8 bits of a saved picture; in emoji64.

``python benchmarks/decoder_precision.py`` draws held-out prompts with the reference, decodes them in several ways, and
compares each with a float32 decoder: the picture, PickScore of the picture, and PickScore's gradient at the latents.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rlhf_t2i.families import registry as families
from rlhf_t2i.families import sources
from rlhf_t2i.plugins import registry
from rlhf_t2i.utils.images import to_8_bits

ZOO = Path(__file__).parents[1] / "zoo/emoji64"
Decode = Callable[[Tensor], Tensor]


def draw(prompts: list[str]) -> Tensor:
    """The reference's latents of the prompts [B, C, h, w]."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(ZOO / "reference", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    latents: Tensor = pipe(prompts, num_inference_steps=20, generator=seeds, output_type="latent").images
    return latents


def decoders() -> dict[str, Decode]:
    """Ways to decode by name; the first is compared with the others."""
    family = families.find(sources.parse(str(ZOO / "reference")))
    whole, half = family.load_decoder().float(), family.load_decoder().to(torch.bfloat16)

    def rounded(latents: Tensor) -> Tensor:
        images = whole.decode(latents)
        return images + (to_8_bits(images).float() / 255 - images).detach()

    def mixed(latents: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # norms and softmax in float32
            return whole.decode(latents)

    return {"float32": whole.decode, "float32, 8 bits": rounded, "bf16": half.decode, "bf16, norms in float32": mixed}


def measure(decode: Decode, scorer: str, latents: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, values [B] and gradients at the latents."""
    reward = registry.reward("pickscore", model=str(ZOO / scorer)).eval().requires_grad_(False)
    leaf = latents.clone().requires_grad_(True)
    images = decode(leaf).float()
    values = reward.score(images, prompts)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return images.detach(), values.detach(), gradient


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    count = parser.parse_args().prompts
    prompts = (ZOO / "prompts/held_out.txt").read_text("utf-8").splitlines()[:count]
    latents = draw(prompts)
    print("| scorer | decoder | picture, of 255 levels | value, of its spread | gradient, relative | its cosine |")
    print("|---|---|---:|---:|---:|---:|")
    for scorer in ("pickscore", "judge"):
        images, values, gradient = (torch.empty(0),) * 3
        for name, decode in decoders().items():
            found = measure(decode, scorer, latents, prompts)
            if name == "float32":
                images, values, gradient = found
                continue
            picture = float((found[0] - images).square().mean().sqrt()) * 255
            value = float((found[1] - values).square().mean().sqrt() / values.std())
            flat, other = gradient.flatten(1), found[2].flatten(1)
            relative = float(((other - flat).norm(dim=1) / flat.norm(dim=1)).mean())
            cosine = float(torch.cosine_similarity(other, flat).mean())
            print(f"| {scorer} | {name} | {picture:.2f} | {value:.2%} | {relative:.2%} | {cosine:.5f} |")


if __name__ == "__main__":
    main()
