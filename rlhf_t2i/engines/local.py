"""The engine of ``placement: local``: plain PyTorch in float32, the reference for distributed runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_t2i.engines import pickles
from rlhf_t2i.engines.base import adamw, trained
from rlhf_t2i.engines.writer import Writer
from rlhf_t2i.errors import RunError
from rlhf_t2i.families import adapters
from rlhf_t2i.recipe.schema import Optimizer


class LocalEngine:
    """One process, float32 weights, torch's own AdamW and clipping."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, accumulation: int) -> None:
        self.module = module
        self._settings, self._accumulation = optimizer, accumulation
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = adamw(self._trained, optimizer)

    def __call__(self, *args: object, **kwargs: object) -> Sequence[Tensor]:
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

    def full_parameters(self, adapted: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The parameters, adapters merged."""
        return adapters.merged(self.module, _full, adapted)

    def copies(self, part: int = 0, parts: int = 1) -> Iterator[tuple[str, Tensor]]:
        """The trained parameters."""
        yield from ((name, parameter.detach()) for name, parameter in trained(self.module, part, parts))

    def masters(self) -> list[Tensor]:
        """The trained parameters themselves."""
        return [parameter.detach() for parameter in self._trained]

    def set_master(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Copy a value into the parameter."""
        parameter.detach().copy_(value)

    def adapter_factors(self) -> Iterator[tuple[str, Tensor]]:
        """The adapters alone."""
        return adapters.factors(self.module, _full)

    def bf16_drift(self) -> dict[str, float]:
        """{}: the weights are float32 themselves."""
        return {}

    def save(self, folder: Path, writer: Writer) -> None:
        """Write ``local.pt``, without frozen parameters."""
        frozen = adapters.frozen(self.module)
        module = {name: value for name, value in self.module.state_dict().items() if name not in frozen}
        state = {"module": module, "optimizer": self._optimizer.state_dict()}
        writer.write(state, lambda copied: torch.save(copied, folder / "local.pt"))

    def load(self, folder: Path) -> None:
        """Read ``local.pt``."""
        if not (folder / "local.pt").is_file():
            raise RunError(
                f"{folder} was written under Ray and DeepSpeed: continue it there, not with placement: local"
            )
        with pickles.explained(folder):
            state = torch.load(folder / "local.pt", map_location="cpu", weights_only=True)
        missing, unexpected = self.module.load_state_dict(state["module"], strict=False)
        if unexpected or set(missing) != adapters.frozen(self.module):
            raise RunError(f"{folder / 'local.pt'} holds other weights than this recipe trains")
        self._optimizer.load_state_dict(state["optimizer"])


def _full(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().float()
