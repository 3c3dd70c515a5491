"""A few sentence vectors in two dimensions."""

import numpy as np
from jaxtyping import Float


def principal_plane(vectors: Float[np.ndarray, "N D"]) -> tuple[Float[np.ndarray, "N 2"], list[float]]:
    """The first two principal components.

    Each axis has the sign that makes its largest coordinate positive, so that the same sentences always lie the same
    way.

    Returns:
      Coordinates, float64 [N, 2], and the share of the variance along each of the two axes; 0 without variance.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    total = float((s**2).sum())
    # Equal sentences leave nothing but rounding.
    if total < 1e-9 * max(float((vectors.astype(np.float64) ** 2).sum()), 1e-300):
        return np.zeros((len(vectors), 2)), [0.0, 0.0]
    plane = np.zeros((len(vectors), 2))
    shares = np.zeros(2)
    kept = min(2, len(s))
    plane[:, :kept], shares[:kept] = (u * s)[:, :kept], (s**2 / total)[:kept]
    largest = np.abs(plane).argmax(axis=0)
    plane *= np.where(plane[largest, [0, 1]] < 0, -1.0, 1.0)
    return plane, shares.tolist()
