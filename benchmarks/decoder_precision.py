"""What a coarser decoder changes in a reward and its gradient, beside the 8 bits of a saved picture; in emoji64.

``python benchmarks/decoder_precision.py`` draws held-out prompts with the reference, decodes them in several ways, and
compares each with a float32 decoder: the picture, PickScore of the picture, and PickScore's gradient at the latents.

emoji64's decoder has no attention. For "attention in bf16" (``models.vae_precision: mixed`` on CUDA) it gets SDXL's one
layer of it in the middle, with random weights, at several strengths: the spread of its scores before the softmax, and
its output's size beside what it is added to. Each is compared with the same decoder in float32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from rlhf_t2i.families import registry as families
from rlhf_t2i.families import sources
from rlhf_t2i.families.base import Decoder
from rlhf_t2i.families.frozen import halve_attention
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

    def mixed(latents: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):  # norms and softmax in float32
            return whole.decode(latents)

    return {
        "float32": whole.decode,
        "float32, 8 bits": partial(rounded, whole),
        "bf16": half.decode,
        "bf16, norms in float32": mixed,
    }


def attentive(latents: Tensor, sharpness: float, share: float) -> dict[str, Decode]:
    """The float32 decoder with random attention in the middle, its 8 bits, and its attention in bf16.

    Args:
        latents: What the strengths are measured on.
        sharpness: Standard deviation of the scores before the softmax.
        share: Root mean square of its output, of that of its input.
    """
    family = families.find(sources.parse(str(ZOO / "reference")))
    plain = family.load_decoder().float()
    config = dict(plain.vae.config) | {"mid_block_add_attention": True}
    vae = type(plain.vae).from_config(config)
    missing, unexpected = vae.load_state_dict(plain.vae.state_dict(), strict=False)
    assert not unexpected
    assert all("attentions" in name for name in missing)
    attention = vae.decoder.mid_block.attentions[0]
    seen: dict[str, Tensor] = {}
    attention.register_forward_hook(lambda _module, inputs, output: seen.update(input=inputs[0], output=output))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer, spread in (
            (attention.to_q, sharpness**0.5),
            (attention.to_k, sharpness**0.5),
            (attention.to_v, 1.0),
            (attention.to_out[0], 1.0),
        ):
            layer.bias.zero_()
            layer.weight.normal_(0.0, spread / layer.in_features**0.5, generator=random)
    decoder = family.make_decoder(vae)
    with torch.no_grad():
        decoder.decode(latents[:8])
        branch = seen["output"] - seen["input"]
        attention.to_out[0].weight *= share * seen["input"].square().mean().sqrt() / branch.square().mean().sqrt()
    whole, half = decoder, family.make_decoder(copy.deepcopy(vae))
    halve_attention(half, half.attention_names)
    return {"float32": whole.decode, "8 bits": partial(rounded, whole), "attention in bf16": half.decode}


def rounded(decoder: Decoder, latents: Tensor) -> Tensor:
    """A decoder's pictures as they are saved; the gradient is as if they were not."""
    images = decoder.decode(latents)
    return images + (to_8_bits(images).float() / 255 - images).detach()


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
    ways = {"": decoders()}
    for sharpness, share in ((1.0, 0.5), (3.0, 0.5), (3.0, 2.0)):
        ways[f", attention of scores {sharpness:g}, output {share:g}"] = attentive(latents, sharpness, share)
    for scorer, (kind, several) in product(("pickscore", "judge"), ways.items()):
        images, values, gradient = (torch.empty(0),) * 3
        for way, decode in several.items():
            found = measure(decode, scorer, latents, prompts)
            if way == "float32":
                images, values, gradient = found
                continue
            name = way + kind
            picture = float((found[0] - images).square().mean().sqrt()) * 255
            value = float((found[1] - values).square().mean().sqrt() / values.std())
            flat, other = gradient.flatten(1), found[2].flatten(1)
            relative = float(((other - flat).norm(dim=1) / flat.norm(dim=1)).mean())
            cosine = float(torch.cosine_similarity(other, flat).mean())
            print(f"| {scorer} | {name} | {picture:.2f} | {value:.2%} | {relative:.2%} | {cosine:.5f} |")


if __name__ == "__main__":
    main()
