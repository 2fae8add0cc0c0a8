"""docs/extending.md: every example is complete and works."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import rlhf_t2i
from rlhf_t2i.families import registry as families
from rlhf_t2i.families import sources
from rlhf_t2i.tools.reward_check import check_reward
from tests.project import pages

PAGE = "docs/extending.md"
FILES = {source.splitlines()[0].removeprefix("# "): source for _, source in pages.blocks(PAGE, "python")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's files, installed as a package with the page's entry points."""
    for name, source in FILES.items():
        (tmp_path / name).write_text(source, "utf-8")
    points: dict[str, Any] = {}
    for _, text in pages.blocks(PAGE, "toml"):
        points |= tomllib.loads(text)["project"]["entry-points"]
    info = tmp_path / "examples-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: examples\nVersion: 0.1\n")
    sections = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in p.items()) for group, p in points.items())
    (info / "entry_points.txt").write_text("\n".join(sections))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.fixture
def letters(folder: Path) -> ModuleType:
    return importlib.import_module("letters")


def letters_recipe(folder: Path, letters: ModuleType) -> dict[str, Any]:
    torch.manual_seed(0)
    config = {"width": 8}
    for name in ("reference", "generator"):
        letters.write(folder / name, config, letters.LettersNetwork(**config).state_dict())
    (folder / "prompts.txt").write_text("a red cat\na blue dog\nan owl\na fox\n")
    return {
        "steps": 2,
        "models": {"reference": str(folder / "reference"), "generator": str(folder / "generator")},
        "data": {"prompts": str(folder / "prompts.txt")},
        "algorithm": {
            "divergence": {"name": "charbonnier", "options": {"c": 0.05}},
            "rewards": [{"name": "contrast", "scale": 10.0}],
            "cfg": {"guidance_scale": 2.0},
        },
        "optimization": {"batch_size": 2},
        "placement": "local",
        "evaluation": {"images": 4, "batch_size": 4},
    }


def test_the_page_has_every_example() -> None:
    assert list(FILES) == ["contrast.py", "charbonnier.py", "letters.py", "novelty.py", "calls.py"]


def test_the_reward_passes_its_checks(folder: Path) -> None:
    scorer = rlhf_t2i.reward("contrast", device="cpu", target=0.1)
    findings = check_reward(scorer.plugin, torch.device("cpu"))
    assert [f"{finding.name}: {finding.detail}" for finding in findings if finding.outcome == "fail"] == []
    (_, text), *_ = pages.blocks(PAGE, "yaml")
    (choice,) = yaml.safe_load(text)["algorithm"]["rewards"]
    by_file = rlhf_t2i.reward(choice["name"].replace("./", f"{folder}/"), device="cpu", **choice["options"])
    images = torch.rand(2, 3, 8, 8)
    assert torch.equal(by_file.score(images, "a"), scorer.score(images, "a"))


def test_the_divergence_is_one(folder: Path) -> None:
    divergence = rlhf_t2i.divergence("charbonnier", c=0.05)
    delta = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(divergence.value(delta).sum(), delta)
    assert torch.allclose(gradient, divergence.derivative(delta))
    assert divergence.value(torch.zeros(2, 3)).tolist() == [0, 0]
    large = 100 * torch.ones(1, 5)
    assert float(divergence.value(2 * large)) == pytest.approx(
        2**divergence.order * float(divergence.value(large)), 0.01
    )


def test_the_family_is_trained_planned_exported_and_drawn(folder: Path, letters: ModuleType) -> None:
    recipe = letters_recipe(folder, letters)
    assert families.find(sources.parse(recipe["models"]["reference"])).name == "letters"
    assert rlhf_t2i.plan(recipe).latents == (3, 16, 24)

    result = rlhf_t2i.train(recipe, folder / "out", student__steps=2)
    assert {row.key for row in result.table} >= {"contrast"}
    model = result.load()
    assert model.store.student.timesteps == (1000.0, 500.0)
    (image,) = model.sample(["a red cat"], seed=1)
    assert image.size == (24, 16)

    before = letters.load_file(folder / "generator/network/model.safetensors")
    after = letters.load_file(result.model / "network/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_family_refuses_what_does_not_fit(folder: Path, letters: ModuleType) -> None:
    recipe = letters_recipe(folder, letters)
    letters.write(folder / "wide", {"width": 9}, letters.LettersNetwork(9).state_dict())
    with pytest.raises(rlhf_t2i.UsageError, match=r"models\.generator: .*another width"):
        rlhf_t2i.train(recipe, folder / "out", models__generator=str(folder / "wide"))
    with pytest.raises(rlhf_t2i.UsageError, match=r"models\.vae"):
        rlhf_t2i.train(recipe, folder / "out", models__vae=str(folder / "wide"))
    assert not (folder / "out").exists()


def test_a_call_of_the_role_means_the_same_everywhere(folder: Path) -> None:
    calls = importlib.import_module("calls")
    assert calls.here.shape == (5,)
    assert torch.equal(calls.here, calls.there)
