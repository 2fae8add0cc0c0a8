"""What fits a device, what makes it fit, and the seconds of a step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from rlhf_t2i.commands import plan as command
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families import adapters, flops
from rlhf_t2i.recipe.schema import ROLES, Recipe
from rlhf_t2i.tools.planning import cost, devices, fit, plan, time
from rlhf_t2i.tools.planning.devices import ACHIEVED, USABLE, Device, Rates
from tests import tiny

GIB = 2**30


def build(folder: Path, devices: int = 2, **optimization: object) -> Recipe:
    settings = {"batch_size": 8, "zero_stage": 1, **optimization}
    placement = {"mode": "ray", "groups": {"all": {"devices": devices, "roles": list(ROLES)}}}
    data = tiny.recipe_dict(folder, Path("/nowhere"), optimization=settings, placement=placement)
    return Recipe.model_validate({**data, "evaluation": {"batch_size": 2}})


def needs(recipe: Recipe) -> float:
    """GiB of a device on which the recipe just fits."""
    return plan.make(recipe).groups[0].memory.device / GIB / USABLE * 1.0001


def test_what_fits_needs_no_change(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl)
    found = fit.check(recipe, plan.make(recipe), needs(recipe))
    assert found.group is None
    assert found.describe().startswith("fits")


def test_smaller_micro_batches_come_first(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl)
    half = needs(fit.changed(recipe, {"optimization.micro_batch": 2}))
    found = fit.check(recipe, plan.make(recipe), half)
    assert (found.group, found.change) == ("all", {"optimization.micro_batch": 2})
    assert "--set optimization.micro_batch=2" in found.describe()


def test_images_drawn_at_once_come_first(tiny_sdxl: Path) -> None:
    """Between steps nothing is trained: a smaller batch there changes no result."""
    recipe = fit.changed(build(tiny_sdxl, micro_batch=1), {"evaluation.batch_size": 512})
    limit = needs(fit.changed(recipe, {"evaluation.batch_size": 128}))
    found = fit.check(recipe, plan.make(recipe), limit)
    assert found.change == {"evaluation.batch_size": 128}


def test_changes_are_combined_and_do_fit(tiny_sdxl: Path) -> None:
    """Smaller than any one change can make it; the answer, planned again, does fit."""
    recipe = build(tiny_sdxl, gradient_checkpointing=True, precision="bf16", micro_batch=1)
    offloaded = needs(fit.changed(recipe, {"optimization.offload_optimizer": True}))
    found = fit.check(recipe, plan.make(recipe), offloaded)
    assert found.change
    assert needs(fit.changed(recipe, found.change)) <= offloaded
    assert needs(recipe) > offloaded


def test_frozen_roles_recompute_before_trained_ones(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl, precision="bf16", micro_batch=1)
    change = {"optimization.gradient_checkpointing": ["reward", "reference"]}
    limit = needs(fit.changed(recipe, change))
    assert limit < needs(recipe)
    found = fit.check(recipe, plan.make(recipe), limit)
    assert found.change == change
    assert "--set 'optimization.gradient_checkpointing=[reward, reference]'" in found.describe()


def test_changes_that_the_recipe_excludes_are_passed_over(tiny_sdxl: Path) -> None:
    """Adapters and compiled blocks refuse ZeRO-3, which is among the changes tried."""
    recipe = build(tiny_sdxl, generator={"lora": {"targets": ["to_q"]}}, compile=True)
    assert fit.check(recipe, plan.make(recipe), 1e-6).change == {}


def test_the_impossible_is_said(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl)
    found = fit.check(recipe, plan.make(recipe), 1e-6)
    assert found.change == {}
    assert "none of the changes" in found.describe()


def test_adapters_and_8_bit_states_are_planned(tiny_sdxl: Path) -> None:
    lora = {"rank": 2, "targets": ["to_q", "to_out.0"]}
    recipe = build(tiny_sdxl, assistant={"lora": lora}, generator={"kind": "adamw_8bit"})
    network = tiny.sdxl_unet()
    count = sum(p.numel() for p in network.parameters())
    adapters.add(network, recipe.optimization.assistant.lora, ("to_q", "to_out.0"), seed=0)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    memory = {item.role: item.memory for item in plan.make(recipe).groups[0].roles}
    # Two ranks under ZeRO-1 in fp32: frozen weights, adapters; half of their gradients and states each.
    assert memory["assistant"].weights == 4 * (count + trained)
    assert memory["assistant"].gradients == 4 * -(-trained // 2)
    assert memory["assistant"].optimizer == 12 * -(-trained // 2)
    assert memory["learner"].optimizer == (2 + 4) * -(-count // 2)


RATES = Rates(network=1.0, decoder=0.5)


@pytest.fixture
def one_flop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward costs one FLOP."""
    parts = ("network", "decoder", "reward:pickscore")
    monkeypatch.setattr(flops, "forwards", lambda recipe: dict.fromkeys(parts, 1))


