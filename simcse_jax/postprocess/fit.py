"""Fitting a post-processor, chosen by name, to a sample of sentence vectors."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from simcse_jax.errors import InputError
from simcse_jax.postprocess.flow import Flow, FlowSettings, fit_flow
from simcse_jax.postprocess.linear import Affine, all_but_the_top, whitening
from simcse_jax.postprocess.modules import Modules

PostProcessor = Affine | Flow | Modules


@dataclass(frozen=True)
class FitSettings:
    """The post-processor to fit, and its settings."""

    method: Literal["whitening", "all-but-the-top", "flow"] = "whitening"
    """Whitening (Su et al. 2021), all-but-the-top (Mu & Viswanath 2018) or BERT-flow (Li et al. 2020)."""
    dim: int | None = None
    """Width of whitened vectors; if not given, the number of directions that the sentences span."""
    components: int | None = None
    """Principal components that all-but-the-top removes; width / 100 if not given."""
    flow: FlowSettings = field(default_factory=FlowSettings)

    def validate(self) -> None:
        """Raises `InputError` for settings that do not go together, or an impossible flow."""
        for name, method in (("dim", "whitening"), ("components", "all-but-the-top")):
            if getattr(self, name) is not None and self.method != method:
                raise InputError(
                    f"{name} is given but the method is {self.method}: only {method} uses it, so leave it out"
                )
        if self.method == "flow":
            self.flow.validate()


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
