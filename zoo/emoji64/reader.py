"""What emoji64's independent reader sees in pictures, as rewards that are only measured.

In a recipe's ``eval_rewards``, or with ``rlhf-t2i eval --metrics``::

    - {name: "emoji64:reader.py:Named", label: named}
    - {name: "emoji64:reader.py:Style", label: glossy, options: {style: fluent3d}}

No training sees the reader, and nothing may train on it.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_t2i import plugins
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import shipped

FOLDER = Path(__file__).parent
STYLES = ("noto", "twemoji", "fluent3d")


def _build() -> nn.Module:
    """The reader without its weights; its file is found beside this one, whether emoji64 is installed or not."""
    name = "rlhf_t2i_emoji64_reader_network"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, FOLDER / "reader_network.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    network: nn.Module = sys.modules[name].Reader()
    return network.eval()


class _Answer(nn.Module):
    """One of the reader's answers: 0, logits of the names [B, 285]; 1, of the styles [B, 3]."""

    def __init__(self, network: nn.Module, which: int) -> None:
        super().__init__()
        self.network, self.which = network, which

    def forward(self, images: Tensor) -> Tensor:
        """Logits for images [B, 3, 64, 64] in [0, 1]."""
        dtype = next(self.network.parameters()).dtype
        logits: Tensor = self.network(images.to(dtype))[self.which]
        return logits


class ReaderOptions(plugins.Options):
    """How an answer counts, and whose it is."""

    weights: str = Field("emoji64:reader.safetensors", description="the reader's weights")
    probability: bool = Field(False, description="the probability of the answer in place of 1 or 0")


class _Read(plugins.Reward):
    """A measure by the reader."""

    which: ClassVar[int]
    options: ReaderOptions
    differentiable = False
    unit = "share"
    value_range = (0.0, 1.0)

    def __init__(self, options: ReaderOptions | None = None) -> None:
        super().__init__(options)
        network = _build()
        weights = load_file(shipped.resolve(self.options.weights))
        network.load_state_dict({key: value.float() for key, value in weights.items()})
        self.answer = _Answer(network, self.which)

    @classmethod
    def preflight(cls, options: Any) -> None:
        """Refuse weights that are not the reader's."""
        path = shipped.resolve(options.weights)
        try:
            with safe_open(path, "pt") as file:
                found = set(file.keys())
        except (OSError, SafetensorError) as error:
            raise UsageError(f"weights: {path} cannot be read as safetensors ({error})") from None
        if found != set(_build().state_dict()):
            raise UsageError(f"weights: {path} holds the weights of another network than the reader's")

    @classmethod
    def footprint(cls, options: Any) -> plugins.Footprint:
        """See :meth:`rlhf_t2i.plugins.Reward.footprint`."""
        return plugins.Footprint(options.weights, lambda: _Answer(_build(), cls.which))

    def counted(self, logits: Tensor, right: Tensor) -> Tensor:
        """The probability of the right answers [B], or 1 where the most likely is the right one; NaN stays NaN."""
        if self.options.probability:
            return logits.softmax(1).gather(1, right[:, None])[:, 0]
        return (logits.argmax(1) == right).float() + 0.0 * logits.sum(1)


class Named(_Read):
    """Whether the reader's most likely name, of 285, is the prompt's: the mean is the share of right names.

    Prompts are emoji64's: ``NAME, on a COLOR background``.
    """

    Options = ReaderOptions
    which = 0

    def __init__(self, options: ReaderOptions | None = None) -> None:
        super().__init__(options)
        self.index = _names()

    @classmethod
    def refuse_prompts(cls, options: ReaderOptions, prompts: Iterable[str]) -> str | None:
        """A prompt without one of the names."""
        index = _names()
        return next((_foreign(prompt) for prompt in prompts if _name(prompt) not in index), None)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values [B] in [0, 1].

        Raises:
            ValueError: A prompt without one of the 285 names.
        """
        right = torch.tensor([self._right(prompt) for prompt in prompts], device=images.device)
        return self.counted(self.answer(images), right)

    def _right(self, prompt: str) -> int:
        name = _name(prompt)
        if name not in self.index:
            raise ValueError(_foreign(prompt))
        return self.index[name]


def _names() -> dict[str, int]:
    """The number of each name."""
    names: list[str] = json.loads((FOLDER / "data/names.json").read_text("utf-8"))
    return {name: i for i, name in enumerate(names)}


def _name(prompt: str) -> str:
    return prompt.partition(", on a ")[0]


def _foreign(prompt: str) -> str:
    return f"the reader knows emoji64's prompts only ('owl, on a red background'), not {prompt!r}"


class StyleOptions(ReaderOptions):
    """Which style is counted."""

    style: Literal["noto", "twemoji", "fluent3d"] = Field("fluent3d", description="the team that drew the picture")


class Style(_Read):
    """Whether the reader takes a picture for one team's drawing: the mean is the team's share."""

    Options = StyleOptions
    options: StyleOptions
    which = 1
    uses_prompt = False

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values [B] in [0, 1]."""
        right = torch.full((len(images),), STYLES.index(self.options.style), device=images.device)
        return self.counted(self.answer(images), right)
