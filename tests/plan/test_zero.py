"""What training a network takes: ZeRO's terms against figures worked out by hand, and a process's phases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf_t2i.engines.local import LocalEngine
from rlhf_t2i.engines.writer import Writer
from rlhf_t2i.families import registry, sources
from rlhf_t2i.recipe.schema import Optimization
from rlhf_t2i.tools.planning import zero
from rlhf_t2i.tools.planning.memory import GroupPlan, Memory, RolePlan, trained_memory

SIZES = zero.Sizes(1000, largest=100)


def setting(
    stage: int | None, precision: str = "bf16", ranks: int = 4, bucket: int = 200, **more: bool
) -> zero.Setting:
    return zero.Setting(ranks, stage, precision, bucket, **more)


def sums(chosen: zero.Setting, *moments: zero.When, sizes: zero.Sizes = SIZES) -> tuple[int, ...]:
    items = zero.terms(sizes, chosen)
    return tuple(zero.total(items, when) for when in moments)


def test_local_training_is_torchs_own() -> None:
    """Weights, gradients and Adam's states of a real step, to the byte."""
    network = torch.nn.Linear(30, 20)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    tensors = list(network.parameters())
    memory = trained_memory(zero.sizes_of([p.numel() for p in tensors]), setting(None, "fp32", 1), activations=7)
    assert memory.weights == sum(p.nbytes for p in tensors)
    assert memory.gradients == sum(p.grad.nbytes for p in tensors if p.grad is not None)
    states = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert memory.optimizer == sum(v.nbytes for v in states)
    assert (memory.activations, memory.buffers, memory.host) == (7, 0, 0)


@pytest.mark.parametrize(
    ("stage", "precision", "offload", "expected"),
    [
        # 1000 parameters on 4 ranks, a bucket of 200: (weights, states, host, waiting)
        (0, "fp32", False, (4000, 8000, 0, 4000)),
        (1, "fp32", False, (4000, 3000, 0, 1000)),
        (2, "fp32", False, (4000, 3000, 0, 1000)),
        (3, "fp32", False, (1000, 3000 + 1000 + 800, 0, 0)),  # gradients and bucket are there all the time
        (0, "bf16", False, (2000, 12000, 0, 2000)),
        (1, "bf16", False, (2000, 3000, 0, 500)),
        (2, "bf16", False, (2000, 3000, 0, 500)),
        (3, "bf16", False, (500, 3000 + 500 + 400, 0, 0)),
        (1, "bf16", True, (2000, 200, 3000 + 1000 + 500 + 200, 0)),  # gradient and new weights on their way
        (2, "bf16", True, (2000, 200, 3000 + 1000 + 500 + 200, 0)),
        (3, "bf16", True, (500, 400, 3000 + 1000 + 500, 0)),
    ],
)
def test_what_stays_and_what_waits(stage: int, precision: str, offload: bool, expected: tuple[int, ...]) -> None:
    chosen = setting(stage, precision, offload=offload)
    assert sums(chosen, "weights", "states", "host", "waiting") == expected
    summed = replace(chosen, accumulates=True)
    assert sums(summed, "host")[0] == sums(chosen, "host")[0] + (500 if offload and stage == 2 else 0)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        # 1000 parameters, a bucket of 200 and a share of 250: (backward, reduction, update)
        (setting(0, "fp32"), (4000, 4000 + 800, 4000)),  # averaged in a flat copy
        (setting(0), (2000, 2000 + 400, 2000 + 4000)),  # and updated in float32
        (setting(1), (2000 + 400, 2000 + 500, 500 + 500 + 1000)),
        (setting(1, bucket=10**9), (2000 + 2000, 2000 + 500, 2000)),  # no larger than the network
        (setting(1, ranks=1), (2000 + 400, 2000 + 2000, 2000 + 2000 + 4000)),
        (setting(1, offload=True), (2000 + 400, 2000, 0)),  # the share is copied to the host
        (setting(2), (400 + 200 + 500, 0, 500 + 500 + 1000)),
        (setting(2, accumulates=True), (400 + 200 + 500 + 500, 0, 2000)),
        (setting(2, ranks=1), (400 + 200 + 2000, 0, 2000 + 2000 + 4000)),
        (setting(2, bucket=1000), (2000 + 500, 0, 2000)),
        (setting(2, "fp32", bucket=1000), (4000 + 1000, 0, 1000 + 1000)),
        (setting(2, offload=True), (400 + 200 + 800, 0, 0)),  # a norm in float64
        (setting(3), (2000 + 2000, 0, 500 + 1000)),  # the whole network is gathered
        (setting(3, ranks=1), (400 + 200, 0, 2000 + 4000)),
        (setting(3, "fp32", offload=True), (4000 + 4000, 0, 0)),
    ],
)
def test_what_is_borrowed(chosen: zero.Setting, expected: tuple[int, ...]) -> None:
    assert sums(chosen, "backward", "reduction", "update") == expected