def scored(folder: Path, clip: Path, **optimization: object) -> Recipe:
    recipe = build(folder, devices=1, precision="bf16", batch_size=1, **optimization)
    reward = {"name": "pickscore", "options": {"model": str(clip)}}
    return fit.changed(recipe, {"algorithm.rewards": [reward]})


def test_seconds_follow_the_groups(tiny_sdxl: Path, tiny_clip: Path, one_flop: None) -> None:
    together = scored(tiny_sdxl, tiny_clip)

    def seconds(recipe: Recipe) -> tuple[float, float]:
        found = plan.step_time(recipe, RATES)
        assert sum(found.assistant_roles.values()) == pytest.approx(found.assistant)
        assert found.step == found.generator + found.assistant
        return found.generator, found.assistant

    # Learner 3, assistant 2, reference 2 x 2, decoder 2 at half the rate, reward 2; drawing 1, training 3.
    assert seconds(together) == pytest.approx((3 + 2 + 4 + 2 * 2 + 2, 1 + 3))
    groups = {"a": {"roles": ["learner", "generator", "reward"]}, "b": {"roles": ["assistant", "reference"]}}
    apart = fit.changed(together, {"placement.groups": groups})
    assert seconds(apart) == pytest.approx((3 + max(2 + 4, 2 * 2 + 2), 1 + 3))
    again = fit.changed(together, {"optimization.gradient_checkpointing": True})
    assert seconds(again) == pytest.approx((4 + 3 + 6 + 2 * 3 + 3, 1 + 4))
    decoder_alone = fit.changed(together, {"optimization.gradient_checkpointing": ["reward"]})
    assert seconds(decoder_alone) == pytest.approx((3 + 2 + 4 + 2 * 3 + 3, 1 + 3))
    frugal = fit.changed(again, {"optimization.generator.lora": {"rank": 1}})
    assert seconds(frugal) == pytest.approx((3 + 3 + 6 + 2 * 3 + 3, 1 + 4))
    kl = fit.changed(again, {"algorithm.divergence.name": "kl"})  # keeps no graph: nothing is recomputed
    assert seconds(kl) == pytest.approx((4 + 1 + 2 + 2 * 3 + 3, 1 + 4))


def test_groups_that_hold_rewards_each_decode(tiny_sdxl: Path, tiny_clip: Path, one_flop: None) -> None:
    recipe = scored(tiny_sdxl, tiny_clip)
    rewards = [{**recipe.algorithm.rewards[0].model_dump(), "label": label} for label in ("one", "two")]
    groups = {
        "a": {"roles": ["learner", "generator", "assistant", "reference", "reward:one"]},
        "b": {"roles": ["reward:two"]},
    }
    recipe = fit.changed(recipe, {"algorithm.rewards": rewards, "placement.groups": groups})
    counted = dict.fromkeys(("network", "decoder", "reward:one", "reward:two"), 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flops, "forwards", lambda recipe: counted)
        found = plan.step_time(recipe, RATES)
    assert found.generator_roles["decoder"] == 2 * (2 * 2)
    assert found.generator == 3 + (2 + 4 + 2 * 2 + 2)


def test_collectives_and_copies_take_time(tiny_sdxl: Path) -> None:
    """Two ranks under ZeRO-2 in four micro-batches; the average is updated in host memory."""
    groups = {
        "a": {"devices": 2, "roles": ["learner", "assistant", "reference", "reward"]},
        "b": {"roles": ["generator"]},
    }
    recipe = build(tiny_sdxl, zero_stage=2, micro_batch=1, ema={"half_life_kimg": 1.0})
    recipe = fit.changed(recipe, {"placement.groups": groups, "algorithm.assistant_steps": 3})
    count = sum(p.numel() for p in tiny.sdxl_unet().parameters())
    found = plan.step_time(recipe, Rates(1e12, 1e12, link=1e3)).communication
    update = (4 * 2 * 4 * count / 2 + 4 * count / 2) / 1e3  # all-reduced four times, then gathered, in float32
    assert found["reductions: learner"] == pytest.approx(update, rel=1e-3)
    assert found["reductions: assistant"] == pytest.approx(3 * update, rel=1e-3)
    assert found["weights to the generator"] == 4 * count / time._STORE
    assert found["moving average"] == 4 * count / time._PAGEABLE
    unknown = plan.step_time(recipe, Rates(1e12, 1e12)).communication
    assert unknown.keys() == {"weights to the generator", "moving average"}


