"""docs/reward_gallery.md: every reward is in it, with the license it declares and the cost that is counted."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from rlhf_t2i.families.counting import Network
from rlhf_t2i.plugins import registry
from tests.project import pages

TEXT = (pages.ROOT / "docs/reward_gallery.md").read_text("utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]


def _build(cls: type[registry.Reward]) -> nn.Module:
    with torch.device("meta"):
        return cls.footprint(cls.Options()).build().to(torch.bfloat16).requires_grad_(False)


def _call(network: nn.Module) -> tuple[Tensor, Tensor]:
    with torch.device("meta"):
        image = torch.empty(1, 3, 1024, 1024, requires_grad=True)
        return image, network(image)


def test_every_shipped_reward_has_a_row_with_its_license_and_direction() -> None:
    rows = {row[0].strip("`"): row for row in ROWS if len(row) == 5 and not re.match(r"[\d.]+$", row[1])}
    shipped = {name for name, found in registry.registered(registry.REWARDS).items() if found[0].package == "rlhf-t2i"}
    assert set(rows) == shipped
    for name, row in rows.items():
        cls = registry.load_class(registry.REWARDS, name)
        assert row[2] == ("yes" if cls.uses_prompt else "no"), name
        assert row[4].startswith(cls.license), name
        assert (row[3] == "no") == (not cls.differentiable), name


@pytest.mark.parametrize("name", ["pickscore", "image_reward", "clip", "aesthetic"])
def test_costs_are_those_that_are_counted(name: str) -> None:
    (row,) = (row for row in ROWS if f"`{name}`" in row[0] and re.match(r"\d+$", row[1]))
    network = Network(("gallery", name), partial(_build, registry.load_class(registry.REWARDS, name)), _call)
    parameters, flops, weights, activations = map(float, row[1:])
    assert parameters == round(network.parameters() / 1e6)
    assert flops == pytest.approx(2 * network.flops() / 1e12, abs=0.006)
    assert weights == pytest.approx(2 * network.parameters() / 1e9, abs=0.06)
    assert activations == pytest.approx(network.activations("input") / 1e9, abs=0.006)
