"""What DeepSpeed's ZeRO needs to train a network, term by term, beside the activations.

Every term is a line of DeepSpeed 0.19.8 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``), and says what it is for.
``benchmarks/zero_memory.py`` measures their sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

When = Literal["weights", "states", "host", "waiting", "summed", "backward", "reduction", "update"]
"""``weights``, ``states`` and ``host`` (in the machine's memory) stay. ``waiting`` are the gradients between the last
backward and the update, ``summed`` those between two micro-batches. ``backward`` (beside activations), ``reduction``
(after the last backward) and ``update`` are moments, and count every gradient that is there then."""

BYTES = {"fp32": 4, "bf16": 2}
_REUSED, _PREFETCHED = 500_000_000, 50_000_000
"""Weights that ZeRO-3 keeps gathered from forward to backward, since their next use is less than
``stage3_max_reuse_distance`` (1e9) away: a network's last half of that. And those it gathers at once
(``stage3_prefetch_bucket_size``)."""
_SUB_GROUP = 1_000_000_000
"""Numbers that ZeRO-3 updates at once (``sub_group_size``)."""
UNDIVIDED = 100_000
"""ZeRO-3 keeps parameters of so many numbers or fewer whole (``stage3_param_persistence_threshold``)."""


@dataclass(frozen=True)
class Sizes:
    """Numbers in the trained parameters of a network.

    Attributes:
        total: In all.
        largest: In the largest.
        small: In those of at most ``UNDIVIDED``.
    """

    total: int
    largest: int = 0
    small: int = 0


def sizes_of(counts: Sequence[int]) -> Sizes:
    """From the numbers in every parameter."""
    return Sizes(sum(counts), max(counts, default=0), sum(n for n in counts if n <= UNDIVIDED))


@dataclass(frozen=True)
class Setting:
    """How a network is trained.

    Attributes:
        ranks: Processes that divide what the stage divides.
        stage: ZeRO's; None without DeepSpeed.
        precision: Of the computation.
        bucket: Gradients that are reduced at once, ``reduce_bucket_size``.
        offload: Whether the optimizer's states lie in host memory.
        accumulates: Whether an update has several micro-batches.
    """

    ranks: int
    stage: int | None
    precision: str
    bucket: int
    offload: bool = False
    accumulates: bool = False


@dataclass(frozen=True)
class Term:
    """Bytes at a moment, and their reason."""

    when: When
    bytes: int
    reason: str


def terms(sizes: Sizes, setting: Setting) -> list[Term]:
    """Everything one process holds and borrows to train a network under AdamW."""
    if setting.stage is None:
        found = [*_plain(sizes)]
    elif setting.stage == 0:
        found = [*_stage_0(sizes, setting)]
    else:
        working = {1: _stage_1, 2: _stage_2, 3: _stage_3}[setting.stage]
        found = [*_states(sizes, setting), *working(sizes, setting)]
    return [item for item in found if setting.accumulates or item.when != "summed"]


def total(items: list[Term], when: When) -> int:
    """Bytes of a moment."""
    return sum(item.bytes for item in items if item.when == when)


def saved(setting: Setting) -> int:
    """Bytes per trained number in a checkpoint: weights and Adam's two moments, and copies in the compute precision.

    Measured with the engines' own ``save``. Stage 3 writes its masters alone; without ZeRO float32 has no masters.
    """
    alone = setting.stage in (None, 3) or (setting.stage == 0 and setting.precision == "fp32")
    return 12 if alone else 12 + BYTES[setting.precision]


@dataclass(frozen=True)
class Collective:
    """Bytes that a rank sends in the collectives of one update.

    Attributes:
        bytes: In all.
        reason: What they are for.
        every: Whether a part of them is sent in every micro-batch, not all after the last one.
        overlaps: Whether the computation goes on meanwhile.
    """

    bytes: int
    reason: str
    every: bool = False
    overlaps: bool = False


def collectives(sizes: Sizes, setting: Setting, micro_batches: int) -> list[Collective]:
    """What the ranks exchange in one update of ``micro_batches``; a ring sends ``(N - 1) / N`` of a buffer per pass."""
    if setting.stage is None or setting.ranks == 1:
        return []
    width, _ = _widths(setting)
    once = width * sizes.total * (setting.ranks - 1) // setting.ranks
    if setting.stage == 0:
        return [Collective(2 * once, "gradients are all-reduced after the last micro-batch")]
    if setting.stage == 3:  # overlap_comm is on in stage 3 alone
        return [
            Collective(
                2 * micro_batches * once, "weights are gathered for every forward and every backward", True, True
            ),
            Collective(micro_batches * once, "gradients are reduce-scattered in every micro-batch", True, True),
        ]
    times, when = (1, "after the last micro-batch") if setting.stage == 1 else (micro_batches, "in every micro-batch")
    return [
        # Without reduce_scatter whole buckets are all-reduced, in place, and a rank keeps its share.
        Collective(2 * times * once, f"gradients are all-reduced {when}", every=setting.stage == 2),
        Collective(once, "updated weights are gathered"),
    ]


def _plain(sizes: Sizes) -> Iterator[Term]:
    yield Term("weights", 4 * sizes.total, "weights")
    yield Term("states", 8 * sizes.total, "Adam's two moments")
    for when in ("waiting", "summed", "backward", "update"):
        yield Term(when, 4 * sizes.total, "gradients")


def _stage_0(sizes: Sizes, setting: Setting) -> Iterator[Term]:
    width, master = _widths(setting)
    yield Term("weights", width * sizes.total, "weights")
    yield Term("states", (8 + master) * sizes.total, "Adam's two moments; of bf16 weights the float32 masters")
    for when in ("waiting", "summed", "backward", "reduction", "update"):
        yield Term(when, width * sizes.total, "gradients")
    yield Term("reduction", width * _bucket(sizes, setting), "a flat copy of as many gradients as are averaged at once")
    yield Term("update", master * sizes.total, "bf16 gradients in float32")


def _states(sizes: Sizes, setting: Setting) -> Iterator[Term]:
    """What stays, from stage 1 on: a rank's share of the states, on the device or in host memory."""
    width, _ = _widths(setting)
    share, third = _share(sizes, setting), setting.stage == 3
    yield Term("weights", width * (share if third else sizes.total), "weights, in stage 3 a rank's share")
    if third and setting.ranks > 1:
        yield Term("weights", width * sizes.small, "small parameters, which stage 3 keeps whole beside the share")
    where: When = "host" if setting.offload else "states"
    yield Term(where, 12 * share, "float32 masters, also of float32 weights, and Adam's two moments")
    if third:
        yield Term(where, width * share, "the share's gradients, a buffer that stage 3 keeps")
        yield Term("states", width * _bucket(sizes, setting), "the bucket, which stage 3 keeps")
    if setting.offload:
        yield Term("host", 4 * share, "float32 gradients for the update")
    if setting.offload and not third:
        yield Term("host", width * share, "new weights on their way to the device")
        yield Term("host", width * sizes.largest, "one parameter's gradient on its way to the device")
        yield Term("states", width * sizes.largest, "the same on the device")
    if setting.offload and setting.stage == 2 and setting.accumulates:
        yield Term("host", width * share, "the sum over micro-batches")


def _stage_1(sizes: Sizes, setting: Setting) -> Iterator[Term]:
    """All gradients wait on the device until the last backward; then bucket by bucket is reduced."""
    width, _ = _widths(setting)
    share, bucket = _share(sizes, setting), _bucket(sizes, setting)
    for when in ("summed", "backward"):
        yield Term(when, width * sizes.total, "gradients")
        yield Term(when, width * bucket, "the bucket, there from the first gradient on")
    yield Term("reduction", width * sizes.total, "gradients; those of a bucket are freed when they are in it")
    if not setting.offload:
        yield Term("reduction", width * share, "the rank's share out of the bucket")
    yield from _update(sizes, setting)


def _stage_2(sizes: Sizes, setting: Setting) -> Iterator[Term]:
    """Gradients go into a bucket as they come, and the rank's share out of it, while activations are there."""
    width, _ = _widths(setting)
    share, bucket = _share(sizes, setting), _bucket(sizes, setting)
    yield Term("backward", width * bucket, "the bucket")
    if bucket < sizes.total:
        yield Term("backward", width * sizes.largest, "a gradient that waits for a full bucket to be reduced")
    if setting.offload:
        yield Term("backward", 8 * sizes.largest, "a gradient in float64, for its norm")
    else:
        yield Term("backward", width * share, "the rank's share out of the bucket")
        yield Term("summed", width * share, "the share's sum so far")
        if setting.accumulates:
            yield Term("backward", width * share, "the share's sum so far")
    yield from _update(sizes, setting)


def _update(sizes: Sizes, setting: Setting) -> Iterator[Term]:
    """Of stages 1 and 2; the host makes that of offloaded states."""
    if setting.offload:
        return
    width, master = _widths(setting)
    share = _share(sizes, setting)
    for when in ("waiting", "update"):
        yield Term(when, width * share, "the share's gradients")
    yield Term("update", width * share, "the same, flat")
    yield Term("update", master * share, "the same in float32")


def _stage_3(sizes: Sizes, setting: Setting) -> Iterator[Term]:
    """Stage 3's gradients are among the states; weights come and go."""
    width, master = _widths(setting)
    divided = sizes.total - sizes.small if setting.ranks > 1 else 0
    gathered = min(divided, _REUSED + _PREFETCHED) + min(divided, _PREFETCHED)
    scattered = _bucket(sizes, setting) + sizes.largest
    why = "weights gathered, and once more those on their way; when the bucket is full, it once more and a gradient"
    yield Term("backward", width * max(gathered, scattered), why)
    if not setting.offload:
        group = min(_share(sizes, setting), _SUB_GROUP)
        yield Term("update", (width + master) * group, "a sub-group's gradients, flat, and of bf16 in float32")


def _widths(setting: Setting) -> tuple[int, int]:
    """Bytes of a number in the precision of the computation, and of its float32 copy where it needs one."""
    width = BYTES[setting.precision]
    return width, 4 if width < 4 else 0


def _share(sizes: Sizes, setting: Setting) -> int:
    return -(-sizes.total // setting.ranks)


def _bucket(sizes: Sizes, setting: Setting) -> int:
    return min(setting.bucket, sizes.total)
