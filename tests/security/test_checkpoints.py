"""Nothing in a checkpoint's files is run when they are read, though DeepSpeed would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf_t2i.engines import pickles, resharding
from rlhf_t2i.engines.deepspeed import import_deepspeed
from rlhf_t2i.engines.local import LocalEngine
from rlhf_t2i.engines.writer import Writer
from rlhf_t2i.errors import RunError
from rlhf_t2i.recipe.schema import Optimization, Recipe
from rlhf_t2i.utils import files
from tests.security.hostile import Payload
from tests.training.ranks import run_ranks
from tests.training.test_universal import build, train

REFUSED = "nothing of it was run: .*mkdir"


def poison(file: Path, ran: Path) -> None:
    """Hide a call of ``mkdir`` among the tensors of a checkpoint's file."""
    state = torch.load(file, weights_only=False)
    torch.save(state | {"more": Payload(ran)}, file)


def test_a_local_checkpoint(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    engine = LocalEngine(nn.Linear(2, 2), make_recipe().optimization.generator, 1)
    writer = Writer()
    engine.save(tmp_path, writer)
    writer.wait()
    poison(tmp_path / "local.pt", tmp_path / "ran")
    with pytest.raises(RunError, match=REFUSED):
        engine.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def hostile_shards(rank: int, settings: Optimization, folder: Path, ran: Path) -> None:
    """As DeepSpeed loads them, and as they are converted to another number of ranks."""
    engine = build(settings, 1)
    train(engine, rank, 1, 0, 1)
    writer = Writer()
    engine.save(folder, writer)
    writer.wait()
    assert engine.load(folder) is None
    file = next(folder.rglob("*optim_states.pt"))
    poison(file, ran)
    for ranks in (1, 2):
        files.write_json(folder / resharding.LAYOUT, {"ranks": ranks, "zero_stage": settings.zero_stage})
        with pytest.raises(RunError, match=REFUSED):
            engine.load(folder)
    assert not ran.exists()
    torch.load(file, weights_only=False)
    assert ran.exists()


def test_shards_of_zero(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    settings = make_recipe(optimization__zero_stage=2).optimization
    run_ranks(1, tmp_path, hostile_shards, settings, tmp_path / "saved", tmp_path / "ran")


class Reach:
    """Pickled as ``getattr(LossScaler, name)``."""

    def __reduce__(self) -> tuple[Any, ...]:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler

        return getattr, (LossScaler, "__init__")


def test_getattr_serves_one_enum_alone(tmp_path: Path) -> None:
    """Some releases of Python 3.11 pickle an enum's member through it, and with it nothing else may be reached."""
    import_deepspeed()
    torch.save({"more": Reach()}, tmp_path / "states.pt")
    with pytest.raises(RunError, match="nothing of it was run: GLOBAL getattr"), pickles.tensors_only(tmp_path):
        torch.load(tmp_path / "states.pt", weights_only=False)
