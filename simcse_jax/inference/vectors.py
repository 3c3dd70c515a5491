"""Vectors of length 1."""

import numpy as np
from jaxtyping import Float


def unit(vectors: Float[np.ndarray, "S H"]) -> Float[np.ndarray, "S H"]:
    """Scales each row x to x / ‖x‖, in its dtype; a row of zeros stays zero."""
    scaled: Float[np.ndarray, "S H"] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled
