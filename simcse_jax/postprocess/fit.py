"""Fitting a post-processor, chosen by name, to a sample of sentence vectors."""

from typing import Any

import numpy as np
from jaxtyping import Float

from simcse_jax.config.postprocess import FitSettings
from simcse_jax.errors import InputError
from simcse_jax.postprocess.flow import Flow, fit_flow
from simcse_jax.postprocess.linear import Affine, all_but_the_top, whitening
from simcse_jax.postprocess.modules import Modules

PostProcessor = Affine | Flow | Modules


def fit(vectors: Float[np.ndarray, "S H"], settings: FitSettings) -> tuple[PostProcessor, dict[str, Any]]:
    """Fits a post-processor.

    Args:
      vectors: the sample: raw vectors as the pooler gives them, not normalised.
      settings: the method and its settings.

    Returns:
      The post-processor, and its description as plain JSON values: `method`, `width`, its own settings.

    Raises:
      InputError: vectors that are not finite; also see `whitening`, `all_but_the_top`, `fit_flow`.
    """
    settings.validate()
    if not np.isfinite(vectors).all():
        raise InputError("the model gives vectors that are not finite: a post-processor cannot be fitted to them")
    post: PostProcessor
    about: dict[str, Any] = {"method": settings.method, "sentences": len(vectors)}
    if settings.method == "whitening":
        post = whitening(vectors, settings.dim)
    elif settings.method == "all-but-the-top":
        post = all_but_the_top(vectors, settings.components)
        about["components"] = vectors.shape[1] - round(float(np.trace(post.weight)))
    else:
        post, history = fit_flow(vectors, settings.flow)
        about |= {"flow": vars(settings.flow), "nats_a_dimension": [round(value, 4) for value in history]}
    return post, {**about, "width": post.width}
