"""A reward that scores PIL images or tensors in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import registry
from rlhf_t2i.plugins.base import LatentReward, Reward
from rlhf_t2i.roles.reward import RewardRole
from rlhf_t2i.utils import images as image_files
from rlhf_t2i.utils.device import default_device
from rlhf_t2i.utils.quiet import quietly


@dataclass(frozen=True)
class Scorer:
    """A reward, ready to score images.

    Attributes:
        plugin: The reward's own object.
        device: Where it runs.
    """

    plugin: Reward
    device: torch.device

    def score(self, images: Image | Sequence[Image] | Tensor, prompts: str | Sequence[str]) -> Tensor:
        """Score images for their prompts.

        Args:
            images: One PIL image, a list of them (of any sizes), or a float tensor [B, 3, H, W] in [0, 1]. A tensor
                that requires a gradient gets one from the scores.
            prompts: One per image, or one for all.

        Returns:
            Float tensor [B] in ``plugin.unit``, on the tensor's device (the CPU for PIL images).

        Raises:
            UsageError: The images are no such thing, or their number is not that of the prompts.
            RunError: The reward failed, or its value is not finite.
        """
        batches = _batches(images)
        count = sum(map(len, batches))
        if not count:
            raise UsageError("there are no images to score")
        texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
        if len(texts) != count:
            raise UsageError(f"{count} images but {len(texts)} prompts: give one prompt per image, or one for all")
        scores, start = [], 0
        for batch in batches:
            scores.append(self._score(batch, texts[start : start + len(batch)]).to(batch.device))
            start += len(batch)
        return torch.cat(scores)

    def _score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        if images.requires_grad and torch.is_grad_enabled():
            return self.plugin.score(images.to(self.device), prompts)
        role = RewardRole({"reward": self.plugin}, None, device=self.device)
        return role.score_images(images.to(self.device), prompts)["reward"]


@quietly()
def build(name: str, device: str | torch.device | None, options: Mapping[str, object]) -> Scorer:
    """Build a reward; arguments and errors as :func:`rlhf_t2i.api.reward`."""
    if issubclass(registry.load_class(registry.REWARDS, name), LatentReward):
        raise UsageError(f"reward {name!r} scores latents beside a trained generator, not images")
    where = torch.device(device) if device is not None else default_device()
    plugin = registry.reward(name, **options)
    return Scorer(plugin.eval().requires_grad_(False).to(where), where)


def _batches(given: Image | Sequence[Image] | Tensor) -> list[Tensor]:
    """Images [B, 3, H, W] in [0, 1]: a tensor as it is, PIL images one by one if their sizes differ."""
    if isinstance(given, Tensor):
        if given.ndim != 4 or given.shape[1] != 3 or not given.is_floating_point():
            raise UsageError(f"images are {given.dtype} {list(given.shape)}: give floats [B, 3, H, W] in [0, 1]")
        if len(given) and not (float(given.detach().min()) >= -0.01 and float(given.detach().max()) <= 1.01):
            raise UsageError("images have values outside [0, 1]: divide 8-bit values by 255")
        return [given]
    several = [given] if isinstance(given, Image) else list(given) if isinstance(given, Sequence) else [given]
    if not all(isinstance(image, Image) for image in several):
        raise UsageError("images must be a PIL image, a list of PIL images, or a tensor [B, 3, H, W] in [0, 1]")
    tensors = [image_files.from_pil(image) for image in several]
    same = len({tuple(tensor.shape) for tensor in tensors}) == 1
    return [torch.cat(tensors)] if same else tensors
