"""The independent reader as rewards: right on true drawings, and only measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_t2i.plugins import registry
from zoo import data, reader


@pytest.fixture(scope="module")
def drawings() -> tuple[Tensor, list[str], Tensor]:
    """Composites [90, 3, 64, 64], their prompts and styles."""
    world, colours = data.load(), list(data.COLOURS)
    images, names, styles, grounds = reader.batch(world, seed=1, size=90, clean=True)
    pairs = zip(names.tolist(), grounds.tolist(), strict=True)
    return images, [data.prompt(world.names[n], colours[c]) for n, c in pairs], styles


def test_true_drawings_are_named(drawings: tuple[Tensor, list[str], Tensor]) -> None:
    images, prompts, _ = drawings
    named = registry.reward("emoji64:reader.py:Named")
    assert named.score(images, prompts).mean() >= 0.97
    wrong = [*prompts[1:], prompts[0]]
    assert named.score(images, wrong).mean() <= 0.03
    assert registry.reward("emoji64:reader.py:Named", probability=True).score(images, prompts).mean() >= 0.97


def test_styles_are_told_apart(drawings: tuple[Tensor, list[str], Tensor]) -> None:
    images, prompts, styles = drawings
    found = [registry.reward("emoji64:reader.py:Style", style=name).score(images, prompts) for name in data.STYLES]
    assert (torch.stack(found).argmax(0) == styles).float().mean() >= 0.97
    assert torch.stack(found).sum(0).eq(1).all()


def test_other_prompts_are_refused_and_nothing_trains_on_it(drawings: tuple[Tensor, list[str], Tensor]) -> None:
    named = registry.reward("emoji64:reader.py:Named")
    with pytest.raises(ValueError, match="not 'a red apple'"):
        named.score(drawings[0][:1], ["a red apple"])
    assert not named.differentiable
