"""What every role of a process is built from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from rlhf_t2i.engines.base import Engine
from rlhf_t2i.engines.deepspeed import DeepSpeedEngine
from rlhf_t2i.engines.local import LocalEngine
from rlhf_t2i.families import adapters
from rlhf_t2i.families.store import DTYPES, ModelStore
from rlhf_t2i.recipe.placement import batch_geometry, callers_per_server
from rlhf_t2i.recipe.schema import Optimizer, Recipe, RewardChoice


@dataclass(frozen=True)
class WorkerSpec:
    """What a process must know to build itself.

    Attributes:
        recipe: The whole recipe.
        group: Its group's name.
        roles: The roles it holds; ``reward:LABEL`` for one reward.
        rank: Its rank in the group.
        world: Processes in the group.
        threads: CPU threads; None: a fair share of the node's cores over Ray, torch's choice in ``placement: local``.
        neighbors: Processes of the run on the same node, this one included.
        distributed: Whether trained roles use DeepSpeed.
        failures: Where a failing sample is saved.
        learns: Whether it holds a reward that learns.
    """

    recipe: Recipe
    group: str
    roles: tuple[str, ...]
    rank: int = 0
    world: int = 1
    threads: int | None = None
    neighbors: int = 1
    distributed: bool = False
    failures: Path | None = None
    learns: bool = False

    @property
    def trains(self) -> bool:
        """Whether a role of this process has an optimizer."""
        return bool({"learner", "assistant"} & set(self.roles))

    def timeouts(self, rewards: Sequence[RewardChoice]) -> dict[str, float]:
        """Limits on these rewards' calls by label; {} where the caller is another process, which has them."""
        return {} if self.distributed else {choice.key: choice.timeout_s for choice in rewards}

    @property
    def stateful(self) -> bool:
        """Whether the run must go back to a checkpoint when this process is lost."""
        return self.trains or self.learns


class RankContext:
    """What the roles of a process share: its device, its share of every batch and the models that it holds.

    Args:
        spec: The process.
        device: Where its networks live.
    """

    def __init__(self, spec: WorkerSpec, device: torch.device) -> None:
        self.spec, self.recipe, self.rank, self.device = spec, spec.recipe, spec.rank, device
        models, settings = spec.recipe.models, spec.recipe.optimization
        self.store = ModelStore(models, spec.recipe.student, device, settings.precision, compiled=settings.compile)
        self.dtype = DTYPES[settings.precision]

    @property
    def callers(self) -> int:
        """Ranks of the learner that call one process of this group."""
        return callers_per_server(self.recipe, self.spec.world)

    def geometry(self) -> tuple[int, int]:
        """(micro-batch, accumulation) of a trained role in this group."""
        optimization = self.recipe.optimization
        return batch_geometry(optimization.batch_size, self.spec.world, optimization.micro_batch)

    def micro_batches(self) -> list[range]:
        """The samples of the global batch this rank handles, micro-batch by micro-batch."""
        micro, accumulation = self.geometry()
        first = self.rank * micro * accumulation
        return [range(first + i * micro, first + (i + 1) * micro) for i in range(accumulation)]

    def trained_network(self, network: Callable[[torch.dtype | None], nn.Module], optimizer: Optimizer) -> nn.Module:
        """A network as its engine gets it: float32 weights to be trained, or adapters on weights that are not.

        Arguments as for :meth:`engine`.
        """
        base = self.dtype if self.spec.distributed else torch.float32
        module = network(None if optimizer.lora is None else base)
        module.train().requires_grad_(True)
        if optimizer.lora is not None:
            targets = optimizer.lora.targets or self.store.family.adapter_targets
            adapters.add(module, optimizer.lora, targets, self.recipe.seed)
        return module

    def engine(self, role: str, network: Callable[[torch.dtype | None], nn.Module], optimizer: Optimizer) -> Engine:
        """The training engine of a role.

        Args:
            role: The role.
            network: Loads its network; gets the dtype of weights under adapters, which roles of a process share, or
                None if all weights are trained.
            optimizer: Its settings.
        """
        module = self.trained_network(network, optimizer)
        micro, accumulation = self.geometry()
        if self.recipe.optimization.checkpoints(role):
            self.store.family.enable_checkpointing(module)
        if self.spec.distributed:
            return DeepSpeedEngine(module, optimizer, accumulation, micro, self.recipe.optimization)
        return LocalEngine(module, optimizer, accumulation)
