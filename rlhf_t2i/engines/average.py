"""The moving average of a trained network: sharded like the float32 masters and where they are, gathered to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, distributed

from rlhf_t2i.engines.base import Engine
from rlhf_t2i.families import adapters

_CHUNK = 2**24
"""Rows of a master that are swapped at once; ZeRO's are flat."""


class Average(Protocol):
    """A moving average of all weights; every rank must make each of these calls."""

    def update(self, weight: float) -> None:
        """Move the average towards the present weights by ``weight`` of the difference."""

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The whole average as :meth:`Engine.full_parameters` gives weights; read all of it."""

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`full_parameters` gave, also on another number of ranks."""


def of(engine: Engine) -> Average:
    """The average of a network from now on."""
    return AdaptedAverage(engine) if adapters.adapted(engine.module) else MasterAverage(engine)


class MasterAverage:
    """The average of a network whose weights are all trained: one tensor beside each of this rank's masters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._shards = [master.clone() for master in engine.masters()]

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """See :meth:`Average.update`; ranks exchange nothing."""
        for shard, master in zip(self._shards, self._engine.masters(), strict=True):
            shard.lerp_(master, weight)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """See :meth:`Average.full_parameters`."""
        with self._in_place_of_the_masters():
            yield from self._engine.full_parameters()

    def load(self, values: Mapping[str, Tensor]) -> None:
        """See :meth:`Average.load`."""
        with self._in_place_of_the_masters():
            for name, parameter in self._engine.module.named_parameters():
                self._engine.set_master(parameter, values[name])

    @contextmanager
    def _in_place_of_the_masters(self) -> Iterator[None]:
        """In the block the masters hold the average: whatever gathers or fills them need not know of another layout."""
        _swap(self._shards, self._engine.masters())
        try:
            yield
        finally:
            _swap(self._shards, self._engine.masters())


class AdaptedAverage:
    """The average of a network with adapters: of the merged weights of its adapted layers; the others never change.

    A product of averaged factors would be another average. Each rank holds an equal part of every weight.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rank, self._ranks = 0, 1
        if distributed.is_initialized():
            self._rank, self._ranks = distributed.get_rank(), distributed.get_world_size()
        self._shards = {name: self._part(value).clone() for name, value in engine.full_parameters(adapted=True)}

    @torch.no_grad()
    def update(self, weight: float) -> None:
        """See :meth:`Average.update`; ranks exchange the adapters' factors."""
        for name, value in self._engine.full_parameters(adapted=True):
            self._shards[name].lerp_(self._part(value), weight)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """See :meth:`Average.full_parameters`."""
        for name, value in self._engine.full_parameters():
            yield name, self._whole(self._shards[name], value) if name in self._shards else value

    def load(self, values: Mapping[str, Tensor]) -> None:
        """See :meth:`Average.load`."""
        for name, shard in self._shards.items():
            shard.copy_(self._part(values[name]))

    def _part(self, value: Tensor) -> Tensor:
        """This rank's share of a weight, flat; the last ranks' is filled up with zeros."""
        size = -(-value.numel() // self._ranks)
        part = value.flatten()[size * self._rank : size * (self._rank + 1)]
        return torch.nn.functional.pad(part, (0, size - len(part)))

    def _whole(self, shard: Tensor, like: Tensor) -> Tensor:
        parts = [shard]
        if self._ranks > 1:
            parts = [torch.empty_like(shard) for _ in range(self._ranks)]
            distributed.all_gather(parts, shard)
        return torch.cat(parts)[: like.numel()].view(like.shape)


@torch.no_grad()
def _swap(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    """Exchange the contents, in parts: a copy of all masters may not fit."""
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one.split(_CHUNK), other.split(_CHUNK), strict=True):
            held = a.clone()
            a.copy_(b)
            b.copy_(held)
