"""The statistics of all pairs without the matrix of logits: in tiles on each device, in a ring over devices.

In the forward pass, every device keeps its own anchors and meets the keys of all devices, a visiting share at a time,
in square tiles; of a tile's logits only running sums are kept (Milakov & Gimelshein, arXiv 1805.02867, for the
log-sum-exp). In the backward pass, the logits are computed again tile by tile, and the saved log-sum-exp n_i normalises
them. With g_i the gradient of the loss with respect to n_i and P_i,kj = g_i exp(S_i,kj − n_i) f'(c_i,kj)/τ,

    dq_i = Σ_kj P_i,kj k_kj,    dk_kj = Σ_i P_i,kj q_i;

the sum dk travels round the ring with its keys. Memory: the rows of one device and a few tiles (cf. Inf-CL, arXiv
2410.17243).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from simcse_jax.objectives.pairs import PairStatistics, Reduction, Score, block_logits, identity, masked, similarities


class _Settings(NamedTuple):
    """The arguments that are known at compile time."""

    temperature: float
    own: tuple[float | None, ...]
    block: int
    mesh: Mesh | None
    axes: tuple[str, ...]
    dtype: str | None
    score: Score
    reduction: Reduction

    @property
    def devices(self) -> int:
        """Devices in the ring."""
        return 1 if self.mesh is None else self.mesh.size


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


class _Share(NamedTuple):
    """The keys of one device, cut into tiles."""

    keys: Float[Array, "K T B H"]
    valid: Bool[Array, "T B"]


_Met = tuple[Float[Array, "B H"], Int[Array, " B"], Bool[Array, " B"]]
"""A tile's keys, their numbers in the global batch, and whether they count."""


def tiled(
    queries: Float[Array, "N H"],
    keys: Float[Array, "K N H"],
    valid: Bool[Array, " N"],
    *,
    temperature: float,
    own: tuple[float, ...],
    score: Score = identity,
    reduction: Reduction = "logsumexp",
    block: int = 1024,
    mesh: Mesh | None = None,
    axes: tuple[str, ...] = (),
    dtype: str | None = None,
) -> PairStatistics:
    """The statistics, tile by tile. See `Pairs`.

    Args:
      queries, keys, valid, temperature, own, score, reduction: see `Pairs`.
      block: largest side of a tile.
      mesh: the rows are split over all its devices; None for a single device.
      axes: the axes of `mesh` in the order in which they split the rows.
      dtype: type to which queries, keys and probabilities are rounded before they are multiplied ("bfloat16"); sums
        stay float32. None does not round.
    """
    settings = _Settings(temperature, (None, *own), block, mesh, axes, dtype, score, reduction)
    return PairStatistics(*_over_negatives(settings, queries, keys, valid))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_negatives(
    settings: _Settings, queries: Float[Array, "N H"], keys: Float[Array, "K N H"], valid: Bool[Array, " N"]
) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, " N"], Float[Array, " N"]]:
    """`negatives`, `entropy`, `similarity` and `potential` of `PairStatistics`."""
    statistics: tuple[Array, Array, Array, Array]
    statistics = _on_devices(settings, _forward, (1, 2, 1), (1, 1, 1, 1))(queries, keys, valid)
    return statistics


def _save(
    settings: _Settings, queries: Array, keys: Array, valid: Array
) -> tuple[tuple[Array, Array, Array, Array], tuple[Array, ...]]:
    statistics = _over_negatives(settings, queries, keys, valid)
    return statistics, (queries, keys, valid, statistics[0])


def _pull_back(
    settings: _Settings, saved: tuple[Array, ...], gradients: tuple[Array, ...]
) -> tuple[Array, Array, None]:
    # The other statistics are constants to the gradient.
    dq, dk = _on_devices(settings, _backward, (1, 2, 1, 1, 1), (1, 2))(*saved, gradients[0])
    return dq, dk, None


_over_negatives.defvjp(_save, _pull_back)


