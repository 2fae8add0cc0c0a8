"""Read ZeRO's files without running code that a pickle can hold."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import torch

from rlhf_t2i.errors import RunError, first_line

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turn torch's refusal of a pickle into an error message.

    Args:
        folder: What is read in the block.

    Raises:
        RunError: A file asks for more than ``torch.load`` may build; nothing of it was run.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        raise RunError(f"{folder} holds more than a checkpoint, and nothing of it was run: {wanted(error)}") from None


@contextmanager
def tensors_only(folder: Path) -> Iterator[None]:
    """While the block runs ``torch.load`` builds tensors, plain containers and the three classes of ZeRO's files.

    DeepSpeed asks it for whatever a pickle says (``weights_only=False``); torch lets the environment overrule that.

    Args:
        folder: What is read in the block.

    Raises:
        RunError: A file asks for more; nothing of it was run.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"

    def member(kind: type[Enum], name: str) -> Enum:
        """What some releases of Python 3.11 pickle an enum's member with: no ``getattr`` of anything else."""
        if kind is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"GLOBAL getattr of {kind}")
        return kind[name]

    allowed = [LossScaler, ZeroStageEnum, fragment_address, (member, "builtins.getattr")]
    try:
        with explained(folder), torch.serialization.safe_globals(allowed):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def wanted(error: pickle.UnpicklingError) -> str:
    """The name that the file asks for, from torch's long message."""
    match = re.search(r"(?:GLOBAL|class|function) [\w.]+", str(error))
    return match[0] if match else first_line(error)
