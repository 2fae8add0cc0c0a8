"""Placements on a number of devices: all roles somewhere, the fastest that fits first, and what the command shows."""

from __future__ import annotations

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
from rlhf_t2i.tools.planning.devices import Rates
from rlhf_t2i.tools.planning.options import options
from rlhf_t2i.tools.planning.plan import make, step_time
from tests import tiny

RATES = Rates(network=1e9, decoder=5e8, link=1e9)


@pytest.fixture
def recipe(tiny_sdxl: Path, tiny_clip: Path, tiny_prompts: Path) -> Recipe:
    keys = tiny.recipe_dict(tiny_sdxl, tiny_prompts, placement={}, optimization={"batch_size": 16, "micro_batch": 2})
    keys["algorithm"] = {"rewards": [{"name": "pickscore", "options": {"model": str(tiny_clip)}}]}
    return reading.build(keys)


def test_every_option_is_a_placement_that_runs(recipe: Recipe) -> None:
    found = options(recipe, 8, RATES, memory=80)
    assert len(found) > 5
    for option in found:
        placed = check_placement(option.recipe)
        assert sum(group.devices for group in option.recipe.placement.groups.values()) == 8
        assert {"learner", "generator", "assistant", "reference", "reward:pickscore"} == placed.keys()
        again = recipe.model_copy(
            update={"placement": recipe.placement.model_validate({"groups": yaml.safe_load(option.yaml())})}
        )
        assert make(again) == make(option.recipe)
    hours = [option.duration.hours for option in found]
    assert hours == sorted(hours)
    one_step = step_time(found[0].recipe, RATES).step
    assert found[0].duration.training == pytest.approx(recipe.steps * one_step / 3600)


def test_more_devices_take_fewer_hours(recipe: Recipe) -> None:
    hours = [options(recipe, devices, RATES, memory=80)[0].duration.hours for devices in (1, 2, 8)]
    assert hours == sorted(hours, reverse=True)


def test_devices_that_the_batch_cannot_use_stay_idle(recipe: Recipe) -> None:
    """Eight micro-batches: of seven devices four hold all roles, unless apart groups are faster."""
    found = options(recipe, 7, RATES, memory=80)
    assert "4 learner, generator, assistant, reference, reward" in [option.describe() for option in found]
    assert found[0].duration.hours <= options(recipe, 4, RATES, memory=80)[0].duration.hours


def test_what_fits_comes_first_although_it_is_slower(recipe: Recipe) -> None:
    everything = options(recipe, 4, RATES, memory=80)
    largest = max(option.memory for option in everything)
    found = options(recipe, 4, RATES, memory=(largest - 1) / 0.9 / 2**30)
    assert [option.fits for option in found] == sorted((option.fits for option in found), reverse=True)
    assert not found[-1].fits
    assert found[-1].memory == largest


def test_a_batch_that_nothing_divides_is_refused(recipe: Recipe) -> None:
    odd = recipe.model_copy(update={"optimization": recipe.optimization.model_copy(update={"micro_batch": 5})})
    with pytest.raises(UsageError, match=r"--gpus 4: no placement divides the batch: .*batch_size 16"):
        options(odd, 4, RATES, memory=80)


def test_the_command_shows_the_choice_and_plans_it(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(reading.dump(recipe), "utf-8")
    result = CliRunner().invoke(app, ["plan", str(file), "--device", "h100", "--gpus", "2"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, (line for line in lines if not line.startswith("the first one")))) <= 80
    (chosen,) = (line for line in lines if line.startswith("the first one: --set "))
    groups = chosen.partition("placement.groups=")[2].rstrip("'")
    planned = rlhf_t2i.plan(file, {"placement.groups": yaml.safe_load(groups)})
    assert f"steps on {planned.devices} x h100-80gb" in result.output
    missing = CliRunner().invoke(app, ["plan", str(file), "--gpus", "2"])
    assert isinstance(missing.exception, UsageError)
    assert "--gpus: name the devices with --device" in str(missing.exception)
