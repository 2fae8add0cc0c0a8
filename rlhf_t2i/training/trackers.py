"""TensorBoard and Weights & Biases beside metrics.jsonl: optional extras, chosen by ``logging.writers``."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rlhf_t2i.errors import UsageError


class Writer(Protocol):
    """Something that takes a step's metrics."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record a row of metrics.jsonl; nested objects become ``outer/inner``, what is no number is left out."""

    def close(self) -> None:
        """Flush and end."""


def open_writers(names: Sequence[str], out: Path) -> list[Writer]:
    """Open writers by name, in OUT/tensorboard and OUT/wandb.

    A resumed run goes on where it was: both are told the step itself.

    Raises:
        UsageError: An unknown name, or the extra is not installed; nothing is opened then.
    """
    unknown = next((name for name in names if name not in _WRITERS), None)
    if unknown:
        raise UsageError(f"logging.writers: unknown writer {unknown!r}; known: {', '.join(_WRITERS)}")
    opened: list[Writer] = []
    for name in names:
        try:
            opened.append(_WRITERS[name](out))
        except ImportError as error:
            for writer in opened:
                writer.close()
            raise UsageError(f"logging.writers: {name} is not installed: pip install 'rlhf-t2i[{name}]' ({error})"
                             ) from None  # fmt: skip
    return opened


class TensorBoard:
    """Scalars in OUT/tensorboard.

    Args:
        out: The run's folder.
    """

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(out / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record a step."""
        for key, value in scalars(metrics):
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()


class WandB:
    """A Weights & Biases run in OUT/wandb, named after OUT; offline unless its own settings say otherwise.

    Args:
        out: The run's folder.
    """

    def __init__(self, out: Path) -> None:
        import wandb

        # Nothing leaves the machine because a recipe names a writer: WANDB_MODE=online asks for it.
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        out.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="rlhf-t2i", name=out.resolve().name, dir=str(out), id=_identity(out), resume="allow", mode=mode
        )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record a step."""
        self._run.log(dict(scalars(metrics)), step=step)

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()


def scalars(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers of a row, nested keys joined by slashes."""
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield prefix + key, float(value)


def _identity(out: Path) -> str:
    """The same for the same folder, so that a resumed run goes on in its own curve."""
    from rlhf_t2i.algorithm import rng

    return f"{rng.seed_of('wandb', str(out.resolve())):016x}"


_WRITERS: dict[str, Callable[[Path], Writer]] = {"tensorboard": TensorBoard, "wandb": WandB}
