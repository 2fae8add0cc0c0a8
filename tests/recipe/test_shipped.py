"""The shipped recipes: all valid, the paper's values where they are published, and placements that fit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.tools.planning import plan as planning

RECIPES = Path(__file__).parents[2] / "recipes"
TRAINING = sorted(p for p in RECIPES.rglob("*.yaml") if not p.name.startswith(("ablation", "table")))
# (divergence, reward scale or None), algorithm.md 3.2
OBJECTIVES = {
    "di_star_pickscore": ("pseudo_huber", 100.0),
    "di_plus_plus_pickscore": ("kl", 100.0),
    "sim": ("pseudo_huber", None),
    "diff_instruct": ("kl", None),
}
GIGABYTE = 10**9


def placements(path: Path) -> dict[int, list[str]]:
    """The ``--set`` lines of a recipe's header, by the size in GB of the one GPU they are for."""
    found: dict[int, list[str]] = {}
    size = 0
    for line in path.read_text("utf-8").splitlines():
        if match := re.search(r"one GPU of (\d+) GB", line):
            size = int(match[1])
        if line.startswith("#   --set"):
            words = shlex.split(line.removeprefix("#"))
            found.setdefault(size, []).extend(words[1::2])
    return found


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: str(p.relative_to(RECIPES)))
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    recipe = reading.load(path)
    check_placement(recipe)
    traits.resolve(recipe)
    store = ModelStore(recipe.models, recipe.student, torch.device("cpu"))
    for role in ("generator", "assistant"):
        store.timestep_range(recipe.algorithm.timesteps, role)
    for overrides in placements(path).values():
        check_placement(reading.load(path, overrides))


@pytest.mark.parametrize("folder", [".", "sd15"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_four_objectives(folder: str, name: str) -> None:
    recipe = reading.load(RECIPES / folder / f"{name}.yaml")
    divergence, scale = OBJECTIVES[name]
    assert recipe.algorithm.divergence.name == divergence
    assert [r.scale for r in recipe.algorithm.rewards] == ([] if scale is None else [scale])
    for reward in [*recipe.algorithm.rewards, *recipe.algorithm.eval_rewards]:
        assert (reward.name, reward.options.get("unit", "cosine")) == ("pickscore", "cosine")
    assert (recipe.algorithm.cfg.mode, recipe.algorithm.cfg.convention) == ("inner", "omega")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_papers_values(name: str) -> None:
    """What the paper states, algorithm.md 2.3; the rest of the recipe is marked as chosen."""
    recipe = reading.load(RECIPES / f"{name}.yaml")
    assert recipe.models.reference == "stabilityai/stable-diffusion-xl-base-1.0"
    assert recipe.models.generator == "tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin"
    assert recipe.models.assistant is None  # the reference
    assert recipe.student.timesteps == [399]
    assert recipe.algorithm.cfg.guidance_scale == 7.5
    assert recipe.optimization.batch_size == 128
    assert Path(recipe.data.prompts).name == "captions_laion_score6.25.txt"
    assert recipe.steps * recipe.optimization.batch_size == 256_000


def test_the_four_recipes_differ_in_the_objective_alone() -> None:
    for folder in (RECIPES, RECIPES / "sd15"):
        loaded = [reading.load(folder / f"{name}.yaml").model_dump() for name in OBJECTIVES]
        for recipe in loaded:
            for key in ("divergence", "rewards", "eval_rewards"):
                recipe["algorithm"].pop(key)
            assert recipe == loaded[0]


@pytest.mark.parametrize(
    ("folder", "suffix", "rewards", "convention"),
    [
        ("sd35", "pickscore", ["pickscore"], "omega"),
        ("flux2_klein", "mixed", ["pickscore", "hpsv2", "clip"], "omega"),
        ("z_image", "pickscore", ["pickscore"], "one_plus"),
    ],
)
def test_flow_matching_in_four_steps(folder: str, suffix: str, rewards: list[str], convention: str) -> None:
    """DI* and DI++ differ in the divergence, and in where things run; each also loads with one step, as it says."""
    paths = {name: RECIPES / folder / f"{name}_{suffix}.yaml" for name in ("di_star", "di_plus_plus")}
    loaded = {name: reading.load(path) for name, path in paths.items()}
    assert {name: recipe.algorithm.divergence.name for name, recipe in loaded.items()} == {
        "di_star": "pseudo_huber",
        "di_plus_plus": "kl",
    }
    dumps = [recipe.model_dump() for recipe in loaded.values()]
    for dump in dumps:
        dump["algorithm"].pop("divergence")
        dump.pop("placement")
        for key in ("zero_stage", "gradient_checkpointing"):
            dump["optimization"].pop(key)
    assert dumps[0] == dumps[1]
    recipe = loaded["di_star"]
    assert [reward.name for reward in recipe.algorithm.rewards] == rewards
    assert recipe.algorithm.cfg.convention == convention
    assert recipe.student.steps == 4
    assert reading.load(paths["di_star"], ["student.steps=1"]).student.steps == 1


@pytest.mark.parametrize(("name", "devices", "size"), [("di_star_pickscore", 8, 80), ("sd15/di_star_pickscore", 4, 40)])
def test_the_placements_fit_by_the_plan(name: str, devices: int, size: int) -> None:
    path = RECIPES / f"{name}.yaml"
    made = planning.make(reading.load(path))
    assert made.notes == ()  # every network is counted
    assert made.devices == devices
    assert all(group.memory.device < 0.9 * size * GIGABYTE for group in made.groups)
    alone = placements(path)
    assert alone
    for gpu, overrides in alone.items():
        (group,) = planning.make(reading.load(path, overrides)).groups
        assert group.devices == 1
        assert group.memory.device < 0.9 * gpu * GIGABYTE


def test_one_80_gb_gpu_needs_the_offload_its_header_sets() -> None:
    path = RECIPES / "di_star_pickscore.yaml"
    overrides = [o for o in placements(path)[80] if "offload" not in o]
    assert len(overrides) == len(placements(path)[80]) - 1
    (group,) = planning.make(reading.load(path, overrides)).groups
    assert group.memory.device > 80 * GIGABYTE
