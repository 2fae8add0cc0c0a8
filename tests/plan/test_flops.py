"""FLOPs: the published architectures' forwards, and that a step's multiples of them are what autograd does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rlhf_t2i.families import flops, published
from rlhf_t2i.families.flops import Forward
from rlhf_t2i.plugins import traits
from rlhf_t2i.recipe.schema import Recipe
from rlhf_t2i.training.metrics import step_metrics
from rlhf_t2i.training.state import TrainState
from tests import tiny

# TFLOP of a forward at 1024 px.
UNET, DECODER, TOWER = 6.76, 10.47, 0.33


def recipe(folder: Path = Path("/nowhere"), **algorithm: Any) -> Recipe:
    algorithm.setdefault("rewards", [{"name": "pickscore", "scale": 100.0}])
    return Recipe.model_validate(tiny.recipe_dict(folder, Path("/nowhere"), algorithm=algorithm))


@pytest.mark.slow
def test_sdxl_forwards_at_1024_pixels() -> None:
    fresh = flops.fresh_unet(published.SDXL_UNET, 128)
    assert fresh == flops.unet(published.SDXL_UNET, 128)  # the kept count
    assert fresh / 1e12 == pytest.approx(UNET, abs=0.005)
    assert flops.decoder(published.VAE, 128) / 1e12 == pytest.approx(DECODER, abs=0.005)
    (tower,) = traits.resolve(recipe()).rewards
    assert flops.image_tower(tower.footprint) / 1e12 == pytest.approx(TOWER, abs=0.005)


def test_steps_at_sdxl_size() -> None:
    step = flops.of_step(recipe(), Forward(676, 1047, {"pickscore": 33}))
    # 3 learner + 2 assistant + 2 x 2 reference, 2 decoder, 2 reward: 82 TFLOP; 1 sample + 3 training: 27.
    assert sum(step.generator.values()) == 9 * 676 + 2 * 1047 + 2 * 33 == 8244
    assert sum(step.assistant.values()) == 4 * 676 == 2704
    assert step.update(images=128, rounds=2) == 128 * (8244 + 2 * 2704)


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
    step = flops.of_step(recipe(**algorithm), Forward(1, 0, {"pickscore": 0, "cfg_implicit": 0}))
    assert (step.generator["reference"], step.generator["assistant"]) == (reference, assistant)


def test_adapters_spare_the_gradient_of_the_weights() -> None:
    adapted = recipe().model_dump()
    adapted["optimization"]["assistant"]["lora"] = {"rank": 4}
    step = flops.of_step(Recipe.model_validate(adapted), Forward(1, 0, {"pickscore": 0}))
    assert (step.generator["learner"], step.assistant["assistant"]) == (3, 2)


def test_rewards_share_a_decode_but_not_its_backward() -> None:
    two = [{"name": "pickscore", "label": label} for label in ("one", "two")]
    step = flops.of_step(recipe(rewards=two), Forward(0, 10, {"one": 1, "two": 2}))
    assert step.generator["decoder"] == 30
    assert step.generator["rewards"] == 6
    assert "decoder" not in flops.of_step(recipe(rewards=[]), Forward(1, 1, {})).generator


@pytest.mark.parametrize(("train", "factor"), [(True, flops.TRAINED), (False, flops.PULLED)])
def test_backward_is_a_multiple_of_the_forward(train: bool, factor: int) -> None:
    """SD1.5's UNet, forward and backward as autograd does them. Attention has two inputs to every product, so a
    frozen one needs a little more than the one gradient of a product with weights; text keys need none."""
    config = published.SD15_UNET
    network = published.build_on_meta(config).requires_grad_(train)
    with torch.device("meta"):
        x, t = torch.empty(1, 4, 64, 64, requires_grad=not train), torch.empty(1, dtype=torch.long)
        embeds = torch.empty(1, 77, 768)
    with FlopCounterMode(display=False) as counter:
        network(x, t, encoder_hidden_states=embeds, return_dict=False)[0].sum().backward()
    assert counter.get_total_flops() == pytest.approx(factor * flops.unet(config, 64), rel=0.1 if not train else 0.03)


def test_a_recipe_is_counted_from_its_folders(tiny_sdxl: Path, tiny_clip: Path) -> None:
    rewards = [{"name": "pickscore", "options": {"model": str(tiny_clip)}}]
    step = flops.of_recipe(recipe(tiny_sdxl, rewards=rewards))
    config = {**tiny.sdxl_unet().config, "_class_name": "UNet2DConditionModel"}
    assert step.assistant["generator"] == flops.unet(config, tiny.LATENTS[1]) > 0
    assert step.generator["decoder"] > 0
    assert step.generator["rewards"] > 0


def test_utilization_is_of_all_devices_and_only_on_gpus() -> None:
    assert flops.utilization(6e12, 2.0, [4e12, 2e12]) == pytest.approx(0.5)
    assert flops.utilization(6e12, 2.0, [4e12, None]) is None
    assert flops.utilization(6e12, 2.0, [None]) is None
    assert flops.utilization(0, 2.0, [4e12]) is None


def test_steps_log_it_where_a_rate_was_measured(tiny_sdxl: Path) -> None:
    made = recipe(tiny_sdxl, rewards=[])
    progress, report = (
        TrainState(step=1, rounds=1),
        [{"samples": {"timestep": [5.0], "delta_norm": [1.0]}, "grad_norm": 1.0}],
    )

    def metrics(rate: float | None) -> dict[str, Any]:
        reading = {"seconds": {}, "bytes": 0, "memory": 0, "rank": 0, "matmul_rate": rate}
        assistant = [{"loss": 1.0, "grad_norm": 1.0}]
        return step_metrics(made, progress, report, assistant, {"step": 2.0}, {"all/0": reading})

    work = flops.of_recipe(made).update(made.optimization.batch_size, 1)
    assert metrics(work)["mfu"] == pytest.approx(0.5)
    assert "mfu" not in metrics(None)
