"""What every role of a process is built from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from rlhf_t2i.engines.base import Engine
from rlhf_t2i.engines.deepspeed import DeepSpeedEngine
from rlhf_t2i.engines.local import LocalEngine
from rlhf_t2i.families import adapters
from rlhf_t2i.families.store import DTYPES, ModelStore
from rlhf_t2i.recipe.placement import batch_geometry, callers_per_server
from rlhf_t2i.recipe.schema import Optimizer, Recipe


@dataclass
class RankContext:
    """One process of a group: its rank, its device and the models it holds.

    Attributes:
        recipe: The whole recipe.
        rank: This process's rank in its group.
        world: Processes in the group.
        device: Where its networks live.
        distributed: Whether trained networks run under DeepSpeed (Ray) or plain PyTorch (local).
        failures: Where a failing sample is saved.
    """

    recipe: Recipe
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    distributed: bool = False
    failures: Path | None = None

    def __post_init__(self) -> None:
        settings = self.recipe.optimization
        self.store = ModelStore(
            self.recipe.models, self.recipe.student, self.device, settings.precision, compiled=settings.compile
        )
        self.dtype = DTYPES[settings.precision]

    @property
    def callers(self) -> int:
        """Ranks of the learner that call one process of this group."""
        return callers_per_server(self.recipe, self.world)

    def geometry(self) -> tuple[int, int]:
        """(micro-batch, accumulation) of a trained role in this group."""
        optimization = self.recipe.optimization
        return batch_geometry(optimization.batch_size, self.world, optimization.micro_batch)

    def micro_batches(self) -> list[range]:
        """The samples of the global batch this rank handles, micro-batch by micro-batch."""
        micro, accumulation = self.geometry()
        first = self.rank * micro * accumulation
        return [range(first + i * micro, first + (i + 1) * micro) for i in range(accumulation)]

    def base(self, optimizer: Optimizer) -> torch.dtype | None:
        """The dtype of a network under adapters, whose weights roles of a process share; None if all are trained."""
        if optimizer.lora is None:
            return None
        return self.dtype if self.distributed else torch.float32

    def engine(self, role: str, module: nn.Module, optimizer: Optimizer) -> Engine:
        """The training engine of a role's network."""
        micro, accumulation = self.geometry()
        if self.recipe.optimization.checkpoints(role):
            self.store.family.enable_checkpointing(module)
        module.train().requires_grad_(True)
        if optimizer.lora is not None:
            targets = optimizer.lora.targets or self.store.family.adapter_targets
            adapters.add(module, optimizer.lora, targets, self.recipe.seed)
        if self.distributed:
            return DeepSpeedEngine(module, optimizer, accumulation, micro, self.recipe.optimization)
        return LocalEngine(module, optimizer, accumulation)
