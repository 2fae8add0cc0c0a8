"""Train emoji64's flow sister, a small StableDiffusion3Pipeline. ``python -m zoo.flow`` (after zoo.reference).

Started, finished and exported like ``zoo.reference``, on the same latents, VAE, tokenizer and text encoders (frozen).

Its teacher is that reference: the regression target is not the noise and the picture that made x_s, but the velocity
(x_s - D) / s of the reference's own prediction D of the picture, which has hardly any variance, so that far fewer
samples do. D has the guidance of :data:`GUIDANCE` in it (arXiv 2210.03142), as FLUX.1-dev has: the flow sister is drawn
from without guidance. Two of its blocks also predict what two of the reference's pass on at the same place
(:class:`Watched`), which are forgotten after training.

Without a T5 encoder StableDiffusion3Pipeline appends ``max_sequence_length`` (by default 256) zero vectors to the
prompt. They are alike and stay alike through every block, so that training puts one in their place, which attention
counts 256 times (:class:`ManyZeros`): the same function at a quarter of the cost.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn

from zoo import data, device, latents, noise, reader, reference, text
from zoo.training import join, load_average, train

BATCH, ZEROS = 32, 256
GUIDANCE = 3.0
SHARED = (
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder_2/model.safetensors",
    *(f"{folder}/{file}.json" for folder in ("tokenizer", "tokenizer_2") for file in ("tokenizer", "tokenizer_config")),
)
BLOCKS = {"mid_block": "transformer_blocks.2", "up_blocks.0.attentions.1": "transformer_blocks.4"}  # teacher's, ours
WIDTH, FEATURES = 160, 0.2  # of the teacher's features, and the weight of their error
HEADS, HEAD, LAYERS = 4, 32, 6


def transformer() -> SD3Transformer2DModel:
    """Three and a half million parameters on 8x8 patches."""
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


class ManyZeros:
    """SD3's joint attention where the last token of the prompt stands for ``ZEROS`` equal ones."""

    def __call__(self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor,
                 attention_mask: None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The image's tokens [B, N, D] and the prompt's [B, L, D]."""
        split = lambda x: x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        query, key, value = (split(f(hidden_states)) for f in (attn.to_q, attn.to_k, attn.to_v))
        words = [split(f(encoder_hidden_states)) for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
        query = torch.cat([attn.norm_q(query), attn.norm_added_q(words[0])], dim=2)
        key = torch.cat([attn.norm_k(key), attn.norm_added_k(words[1])], dim=2)
        count = torch.zeros(key.shape[2], device=key.device)
        count[-1] = math.log(ZEROS)  # exp(score + log n) is n equal terms of the softmax
        found = nn.functional.scaled_dot_product_attention(
            query, key, torch.cat([value, words[2]], dim=2), attn_mask=count.to(query.dtype).expand(1, 1, 1, -1)
        )
        image, prompt = found.transpose(1, 2).flatten(2).split([hidden_states.shape[1], words[0].shape[2]], dim=1)
        return attn.to_out[0](image), prompt if attn.context_pre_only else attn.to_add_out(prompt)


@torch.no_grad()
def build() -> nn.ModuleDict:
    """The trained network, as DiT starts: every block as the identity, the output as zero."""
    net = transformer()
    for block in net.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    for linear in (net.norm_out.linear, net.proj_out):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    net.set_attn_processor(ManyZeros())
    probes = nn.ModuleList(nn.Linear(HEADS * HEAD, WIDTH) for _ in BLOCKS)
    return nn.ModuleDict({"transformer": net, "probes": probes})


class Watched(nn.Module):
    """A network and what its blocks pass on: ``net(...)`` gives its prediction and tokens [B, N, D] of every block."""

    def __init__(self, net: nn.Module, blocks: Iterable[str]) -> None:
        super().__init__()
        self.net, self.blocks = net, list(blocks)
        self.seen: dict[str, Tensor] = {}
        for name in self.blocks:
            net.get_submodule(name).register_forward_hook(functools.partial(self._see, name))

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        found = output[-1] if isinstance(output, tuple) else output
        found = getattr(found, "sample", found)
        self.seen[name] = found.flatten(2).mT if found.ndim == 4 else found

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """The network's prediction, and tokens [B, N, D] of every block."""
        return self.net(*args, **kwargs).sample, [self.seen.pop(name) for name in self.blocks]


@torch.no_grad()
def encoders() -> nn.ModuleDict:
    """The reference's text encoders, frozen; the first one gets an identity as the projection that SD3 asks for."""
    source = StableDiffusionXLPipeline.from_pretrained(data.OUT / "reference", torch_dtype=torch.float32)
    tokens = text.tokenizer()
    first = text.encoder(reference.WIDTHS[0], len(tokens), tokens.eos_token_id, tokens.bos_token_id, projection=True)
    first.text_model.load_state_dict(source.text_encoder.state_dict())  # a CLIPTextModel is its own text_model
    first.text_projection.weight.copy_(torch.eye(reference.WIDTHS[0]))
    both = nn.ModuleDict({"text_encoder": first, "text_encoder_2": source.text_encoder_2})
    return both.to(device.DEVICE).eval().requires_grad_(False)


def encode(modules: nn.ModuleDict, ids: Tensor) -> tuple[Tensor, Tensor]:
    """SD3's conditioning: both penultimate hidden states side by side, both projections side by side."""
    outputs = [modules[name](ids, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    hidden = torch.cat([out.hidden_states[-2] for out in outputs], dim=-1)
    return hidden, torch.cat([out.text_embeds for out in outputs], dim=-1)


@torch.no_grad()
def conditions(prompts: list[str]) -> tuple[Tensor, Tensor]:
    """The text encoders' answers to prompts: hidden [N, L, 256] and pooled [N, 256]."""
    modules = encoders()
    ids = device.here(text.tokenizer()(prompts, padding="max_length", return_tensors="pt").input_ids)
    hidden, pooled = zip(*[encode(modules, part) for part in ids.split(114)], strict=True)
    return torch.cat(hidden), torch.cat(pooled)


def call(net: Callable[..., Any], x: Tensor, s: Tensor, embeds: Tensor, pooled: Tensor) -> Any:
    """What the network gives at times s in [0, 1]."""
    embeds = nn.functional.pad(embeds, (0, 0, 0, 1))
    kernel = torch.nn.attention.SDPBackend.FLASH_ATTENTION if device.on_cuda() else torch.nn.attention.SDPBackend.MATH
    with device.autocast(), torch.nn.attention.sdpa_kernel(kernel):
        return net(x, embeds, pooled, s * 1000)


def predict(net: Callable[..., Any], x: Tensor, s: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    """The velocity noise - x0 at times s in [0, 1], in float32."""
    return call(net, x, s, embeds, pooled).sample.float()


def times(size: int, generator: torch.Generator) -> Tensor:
    """Times [B] in (0, 1), stratified: half uniform, half logit-normal."""
    place = (torch.arange(size, device=device.DEVICE) + device.rand(size, generator=generator)) / size
    place = place[device.randperm(size, generator=generator)]
    normal = torch.special.ndtri((2 * place - 1).clamp(1e-4, 1 - 1e-4)).add(0.3).sigmoid()
    return torch.where(place < 0.5, (2 * place).clamp(1e-3, 1), normal)


def taught(unet: Callable[..., Any], x0: Tensor, s: Tensor, embeds: Tensor, pooled: Tensor, keep: Tensor,
           generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Noisy latents x_s, their times (of the reference's schedule), the velocity and features by the reference.

    Both paths hold the same mixtures: x_s (1 - s) / alpha is SDXL's x_t where sigma / alpha = s / (1 - s). SDXL's noise
    ends at s = 0.936; there, more noise on top of x_t leaves the reference's prediction an unbiased target. Where
    ``keep`` [B] is false, the prompt is dropped (zeros), and with it the guidance.
    """
    alphas, sigmas = noise.coefficients()
    known = sigmas / (alphas + sigmas)
    t = torch.searchsorted(known, s).clamp(max=noise.STEPS - 1)
    alpha, sigma = alphas[t][:, None, None, None], sigmas[t][:, None, None, None]
    x_t = alpha * x0 + sigma * device.randn(*x0.shape, generator=generator)
    words, whole = embeds * keep[:, None, None], pooled[:, reference.WIDTHS[0] :] * keep[:, None]
    added = {"text_embeds": torch.cat([whole, whole * 0]), "time_ids": reference.time_ids(2 * len(x0))}
    with torch.no_grad(), device.autocast():
        both, features = unet(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([words, words * 0]),
                              added_cond_kwargs=added)  # fmt: skip
    prompted, without = both.float().chunk(2)
    found = (x_t - sigma * without.lerp(prompted, GUIDANCE)) / alpha
    s = torch.maximum(s, known[-1]).where(s > known[-1], known[t])
    scale, end = (1 - s[:, None, None, None]) / alpha, s[:, None, None, None]
    more = (end.square() - (scale * sigma).square()).clamp(min=0).sqrt()
    x_s = scale * x_t + more * device.randn(*x0.shape, generator=generator)
    return x_s, s, (x_s - found) / end, [part[: len(x0)] for part in features]


def loss_fn(net: Callable[..., Any], probes: nn.ModuleList, lesson: Callable[..., tuple[Tensor, ...]], seed: int,
            size: int) -> Tensor:  # fmt: skip
    """Mean squared error of the velocity, and of the reference's features where blocks are watched."""
    x_s, s, target, features, embeds, pooled = lesson(device.generator(seed), size)
    found, tokens = call(net, x_s, s, embeds, pooled)
    missed = [(probe(ours.float()) - nn.functional.layer_norm(theirs.float(), [WIDTH])).square().mean()
              for probe, ours, theirs in zip(probes, tokens, features, strict=True)]  # fmt: skip
    return (found.float() - target).square().mean() + FEATURES * torch.stack(missed).mean()


def lesson(unet: Callable[..., Any], stored: latents.Latents, known: tuple[Tensor, Tensor], generator: torch.Generator,
           size: int, dropout: float = 0.1) -> tuple[Any, ...]:  # fmt: skip
    """x_s [B, C, 16, 16], s [B], the velocity, the reference's features and the prompts' embeddings.

    A dropped prompt is SDXL's zeros for the reference and SD3's empty prompt, the last of ``known``, for the sister.
    """
    index = device.randint(len(stored.latents), size, generator)
    x0, where = stored.latents[index].float(), stored.prompts[index].long()
    keep = device.rand(size, generator=generator) >= dropout
    answer = taught(unet, x0, times(size, generator), *(part[where] for part in known), keep, generator)
    where = torch.where(keep, where, len(known[0]) - 1)
    return *answer, *(part[where] for part in known)


@torch.no_grad()
def sample(
    modules: nn.ModuleDict, prompts: list[str], steps: int, seed: int = 0, start: Tensor | None = None
) -> Tensor:
    """Latents of prompts by Heun's method, ``steps`` evaluations; ``start`` [B, C, 16, 16] is the noise."""
    if start is None:
        start = torch.randn(len(prompts), reference.CHANNELS, 16, 16, generator=torch.Generator().manual_seed(seed))
    start, found = device.here(start), []
    embeds, pooled = conditions(prompts)
    grid = device.here(torch.linspace(1, 0, steps // 2 + 1))

    def velocity(x: Tensor, s: Tensor, part: slice) -> Tensor:
        return predict(modules["transformer"], x, s.expand(len(x)), embeds[part], pooled[part])

    for part in (slice(i, i + 32) for i in range(0, len(prompts), 32)):
        x = start[part]
        for now, after in itertools.pairwise(grid):
            first = velocity(x, now, part)
            ahead = x + (after - now) * first
            x = ahead if after == 0 else x + (after - now) * (first + velocity(ahead, after, part)) / 2
        found.append(x)
    return torch.cat(found)


def evaluate(modules: nn.ModuleDict, name: str, each: int = 40, steps: int = 16) -> dict[str, dict[str, float]]:
    """What the reader finds in samples of every split, and a picture of some."""
    vae = AutoencoderKL.from_pretrained(data.OUT / "reference/vae", torch_dtype=torch.float32).eval()
    vae.to(device.DEVICE)
    names, judge, result, shown = data.load().names, reader.load(), {}, []
    for number, split in enumerate(reference.SPLITS):
        prompts = reference.lines(split)[:each]
        pictures = reference.decode(vae, sample(modules, prompts, steps, seed=number))
        result[split] = reader.report(judge, pictures, prompts, names)
        shown.append(pictures[:24])
    grid = data.grid(torch.cat(shown), 12)
    grid.resize((grid.width * 2, grid.height * 2), 0).save(data.WORK / f"{name}.png")
    return result


def export(modules: nn.ModuleDict) -> None:
    """Save ``flow/reference`` as a StableDiffusion3Pipeline in fp16; what it shares with ``reference`` are links."""
    tokens, both = text.tokenizer(), encoders()
    folder = data.OUT / "flow/reference"
    vae = AutoencoderKL.from_pretrained(data.OUT / "reference/vae")
    vae.register_to_config(shift_factor=0.0, _name_or_path="")  # SD3's pipeline adds the shift
    modules["transformer"].set_attn_processor(JointAttnProcessor2_0())
    StableDiffusion3Pipeline(
        transformer=modules["transformer"],
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=both["text_encoder"],
        tokenizer=tokens,
        text_encoder_2=both["text_encoder_2"],
        tokenizer_2=tokens,
        text_encoder_3=None,
        tokenizer_3=None,
    ).to(torch.float16).save_pretrained(folder)
    for name in SHARED:
        (folder / name).unlink()
        (folder / name).symlink_to(Path("../../../reference") / name)


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
    stored, known = latents.Latents(), conditions([*latents.prompts(), ""])
    unet = StableDiffusionXLPipeline.from_pretrained(data.OUT / "reference", torch_dtype=torch.float32).unet
    unet.to(device.DEVICE).eval().requires_grad_(False)
    fast = (lambda net: net) if device.on_cuda() else functools.partial(torch.compile, dynamic=False)
    ask = functools.partial(lesson, fast(Watched(unet, BLOCKS)), stored, known)
    net, probes = fast(Watched(modules["transformer"], BLOCKS.values())), modules["probes"]
    train(
        "flow", modules, lambda number: loss_fn(net, probes, ask, number, args.batch),
        lr=args.lr, minutes=args.minutes, finish=args.finish, constant=True, muon=True, ema_decay=0.998,
        weight_decay=0.05, batch=args.batch * join()[1], evaluate=lambda a: evaluate(a, "flow_training"),
        evaluate_seconds=600,
    )  # fmt: skip


if __name__ == "__main__":
    main()
