"""Counter-based randomness: every draw is a pure function of the run's seed and what it is for.

Nothing depends on the order of calls, on how samples are split over ranks, or on the device, so a retry, a resume or
another placement repeats exactly. Each sample has a stream of its own, but for chance: torch's CPU generator takes only
the lower 32 bits of a seed, so that of N streams some N^2 / 2^33 pairs are equal (of 20 million, one in 215 has a twin
somewhere in the run, as a rule at another step).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Key = tuple[str | int, ...]


def seed_of(*key: str | int) -> int:
    """A 63-bit seed from a key such as ``(run_seed, "generator", step, sample)``."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal(shape: Sequence[int], keys: Sequence[Key]) -> Tensor:
    """Standard normal float32 [len(keys), *shape] on the CPU, one stream a key."""
    samples = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed_of(*key))) for key in keys]
    return torch.stack(samples)


def timesteps(first: int, last: int, keys: Sequence[Key]) -> Tensor:
    """Uniform integers in [first, last], one a key."""
    draws = [np.random.default_rng(seed_of(*key)).integers(first, last + 1) for key in keys]
    return torch.tensor(np.array(draws, dtype=np.int64))


def uniform(keys: Sequence[Key]) -> Tensor:
    """Uniform float64 numbers in [0, 1) [len(keys)], one per key."""
    return torch.tensor([np.random.default_rng(seed_of(*key)).random() for key in keys], dtype=torch.float64)


def permutation(length: int, *key: str | int) -> np.ndarray:
    """A shuffled ``range(length)``."""
    return np.random.default_rng(seed_of(*key)).permutation(length)
