"""Train emoji64's flow sister, a small StableDiffusion3Pipeline. ``python -m zoo.flow`` (after zoo.reference).

Started, finished and exported like ``zoo.reference``.

The same latents, VAE and tokenizer. Its two CLIP text encoders start from the reference's and are trained on. Without
a T5 encoder StableDiffusion3Pipeline appends ``max_sequence_length`` (by default 256) zero vectors to the prompt: the
model is trained without them, and one batch in twelve with 256, so that the default call works too.
"""

from __future__ import annotations

import argparse
import itertools
import math

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn

from zoo import data, device, latents, reader, reference, text
from zoo.training import join, load_average, train

BATCH, ZEROS, ZEROS_EVERY = 48, 256, 12
HEADS, HEAD, LAYERS = 5, 32, 5


def transformer() -> SD3Transformer2DModel:
    """Four and a half million parameters on 8x8 patches."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=reference.CHANNELS,
        out_channels=reference.CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD,
        num_attention_heads=HEADS,
        joint_attention_dim=sum(reference.WIDTHS),
        caption_projection_dim=HEADS * HEAD,
        pooled_projection_dim=sum(reference.WIDTHS),
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def build() -> nn.ModuleDict:
    """The trained networks: transformer and both text encoders."""
    tokens = text.tokenizer()
    ids = (len(tokens), tokens.eos_token_id, tokens.bos_token_id)
    widths = reference.WIDTHS
    encoders = {f"text_encoder{end}": text.encoder(w, *ids, projection=True) for end, w in zip(("", "_2"), widths)}  # noqa: B905
    return nn.ModuleDict({"transformer": transformer(), **encoders})


@torch.no_grad()
def warm_start(modules: nn.ModuleDict) -> None:
    """The text encoders of the reference; the first one's projection is new."""
    source = reference.build()
    load_average("reference_finished" if (data.WORK / "reference_finished.pt").is_file() else "reference", source)
    for name in ("text_encoder", "text_encoder_2"):
        modules[name].load_state_dict(source[name].state_dict(), strict=False)
    # As DiT starts: every block as the identity, the output as zero.
    net = modules["transformer"]
    for block in net.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for linear in (net.norm_out.linear, net.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def encode(modules: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """SD3's conditioning: both penultimate hidden states side by side, both projections side by side."""
    outputs = [modules[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    hidden = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
    return hidden, torch.cat([out.text_embeds for out in outputs], dim=-1)


def predict(modules: nn.ModuleDict, x: Tensor, s: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    """The velocity noise - x0 at times s in [0, 1], in float32."""
    with torch.autocast("cpu", torch.bfloat16), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return modules["transformer"](x, embeds, pooled, s * 1000).sample.float()


def loss_fn(modules: nn.ModuleDict, stored: latents.Latents, seed: int, size: int, dropout: float = 0.1,
            zeros: bool = False) -> Tensor:  # fmt: skip
    """Mean squared error of the velocity, times logit-normal and stratified; dropped prompts are the empty one's."""
    generator = torch.Generator().manual_seed(seed)
    size = size // 4 if zeros else size
    x0, ids = stored.batch(generator, size)
    place = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    s = torch.special.ndtri(place.clamp(1e-4, 1 - 1e-4)).sigmoid()[torch.randperm(size, generator=generator)]
    noise = torch.randn(x0.shape, generator=generator)
    empty = text.tokenizer()([""], padding="max_length", return_tensors="pt").input_ids if dropout else ids[:1]
    ids = torch.where(torch.rand(size, 1, generator=generator) < dropout, empty, ids)
    with torch.autocast("cpu", torch.bfloat16):
        embeds, pooled = encode(modules, ids)
    if zeros:
        embeds = nn.functional.pad(embeds, (0, 0, 0, ZEROS))
    mix = s[:, None, None, None]
    return (predict(modules, x0.lerp(noise, mix), s, embeds, pooled) - (noise - x0)).square().mean()


@torch.no_grad()
def sample(modules: nn.ModuleDict, prompts: list[str], guidance: float, steps: int, seed: int = 0) -> Tensor:
    """Latents of prompts by Heun's method with guidance, ``steps`` evaluations."""
    tokens = text.tokenizer()
    ids = tokens([*prompts, ""], padding="max_length", return_tensors="pt").input_ids
    start = torch.randn(len(prompts), reference.CHANNELS, 16, 16, generator=torch.Generator().manual_seed(seed))
    with torch.autocast("cpu", torch.bfloat16):
        embeds, pooled = encode(modules, ids)

    def velocity(x: Tensor, s: Tensor, part: slice) -> Tensor:
        words = torch.cat([embeds[:-1][part], embeds[-1:].expand(len(x), -1, -1)])
        whole = torch.cat([pooled[:-1][part], pooled[-1:].expand(len(x), -1)])
        with_prompt, without = predict(modules, torch.cat([x, x]), s.expand(2 * len(x)), words, whole).chunk(2)
        return without + guidance * (with_prompt - without)

    times = torch.linspace(1, 0, steps // 2 + 1)
    found = []
    for part in (slice(i, i + 32) for i in range(0, len(prompts), 32)):
        x = start[part]
        for now, after in itertools.pairwise(times):
            first = velocity(x, now, part)
            ahead = x + (after - now) * first
            x = ahead if after == 0 else x + (after - now) * (first + velocity(ahead, after, part)) / 2
        found.append(x)
    return torch.cat(found)


def evaluate(modules: nn.ModuleDict, name: str, each: int = 40, guidance: float = 3.5,
             steps: int = 16) -> dict[str, dict[str, float]]:  # fmt: skip
    """What the reader finds in samples of every split, and a picture of some."""
    vae = AutoencoderKL.from_pretrained(data.OUT / "reference/vae", torch_dtype=torch.float32).eval()
    names, judge, result, shown = data.load().names, reader.load(), {}, []
    for number, split in enumerate(reference.SPLITS):
        prompts = reference.lines(split)[:each]
        pictures = reference.decode(vae, sample(modules, prompts, guidance, steps, seed=number))
        result[split] = reader.report(judge, pictures, prompts, names)
        shown.append(pictures[:24])
    grid = data.grid(torch.cat(shown), 12)
    grid.resize((grid.width * 2, grid.height * 2), 0).save(data.WORK / f"{name}.png")
    return result


def export(modules: nn.ModuleDict) -> None:
    """Save ``flow/reference`` as a StableDiffusion3Pipeline in fp16."""
    tokens = text.tokenizer()
    StableDiffusion3Pipeline(
        transformer=modules["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=AutoencoderKL.from_pretrained(data.OUT / "reference/vae"),
        text_encoder=modules["text_encoder"],
        tokenizer=tokens,
        text_encoder_2=modules["text_encoder_2"],
        tokenizer_2=tokens,
        text_encoder_3=None,
        tokenizer_3=None,
    ).to(torch.float16).save_pretrained(data.OUT / "flow/reference")


def main() -> None:
    """Train (or resume), or export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop by then")
    parser.add_argument("--finish", type=float, help="minutes in which to lower the learning rate to zero")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=BATCH, help="of a process")
    parser.add_argument("--export", action="store_true")
    parser.add_argument("--stable", action="store_true", help="the average of the constant learning rate")
    parser.add_argument("--evaluate", type=int, default=0, help="pictures a split; only measure")
    args = parser.parse_args()
    device.cpu_only(parser)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    modules = build()
    print(f"{sum(p.numel() for p in modules['transformer'].parameters()) / 1e6:.2f} M", flush=True)
    checkpoint = "flow" if args.stable else "flow_finished"
    if args.export:
        export(load_average(checkpoint, modules))
        return
    if args.evaluate:
        print(evaluate(load_average(checkpoint, modules), checkpoint, args.evaluate))
        return
    stored = latents.Latents()
    if not (data.WORK / "flow.pt").is_file():
        warm_start(modules)
    train(
        "flow", modules,
        lambda number: loss_fn(modules, stored, number, args.batch, zeros=number // join()[1] % ZEROS_EVERY == 11),
        lr=args.lr, minutes=args.minutes, finish=args.finish, constant=True, muon=True, ema_decay=0.998,
        weight_decay=0.05, batch=args.batch * join()[1], evaluate=lambda a: evaluate(a, "flow_training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
