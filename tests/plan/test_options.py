"""Placements on a number of devices: all roles somewhere, the fastest that fits first, and what the command shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import rlhf_t2i
from rlhf_t2i.cli import app
from rlhf_t2i.errors import UsageError
from rlhf_t2i.recipe import reading
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.tools.planning.fit import changed
from rlhf_t2i.tools.planning.options import Option, Search
from rlhf_t2i.tools.planning.plan import make, networks_of, step_time
from rlhf_t2i.tools.planning.speed import Links, Measured, Passes
from tests import tiny

SPEED = Measured(
    {part: Passes(1.0, 1.0, 1.0) for part in ("network", "decoder", "reward:pickscore")},
    links=Links(1e9),
    bandwidth=1e9,
)


@pytest.fixture
def recipe(tiny_sdxl: Path, tiny_clip: Path, tiny_prompts: Path) -> Recipe:
    keys = tiny.recipe_dict(tiny_sdxl, tiny_prompts, placement={}, optimization={"batch_size": 16, "micro_batch": 2})
    keys["algorithm"] = {"rewards": [{"name": "pickscore", "options": {"model": str(tiny_clip)}}]}
    return reading.build(keys)


def options(recipe: Recipe, devices: int, memory: float = 80) -> list[Option]:
    return Search(recipe, networks_of(recipe), SPEED, memory).options(devices)


def test_every_option_is_a_placement_that_runs(recipe: Recipe) -> None:
    found = options(recipe, 8)
    assert len(found) > 5
    for option in found:
        placed = check_placement(option.recipe)
        assert sum(group.devices for group in option.recipe.placement.groups.values()) == 8
        assert {"learner", "generator", "assistant", "reference", "reward:pickscore"} == placed.keys()
    hours = [option.duration.hours for option in found]
    assert hours == sorted(hours)
    one_step = step_time(found[0].recipe, SPEED).step
    assert found[0].duration.training == pytest.approx(recipe.steps * one_step / 3600)
    assert found[0].images_per_second == pytest.approx(16 / one_step)


def test_the_lines_make_the_option_of_the_recipe(recipe: Recipe) -> None:
    for option in options(recipe, 4):
        again = changed(recipe, _flat(yaml.safe_load(option.lines())))
        assert make(again) == make(option.recipe)


def _flat(lines: dict[str, dict[str, object]]) -> dict[str, object]:
    return {f"{section}.{key}": value for section, keys in lines.items() for key, value in keys.items()}


def test_all_roles_together_are_fastest_where_they_fit(recipe: Recipe) -> None:
    """Nothing waits: that is why it wins, and the recipe's own two groups lose."""
    groups = {
        "train": {"devices": 2, "roles": ["learner", "generator", "reward"]},
        "score": {"devices": 2, "roles": ["assistant", "reference"]},
    }
    apart = changed(recipe, {"placement.groups": groups})
    search = Search(apart, networks_of(apart), SPEED, 80)
    best, own = search.options(4)[0], search.as_it_is()
    assert best.describe() == "4 with all roles"
    assert best.idle == pytest.approx(0.0)
    assert own.as_it_is
    assert own.idle > 0.1
    assert own.seconds.step > 1.1 * best.seconds.step
    group, role, share = best.limit
    assert (group, role) == ("all", "assistant")  # trained and serving
    spent = sum(best.seconds.roles(phase)["assistant"] for phase in ("assistant", "generator"))
    assert share == pytest.approx(spent / best.seconds.step)


def test_less_memory_costs_time(recipe: Recipe) -> None:
    """Settings follow the memory: smaller micro-batches, recomputation, and ZeRO-3 only where nothing else fits."""
    roomy = options(recipe, 4)[0]
    least = min(option.memory for option in options(recipe, 4, memory=1e-6))
    tight = options(recipe, 4, memory=1.001 * least / 0.9 / 2**30)
    assert tight[0].fits
    assert tight[0].seconds.step >= roomy.seconds.step
    assert tight[0].memory < 0.9 * roomy.memory
    assert roomy.recipe.optimization.gradient_checkpointing is False
    assert roomy.recipe.optimization.zero_stage < 3


