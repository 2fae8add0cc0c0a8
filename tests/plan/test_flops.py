"""FLOPs: the published architectures' forwards, and that a step's multiples of them are what autograd does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf_t2i.families import flops
from rlhf_t2i.families.flops import Work
from rlhf_t2i.families.footprints import Footprints
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.roles.trained import Update
from rlhf_t2i.roles.worker import Reading
from rlhf_t2i.training.metrics import step_metrics
from rlhf_t2i.training.state import TrainState
from tests import tiny

SDXL, SD15 = "stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-v1-5/stable-diffusion-v1-5"
# TFLOP of a forward at 1024 px.
NETWORK, DECODER, TOWER = 6.76, 10.47, 0.33


def recipe(reference: Path | str = SDXL, **changes: Any) -> Recipe:
    algorithm = {"rewards": [{"name": "pickscore", "scale": 100.0}], **changes.pop("algorithm", {})}
    data = tiny.recipe_dict(Path("/nowhere"), Path("/nowhere"), algorithm=algorithm, **changes)
    models = {"reference": str(reference), "generator": str(reference)}
    size = {} if isinstance(reference, str) else {"height": tiny.RESOLUTION, "width": tiny.RESOLUTION}
    return Recipe.model_validate({**data, "models": models | size})


def test_sdxl_forwards_at_1024_pixels() -> None:
    counted = flops.forwards(recipe())
    assert counted["network"] == 6_761_236_398_080
    assert counted["network"] / 1e12 == pytest.approx(NETWORK, abs=0.005)
    assert counted["decoder"] / 1e12 == pytest.approx(DECODER, abs=0.005)
    assert counted["reward:pickscore"] / 1e12 == pytest.approx(TOWER, abs=0.005)


def total(works: list[Work], **forward: float) -> float:
    return sum(work.flops(forward[work.part.partition(":")[0]]) for work in works)


def test_steps_at_sdxl_size() -> None:
    sizes = {"network": 676, "decoder": 1047, "reward": 33}
    # 3 learner + 2 assistant + 2 x 2 reference, 2 decoder, 2 reward: 82 TFLOP; 1 sample + 3 training: 27.
    assert total(flops.generator_step(recipe()), **sizes) == 9 * 676 + 2 * 1047 + 2 * 33 == 8244
    assert total(flops.assistant_step(recipe()), **sizes) == 4 * 676 == 2704


@pytest.mark.parametrize(
    ("algorithm", "reference", "assistant"),
    [
        ({"cfg": {"guidance_scale": 7.5}}, 4, 2),
        ({"cfg": {"guidance_scale": 0.0, "convention": "one_plus"}}, 2, 2),
        ({"cfg": {"mode": "outer"}}, 3, 2),
        ({"cfg": {"mode": "outer", "guidance_scale": 0.0}}, 2, 2),
        ({"divergence": {"name": "kl"}}, 2, 1),
        ({"divergence": {"name": "kl"}, "cfg": {"mode": "outer"}}, 2, 1),
        ({"rewards": [{"name": "cfg_implicit"}]}, 6, 2),
    ],
)
def test_every_objective_has_its_own_work(algorithm: dict[str, Any], reference: int, assistant: int) -> None:
    found = {work.role: work.flops(1) for work in flops.generator_step(recipe(algorithm=algorithm))}
    assert (found["reference"], found["assistant"]) == (reference, assistant)


def test_adapters_spare_the_gradient_of_the_weights() -> None:
    adapted = recipe(optimization={"batch_size": 2, "assistant": {"lora": {"rank": 4}}})
    (learner, *_), (_, assistant) = flops.generator_step(adapted), flops.assistant_step(adapted)
    assert (learner.flops(1), assistant.flops(1)) == (3, 2)
    # Recomputed: one forward more.
    assert (learner.flops(1, recomputed=True), assistant.flops(1, recomputed=True)) == (4, 3)


def test_steps_of_the_student_are_counted() -> None:
    """Of four steps the one that is trained is uniform: 1.5 forwards before it on average."""
    four = recipe(student={"steps": 4})
    assert flops.generator_step(four)[0].flops(1) == 1.5 + 3
    assert flops.assistant_step(four)[0].flops(1) == 2.5
    assert flops.measuring(four)[0].flops(1) == 4


def test_rewards_share_a_decode_but_not_its_backward() -> None:
    two = recipe(algorithm={"rewards": [{"name": "pickscore", "label": label} for label in ("one", "two")]})
    found = {work.role: work.flops(1) for work in flops.generator_step(two)}
    assert (found["decoder"], found["reward:one"], found["reward:two"]) == (3, 2, 2)
    assert "decoder" not in {work.role for work in flops.generator_step(recipe(algorithm={"rewards": []}))}


@pytest.mark.parametrize(("train", "factor"), [(True, 3), (False, 2)])
def test_backward_is_a_multiple_of_the_forward(train: bool, factor: int) -> None:
    """SD1.5's UNet, forward and backward as autograd does them. Attention has two inputs to every product, so a
    frozen one needs a little more than the one gradient of a product with weights; text keys need none."""
    counted = Footprints(recipe(SD15)).network()
    network = counted.build().requires_grad_(train)
    with FlopCounterMode(display=False) as counter:
        x_t, output = counted.call(network)
        if train:
            output.sum().backward()
        else:
            torch.autograd.grad(output.sum(), x_t)
    assert counter.get_total_flops() == pytest.approx(factor * counted.flops(), rel=0.03 if train else 0.1)


def test_a_recipe_is_counted_from_its_folders(tiny_sdxl: Path, tiny_clip: Path) -> None:
    rewards = [{"name": "pickscore", "options": {"model": str(tiny_clip)}}]
    counted = flops.forwards(recipe(tiny_sdxl, algorithm={"rewards": rewards}))
    assert all(counted[part] > 0 for part in ("network", "decoder", "reward:pickscore"))


def test_utilization_is_of_all_devices_and_only_on_gpus() -> None:
    assert flops.utilization(6e12, 2.0, [4e12, 2e12]) == pytest.approx(0.5)
    assert flops.utilization(6e12, 2.0, [4e12, None]) is None
    assert flops.utilization(6e12, 2.0, [None]) is None
    assert flops.utilization(0, 2.0, [4e12]) is None


def test_steps_log_it_where_a_rate_was_measured(tiny_sdxl: Path) -> None:
    made = recipe(tiny_sdxl, algorithm={"rewards": []})
    state = TrainState(step=1, rounds=1)
    report = [Update(1.0, samples={"timestep": [5.0], "delta_norm": [1.0]})]

    def metrics(rate: float | None) -> dict[str, Any]:
        reading = Reading(matmul_rate=rate)
        assistant = [{"loss": 1.0, "grad_norm": 1.0}]
        return step_metrics(made, state, report, assistant, {"step": 2.0}, {"all/0": reading})

    assert metrics(flops.of_update(made, 1))["mfu"] == pytest.approx(0.5)
    assert "mfu" not in metrics(None)
