"""Calls of a scorer that cost time or money: in batches, once per content, and counted."""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from rlhf_t2i.errors import UsageError
from rlhf_t2i.plugins import Reward
from rlhf_t2i.utils import files, inputs, targets
from rlhf_t2i.utils.images import to_8_bits

_REMEMBERED = 65_536


def cache_file() -> Path:
    """The SQLite file of scores of all runs of this user: ``~/.cache/rlhf-t2i/scores.sqlite``.

    Not a path in the recipe: what a recipe's options name must not change while it runs.
    """
    return files.expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "rlhf-t2i" / "scores.sqlite"


def check_cache(place: str) -> None:
    """Refuse a cache that cannot be written, or that is no file of scores.

    Args:
        place: Begins the error message.

    Raises:
        UsageError: One sentence.
    """
    path = cache_file()
    targets.check_folder(path.parent, place)
    if not path.exists():
        return
    inputs.open_regular(path, "file of scores", inputs.LOG, f"{place}: ").close()
    try:
        with closing(sqlite3.connect(path, timeout=60)) as database:
            database.execute("SELECT key, value FROM scores LIMIT 1").fetchone()
    except sqlite3.Error as error:
        raise UsageError(f"{place} {path} is no file of scores ({error}): remove it") from None


class ScorerCalls:
    """Asks a reward for values, and remembers them by the 8-bit image, the prompt and the scorer.

    Args:
        scorer: The reward.
        identity: Names the scorer and its options: a file may serve several.
        batch: Images per call; all at once when None.
        keep: Keep the values in :func:`cache_file`, for later runs and for steps that are repeated after a kill.
    """

    def __init__(self, scorer: Reward, identity: str, batch: int | None = None, keep: bool = False) -> None:
        self._scorer, self._identity, self._batch = scorer, identity, batch
        self._known: dict[str, float] = {}
        self._file = cache_file() if keep else None
        self.asked = 0
        """Images that the scorer has been asked for."""

    @torch.no_grad()
    def values(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values [B], float32, of images [B, 3, H, W] in [0, 1], on their device."""
        keys = [self._key(image, prompt) for image, prompt in zip(to_8_bits(images).cpu(), prompts, strict=True)]
        self._recall(keys)
        new = list({key: index for index, key in enumerate(keys) if key not in self._known}.values())
        for start in range(0, len(new), self._batch or len(new) or 1):
            part = new[start : start + (self._batch or len(new))]
            values = self._scorer.score(images[part], [prompts[i] for i in part])
            if tuple(values.shape) != (len(part),) or not bool(values.isfinite().all()):
                raise ValueError(f"the scorer gave {list(values.shape)} values, not {len(part)} finite ones")
            self.asked += len(part)
            self._remember({keys[i]: float(value) for i, value in zip(part, values, strict=True)})
        return torch.tensor([self._known[key] for key in keys], dtype=torch.float32, device=images.device)

    def _key(self, pixels: Tensor, prompt: str) -> str:
        digest = hashlib.sha256(f"{self._identity}\0{list(pixels.shape)}\0{prompt}\0".encode())
        digest.update(pixels.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _remember(self, values: dict[str, float]) -> None:
        if len(self._known) + len(values) > _REMEMBERED:
            for key in list(self._known)[: _REMEMBERED // 2]:
                del self._known[key]
        self._known |= values
        if self._file is not None:
            with closing(self._open()) as database, database:
                database.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?)", values.items())

    def _recall(self, keys: Sequence[str]) -> None:
        if self._file is None or not self._file.is_file():
            return
        with closing(self._open()) as database:
            for key in keys:
                found = database.execute("SELECT value FROM scores WHERE key = ?", (key,)).fetchone()
                if found is not None:
                    self._known[key] = found[0]

    def _open(self) -> sqlite3.Connection:
        assert self._file is not None
        self._file.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._file, timeout=60)
        database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, value REAL NOT NULL)")
        return database
