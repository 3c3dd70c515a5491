"""The gradient noise scale (McCandlish et al., arXiv 1812.06162) of a loss that is no sum over examples.

InfoNCE couples the examples of a batch, so noise is defined for the gradient of a whole batch: with gradients g_1 … g_k
of k independent batches of B examples at the same parameters and ḡ their mean,

    S = Σ_i ‖g_i − ḡ‖² / (k − 1),   |G|² = ‖ḡ‖² − S / k,   noise scale = B · S / |G|²   (in examples).

S and |G|² are without bias; the ratio is not, and where the estimate of |G|² is not positive there is none. Dropout is
part of a gradient's noise. The expected gradient itself depends on B, through the number of negatives.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from simcse_jax.config import MLMConfig
from simcse_jax.data.batch import Batch
from simcse_jax.data.feed import Feed
from simcse_jax.model.params import Params
from simcse_jax.runtime.mesh import compiler_options
from simcse_jax.training.loss import make_loss
from simcse_jax.training.spec import StepSpec

Gradient = Callable[[Params, Batch, np.int32], Params]


def noise_scale(gradients: Iterable[Any], batch_size: int) -> float | None:
    """The noise scale, in examples, from the gradients of batches of `batch_size`, each a tree.

    It is None for fewer than two batches, or where the estimate of |G|² is not positive.

    Two trees are held at a time: the mean and the latest (Welford's recurrence).
    """
    mean, total, k = None, jnp.zeros(()), 0
    for k, gradient in enumerate(gradients, 1):
        if mean is None:
            mean = gradient
        else:
            mean, total = _accumulate(mean, total, gradient, k)
    if k < 2:
        return None
    variance = float(total) / (k - 1)
    square = float(optax.tree.norm(mean, squared=True)) - variance / k
    return batch_size * variance / square if square > 0 else None


@partial(jax.jit, donate_argnums=0)
def _accumulate(
    mean: Any, total: Float[Array, ""], gradient: Any, k: Int[Array, ""] | int
) -> tuple[Any, Float[Array, ""]]:
    """Mean of k gradients and Σ ‖g_i − mean‖², from those of k − 1."""
    deviation = optax.tree.sub(gradient, mean)
    mean = optax.tree.add(mean, optax.tree.scale(1 / k, deviation))
    return mean, total + optax.tree.vdot(deviation, optax.tree.sub(gradient, mean))


def make_gradient(spec: StepSpec, params: Any) -> Gradient:
    """The gradient of a run's contrast: `params, batch, number of the draw -> gradient`.

    Args:
      spec: the step, with a number for `micro_batch`.
      params: the parameters, or their `ShapeDtypeStruct`s.
    """
    objective = replace(spec.config.objective, contrastive_weight=1.0, mlm=MLMConfig())
    spec = replace(spec, config=replace(spec.config, objective=objective))
    gradient = jax.grad(make_loss(spec, params, streams="noise_scale/"), has_aux=True)
    options = compiler_options(spec.mesh)
    return jax.jit(lambda params, batch, draw: gradient(params, None, draw, batch)[0], compiler_options=options)


def compared(gradients: Iterable[Any], whole: Any, cosines: list[float]) -> Iterator[Any]:
    """Gradients as they come, each a tree; adds their cosines with another, NaN where one is 0."""
    for gradient in gradients:
        cosines.append(float(_cosine(gradient, whole)))
        yield gradient


def mean_cosine(cosines: list[float]) -> float | None:
    """The mean of cosines; None without any, or where one is NaN."""
    mean = float(np.mean(cosines)) if cosines else math.nan
    return mean if math.isfinite(mean) else None


@jax.jit
def _cosine(a: Any, b: Any) -> Float[Array, ""]:
    cosine: Array = optax.tree.vdot(a, b) / (optax.tree.norm(a) * optax.tree.norm(b))
    return cosine


def batch_gradients(gradient: Gradient, params: Params, feed: Feed, count: int) -> Iterator[Params]:
    """Gradients of the first `count` whole batches of a feed, under dropout noise that no training run has.

    They are independent if no two share an example: the batches must not exceed an epoch.
    """
    for i in range(count):
        yield gradient(params, feed.batch(i), np.int32(i))
