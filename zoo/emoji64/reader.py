"""What emoji64's independent reader sees in pictures, as rewards that are only measured.

In a recipe's ``eval_rewards`` or with ``rlhf-t2i eval --metrics``::

    - {name: "emoji64:reader.py:Named", label: named}
    - {name: "emoji64:reader.py:Style", label: glossy, options: {style: fluent3d}}

No training sees the reader, so neither may be trained on.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_t2i import plugins

FOLDER = Path(__file__).parent


def _network() -> nn.Module:
    """The trained reader; its file is found beside this one, installed or not."""
    name = "rlhf_t2i_emoji64_reader_network"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / "reader_network.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    network: nn.Module = sys.modules[name].Reader()
    network.load_state_dict({key: value.float() for key, value in load_file(FOLDER / "reader.safetensors").items()})
    return network.eval()


def _counted(logits: Tensor, right: Tensor | int) -> Tensor:
    """1 where the highest of the logits [B, N] is the right one, else 0 [B]; NaN stays NaN."""
    return (logits.argmax(1) == right).float() + 0.0 * logits.sum(1)


class ReaderOptions(plugins.Options):
    """How an answer counts."""

    probability: bool = Field(False, description="the probability of the answer in place of 1 or 0")


class Named(plugins.Reward):
    """Whether the reader's most likely name, of 285, is the prompt's: the mean is the share of right names.

    Prompts are emoji64's: ``NAME, on a COLOR background``.
    """

    Options = ReaderOptions
    options: ReaderOptions
    differentiable = False
    unit = "share"
    value_range = (0.0, 1.0)

    def __init__(self, options: ReaderOptions | None = None) -> None:
        super().__init__(options)
        self.network = _network()
        names: list[str] = json.loads((FOLDER / "data/names.json").read_text("utf-8"))
        self.index = {name: i for i, name in enumerate(names)}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values [B] in [0, 1].

        Raises:
            ValueError: A prompt without one of the 285 names.
        """
        right = torch.tensor([self._right(prompt) for prompt in prompts], device=images.device)
        logits = self.network(images.float())[0]
        if self.options.probability:
            return logits.softmax(1).gather(1, right[:, None])[:, 0]
        return _counted(logits, right)

    def _right(self, prompt: str) -> int:
        name = prompt.partition(", on a ")[0]
        if name not in self.index:
            raise ValueError(f"the reader knows emoji64's prompts only ('fox, on a red background'), not {prompt!r}")
        return self.index[name]


class StyleOptions(ReaderOptions):
    """Which style is counted."""

    style: Literal["noto", "twemoji", "fluent3d"] = Field("fluent3d", description="the team that drew the picture")


class Style(plugins.Reward):
    """Whether the reader takes a picture for one team's drawing: the mean is the team's share."""

    Options = StyleOptions
    options: StyleOptions
    differentiable = False
    uses_prompt = False
    unit = "share"
    value_range = (0.0, 1.0)

    def __init__(self, options: StyleOptions | None = None) -> None:
        super().__init__(options)
        self.network = _network()

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values [B] in [0, 1]."""
        logits = self.network(images.float())[1]
        index = ("noto", "twemoji", "fluent3d").index(self.options.style)
        if self.options.probability:
            return logits.softmax(1)[:, index]
        return _counted(logits, index)
