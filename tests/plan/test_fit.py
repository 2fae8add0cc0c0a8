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
from rlhf_t2i.tools.planning import cost, devices, fit, graph, plan, time
from rlhf_t2i.tools.planning.devices import CONVOLUTION, DEVICES, MATMUL, USABLE, Device
from rlhf_t2i.tools.planning.simulation import Call, simulate
from rlhf_t2i.tools.planning.speed import Links, Measured, Passes, Roofline
from rlhf_t2i.tools.planning.zero import Setting
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


PARTS = ("network", "decoder", "reward:pickscore", "reward:one", "reward:two")
# A decoder at half the rate.
SPEED = Measured({part: Passes(*[2.0 if part == "decoder" else 1.0] * 3) for part in PARTS})


def scored(folder: Path, clip: Path, **optimization: object) -> Recipe:
    recipe = build(folder, devices=1, precision="bf16", batch_size=1, **optimization)
    reward = {"name": "pickscore", "options": {"model": str(clip)}}
    return fit.changed(recipe, {"algorithm.rewards": [reward]})


def test_seconds_follow_the_groups(tiny_sdxl: Path, tiny_clip: Path) -> None:
    together = scored(tiny_sdxl, tiny_clip)

    def seconds(recipe: Recipe) -> tuple[float, float]:
        found = plan.step_time(recipe, SPEED)
        assert sum(found.roles("assistant").values()) == pytest.approx(found.assistant)
        assert found.step == found.generator + found.assistant
        return found.generator, found.assistant

    # Learner 3, assistant 2, reference 2 x 2, decoder 2 at half the rate, reward 2; drawing 1, training 3.
    assert seconds(together) == pytest.approx((3 + 2 + 4 + 2 * 2 + 2, 1 + 3))
    groups = {"a": {"roles": ["learner", "generator", "reward"]}, "b": {"roles": ["assistant", "reference"]}}
    apart = fit.changed(together, {"placement.groups": groups})
    generator, assistant = seconds_without_hops(apart)
    assert (generator, assistant) == pytest.approx((3 + max(2 + 4, 2 * 2 + 2), 1 + 3))
    again = fit.changed(together, {"optimization.gradient_checkpointing": True})
    assert seconds(again) == pytest.approx((4 + 3 + 6 + 2 * 3 + 3, 1 + 4))
    decoder_alone = fit.changed(together, {"optimization.gradient_checkpointing": ["reward"]})
    assert seconds(decoder_alone) == pytest.approx((3 + 2 + 4 + 2 * 3 + 3, 1 + 4 - 1))
    frugal = fit.changed(again, {"optimization.generator.lora": {"rank": 1}})
    assert seconds(frugal) == pytest.approx((3 + 3 + 6 + 2 * 3 + 3, 1 + 4))
    kl = fit.changed(again, {"algorithm.divergence.name": "kl"})  # keeps no graph: nothing is recomputed
    assert seconds(kl) == pytest.approx((4 + 1 + 2 + 2 * 3 + 3, 1 + 4))


def seconds_without_hops(recipe: Recipe) -> tuple[float, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "_HOP", 0.0)
        found = plan.step_time(recipe, SPEED, graph.Rules())
    return found.generator, found.assistant


def test_groups_that_hold_rewards_each_decode(tiny_sdxl: Path, tiny_clip: Path) -> None:
    recipe = scored(tiny_sdxl, tiny_clip)
    rewards = [{**recipe.algorithm.rewards[0].model_dump(), "label": label} for label in ("one", "two")]
    groups = {
        "a": {"roles": ["learner", "generator", "assistant", "reference", "reward:one"]},
        "b": {"roles": ["reward:two"]},
    }
    recipe = fit.changed(recipe, {"algorithm.rewards": rewards, "placement.groups": groups})
    assert plan.step_time(recipe, SPEED).roles("generator")["decoder"] == 2 * (2 * 2)
    assert seconds_without_hops(recipe)[0] == 3 + (2 + 4 + 2 * 2 + 2)


def test_a_server_of_several_callers_does_their_calls_one_by_one(tiny_sdxl: Path, tiny_clip: Path) -> None:
    """Four learner ranks of two images share one process of rewards, which decodes one image at once."""
    recipe = fit.changed(scored(tiny_sdxl, tiny_clip), {"optimization.batch_size": 8})
    groups = {
        "a": {"roles": ["learner", "generator", "assistant", "reference"], "devices": 4},
        "b": {"roles": ["reward"]},
    }
    recipe = fit.changed(recipe, {"placement.groups": groups})
    counted: list[tuple[str, int]] = []

    class Counting(Measured):
        def passes(self, part: str, images: int) -> Passes:
            counted.append((part, images))
            return super().passes(part, images)

    found = plan.step_time(recipe, Counting(SPEED.image)).roles("generator")
    assert found["reward:pickscore"] == 8 * 2
    assert found["learner"] == 2 * 3
    assert {("network", 2), ("reward:pickscore", 2), ("network", 4)} <= set(counted)
    one = fit.changed(recipe, {"algorithm.rewards": [{**recipe.algorithm.rewards[0].model_dump(), "micro_batch": 1}]})
    counted.clear()
    assert plan.step_time(one, Counting(SPEED.image)).roles("generator")["reward:pickscore"] == 8 * 2
    assert ("reward:pickscore", 1) in counted


