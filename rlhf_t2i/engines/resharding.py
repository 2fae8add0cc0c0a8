"""DeepSpeed's universal checkpoint: makes ZeRO shards loadable by another number of ranks or another stage."""

from __future__ import annotations

import json
import os
import pickle
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from torch import distributed

from rlhf_t2i.engines import pickles
from rlhf_t2i.errors import RunError
from rlhf_t2i.utils import files

LAYOUT = "layout.json"
_ASIDE = ".universal"


def write_layout(folder: Path, stage: int) -> None:
    """Record in a checkpoint the layout of its shards."""
    files.write_json(folder / LAYOUT, {"ranks": distributed.get_world_size(), "zero_stage": stage})


def read_layout(folder: Path) -> dict[str, int] | None:
    """``ranks`` and ``zero_stage`` of a checkpoint's shards; None if unknown."""
    try:
        return dict(json.loads((folder / LAYOUT).read_text("utf-8")))
    except OSError:
        return None


@contextmanager
def converted(folder: Path, shards: str) -> Iterator[str]:
    """Convert a checkpoint on rank 0, for all ranks while the block runs; the copy is removed afterwards.

    Args:
        folder: The role's folder of a checkpoint, seen by all ranks.
        shards: The tag of its ZeRO shards.

    Yields:
        The tag of the universal checkpoint in ``folder``.

    Raises:
        RunError: The shards cannot be converted.
    """
    first, target = distributed.get_rank() == 0, folder / _ASIDE
    problem: list[str | None] = [None]
    if first:
        files.remove(target)  # of a run that was killed while it converted
        problem[0] = _convert(folder / shards, target / shards)
    distributed.broadcast_object_list(problem)
    try:
        if problem[0]:
            raise RunError(f"{folder / shards} cannot be converted to another number of ranks: {problem[0]}")
        yield f"{_ASIDE}/{shards}"
    finally:
        distributed.barrier()
        if first:
            files.remove(target)


def _convert(source: Path, target: Path) -> str | None:
    """Convert; returns the error message, or None."""
    from deepspeed.checkpoint import ds_to_universal

    settings = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # processes that would each import torch anew
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            ds_to_universal.main(settings)
    except pickle.UnpicklingError as error:
        return f"it holds more than a checkpoint, and nothing of it was run: {pickles.wanted(error)}"
    except (OSError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
