"""The statistics of all pairs without the matrix of logits: in tiles on each device, in rings over devices and slices.

In the forward pass, every device keeps its own anchors and meets the keys of all devices, a visiting share at a time,
in square tiles; of a tile's logits only running sums are kept (Milakov & Gimelshein, arXiv 1805.02867, for the
log-sum-exp). In the backward pass, the logits are computed again tile by tile, and the saved log-sum-exp n_i normalises
them. With g_i the gradient of the loss with respect to n_i and P_i,kj = g_i exp(S_i,kj − n_i) (f'(c_i,kj)/τ + β),

    dq_i = Σ_kj P_i,kj k_kj,    dk_kj = Σ_i P_i,kj q_i;

the sum dk travels round the ring with its keys. Memory: the rows of one device and a few tiles (cf. Inf-CL, arXiv
2410.17243).

With several slices the ring goes round inside each; once per round, every device also passes the share that it began
the round with on to the next slice, while the round is computed. No byte crosses slices more often than there are other
slices.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from simcse_jax.objectives.pairs import (
    AnchorMarks,
    KeyMarks,
    Logits,
    PairStatistics,
    Reduction,
    Score,
    block_logits,
    identity,
    masked,
    similarities,
)
from simcse_jax.objectives.tiles import (
    Anchors,
    Learned,
    Met,
    Settings,
    Share,
    Turn,
    alike,
    cut,
    in_tiles,
    in_turn,
    multiplied,
    numbers,
    on_devices,
    owner,
    pass_on,
    tour,
    uncut,
)


class _Running(NamedTuple):
    """Sums over the negatives met so far, for each anchor."""

    maximum: Float[Array, "*rows"]
    total: Float[Array, "*rows"]
    """Σ exp(S − maximum)."""
    moment: Float[Array, "*rows"]
    """Σ exp(S − maximum)·(S − maximum)."""
    similarity: Float[Array, "*rows"]
    potential: Float[Array, "*rows"]
    softplus: Float[Array, "*rows"]
    """Σ log(1 + exp S), where the reduction asks for it."""
    masked: Float[Array, "*rows"] | None
    """Number of false negatives, where something looks for them."""


def tiled(
    queries: Float[Array, "N H"],
    keys: Float[Array, "K N H"],
    anchor_marks: AnchorMarks,
    key_marks: KeyMarks,
    *,
    temperature: float | Float[Array, ""],
    own: tuple[float | None, ...],
    bias: float | Float[Array, ""] = 0.0,
    tilt: float = 0.0,
    score: Score = identity,
    reduction: Reduction = "logsumexp",
    block: int = 1024,
    mesh: Mesh | None = None,
    axes: tuple[str, ...] = (),
    across: tuple[str, ...] = (),
    dtype: str | None = None,
) -> PairStatistics:
    """The statistics, tile by tile. See `Pairs`.

    Args:
      queries, keys, anchor_marks, key_marks, temperature, own, bias, tilt, score, reduction: see `Pairs`.
      block: largest side of a tile.
      mesh: the rows are split over all its devices; None for a single device.
      axes: the axes of `mesh` in the order in which they split the rows.
      across: the first of these axes, where they lie between slices.
      dtype: type to which queries, keys and probabilities are rounded before they are multiplied ("bfloat16"); sums
        stay float32. None does not round.
    """
    learned = Learned(*(None if isinstance(x, int | float) else x for x in (temperature, bias)))
    static = [0.0 if part is not None else x for part, x in zip(learned, (temperature, bias), strict=True)]
    rings = across, tuple(axis for axis in axes if axis not in across)
    settings = Settings(Logits(static[0], static[1], tilt, score), own, block, mesh, rings, dtype, reduction)
    negatives, *rest = _over_negatives(settings, queries, keys, learned, (anchor_marks, key_marks))
    return PairStatistics(negatives, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_negatives(
    settings: Settings,
    queries: Float[Array, "N H"],
    keys: Float[Array, "K N H"],
    learned: Learned,
    marks: tuple[AnchorMarks, KeyMarks],
) -> tuple[Any, ...]:
    """The fields of `PairStatistics`."""
    statistics: tuple[Any, ...]
    statistics = on_devices(settings, _forward, (1, 2, 0, (1, 2)), 1)(queries, keys, learned, marks)
    return statistics


def _save(
    settings: Settings, queries: Array, keys: Array, learned: Learned, marks: tuple[AnchorMarks, KeyMarks]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    statistics = _over_negatives(settings, queries, keys, learned, marks)
    return statistics, (queries, keys, learned, marks, statistics[0])


def _pull_back(
    settings: Settings, saved: tuple[Any, ...], gradients: tuple[Any, ...]
) -> tuple[Array, Array, Learned, None]:
    # The other statistics are constants to the gradient.
    backward = on_devices(settings, _backward, (1, 2, 0, (1, 2), 1, 1), (1, 2, 0))
    return *backward(*saved, gradients[0]), None


_over_negatives.defvjp(_save, _pull_back)


def _forward(
    settings: Settings,
    queries: Float[Array, "n H"],
    keys: Float[Array, "K n H"],
    learned: Learned,
    marks: tuple[AnchorMarks, KeyMarks],
) -> tuple[Any, ...]:
    n, (slices, devices) = queries.shape[0], settings.rings
    logits_of = learned.applied(settings.logits)
    anchors, share = in_tiles(settings, queries, keys, marks)
    tiles = anchors.numbers.shape
    zero = jnp.zeros(tiles, queries.dtype)
    counted = None if all(x is None for x in marks[0]) else zero
    running = _Running(jnp.full(tiles, masked(zero.dtype), zero.dtype), zero, zero, zero, zero, zero, counted)

    def meet(running: _Running, share: Share, turn: Turn) -> _Running:
        columns = numbers(owner(settings, turn), n, tiles)

        def anchors_tile(args: tuple[_Running, Anchors]) -> _Running:
            part, tile = args
            for kinds in alike(settings.own):

                def absorb(part: _Running, met: Met, kind: int = kinds.start) -> tuple[_Running, None]:
                    return _absorb(settings, logits_of, kind, part, tile, met), None

                part, _ = lax.scan(absorb, part, in_turn(share, columns, kinds))
            return part

        absorbed: _Running = lax.map(anchors_tile, (running, anchors))
        return absorbed

    def in_slice(running: _Running, share: Share, t: Int[Array, ""] | int) -> _Running:
        slice_met: _Running = tour(settings, devices, lambda met, share, u: meet(met, share, (t, u)), running, share)
        return slice_met

    running = tour(settings, slices, in_slice, running, share)
    some = running.total > 0
    total = jnp.where(some, running.total, 1)
    statistics = (
        running.maximum + jnp.log(total) if settings.reduction == "logsumexp" else running.softplus,
        jnp.log(total) - running.moment / total,
        running.similarity,
        running.potential,
        running.masked,
    )
    return tuple(None if x is None else uncut(x, 0, n) for x in statistics)


def _absorb(settings: Settings, logits_of: Logits, kind: int, part: _Running, anchors: Anchors, met: Met) -> _Running:
    """The running sums with one more tile."""
    keys, columns, marks = met
    cosine = similarities(anchors.vectors, keys)
    same = anchors.numbers[:, None] == columns[None, :]
    logits, negative, false = block_logits(cosine, same, anchors.marks, marks, logits_of, settings.own[kind])
    logits = jnp.where(negative, logits, masked(logits.dtype))
    maximum = jnp.maximum(part.maximum, jnp.max(logits, axis=1))
    shifted = logits - maximum[:, None]
    # Where nothing has been met yet the maximum is the mask itself.
    weights = jnp.where(negative, jnp.exp(shifted), 0)
    shrink = part.maximum - maximum
    scale = jnp.exp(shrink)
    similarity, potential, softplus = part.similarity, part.potential, part.softplus
    if settings.reduction == "softplus":
        softplus = softplus + jnp.sum(jax.nn.softplus(logits), axis=1)
    if kind == 0:
        others = negative if false is None else marks.valid[None, :] & ~same
        similarity = similarity + jnp.sum(jnp.where(others, cosine, 0), axis=1)
        potential = potential + jnp.sum(jnp.where(others, jnp.exp(4 * cosine - 4), 0), axis=1)
    return _Running(
        maximum,
        part.total * scale + jnp.sum(weights, axis=1),
        (part.moment + part.total * shrink) * scale + jnp.sum(weights * shifted, axis=1),
        similarity,
        potential,
        softplus,
        None if part.masked is None or false is None else part.masked + jnp.sum(false, axis=1),
    )


def _backward(
    settings: Settings,
    queries: Float[Array, "n H"],
    keys: Float[Array, "K n H"],
    learned: Learned,
    marks: tuple[AnchorMarks, KeyMarks],
    negatives: Float[Array, " n"],
    gradient: Float[Array, " n"],
) -> tuple[Float[Array, "n H"], Float[Array, "K n H"], Learned]:
    n, (slices, devices) = queries.shape[0], settings.rings
    logits_of = learned.applied(settings.logits)
    score, temperature = logits_of.score, logits_of.temperature
    anchors, share = in_tiles(settings, queries, keys, marks)
    tiles = anchors.numbers.shape
    tops, scales = cut(negatives, 0, settings.block), cut(gradient / temperature, 0, settings.block)
    # Summed over the pairs: g w f/τ for the temperature, g w/τ for the bias, w the weight of a logit.
    zeros = jax.tree.map(lambda x: jnp.zeros((), queries.dtype), learned)
    sums = jnp.zeros(anchors.vectors.shape, queries.dtype), zeros

    def meet(sums: tuple[Array, Learned], dk: Array, share: Share, turn: Turn) -> tuple[Any, Array]:
        """The sums with the visiting share; `dk` is that of the share."""
        columns = numbers(owner(settings, turn), n, tiles)

        def anchors_tile(carry: tuple[Array, Learned], args: tuple[Any, ...]) -> tuple[tuple[Array, Learned], Array]:
            dk, learned = carry
            dq_tile, tile, top, scale = args
            for kinds in alike(settings.own):

                def add(
                    carry: tuple[Array, Array, Learned],
                    met: tuple[tuple[Array, Array], Met],
                    own: float | None = settings.own[kinds.start],
                ) -> tuple[tuple[Array, Array, Learned], None]:
                    dq_tile, dk, learned = carry
                    index, (keys, columns, marks) = met
                    cosine = similarities(tile.vectors, keys)
                    same = tile.numbers[:, None] == columns[None, :]
                    logits, negative, _ = block_logits(cosine, same, tile.marks, marks, logits_of, own)
                    if settings.reduction == "logsumexp":
                        weights = jnp.exp(logits - top[:, None])
                    else:
                        weights = jax.nn.sigmoid(logits)
                    drawn = jnp.where(negative, weights * scale[:, None], 0)
                    if learned.temperature is not None:
                        learned = learned._replace(temperature=learned.temperature + jnp.sum(drawn * score(cosine)))
                    if learned.bias is not None:
                        learned = learned._replace(bias=learned.bias + jnp.sum(drawn))
                    if score is not identity or logits_of.tilt:
                        slope = jax.jvp(score, (cosine,), (jnp.ones_like(cosine),))[1]
                        weights = weights * (slope + logits_of.tilt * temperature if logits_of.tilt else slope)
                        drawn = jnp.where(negative, weights * scale[:, None], 0)
                    p = multiplied(settings, drawn)
                    dq_tile = dq_tile + similarities(p, keys.T)
                    return (dq_tile, dk.at[index].add(similarities(p.T, tile.vectors.T)), learned), None

                places = jnp.repeat(jnp.arange(kinds.start, kinds.stop), tiles[0])
                numbered = (places, jnp.tile(jnp.arange(tiles[0]), len(kinds))), in_turn(share, columns, kinds)
                (dq_tile, dk, learned), _ = lax.scan(add, (dq_tile, dk, learned), numbered)
            return (dk, learned), dq_tile

        dq, learned = sums
        (dk, learned), dq = lax.scan(anchors_tile, (dk, learned), (dq, anchors, tops, scales))
        return (dq, learned), dk

    empty = jnp.zeros(share.keys.shape, queries.dtype)

    def in_slice(sums: Any, share: Share, t: Int[Array, ""] | int) -> tuple[Any, Array]:
        """The sums with all shares of a slice, and the gradient of the share that is here by this slice's anchors."""
        size = settings.size(devices)
        if size == 1:
            return meet(sums, empty, share, (t, 0))

        def turn(u: Int[Array, ""], carry: tuple[Any, Array, Share]) -> tuple[Any, Array, Share]:
            sums, dk, share = carry
            # Neither waits for the products of this turn: dk, one device behind its keys, is added when it arrives.
            following, arrived = pass_on(settings, devices, share), pass_on(settings, devices, dk)
            sums, new = meet(sums, empty, share, (t, u))
            return sums, arrived + new, following

        sums, dk, share = lax.fori_loop(0, size - 1, turn, (sums, empty, share))
        arrived = pass_on(settings, devices, dk)
        sums, new = meet(sums, empty, share, (t, size - 1))
        return sums, pass_on(settings, devices, arrived + new)

    def over_slices(sums: Any, share: Share) -> tuple[Any, Array]:
        """The same with all slices. A gradient begins in the slice after its keys' own; its last pass leads home."""
        last = settings.size(slices) - 1
        following = pass_on(settings, slices, share) if last else share
        sums, own = in_slice(sums, share, 0)
        if not last:
            return sums, own
        share = following
        following = pass_on(settings, slices, share) if last > 1 else share
        sums, dk = in_slice(sums, share, 1)

        def turn(t: Int[Array, ""], carry: tuple[Any, Array, Share]) -> tuple[Any, Array, Share]:
            sums, dk, share = carry
            following, arrived = pass_on(settings, slices, share), pass_on(settings, slices, dk)
            sums, new = in_slice(sums, share, t)
            return sums, arrived + new, following

        if last > 1:
            sums, dk, share = lax.fori_loop(2, last, turn, (sums, dk, following))
            arrived = pass_on(settings, slices, dk)
            sums, new = in_slice(sums, share, last)
            dk = arrived + new
        return sums, own + pass_on(settings, slices, dk)

    sums, dk = over_slices(sums, share)
    dq, (of_temperature, of_bias) = sums
    slopes = Learned(
        None if of_temperature is None else -of_temperature / temperature,
        None if of_bias is None else of_bias * temperature,
    )
    if settings.size(settings.axes) > 1:
        slopes = jax.tree.map(lambda x: lax.psum(x, settings.axes), slopes)
    return uncut(dq, 0, n), uncut(dk, 1, n), slopes
