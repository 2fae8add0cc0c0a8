"""Features of images as files that prove what they are of, and that they are whole."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_t2i.utils import files

_DIGEST_BYTES = hashlib.sha256().digest_size


def save(file: Path, features: np.ndarray, images: Sequence[str]) -> None:
    """Write features [N, D] of images with these digests; ``numpy.load`` reads the file, too.

    A digest of the images and the features follows the array.
    """
    buffer = io.BytesIO()
    np.save(buffer, features)
    files.write_atomic(file, buffer.getvalue() + _digest(buffer.getvalue(), images))


def load(file: Path, images: Sequence[str]) -> np.ndarray | None:
    """The features [N, D]; None if the file is missing or damaged, or is of other images."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    array, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if digest != _digest(array, images):
        return None
    found: np.ndarray = np.load(io.BytesIO(array), allow_pickle=False)
    return found


def _digest(array: bytes, images: Sequence[str]) -> bytes:
    return hashlib.sha256("\n".join(images).encode() + array).digest()
