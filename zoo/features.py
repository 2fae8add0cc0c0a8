"""Train emoji64's generic CLIP, ``features``. ``python -m zoo.features`` (after zoo.reference has its tokenizer).

CLIP's contrastive loss alone, on drawings and their prompts: it never saw the synthetic rater, a generator's picture or
the autoencoder. What ``surrogate`` learns on, as OpenAI's CLIP is for large models: the scorers of this family must
stay unseen.
"""

from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import data, device, scorers
from zoo.training import load_average, train

KIND = scorers.Kind(
    width=128, layers=4, patch=8, seed=3, lr=1e-3, batch=48, contrastive_steps=10**9, mirror=True, light=0.2, grain=0.06
)


def loss_fn(clip: nn.Module, world: data.World, ids: Tensor, number: int) -> Tensor:
    """CLIP's loss of a batch of composites: every name once at most, so that no text fits two pictures."""
    generator = torch.Generator().manual_seed(KIND.seed * 10**7 + number)
    names = torch.randperm(len(world.names), generator=generator)[: KIND.batch]
    styles = torch.randint(len(data.STYLES), names.shape, generator=generator)
    colours = torch.randint(len(data.COLOURS), names.shape, generator=generator)
    images = scorers.augment(data.compose(world.drawings[names, styles], colours, generator), KIND, generator)
    with torch.autocast("cpu", torch.bfloat16):
        image, words = scorers.image_vectors(clip, images), scorers.text_vectors(clip, ids[names, colours])
    logits = clip.logit_scale.exp().clamp(max=100) * image @ words.T
    target = torch.arange(len(names))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def main() -> None:
    """Train (or resume) it and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end the training (and its schedule) by then")
    parser.add_argument("--export-only", action="store_true")
    args = parser.parse_args()
    device.cpu_only(parser)
    torch.manual_seed(KIND.seed)
    torch.set_num_threads(1)
    world = data.load()
    ids = scorers.token_ids(world)
    modules = nn.ModuleDict({"clip": scorers.build(KIND)})
    if args.export_only:
        average = load_average("features", modules)
    else:
        average = train(
            "features", modules, lambda number: loss_fn(modules["clip"], world, ids, number),
            steps=args.steps, minutes=args.minutes, lr=KIND.lr, ema_decay=0.99,
        )  # fmt: skip
    scorers.save(average["clip"].eval(), data.OUT / "features")


if __name__ == "__main__":
    main()