def test_more_devices_take_fewer_hours(recipe: Recipe) -> None:
    hours = [options(recipe, devices)[0].duration.hours for devices in (1, 2, 8)]
    assert hours == sorted(hours, reverse=True)


def test_devices_that_the_batch_cannot_use_stay_idle(recipe: Recipe) -> None:
    """Of seven devices four hold all roles, since 16 images divide by four, unless apart groups are faster."""
    found = options(recipe, 7)
    assert "4 with all roles" in [option.describe() for option in found]
    assert found[0].duration.hours <= options(recipe, 4)[0].duration.hours


def test_a_reward_that_learns_has_a_process_of_its_own(recipe: Recipe, tiny_clip: Path) -> None:
    learning = {
        "name": "surrogate", "label": "text",
        "options": {"of": {"name": "pickscore", "options": {"model": str(tiny_clip)}}, "features": str(tiny_clip)},
    }  # fmt: skip
    both = changed(recipe, {"algorithm.rewards": [*recipe.model_dump()["algorithm"]["rewards"], learning]})
    speed = Measured({**SPEED.image, "reward:text": Passes(1.0, 1.0, 1.0)})
    for option in Search(both, networks_of(both), speed, 80).options(5):
        (group,) = (g for g in option.recipe.placement.groups.values() if "reward:text" in g.roles)
        assert (group.devices, group.roles) == (1, ["reward:text"])
    with pytest.raises(UsageError, match="--gpus 1: a reward that learns has one process"):
        Search(both, networks_of(both), speed, 80).options(1)


def test_what_fits_comes_first_although_it_is_slower(recipe: Recipe) -> None:
    largest = max(option.memory for option in options(recipe, 4, memory=1e-6))
    found = options(recipe, 4, memory=(largest - 1) / 0.9 / 2**30)
    assert [option.fits for option in found] == sorted((option.fits for option in found), reverse=True)
    assert not found[-1].fits
    assert found[-1].memory == largest


@pytest.fixture
def file(recipe: Recipe, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(reading.dump(recipe), "utf-8")
    return path


def test_the_command_shows_the_choice_and_plans_it(file: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(file), "--device", "h100", "--gpus", "2"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "Fastest: " in result.stdout
    lines = result.stdout[result.stdout.index("optimization:") : result.stdout.index("Whole run")]
    planned = rlhf_t2i.plan(file, _flat(yaml.safe_load(lines)))
    assert f"steps on {planned.devices} x h100-80gb" in result.stdout


def test_placements_are_compared_with_the_recipe_s_own(file: Path) -> None:
    given = ["plan", str(file), "--device", "h100", "--compare"]
    shown = CliRunner().invoke(app, [*given, "--gpus", "1"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0, shown.output
    assert "as it is: 1 with all roles" in shown.stdout
    assert "Whole run" not in shown.stdout
    data = json.loads(CliRunner().invoke(app, [*given, "--json", "--gpus", "4"]).stdout)
    assert data["devices"] == 4
    best = data["options"][0]
    assert best["fits"]
    assert best["seconds"] > 0 < best["gpu_hours"]
    assert not any(option["as_it_is"] for option in data["options"]), "the recipe has one device"
    small = CliRunner().invoke(app, [*given, "--device-memory", "0.001"])
    assert small.exit_code == 1
    assert "Nothing fits: the smallest needs" in small.stdout


@pytest.mark.parametrize("option", [["--gpus", "2"], ["--compare"], ["--network-gbps", "100"]])
def test_the_device_must_be_named(file: Path, option: list[str]) -> None:
    refused = CliRunner().invoke(app, ["plan", str(file), *option])
    assert isinstance(refused.exception, UsageError)
    assert f"{option[0]}: name the devices with --device" in str(refused.exception)
