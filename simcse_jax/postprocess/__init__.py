"""Maps of sentence vectors: fitted without labels (whitening, all-but-the-top, flow), or read from a saved model.

A post-processor is a pytree of arrays with `__call__(x: [S, H]) -> [S, D]`. It belongs to the weights whose vectors it
was fitted to, is stored among a loaded model's parameters under `KEY`, and is applied whenever sentences are encoded.
"""

from simcse_jax.config.postprocess import FitSettings, FlowSettings
from simcse_jax.postprocess.fit import PostProcessor, fit
from simcse_jax.postprocess.flow import Flow, fit_flow
from simcse_jax.postprocess.linear import Affine, all_but_the_top, whitening
from simcse_jax.postprocess.modules import Dense, Modules
from simcse_jax.postprocess.stored import KEY, describe, read, read_saved, tensors_of

__all__ = [
    "KEY",
    "Affine",
    "Dense",
    "FitSettings",
    "Flow",
    "FlowSettings",
    "Modules",
    "PostProcessor",
    "all_but_the_top",
    "describe",
    "fit",
    "fit_flow",
    "read",
    "read_saved",
    "tensors_of",
    "whitening",
]