def test_collectives_of_zero_3_hide_behind_the_computation(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl, zero_stage=3)
    assert plan.step_time(recipe, Rates(1.0, 1.0, link=1e9)).communication == {}
    slow = plan.step_time(recipe, Rates(1e15, 1e15, link=1e3)).communication
    assert slow.keys() == {"reductions: learner", "reductions: assistant"}


def test_hours_of_the_whole_run(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl).model_copy(update={"steps": 10})
    recipe = fit.changed(recipe, {"algorithm.assistant_warmup": 6, "logging.watch_every": 5, "logging.watch_images": 8})
    recipe = fit.changed(recipe, {"evaluation.images": 100, "logging.samples_every": 5, "logging.sample_count": 4})
    seconds = time.StepTime(1.0, 2.0, {}, {}, {"reductions: learner": 0.5}, assistant_update=2.0, image=0.1)
    found = cost.duration(recipe, seconds, devices=2)
    assert found.training == pytest.approx(10 * 3.5 / 3600)
    assert found.warmup == pytest.approx(6 * 2.0 / 3600)
    assert found.measuring == pytest.approx((2 * 100 + 2 * 8 + 3 * 4) * 0.1 / 3600)
    assert found.gpu_hours == 2 * found.hours == pytest.approx(2 * (found.training + found.warmup + found.measuring))


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("h100", "h100-80gb"),
        ("H100-80GB", "h100-80gb"),
        ("h200", "h200-141gb"),
        ("a100", "a100-80gb"),
        ("a100-40gb", "a100-40gb"),
        ("l40s", "l40s-48gb"),
        ("here", "here"),
    ],
)
def test_short_names_of_devices(name: str, full: str) -> None:
    assert devices.find(name) == (full, devices.DEVICES.get(full))


@pytest.mark.parametrize(
    ("name", "near"), [("h1000", "h100"), ("hopper100", "h100"), ("tpu", None), ("h", None), ("", None)]
)
def test_unknown_devices_are_refused_with_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(UsageError, match="Known: h100-80gb, h200-141gb") as caught:
        devices.find(name)
    assert ("did you mean" in str(caught.value)) == (near is not None)
    assert near is None or f"did you mean {near}" in str(caught.value)


def test_a_wrong_device_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from rlhf_t2i.commands import plan\n"
        "try: plan.plan_command(pathlib.Path('absent.yaml'), device='h1000')\n"
        "except plan.UsageError as error: assert 'h1000' in str(error), error\n"
        "assert not {'torch', 'ray', 'diffusers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_rates_follow_the_precision(tiny_sdxl: Path) -> None:
    device, recipe = Device(80, bf16=100.0, fp32=10.0, link=1.0), build(tiny_sdxl, precision="bf16")
    assert device.rates(recipe).network == 100 * ACHIEVED
    assert device.rates(recipe).decoder == 50 * ACHIEVED
    assert device.rates(fit.changed(recipe, {"models.vae_precision": "bf16"})).decoder == 100 * ACHIEVED
    assert device.rates(fit.changed(recipe, {"optimization.precision": "fp32"})).network == 10 * ACHIEVED


def test_the_command(tiny_sdxl: Path, tmp_path: Path) -> None:
    recipe = fit.changed(build(tiny_sdxl, precision="bf16"), {"data.prompts": str(tiny.make_prompts(tmp_path))})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump()))
    app = typer.Typer()
    app.command()(command.plan_command)
    fits = CliRunner().invoke(app, [str(file), "--device", "h100", "--json"])
    assert fits.exit_code == 0, fits.output
    data = json.loads(fits.stdout)
    assert data["fit"]["group"] is None
    work = flops.of_update(recipe, recipe.algorithm.assistant_steps)
    assert data["seconds"]["step"] >= work / (2 * 989e12 * ACHIEVED) > 0
    assert data["run"]["gpu_hours"] == 2 * data["run"]["hours"] > 0
    assert data["run"]["disk"]["total"] > data["run"]["disk"]["checkpoint"] > 0
    large = CliRunner().invoke(app, [str(file), "--device-memory", str(needs(recipe) * 0.9)])
    assert large.exit_code == 1
    assert "does not fit: a process of group 'all' needs" in large.output
    assert "cheapest that fits: --set" in large.output
    here = CliRunner().invoke(app, [str(file), "--device", "here", "--set", "optimization.precision=fp32", "--json"])
    assert here.exit_code == 0, here.output
    data = json.loads(here.stdout)
    assert data["rates"]["network"] > 1e6 < data["rates"]["decoder"]
    text = CliRunner().invoke(app, [str(file), "--device", "h100"]).stdout
    assert text.startswith("Whole run, 2 steps on 2 x h100-80gb: ")
    assert "rates (assumed, 45% of the peak" in text
    assert "a lower bound: networks this small" in text
    assert max(len(line) for line in text.splitlines() if "fits" not in line) <= 80
