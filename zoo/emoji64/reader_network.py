"""The network of emoji64's independent reader: a small ResNet with three answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and the path around them."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(width_in, width, 1, bias=False) if width_in != width else nn.Identity()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, width, H / stride, W / stride]."""
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.skip(F.avg_pool2d(x, self.stride) if self.stride > 1 else x))


class Reader(nn.Module):
    """Images [B, 3, 64, 64] in [0, 1] to logits of the name, the style and the background color."""

    def __init__(self, names: int = 285) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 5, 2, 2)
        self.blocks = nn.Sequential(Block(32, 48, 1), Block(48, 96, 2), Block(96, 192, 2), Block(192, 256, 2))
        self.name, self.style, self.colour = nn.Linear(256, names), nn.Linear(256, 3), nn.Linear(256, 12)

    def features(self, images: Tensor) -> Tensor:
        """Vectors [B, 256]."""
        return self.blocks(F.relu(self.stem(images * 4 - 2))).mean(dim=(2, 3))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, 285], [B, 3], [B, 12]."""
        vectors = self.features(images).float()
        return self.name(vectors), self.style(vectors), self.colour(vectors)