def test_collectives_and_copies_take_time(tiny_sdxl: Path) -> None:
    """Two ranks under ZeRO-2 in four micro-batches; the average is updated in shards, and weights travel."""
    groups = {
        "a": {"devices": 2, "roles": ["learner", "assistant", "reference", "reward"]},
        "b": {"roles": ["generator"]},
    }
    recipe = build(tiny_sdxl, zero_stage=2, micro_batch=1, ema={"half_life_kimg": 1.0})
    recipe = fit.changed(recipe, {"placement.groups": groups, "algorithm.assistant_steps": 3})
    count = sum(p.numel() for p in tiny.sdxl_unet().parameters())
    slow = Measured(SPEED.image, links=Links(1e3, start=0.0), bandwidth=1e6)

    def communication(speed: Measured) -> tuple[dict[str, float], dict[str, float]]:
        found = plan.step_time(recipe, speed)
        return found.communication("generator"), found.communication("assistant")

    learner, assistant = communication(slow)
    update = (4 * 2 * 4 * count / 2 + 4 * count / 2) / 1e3  # all-reduced four times, then gathered, in float32
    assert learner["learner: reduce"] == pytest.approx(update, rel=1e-3)
    assert assistant["assistant: reduce"] == pytest.approx(3 * update, rel=1e-3)
    assert learner["learner: weights to the generator"] == pytest.approx(4 * count / time._PACKED)
    assert communication(SPEED)[1].keys() == {graph.HOP}
    averaged = plan.step_time(recipe, slow).roles("generator")["learner"]
    plain = plan.step_time(fit.changed(recipe, {"optimization.ema": None}), slow).roles("generator")["learner"]
    assert averaged - plain == pytest.approx(12 * -(-count // 2) / 1e6)


def test_exposed_communication_is_what_the_step_would_be_shorter(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl)
    free, slow = (plan.step_time(recipe, Measured(SPEED.image, links=links)) for links in (Links(), Links(1e3)))
    assert free.exposed == pytest.approx(0.0)
    assert slow.exposed == pytest.approx(slow.step - free.step)
    assert slow.step > free.step
    assert slow.idle == {"all": pytest.approx(0.0)}


def test_collectives_of_zero_3_hide_behind_the_computation(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl, zero_stage=3)
    fast, slow = (plan.step_time(recipe, Measured(SPEED.image, links=Links(rate))) for rate in (1e12, 1e3))
    assert fast.exposed == pytest.approx(0.0, abs=1e-6)
    assert slow.exposed > 0


def test_machines_are_connected_by_their_network() -> None:
    links = Links(node=100.0, network=10.0, devices=8, start=0.0)
    assert links.seconds(1000.0, ranks=8) == 10.0
    assert links.seconds(1000.0, ranks=16) == 100.0
    assert links.seconds(1000.0, ranks=1) == 0.0
    assert Links(node=100.0, start=0.5).seconds(1000.0, ranks=64) == 10.5


def test_an_update_is_bound_by_memory_and_an_offloaded_one_by_the_host(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl, precision="bf16")
    device = DEVICES["h100-80gb"]
    roofline = Roofline(device, plan.networks_of(recipe), device.links())
    near, far = (Setting(8, 1, "bf16", 1, offload=offload) for offload in (False, True))
    assert roofline.update(10**9, near) == pytest.approx(52e9 / (devices.MEMORY * 3.35e12))
    assert roofline.update(10**9, far) > 1.0


def test_hours_of_the_whole_run(tiny_sdxl: Path) -> None:
    recipe = build(tiny_sdxl).model_copy(update={"steps": 10})
    recipe = fit.changed(recipe, {"algorithm.assistant_warmup": 6, "logging.watch_every": 5, "logging.watch_images": 8})
    recipe = fit.changed(recipe, {"evaluation.images": 100, "logging.samples_every": 5, "logging.sample_count": 4})
    step, update = (simulate([Call("a", "learner", "all", spent)]) for spent in (3.5, 2.0))
    seconds = time.StepTime(step, update, without_communication=3.0, image=0.1)
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


def test_rates_follow_the_kind_of_kernel_and_its_numbers() -> None:
    device = Device(80, bf16=100.0, tf32=50.0, fp32=10.0, bandwidth=1.0, link=1.0, attention=0.4)
    assert device.rate("matmul", 16) == 100 * MATMUL
    assert device.rate("matmul", 32) == 10 * MATMUL  # torch takes TF32 for convolutions alone
    assert device.rate("convolution", 32) == 50 * CONVOLUTION
    assert device.rate("attention", 16) == pytest.approx(40)


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
    assert data["seconds"]["step"] >= work / (2 * 989e12) > 0
    assert data["run"]["gpu_hours"] == 2 * data["run"]["hours"] > 0
    assert data["run"]["disk"]["total"] > data["run"]["disk"]["checkpoint"] > 0
    large = CliRunner().invoke(app, [str(file), "--device-memory", str(needs(recipe) * 0.9)])
    assert large.exit_code == 1
    assert "does not fit: a process of group 'all' needs" in large.output
    assert "cheapest that fits: --set" in large.output
    here = CliRunner().invoke(app, [str(file), "--device", "here", "--set", "optimization.precision=fp32", "--json"])
    assert here.exit_code == 0, here.output
    data = json.loads(here.stdout)
    assert data["speed"]["source"].startswith("measured here")
    assert data["speed"]["image"].keys() == {"network", "decoder"}
    assert all(part["forward"] > 0 < part["inputs"] for part in data["speed"]["image"].values())
    text = CliRunner().invoke(app, [str(file), "--device", "h100"]).stdout
    assert text.startswith("Whole run, 2 steps on 2 x h100-80gb: ")
    assert "rates assumed, never measured by us on a GPU: TFLOP/s of matmul 544" in text
    assert "devices that wait for others: all 0% of the step" in text
    assert max(len(line) for line in text.splitlines() if "fits" not in line) <= 80
