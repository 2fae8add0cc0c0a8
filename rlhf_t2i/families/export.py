"""Write the aligned generator as a folder that plain diffusers loads and draws with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_t2i.algorithm.student import Student
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.utils import files, manifest

STUDENT = "student.json"


@dataclass(frozen=True)
class StudentFile:
    """``student.json`` beside an exported model: how its generator is called.

    Attributes:
        timesteps: In thousandths.
        transition: See :class:`rlhf_t2i.algorithm.student.Student`.
        input: See there.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
    """

    timesteps: list[float]
    transition: str
    input: str
    height: int
    width: int

    @classmethod
    def of(cls, student: Student, height: int, width: int) -> StudentFile:
        """From the student and the image size."""
        return cls(list(student.timesteps), student.transition, student.input, height, width)

    @classmethod
    def read(cls, folder: Path) -> StudentFile | None:
        """Read it from a model's folder; None where there is none.

        Raises:
            UsageError: Damaged.
        """
        path = folder / STUDENT
        if not path.is_file():
            return None
        try:
            data: Any = json.loads(path.read_text("utf-8"))
            found = cls(
                [float(tau) for tau in data["timesteps"]],
                str(data["transition"]),
                str(data["input"]),
                int(data["height"]),
                int(data["width"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            raise UsageError(f"{path} is damaged: it does not say how the generator is called") from None
        if (
            not found.timesteps
            or not all(0 <= tau <= 1000 for tau in found.timesteps)
            or found.transition not in ("stochastic", "deterministic")
            or found.input not in ("unit", "sigma")
            or not all(8 <= side <= 8192 for side in (found.height, found.width))
        ):
            raise UsageError(f"{path} is damaged: it does not say how the generator is called")
        return found


def write_model(store: ModelStore, weights: Mapping[str, Tensor], target: Path) -> None:
    """Export the generator; the folder is whole or absent.

    Its network is float32 after a float32 run and float16 after a bf16 one, as published few-step models are. All
    other parts are the reference's own files.

    Args:
        store: The run's models.
        weights: The network's state dict in float32.
        target: The folder.

    Raises:
        RunError: It could not be written.
    """
    dtype = torch.float32 if store.dtype == torch.float32 else torch.float16
    with files.atomic_dir(target) as folder:
        store.generator_family.export(folder, weights, store.student, dtype, store.vae)
        files.write_json(folder / STUDENT, asdict(StudentFile.of(store.student, *store.size)))
        manifest.write(folder)


def write_adapter(store: ModelStore, factors: Mapping[str, Tensor], target: Path) -> None:
    """Export the generator's adapters alone; the folder is whole or absent.

    Args:
        store: The run's models.
        factors: See :func:`rlhf_t2i.families.adapters.factors`.
        target: The folder.

    Raises:
        RunError: It could not be written.
    """
    dtype = torch.float32 if store.dtype == torch.float32 else torch.float16
    with files.atomic_dir(target) as folder:
        store.generator_family.export_adapter(folder, {name: factor.to(dtype) for name, factor in factors.items()})
        manifest.write(folder)
