"""Maps of sentence vectors that are fitted without labels: whitening, all-but-the-top, flow.

A post-processor is a pytree of arrays with `__call__(x: [S, H]) -> [S, D]`. It belongs to the weights whose vectors it
was fitted to, lies among a loaded model's parameters under `KEY`, and is applied wherever sentences are encoded.
"""

from simcse_jax.postprocess.fit import FitSettings, PostProcessor, fit
from simcse_jax.postprocess.flow import Flow, FlowSettings, fit_flow
from simcse_jax.postprocess.linear import Affine, all_but_the_top, whitening
from simcse_jax.postprocess.stored import KEY, describe, read, tensors_of

__all__ = [
    "KEY",
    "Affine",
    "FitSettings",
    "Flow",
    "FlowSettings",
    "PostProcessor",
    "all_but_the_top",
    "describe",
    "fit",
    "fit_flow",
    "read",
    "tensors_of",
    "whitening",
]
