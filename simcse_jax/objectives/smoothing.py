"""Instance smoothing (IS-CSE, arXiv 2305.07424, section 3): positives averaged with what lies near them in a buffer.

A buffer holds the latest Q positives as unit vectors, oldest first. In each step, over the global batch:

1. the batch's positives u_i = z2_i/‖z2_i‖ enter the buffer (no gradient flows into it);
2. each u_i is grouped with members of the buffer near it: K_i = [u_i; neighbours];
3. the group is aggregated, by attention w = softmax(u_i·K_iᵀ/β), z*_i = w·K_i, or by its mean;
4. loss = contrast(z1, z2) + α contrast(z1, z*), where the second term waits until the buffer is full.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from simcse_jax.config import SmoothingConfig
from simcse_jax.objectives.pairs import similarities

LLOYD_ITERATIONS = 10
BLOCK = 4096
"""Positives whose similarities with the buffer are in memory at a time."""


def smoothing_weight(config: SmoothingConfig, step: Int[Array, ""], total_steps: int) -> Float[Array, ""]:
    """α at a step: constant, or min(end, end + (start − end) cos(π t/T)), which stays at its end from T/2 on."""
    if config.schedule == "constant":
        return jnp.asarray(config.weight)
    change = (config.start_weight - config.weight) * jnp.cos(jnp.pi * step / total_steps)
    return jnp.minimum(config.weight, config.weight + change)


def push(buffer: Float[Array, "Q H"], u: Float[Array, "N H"], valid: Bool[Array, " N"]) -> Float[Array, "Q H"]:
    """The buffer with a batch behind it and its oldest rows dropped.

    Args:
      buffer: rows, oldest first; zeros where nothing is stored yet.
      u: the batch, of any size.
      valid: rows that count, which stand before those that do not.
    """
    size = buffer.shape[0]
    # Rows are taken by number, at most Q of the batch: rows split over devices are then not gathered whole.
    source = jnp.arange(size) + jnp.sum(valid)
    new = jnp.take(jax.lax.stop_gradient(u).astype(buffer.dtype), source - size, axis=0, mode="clip")
    return jnp.where((source < size)[:, None], jnp.take(buffer, source, axis=0, mode="clip"), new)


def is_full(buffer: Float[Array, "Q H"]) -> Bool[Array, ""]:
    """Whether the oldest row holds a vector."""
    return jnp.any(buffer[0] != 0)


def smooth(config: SmoothingConfig, u: Float[Array, "N H"], buffer: Float[Array, "Q H"]) -> Float[Array, "N H"]:
    """The aggregate z* of each positive's group; the gradient flows through `u` only.

    Args:
      config: the settings.
      u: positives of length 1.
      buffer: from `push`, with the positives inside.
    """
    buffer = jax.lax.stop_gradient(buffer)
    clusters = _clusters(buffer, config.clusters) if config.grouping == "kmeans" else None

    def one(u: Float[Array, " H"]) -> Float[Array, " H"]:
        cosine = similarities(u[None], buffer)[0]
        if clusters is None:
            # The very nearest is the row itself.
            near = jax.lax.top_k(cosine, config.neighbours + 1)[1][1:]
            members = jnp.zeros(len(buffer), bool).at[near].set(True)
        else:
            itself = jnp.argmax(cosine)
            members = (clusters == clusters[itself]) & (jnp.arange(len(buffer)) != itself)
        if config.aggregation == "mean":
            logits = jnp.zeros(len(buffer) + 1, cosine.dtype)
        else:
            # u·u is 1, but its gradient is not 0 before u is normalised.
            logits = jnp.concatenate([jnp.sum(u * u)[None], cosine]) / config.temperature
        weights = jax.nn.softmax(logits, where=jnp.concatenate([jnp.ones(1, bool), members]))
        return weights[0] * u + similarities(weights[None, 1:], buffer.T)[0]

    # In blocks, so that N × Q similarities are never in memory at once.
    aggregates: Array = jax.lax.map(jax.checkpoint(one), u, batch_size=BLOCK)
    return aggregates


def _clusters(buffer: Float[Array, "Q H"], count: int) -> Int[Array, " Q"]:
    """Spherical k-means: `LLOYD_ITERATIONS` rounds; each initial centre is the farthest from those before it."""

    def spread(i: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centres, nearest = carry
        centre = buffer[jnp.argmin(nearest)]
        return centres.at[i].set(centre), jnp.maximum(nearest, similarities(buffer, centre[None])[:, 0])

    def assign(centres: Float[Array, "C H"]) -> Int[Array, " Q"]:
        return jnp.argmax(similarities(buffer, centres), axis=1)

    def move(_: Int[Array, ""], centres: Float[Array, "C H"]) -> Float[Array, "C H"]:
        members = jax.nn.one_hot(assign(centres), count, axis=0, dtype=buffer.dtype)
        sums = similarities(members, buffer.T)
        norm = jnp.linalg.norm(sums, axis=1, keepdims=True)
        return jnp.where(norm > 0, sums / jnp.where(norm > 0, norm, 1), centres)  # an empty cluster stays

    start = jnp.zeros((count, buffer.shape[1]), buffer.dtype), jnp.full(len(buffer), -jnp.inf, buffer.dtype)
    centres, _ = jax.lax.fori_loop(0, count, spread, start)
    return assign(jax.lax.fori_loop(0, LLOYD_ITERATIONS, move, centres))
