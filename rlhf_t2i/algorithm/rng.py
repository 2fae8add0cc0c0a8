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


def permuted(index: int, length: int, *key: str | int) -> int:
    """Where a pseudo-random permutation of ``range(length)`` sends an index, without the permutation in memory.

    A Feistel network of eight rounds over the smallest square power of two that holds the range; what falls outside
    the range is sent on until it is inside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite
    domains").

    Args:
        index: 0 <= index < length.
        length: Of the range.
        *key: What the permutation is for.
    """
    half = max((length - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    seed = seed_of(*key).to_bytes(8, "little")
    while True:
        left, right = index >> half, index & mask
        for round_ in range(8):
            digest = hashlib.blake2b(right.to_bytes(8, "little") + bytes([round_]), digest_size=8, key=seed).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < length:
            return index
