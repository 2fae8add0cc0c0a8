"""Write the aligned generator as a folder that plain diffusers loads and draws with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from rlhf_t2i.algorithm.student import StartNoise, Student, Transition
from rlhf_t2i.errors import UsageError
from rlhf_t2i.families.sources import STUDENT
from rlhf_t2i.families.store import ModelStore
from rlhf_t2i.utils import files, manifest

_Side = Annotated[int, Field(ge=8, le=8192)]


class StudentFile(BaseModel):
    """``student.json`` beside an exported model: how its generator is called.

    Attributes:
        timesteps: In thousandths.
        transition: See :class:`rlhf_t2i.algorithm.student.Student`.
        input: See there.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
    """

    model_config = ConfigDict(frozen=True)

    timesteps: Annotated[list[Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]], Field(min_length=1)]
    transition: Transition
    input: StartNoise
    height: _Side
    width: _Side

    @model_validator(mode="after")
    def _falling(self) -> StudentFile:
        if any(a <= b for a, b in pairwise(self.timesteps)):
            raise ValueError("timesteps must fall from step to step")
        return self

    @classmethod
    def of(cls, student: Student, height: int, width: int) -> StudentFile:
        """From the student and the image size."""
        return cls(
            timesteps=list(student.timesteps), transition=student.transition, input=student.input,
            height=height, width=width,
        )  # fmt: skip

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
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            raise UsageError(f"{path} is damaged: it does not say how the generator is called") from None


def write_model(
    store: ModelStore,
    weights: Mapping[str, Tensor],
    target: Path,
    write_card: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Export the generator; the folder is whole or absent.

    Its network is float32 after a float32 run and float16 after a bf16 one, as published few-step models are. All
    other parts are the reference's own files.

    Args:
        store: The run's models.
        weights: The network's state dict in float32.
        target: The folder.
        write_card: Called with the folder; what it writes is covered by the manifest.

    Raises:
        RunError: It could not be written.
    """
    dtype = torch.float32 if store.dtype == torch.float32 else torch.float16
    with files.atomic_dir(target) as folder:
        store.generator_family.export(folder, weights, store.student, dtype, store.vae)
        files.write_json(folder / STUDENT, StudentFile.of(store.student, *store.size).model_dump())
        write_card(folder)
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
