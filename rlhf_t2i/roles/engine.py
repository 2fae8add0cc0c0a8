"""Training engines: DeepSpeed ZeRO for distributed runs, plain PyTorch for one process.

Both take the same steps: accumulate micro-batches, average over ranks, clip by global norm, AdamW. The plain engine is
what distributed runs are compared with.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlhf_t2i.errors import RunError, UsageError
from rlhf_t2i.models import lora
from rlhf_t2i.recipe import Optimisation, Optimiser


class Engine(Protocol):
    """What a role needs to train a network."""

    module: nn.Module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward with training hooks."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss."""

    def step(self, learning_rate: float) -> float:
        """Update after the last micro-batch; returns the gradient norm over all ranks before clipping.

        Where that norm is not finite nothing is updated, on any rank, and it is returned as infinite.
        """

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole, adapters merged, in float32 on the device; all ranks must iterate together."""

    def save(self, folder: Path) -> None:
        """Write this rank's share of the state into an existing folder."""

    def load(self, folder: Path) -> None:
        """Restore what :meth:`save` wrote, bit for bit."""


def learning_rate(optimiser: Optimiser, step: int) -> float:
    """Linear warm-up to a constant; ``step`` counts from 0."""
    if optimiser.warmup_steps == 0:
        return optimiser.lr
    return optimiser.lr * min(1.0, (step + 1) / optimiser.warmup_steps)


def adamw(parameters: Any, optimiser: Optimiser) -> torch.optim.Optimizer:
    """The optimiser of both engines; fused, since ZeRO's flat partition makes the loop of operators 20 times slower.

    Raises:
        UsageError: 8-bit states without bitsandbytes or without a GPU.
    """
    settings: dict[str, Any] = {
        "lr": optimiser.lr,
        "betas": (optimiser.betas[0], optimiser.betas[1]),
        "eps": optimiser.eps,
        "weight_decay": optimiser.weight_decay,
    }
    if optimiser.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    check_eight_bit()
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def check_eight_bit() -> None:
    """Refuse ``kind: adamw_8bit`` where it cannot run.

    Raises:
        UsageError: bitsandbytes is not installed, or there is no GPU.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "optimisation: kind adamw_8bit needs bitsandbytes: pip install 'rlhf-t2i[8bit]', or set kind to adamw"
        )
    if not torch.cuda.is_available():
        raise UsageError("optimisation: kind adamw_8bit needs an NVIDIA GPU, and none is here: set kind to adamw")


class LocalEngine:
    """One process, float32 weights, torch's own AdamW and clipping."""

    def __init__(self, module: nn.Module, optimiser: Optimiser, accumulation: int) -> None:
        self.module = module
        self._settings, self._accumulation = optimiser, accumulation
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = adamw(self._trained, optimiser)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate."""
        (loss / self._accumulation).backward()

    def step(self, learning_rate: float) -> float:
        """Clip, update, clear."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = float(torch.nn.utils.clip_grad_norm_(self._trained, self._settings.max_grad_norm))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm if math.isfinite(norm) else math.inf

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters as they are, adapters merged."""
        return lora.merged(self.module, lambda parameter: parameter.detach().float())

    def save(self, folder: Path) -> None:
        """Write ``local.pt``, without what is frozen."""
        frozen = lora.frozen(self.module)
        module = {name: value for name, value in self.module.state_dict().items() if name not in frozen}
        torch.save({"module": module, "optimizer": self._optimizer.state_dict()}, folder / "local.pt")

    def load(self, folder: Path) -> None:
        """Read ``local.pt``."""
        state = torch.load(folder / "local.pt", map_location="cpu", weights_only=True)
        missing, unexpected = self.module.load_state_dict(state["module"], strict=False)
        if unexpected or set(missing) != lora.frozen(self.module):
            raise RunError(f"{folder / 'local.pt'} holds other weights than this recipe trains")
        self._optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine:
    """DeepSpeed ZeRO 0 to 3 over the process's torch.distributed world."""

    def __init__(
        self, module: nn.Module, optimiser: Optimiser, accumulation: int, micro_batch: int, settings: Optimisation
    ) -> None:
        deepspeed = import_deepspeed()
        self._stage = settings.zero_stage
        self._accumulation, self._micro_steps = accumulation, 0
        config = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": optimiser.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": settings.precision == "bf16"},
            "zero_optimization": {
                "stage": settings.zero_stage,
                **({"offload_optimizer": {"device": "cpu", "pin_memory": True}} if settings.offload_optimizer else {}),
            },
            "steps_per_print": 2**62,
        }
        trainable = [p for p in module.parameters() if p.requires_grad]
        self._engine, *_ = deepspeed.initialize(model=module, optimizer=adamw(trainable, optimiser), config=config)
        self.module: nn.Module = self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Accumulate; ranks are averaged at the boundary."""
        self._engine.backward(loss)
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            self._engine.step()

    def step(self, learning_rate: float) -> float:
        """Reduce, clip, update."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        if self._stage == 0 and not self._finite():
            # Without ZeRO DeepSpeed would update all the same: leave its step out, but for the count of micro-batches.
            self._engine.zero_grad()
            self._engine.micro_steps += 1
            return math.inf
        self._engine.step()
        if not self._engine.was_step_applied():
            return math.inf
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else 0.0

    def _finite(self) -> bool:
        """Whether the gradients are, which the last backward has averaged over the ranks."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """The float32 master weights, gathered one at a time, adapters merged."""
        from deepspeed.utils import safe_get_full_fp32_param

        def full(parameter: nn.Parameter) -> Tensor:
            # What is frozen has no master copy.
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            return (parameter.detach() if master is None else master).float()

        return lora.merged(self.module, full)

    def save(self, folder: Path) -> None:
        """Write the ZeRO shards with DeepSpeed's own format, without what is frozen."""
        partial = bool(lora.frozen(self.module))
        self._engine.save_checkpoint(str(folder), tag="zero", save_latest=False, exclude_frozen_parameters=partial)

    def load(self, folder: Path) -> None:
        """Read the ZeRO shards."""
        whole = not lora.frozen(self.module)
        path, _ = self._engine.load_checkpoint(
            str(folder), tag="zero", load_module_strict=whole, load_lr_scheduler_states=False
        )
        if path is None:
            raise RunError(f"no ZeRO checkpoint in {folder}")


def import_deepspeed() -> Any:
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