@pytest.mark.parametrize(("stage", "expected"), [(None, 4000), (0, 2000), (1, 2000 + 400), (2, 500), (3, 0)])
def test_what_waits_for_the_next_micro_batch(stage: int | None, expected: int) -> None:
    """ZeRO-1 keeps its bucket until it reduces; ZeRO-3's sum is among its states."""
    assert sums(setting(stage, accumulates=True), "summed") == (expected,)
    assert sums(setting(stage), "summed") == (0,)


def test_zero_3_keeps_small_parameters_whole() -> None:
    sizes = zero.sizes_of([100_000, 100_001, 5])
    assert sizes == zero.Sizes(200_006, 100_001, 100_005)
    shared = sums(setting(3, ranks=2), "weights", sizes=sizes)
    assert shared == (2 * (100_003 + 100_005),)
    assert sums(setting(3, ranks=1), "weights", sizes=sizes) == (2 * 200_006,)


def sdxl() -> zero.Sizes:
    network = registry.find(sources.parse("stabilityai/stable-diffusion-xl-base-1.0")).build_network()
    return zero.sizes_of([p.numel() for p in network.parameters()])


def test_sizes_of_sdxl_s_unet() -> None:
    sizes = sdxl()
    assert sizes.total == 2_567_463_684
    assert sizes.largest == 1280 * 2560 * 9
    assert 0 < sizes.small < 0.001 * sizes.total


def test_sdxl_s_update_takes_more_than_its_recomputed_activations() -> None:
    """On one GPU: gradients flat and in float32, at a moment when no activations are held."""
    sizes = sdxl()
    memory = trained_memory(sizes, setting(2, ranks=1, bucket=500_000_000), activations=800_000_000)
    assert memory.gradients == 2 * sizes.total
    assert memory.activations + memory.buffers == 6 * sizes.total


def test_a_process_needs_the_largest_of_its_phases() -> None:
    """Learner and assistant train in turns: the gradients of one are gone when the other's come."""
    learner = RolePlan("learner", 1, Memory(weights=10, gradients=20, optimizer=30, activations=5, buffers=40), 15)
    assistant = RolePlan("assistant", 1, Memory(weights=10, gradients=21, optimizer=30, activations=6, buffers=40))
    reference = RolePlan("reference", 1, Memory(weights=10, activations=7))
    reward = RolePlan("reward:x", 1, Memory(weights=1, activations=12))
    together = GroupPlan("all", 1, (learner, assistant, reference, reward))
    assert together.memory == Memory(weights=31, gradients=21, optimizer=60, activations=6, buffers=40)
    # Rewards and denoisers are asked one after the other, beside the learner's graph and what it has summed.
    frugal = GroupPlan("all", 1, tuple(replace(r, memory=replace(r.memory, buffers=0)) for r in together.roles))
    assert frugal.memory == Memory(weights=31, gradients=15, optimizer=60, activations=5 + max(6 + 7, 12))
    assert GroupPlan("score", 1, (reference,)).memory == reference.memory
    # A denoiser that serves a learner elsewhere keeps its graph beside rewards, which follow its prediction alone.
    assert GroupPlan("serve", 1, (reference, reward)).memory == reference.memory + reward.memory
    both = GroupPlan("serve", 1, (replace(assistant, memory=Memory(activations=6)), reference, reward))
    assert both.memory == Memory(weights=11, activations=6 + 7)
    # Held-out prompts are measured when nothing else runs.
    judge = RolePlan("reward:y", 1, Memory(weights=1), measuring=100)
    assert GroupPlan("all", 1, (*together.roles, judge)).memory == Memory(weights=32, optimizer=60, activations=100)


@pytest.mark.parametrize(
    ("stage", "expected", "overlaps"),
    [
        # 1000 parameters in bf16 on 4 ranks, 5 micro-batches; a ring passes 3/4 of a buffer, an all-reduce twice.
        (None, 0, False),
        (0, 2 * 1500, False),
        (1, 2 * 1500 + 1500, False),
        (2, 5 * 2 * 1500 + 1500, False),
        (3, 5 * 3 * 1500, True),
    ],
)
def test_what_ranks_exchange(stage: int | None, expected: int, overlaps: bool) -> None:
    sent = zero.collectives(SIZES, setting(stage), micro_batches=5)
    assert sum(item.bytes for item in sent) == expected
    assert all(item.overlaps == overlaps for item in sent)
    assert any(item.every for item in sent) == (stage in (2, 3))
    assert zero.collectives(SIZES, setting(stage, ranks=1), micro_batches=5) == []


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    """Plain torch saves here; DeepSpeed's sizes were measured with its own ``save``."""
    engine = LocalEngine(torch.nn.Linear(400, 400), Optimization().generator, 1)
    engine.backward(engine(torch.ones(1, 400)).sum())
    engine.step(1e-3)
    writer = Writer()
    engine.save(tmp_path, writer)
    writer.wait()
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size == pytest.approx(zero.saved(setting(None, "fp32", 1)) * (400 * 400 + 400), rel=0.01)
    measured = {0: (12, 14), 1: (16, 14), 2: (16, 14), 3: (12, 12)}
    for stage, sizes in measured.items():
        assert tuple(zero.saved(setting(stage, precision)) for precision in ("fp32", "bf16")) == sizes
