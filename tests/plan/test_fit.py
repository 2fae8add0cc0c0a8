"""What fits a device, what makes it fit, and the seconds of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from rlhf_t2i.commands import plan as command
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import adapters as adapters
from rlhf_t2i.families import flops
from rlhf_t2i.families.flops import StepFlops
from rlhf_t2i.recipe.placement import check_placement
from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.tools import planning
from rlhf_t2i.tools.planning import USABLE, Device
from tests import tiny

GIB = 2**30


def build(folder: Path, devices: int = 2, **optimization: object) -> Recipe:
    settings = {"batch_size": 8, "zero_stage": 1, **optimization}
    placement = {"mode": "ray", "groups": {"all": {"devices": devices, "roles": list(ROLES)}}}
    return Recipe.model_validate(tiny.recipe_dict(folder, Path("/nowhere"), optimization=settings, placement=placement))


def needs(recipe: Recipe) -> float:
    """GiB of a device on which the recipe just fits."""
    return planning.make(recipe).groups[0].memory.device / GIB / USABLE * 1.0001


def test_what_fits_needs_no_change(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl)
    fit = planning.check(recipe, planning.make(recipe), needs(recipe))
    assert fit.group is None
    assert fit.sentence().startswith("fits")


def test_smaller_micro_batches_come_first(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl)
    half = needs(planning.changed(recipe, {"optimization.micro_batch": 2}))
    fit = planning.check(recipe, planning.make(recipe), half)
    assert (fit.group, fit.change) == ("all", {"optimization.micro_batch": 2})
    assert "--set optimization.micro_batch=2" in fit.sentence()


def test_changes_are_combined_and_do_fit(tiny_sdxl: Path) -> None:
    """Smaller than any one change can make it; the answer, planned again, does fit."""
    recipe = build(tiny_sdxl, gradient_checkpointing=True, precision="bf16", micro_batch=1)
    offloaded = needs(planning.changed(recipe, {"optimization.offload_optimizer": True}))
    fit = planning.check(recipe, planning.make(recipe), offloaded)
    assert fit.change
    assert needs(planning.changed(recipe, fit.change)) <= offloaded
    assert needs(recipe) > offloaded


def test_frozen_roles_recompute_before_trained_ones(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl, precision="bf16", micro_batch=1)
    change = {"optimization.gradient_checkpointing": ["reward", "reference"]}
    limit = needs(planning.changed(recipe, change))
    assert limit < needs(recipe)
    fit = planning.check(recipe, planning.make(recipe), limit)
    assert fit.change == change
    assert "--set 'optimization.gradient_checkpointing=[reward, reference]'" in fit.sentence()


def test_changes_that_the_recipe_excludes_are_passed_over(tiny_sdxl: Path) -> None:
    """Adapters and compiled blocks refuse ZeRO-3, which is among the changes tried."""
    recipe = build(tiny_sdxl, generator={"lora": {"targets": ["to_q"]}}, compile=True)
    assert planning.check(recipe, planning.make(recipe), 1e-6).change == {}


def test_the_impossible_is_said(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl)
    fit = planning.check(recipe, planning.make(recipe), 1e-6)
    assert fit.change == {}
    assert "no change" in fit.sentence()


def test_adapters_and_8_bit_states_are_planned(tiny_sdxl: Path) -> None:
    lora = {"rank": 2, "targets": ["to_q", "to_out.0"]}
    recipe = build(tiny_sdxl, assistant={"lora": lora}, generator={"kind": "adamw_8bit"})
    network = tiny.sdxl_unet()
    count = sum(p.numel() for p in network.parameters())
    adapters.add(network, recipe.optimization.assistant.lora, ("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    memory = {item.role: item.memory for item in planning.make(recipe).groups[0].roles}
    # Two ranks under ZeRO-1 in fp32: frozen weights, adapters; half of their gradients and states each.
    assert memory["assistant"].weights == 4 * (count + trained)
    assert memory["assistant"].gradients == 4 * -(-trained // 2)
    assert memory["assistant"].optimizer == 12 * -(-trained // 2)
    assert memory["learner"].optimizer == (2 + 4) * -(-count // 2)


def test_seconds_follow_the_groups(tiny_sdxl: Path) -> None:
    device = Device(80, 1 / planning.ACHIEVED)  # one FLOP a second, half of it in a float32 decoder
    work = StepFlops(
        {"learner": 3, "assistant": 2, "reference": 4, "decoder": 2, "rewards": 1}, {"generator": 1, "assistant": 3}
    )
    together = build(tiny_sdxl, devices=1, precision="bf16", batch_size=1)

    def seconds(recipe: Recipe) -> tuple[float, float]:
        rates = device.rates(recipe)
        assert rates is not None
        found = planning.step_time(recipe, check_placement(recipe), work, rates)
        assert found is not None
        assert sum(found.assistant_roles.values()) == pytest.approx(found.assistant)
        return found.generator, found.assistant

    # The decoder runs at half the rate.
    assert seconds(together) == pytest.approx((3 + 2 + 4 + 2 * 2 + 1, 1 + 3))
    groups = {"a": {"roles": ["learner", "generator", "reward"]}, "b": {"roles": ["assistant", "reference"]}}
    apart = planning.changed(together, {"placement.groups": groups})
    assert seconds(apart) == pytest.approx((3 + max(2 + 4, 2 * 2 + 1), 1 + 3))
    again = planning.changed(together, {"optimization.gradient_checkpointing": True})
    assert seconds(again) == pytest.approx((4 + 3 + 6 + 2 * 3 + 1.5, 1 + 4))
    decoder_alone = planning.changed(together, {"optimization.gradient_checkpointing": ["reward"]})
    assert seconds(decoder_alone) == pytest.approx((3 + 2 + 4 + 2 * 3 + 1.5, 1 + 3))
    coarse = planning.changed(together, {"models.vae_precision": "bf16"})
    assert seconds(coarse) == pytest.approx((3 + 2 + 4 + 2 + 1, 1 + 3))
    fp32 = planning.changed(together, {"optimization.precision": "fp32"})
    assert device.rates(fp32) is None
    frugal = planning.changed(again, {"optimization.generator.lora": {"rank": 1}})
    assert seconds(frugal) == pytest.approx((3 * 1.5 + 3 + 6 + 2 * 3 + 1.5, 1 + 4))  # whatever their own FLOPs


def test_the_command(tiny_sdxl: Path, tmp_path: Path) -> None:
    recipe = build(tiny_sdxl, precision="bf16")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump()))
    app = typer.Typer()
    app.command()(command.plan_command)
    fits = CliRunner().invoke(app, [str(file), "--device", "h100-80gb", "--json"])
    assert fits.exit_code == 0, fits.output
    data = json.loads(fits.output)
    assert data["fit"]["group"] is None
    work = flops.of_recipe(recipe).update(8, recipe.algorithm.assistant_steps)
    assert data["seconds"]["step"] >= work / (2 * 989e12 * planning.ACHIEVED) > 0
    large = CliRunner().invoke(app, [str(file), "--device-memory", str(needs(recipe) * 0.9)])
    assert large.exit_code == 1
    assert "does not fit: a process of group 'all' needs" in large.output
    assert "cheapest that fits: --set" in large.output
    here = CliRunner().invoke(app, [str(file), "--device", "here", "--set", "optimization.precision=fp32", "--json"])
    assert here.exit_code == 0, here.output
    data = json.loads(here.stdout)
    assert data["rates"]["unet"] > 1e6 < data["rates"]["decoder"]
    one = work / 2 / max(data["rates"].values()), work / 2 / min(data["rates"].values())  # over two processes
    assert 0.999 * one[0] <= data["seconds"]["step"] <= 1.001 * one[1]  # sums round
    table = CliRunner().invoke(app, [str(file), "--device", "h100-80gb"]).output
    assert "Seconds a step on h100-80gb, at an assumed 45% of its peak" in table
    assert max(len(line) for line in table.splitlines() if "fits" not in line) <= 80
    unknown = CliRunner().invoke(app, [str(file), "--device", "h1000"])
    assert isinstance(unknown.exception, UsageError)
    assert "known: h100-80gb" in str(unknown.exception)