def _on_devices(
    settings: _Settings, function: Callable[..., Any], inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> Callable[..., Any]:
    """`function` of each device's rows. Rows are axis 0 of the arrays marked 1 and axis 1 of those marked 2."""
    function = partial(function, settings)
    if settings.mesh is None:
        return function
    specs = {1: PartitionSpec(settings.axes), 2: PartitionSpec(None, settings.axes)}
    # Nothing here is differentiated by JAX, so there are no replication rules for it to check.
    return jax.shard_map(
        function,
        mesh=settings.mesh,
        in_specs=tuple(specs[i] for i in inputs),
        out_specs=tuple(specs[i] for i in outputs),
        check_vma=False,
    )


def _cut(x: Array, axis: int, block: int) -> Array:
    """`axis` cut in two, tiles of at most `block` and equal size, the last filled up with zeros."""
    n = x.shape[axis]
    tiles = -(-n // block)
    side = -(-n // tiles)
    # Whole vector registers, unless that would be more than a tile.
    side = min(-(-side // 8) * 8, max(block, side))
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, tiles * side - n)
    return jnp.pad(x, padding).reshape(*x.shape[:axis], tiles, side, *x.shape[axis + 1 :])


def _uncut(x: Array, axis: int, n: int) -> Array:
    joined = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(joined, 0, n, axis=axis)


def _multiplied(settings: _Settings, x: Array) -> Array:
    """`x` in the type in which it is multiplied."""
    return x if settings.dtype is None else x.astype(settings.dtype)


def _numbers(device: Int[Array, ""] | int, n: int, tiles: tuple[int, ...]) -> Int[Array, "T B"]:
    """Global numbers of the rows of a device; −1 for the padding behind its `n` rows."""
    local = jnp.arange(tiles[0] * tiles[1]).reshape(tiles)
    return jnp.where(local < n, device * n + local, -1)


def _me(settings: _Settings) -> Int[Array, ""] | int:
    return 0 if settings.mesh is None else lax.axis_index(settings.axes)


def _pass_on(settings: _Settings, x: Any) -> Any:
    """Sends `x` from every device to the next in the ring."""
    size = settings.devices
    ring = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, settings.axes, ring), x)


def _forward(
    settings: _Settings, queries: Float[Array, "n H"], keys: Float[Array, "K n H"], valid: Bool[Array, " n"]
) -> tuple[Array, ...]:
    n, me, ring = queries.shape[0], _me(settings), settings.devices
    anchors = _multiplied(settings, _cut(queries, 0, settings.block))
    share = _Share(_multiplied(settings, _cut(keys, 1, settings.block)), _cut(valid, 0, settings.block))
    tiles = share.valid.shape
    rows = _numbers(me, n, tiles)
    zero = jnp.zeros(tiles, queries.dtype)
    running = _Running(jnp.full(tiles, masked(zero.dtype), zero.dtype), zero, zero, zero, zero, zero)

    def meet(running: _Running, share: _Share, turn: Int[Array, ""] | int) -> _Running:
        columns = _numbers((me - turn) % ring, n, tiles)

        def anchors_tile(args: tuple[_Running, Array, Array]) -> _Running:
            part, tile, tile_rows = args
            for kind, own in enumerate(settings.own):

                def absorb(part: _Running, met: _Met, own: float | None = own) -> tuple[_Running, None]:
                    return _absorb(settings, part, tile, tile_rows, *met, own), None

                part, _ = lax.scan(absorb, part, (share.keys[kind], columns, share.valid))
            return part

        absorbed: _Running = lax.map(anchors_tile, (running, anchors, rows))
        return absorbed

    def turn(t: Int[Array, ""], carry: tuple[_Running, _Share]) -> tuple[_Running, _Share]:
        running, share = carry
        # Independent of the products of this turn, so that both can run at the same time.
        following = _pass_on(settings, share)
        return meet(running, share, t), following

    if ring > 1:
        running, share = lax.fori_loop(0, ring - 1, turn, (running, share))
    running = meet(running, share, ring - 1)
    some = running.total > 0
    total = jnp.where(some, running.total, 1)
    statistics = (
        running.maximum + jnp.log(total) if settings.reduction == "logsumexp" else running.softplus,
        jnp.log(total) - running.moment / total,
        running.similarity,
        running.potential,
    )
    return tuple(_uncut(x, 0, n) for x in statistics)


def _absorb(
    settings: _Settings,
    part: _Running,
    queries: Float[Array, "A H"],
    rows: Int[Array, " A"],
    keys: Float[Array, "B H"],
    columns: Int[Array, " B"],
    valid: Bool[Array, " B"],
    own: float | None,
) -> _Running:
    """The running sums with one more tile."""
    cosine = similarities(queries, keys)
    same = rows[:, None] == columns[None, :]
    logits, negative = block_logits(cosine, same, valid, settings.temperature, own, settings.score)
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
    if own is None:
        similarity = similarity + jnp.sum(jnp.where(negative, cosine, 0), axis=1)
        potential = potential + jnp.sum(jnp.where(negative, jnp.exp(4 * cosine - 4), 0), axis=1)
    return _Running(
        maximum,
        part.total * scale + jnp.sum(weights, axis=1),
        (part.moment + part.total * shrink) * scale + jnp.sum(weights * shifted, axis=1),
        similarity,
        potential,
        softplus,
    )


def _backward(
    settings: _Settings,
    queries: Float[Array, "n H"],
    keys: Float[Array, "K n H"],
    valid: Bool[Array, " n"],
    negatives: Float[Array, " n"],
    gradient: Float[Array, " n"],
) -> tuple[Float[Array, "n H"], Float[Array, "K n H"]]:
    n, me, ring = queries.shape[0], _me(settings), settings.devices
    anchors = _multiplied(settings, _cut(queries, 0, settings.block))
    share = _Share(_multiplied(settings, _cut(keys, 1, settings.block)), _cut(valid, 0, settings.block))
    tiles = share.valid.shape
    rows = _numbers(me, n, tiles)
    tops, scales = _cut(negatives, 0, settings.block), _cut(gradient / settings.temperature, 0, settings.block)
    dq = jnp.zeros(anchors.shape, queries.dtype)

    def meet(dq: Array, dk: Array, share: _Share, turn: Int[Array, ""] | int) -> tuple[Array, Array]:
        """The sums with the visiting share; `dk` is that of the share."""
        columns = _numbers((me - turn) % ring, n, tiles)

        def anchors_tile(dk: Array, args: tuple[Array, ...]) -> tuple[Array, Array]:
            dq_tile, tile, tile_rows, top, scale = args
            for kind, own in enumerate(settings.own):

                def add(
                    carry: tuple[Array, Array], met: tuple[Array, *_Met], kind: int = kind, own: float | None = own
                ) -> tuple[tuple[Array, Array], None]:
                    dq_tile, dk = carry
                    index, keys, columns, valid = met
                    cosine = similarities(tile, keys)
                    same = tile_rows[:, None] == columns[None, :]
                    logits, negative = block_logits(cosine, same, valid, settings.temperature, own, settings.score)
                    if settings.reduction == "logsumexp":
                        weights = jnp.exp(logits - top[:, None])
                    else:
                        weights = jax.nn.sigmoid(logits)
                    if settings.score is not identity:
                        weights = weights * jax.jvp(settings.score, (cosine,), (jnp.ones_like(cosine),))[1]
                    p = _multiplied(settings, jnp.where(negative, weights * scale[:, None], 0))
                    dq_tile = dq_tile + similarities(p, keys.T)
                    return (dq_tile, dk.at[kind, index].add(similarities(p.T, tile.T))), None

                numbered = (jnp.arange(tiles[0]), share.keys[kind], columns, share.valid)
                (dq_tile, dk), _ = lax.scan(add, (dq_tile, dk), numbered)
            return dk, dq_tile

        dk, dq = lax.scan(anchors_tile, dk, (dq, anchors, rows, tops, scales))
        return dq, dk

    empty = jnp.zeros(share.keys.shape, queries.dtype)
    if ring == 1:
        dq, dk = meet(dq, empty, share, 0)
    else:

        def turn(t: Int[Array, ""], carry: tuple[Array, Array, _Share]) -> tuple[Array, Array, _Share]:
            dq, dk, share = carry
            # Neither waits for the products of this turn: dk, one device behind its keys, is added when it arrives.
            following, arrived = _pass_on(settings, share), _pass_on(settings, dk)
            dq, new = meet(dq, empty, share, t)
            return dq, arrived + new, following

        dq, dk, share = lax.fori_loop(0, ring - 1, turn, (dq, empty, share))
        arrived = _pass_on(settings, dk)
        dq, new = meet(dq, empty, share, ring - 1)
        dk = _pass_on(settings, arrived + new)
    return _uncut(dq, 0, n), _uncut(dk, 1, n)
