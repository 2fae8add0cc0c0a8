"""DeepSpeed ZeRO over the process's torch.distributed world."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, distributed, nn

from rlhf_t2i.engines import pickles, resharding
from rlhf_t2i.engines.base import adamw, trained
from rlhf_t2i.engines.writer import Writer
from rlhf_t2i.errors import RunError
from rlhf_t2i.families import adapters
from rlhf_t2i.recipe.schema import Optimization, Optimizer

_SHARDS = "zero"
_KINDS = (0, 1, 1, 3)
"""Layout of the shards of ZeRO 0 to 3: nothing is partitioned, the optimizer's states are, or the weights too."""
_SAMPLED_PARAMETERS, _SAMPLED_WEIGHTS = 16, 4096
"""For :meth:`DeepSpeedEngine.bf16_drift`: parameters, and weights per parameter."""


REDUCE_BUCKET = 500_000_000
"""Gradients that ZeRO reduces at once (DeepSpeed's default); stage 3 holds a buffer of this size all the time."""


class DeepSpeedEngine:
    """DeepSpeed ZeRO 0 to 3 over the process's torch.distributed world."""

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, accumulation: int, micro_batch: int, settings: Optimization
    ) -> None:
        deepspeed = import_deepspeed()
        trainable = [p for p in module.parameters() if p.requires_grad]
        self._stage = settings.zero_stage
        self._accumulation, self._micro_steps = accumulation, 0
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optimizer.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": settings.precision == "bf16"},
            "zero_optimization": {
                "stage": settings.zero_stage,
                "reduce_bucket_size": min(REDUCE_BUCKET, sum(p.numel() for p in trainable)),
                # Stages 1 and 2 all-reduce whole buckets either way; with it they do so in a flat copy.
                "reduce_scatter": settings.zero_stage == 3,
                **({"offload_optimizer": {"device": "cpu", "pin_memory": True}} if settings.offload_optimizer else {}),
            },
            "steps_per_print": 2**62,
            "timers": {"throughput": {"enabled": False}},  # waits for the device in every forward
        }
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=adamw(trainable, optimizer), config=config)
        self.module: nn.Module = self._engine.module
        if settings.zero_stage == 0 and settings.precision == "bf16":
            self._undo_first_update()
        self._at_start: list[tuple[Tensor, Tensor]] | None = self._sample() if settings.precision == "bf16" else None

    def _undo_first_update(self) -> None:
        """Without ZeRO DeepSpeed makes Adam's states by an update with zero gradients, which decays the masters.

        It counts as Adam's first, too, so that its bias correction would make the first real one too large by the root
        of 2.
        """
        optimizer = self._engine.optimizer
        optimizer.optimizer.state.clear()
        for copies, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for copy, master in zip(copies, masters, strict=True):
                master.detach().copy_(copy.detach())

    def __call__(self, *args: object, **kwargs: object) -> Sequence[Tensor]:
        """Forward; without gradients past DeepSpeed's own, which prepares a backward pass."""
        return self._engine(*args, **kwargs) if torch.is_grad_enabled() else self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate; ranks are averaged at the boundary."""
        if self._stage in (1, 2):
            # DeepSpeed resets what it counts in a backward pass at the next forward pass, and this one's may have run
            # before the last backward pass.
            self._engine.optimizer.clear_backward_seen_flag()
        self._engine.backward(loss)
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            self._engine.step()

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._stage == 0:
            return self._step_without_zero()
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf

    def _step_without_zero(self) -> float:
        """Without ZeRO DeepSpeed updates whatever the gradients are, and under float32 it knows no norm."""
        # The last backward has averaged the gradients over the ranks.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        norm = float(torch.stack(norms).norm())
        if not math.isfinite(norm):
            self._engine.zero_grad()
            self._engine.micro_steps += 1  # what its step would have counted
            return math.inf
        self._engine.step()
        return norm

    def full_parameters(self, adapted: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The float32 master weights, gathered one at a time, adapters merged."""
        return adapters.merged(self.module, self._full, adapted)

    def copies(self, part: int = 0, parts: int = 1) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters, under ZeRO-3 gathered one at a time."""
        from deepspeed import zero

        for name, parameter in trained(self.module, part, parts):
            with zero.GatheredParameters([parameter], enabled=self._stage == 3):
                yield name, parameter.detach()

    def masters(self) -> list[Tensor]:
        """ZeRO's partition of this rank, or whole weights where nothing is partitioned."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return [self._whole_master(p).detach() for p in self.module.parameters() if p.requires_grad]
        flat = optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
        return [partition.detach() for partition in flat]

    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Copy this rank's share of a value into ZeRO's partition."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self._stage == 0:
            self._whole_master(parameter).detach().copy_(value)
        elif self._stage < 3:
            safe_set_full_fp32_param(parameter, value)
        else:  # DeepSpeed's own call for a whole parameter fails where the ranks do not divide it
            size = parameter.ds_tensor.numel()
            share = value.flatten()[size * distributed.get_rank() :][:size]
            safe_set_local_fp32_param(parameter, nn.functional.pad(share, (0, size - len(share))))

    def adapter_factors(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters' float32 masters."""
        return adapters.factors(self.module, self._full)

    def _full(self, parameter: nn.Parameter) -> Tensor:
        # Frozen parameters have no master copy, nor have unpartitioned ones that are float32 themselves.
        master = self._master(parameter) if parameter.requires_grad else None
        return (parameter.detach() if master is None else master).float()

    def _master(self, parameter: nn.Parameter) -> Tensor | None:
        """The gathered float32 weights of a trained parameter; all ranks must call it together."""
        from deepspeed.utils import safe_get_full_fp32_param

        if self._stage == 0:
            return self._whole_master(parameter).detach()
        gathered: Tensor | None = safe_get_full_fp32_param(parameter)
        return gathered

    def _whole_master(self, parameter: nn.Parameter) -> Tensor:
        """Without ZeRO: the master of a bf16 weight, to which DeepSpeed gives no link, or the float32 weight itself."""
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "fp16_groups"):
            for copies, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
                for copy, master in zip(copies, masters, strict=True):
                    if copy is parameter:
                        found: Tensor = master
                        return found
        return parameter

    def bf16_drift(self) -> dict[str, float]:
        """Compare masters with copies on a sample of the weights, now and at the start."""
        if self._at_start is None:
            return {}
        error = size = moved = unmoved = 0.0
        for (old_master, old_copy), (master, copy) in zip(self._at_start, self._sample(), strict=True):
            error += float((copy - master).square().sum())
            size += float(master.square().sum())
            changed = master != old_master
            moved += float(changed.sum())
            unmoved += float((changed & (copy == old_copy)).sum())
        drift = {"bf16_drift": math.sqrt(error / size) if size else 0.0}
        return drift | ({"bf16_unmoved": unmoved / moved} if moved else {})

    def _sample(self) -> list[tuple[Tensor, Tensor]]:
        """A sample of the weights as (master, bf16 copy), in float64 on the CPU."""
        from deepspeed import zero

        trained = [p for p in self.module.parameters() if p.requires_grad]
        sample = []
        for parameter in trained[:: -(-len(trained) // _SAMPLED_PARAMETERS)]:
            master = self._master(parameter)
            with zero.GatheredParameters([parameter], enabled=self._stage == 3):
                copy = parameter.detach().flatten().clone()
            if master is None:
                raise RunError("a bf16 weight has no float32 master: its small updates would be lost")
            stride = -(-copy.numel() // _SAMPLED_WEIGHTS)
            sample.append((master.flatten()[::stride].double().cpu(), copy[::stride].double().cpu()))
        return sample

    def save(self, folder: Path, writer: Writer) -> None:
        """Write the ZeRO shards in DeepSpeed's format, without frozen parameters."""
        partial, files = bool(adapters.frozen(self.module)), self._engine.checkpoint_engine
        save = files.save
        files.save = lambda state_dict, path: writer.write(state_dict, lambda copied: save(copied, path))
        try:
            self._engine.save_checkpoint(str(folder), tag=_SHARDS, save_latest=False, exclude_frozen_parameters=partial)
        finally:
            files.save = save
        if distributed.get_rank() == 0:
            resharding.write_layout(folder, self._stage)

    def load(self, folder: Path) -> str | None:
        """Read the ZeRO shards, through a universal checkpoint if they have another layout.

        Returns:
            A message about the change of layout, after which the run is not bit for bit what it would have been.
        """
        with pickles.tensors_only(folder):
            return self._load_layout(folder)

    def _load_layout(self, folder: Path) -> str | None:
        saved = resharding.read_layout(folder)
        now = {"ranks": distributed.get_world_size(), "zero_stage": self._stage}
        if saved is None or saved == now or (saved["zero_stage"] == now["zero_stage"] == 0):
            self._load(folder, _SHARDS)
            message = None
        elif _KINDS[saved["zero_stage"]] != _KINDS[now["zero_stage"]]:
            raise RunError(
                f"{folder} was saved under zero_stage {saved['zero_stage']} and cannot be loaded under "
                f"{now['zero_stage']}: stages 1 and 2 load each other's states, 0 and 3 only their own"
            )
        else:
            with resharding.converted(folder, _SHARDS) as tag:
                self._engine._config.load_universal_checkpoint = True
                try:
                    self._load(folder, tag)
                finally:
                    self._engine._config.load_universal_checkpoint = False
            message = (
                f"{folder.name}: {saved['ranks']} ranks at zero_stage {saved['zero_stage']} become {now['ranks']} at "
                f"{now['zero_stage']} through a universal checkpoint; weights and moments are the same, but sums over "
                "ranks round differently from here on: bit-equality is not promised"
            )
        if self._at_start is not None:
            self._at_start = self._sample()
        return message

    def _load(self, folder: Path, tag: str) -> None:
        if not (folder / tag).is_dir():
            raise RunError(f"{folder} was written with placement: local: continue it there, not under Ray")
        whole = not adapters.frozen(self.module)
        path, _ = self._engine.load_checkpoint(
            str(folder), tag=tag, load_module_strict=whole, load_lr_scheduler_states=False
        )
        if path is None:
            raise RunError(f"no ZeRO checkpoint in {folder}")


def import_deepspeed() -> ModuleType:
    """Import DeepSpeed quietly, and on a CPU without compiling its shared-memory kernels (31-74 s)."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging
    import warnings

    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has deprecated: thousands of lines a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if deepspeed.accelerator.get_accelerator().device_name() == "cpu":
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed
