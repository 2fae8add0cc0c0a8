"""A checkpoint of one number of ranks is loaded by another: same weights and moments, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_t2i.engines import average
from rlhf_t2i.engines.deepspeed import DeepSpeedEngine
from rlhf_t2i.engines.writer import Writer
from rlhf_t2i.recipe.schema import Optimization, Recipe
from tests.training.ranks import run_ranks

BATCH = 4


def build(settings: Optimization, ranks: int) -> DeepSpeedEngine:
    """A small network; every layout starts from the same weights."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5), nn.LayerNorm(5))
    return DeepSpeedEngine(module, settings.generator, 1, BATCH // ranks, settings)


def train(engine: DeepSpeedEngine, rank: int, ranks: int, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` of one run, whatever the number of ranks."""
    share = BATCH // ranks
    for step in range(first, last):
        inputs = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))
        engine.backward(engine(inputs[rank * share : (rank + 1) * share]).square().sum(1).sub(1).square().mean())
        engine.step(1e-2)


def state(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Weights and moments, whole."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    found = {}
    for name, parameter in engine.module.named_parameters():
        found[name] = safe_get_full_fp32_param(parameter).clone()
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name} {moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
    return found


def begin(rank: int, ranks: int, stage: Optimization, folder: Path) -> None:
    """Three steps, a checkpoint, three more: what the others are compared with."""
    engine = build(stage, ranks)
    averaged = average.of(engine)
    train(engine, rank, ranks, 0, 3)
    averaged.update(0.5)
    writer = Writer()
    engine.save(folder, writer)
    writer.wait()
    at_checkpoint = state(engine)
    gathered = {name: value.clone() for name, value in averaged.full_parameters()}
    train(engine, rank, ranks, 3, 6)
    whole = state(engine)
    if rank == 0:
        torch.save((at_checkpoint, whole, gathered), folder / "states.pt")


def resume(rank: int, ranks: int, stage: Optimization, folder: Path) -> None:
    """Load, compare, go on."""
    at_checkpoint, whole, gathered = torch.load(folder / "states.pt", weights_only=True)
    engine = build(stage, ranks)
    said = engine.load(folder)
    assert said is not None
    assert "bit-equality is not promised" in said
    averaged = average.of(engine)
    averaged.load(gathered)
    for name, value in averaged.full_parameters():
        assert torch.equal(value, gathered[name]), (stage.zero_stage, name)
    loaded = state(engine)
    for name, expected in at_checkpoint.items():
        assert expected.any(), name
        assert torch.equal(loaded[name], expected), (stage.zero_stage, name)
        assert name not in gathered or not torch.equal(gathered[name], expected), name
    train(engine, rank, ranks, 3, 6)
    ended = state(engine)
    for name, expected in whole.items():
        change = (expected - at_checkpoint[name]).norm()
        assert float((ended[name] - expected).norm()) < 1e-3 * float(change), (stage.zero_stage, name)
    torch.distributed.barrier()
    assert not [path for path in folder.iterdir() if "universal" in path.name]


Runs = list[tuple[Optimization, Path]]


def phase(rank: int, ranks: int, resumed: Runs, begun: Runs) -> None:
    """Go on from others' checkpoints, then write some for others."""
    for settings, folder in resumed:
        resume(rank, ranks, settings, folder)
    for settings, folder in begun:
        begin(rank, ranks, settings, folder)


def test_another_number_of_ranks_goes_on_from_the_same_state(
    make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = {stage: make_recipe(optimization__zero_stage=stage).optimization for stage in (1, 2, 3)}
    folders = {name: tmp_path / name for name in ("one to two", "two to one", "three")}
    for folder in folders.values():
        folder.mkdir()
    one, two, three = folders.values()
    run_ranks(1, one, phase, 1, [], [(settings[1], one), (settings[3], three)])
    run_ranks(2, one, phase, 2, [(settings[1], one), (settings[3], three)], [(settings[2], two)])
    run_ranks(1, two, phase, 1, [(settings[1], two)], [])
