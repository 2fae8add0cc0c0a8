"""How different the images of one prompt are: three measures of features [K, D], K images. Nothing imports torch.

In latents or a VAE's features no further model is needed; in a CLIP's features the measures follow what is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def within(units: Sequence[Hashable], features: Array, measure: Callable[[Array], float]) -> list[float]:
    """Apply a measure to the images of each unit (a prompt) that has two or more.

    Args:
        units: The unit of each of N images.
        features: [N, D].
        measure: One of this module's.

    Returns:
        One value per unit, in order of first appearance.
    """
    members: dict[Hashable, list[int]] = {}
    for index, unit in enumerate(units):
        members.setdefault(unit, []).append(index)
    features = np.asarray(features, dtype=np.float64)
    return [measure(features[indices]) for indices in members.values() if len(indices) > 1]


def rms_distance(features: Array) -> float:
    """Mean root-mean-square distance over the pairs of features [K, D]; 0 when the noise no longer matters."""
    from scipy.spatial.distance import pdist

    return float(pdist(features).mean() / math.sqrt(features.shape[1]))


def cosine_distance(features: Array) -> float:
    """Mean cosine distance ``1 - cos`` over the pairs of features [K, D]: 0 (all equal) to 2."""
    return float((1.0 - _cosines(features))[np.triu_indices(len(features), 1)].mean())


def vendi_score(features: Array) -> float:
    """The effective number of different images among K: exp of the eigenvalue entropy of ``cosines / K``.

    Friedman and Dieng, "The Vendi Score" (2023), equation (2) with q = 1: between 1 (all alike) and K (all unlike).
    """
    eigenvalues = np.linalg.eigvalsh(_cosines(features) / len(features))
    positive = eigenvalues[eigenvalues > 1e-12]
    return float(np.exp(-(positive * np.log(positive)).sum()))


def _cosines(features: Array) -> Array:
    """The matrix [K, K] of cosines between features, its diagonal exactly 1."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    matrix = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(matrix, 1.0)
    return matrix
