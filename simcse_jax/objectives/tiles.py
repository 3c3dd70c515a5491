"""The rows of each device, cut into tiles, and the rings in which they travel from device to device."""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from simcse_jax.objectives.pairs import AnchorMarks, KeyMarks, Logits, Reduction


class Settings(NamedTuple):
    """The arguments that are known at compile time."""

    logits: Logits
    """Without the parts that are learned."""
    own: tuple[float | None, ...]
    block: int
    mesh: Mesh | None
    rings: tuple[tuple[str, ...], tuple[str, ...]]
    """The axes of the ring of slices and those of the ring of devices inside each slice."""
    dtype: str | None
    reduction: Reduction

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes in the order in which they split the rows."""
        return self.rings[0] + self.rings[1]

    def size(self, ring: tuple[str, ...]) -> int:
        """Members of a ring."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in ring)


class Learned(NamedTuple):
    """The parts of the logits that have gradients; None where they are known at compile time."""

    temperature: Float[Array, ""] | None
    bias: Float[Array, ""] | None

    def applied(self, logits: Logits) -> Logits:
        """The logits with these parts."""
        return logits._replace(**{name: x for name, x in self._asdict().items() if x is not None})


class Share(NamedTuple):
    """The keys of one device, cut into tiles: axes K, T, B."""

    keys: Float[Array, "K T B H"]
    marks: KeyMarks


class Anchors(NamedTuple):
    """Anchors of one device, cut into tiles: axes T, B; or one tile of them."""

    vectors: Float[Array, "*T B H"]
    numbers: Int[Array, "*T B"]
    """In the global batch; −1 for padding."""
    marks: AnchorMarks


Met = tuple[Float[Array, "*T B H"], Int[Array, "*T B"], KeyMarks]
"""Keys of a tile, or of several, their numbers in the global batch, and their marks."""

Turn = tuple[Int[Array, ""] | int, Int[Array, ""] | int]
"""How often the share that is here has been passed on between slices, and then inside a slice."""


def on_devices(settings: Settings, function: Callable[..., Any], inputs: Any, outputs: Any) -> Callable[..., Any]:
    """`function` of each device's rows.

    Rows are axis 0 of the arrays in the trees marked 1 and axis 1 of those marked 2; those marked 0 are whole.
    """
    function = partial(function, settings)
    if settings.mesh is None:
        return function
    specs = PartitionSpec(), PartitionSpec(settings.axes), PartitionSpec(None, settings.axes)
    # Nothing here is differentiated by JAX, so there are no replication rules for it to check.
    return jax.shard_map(
        function,
        mesh=settings.mesh,
        in_specs=jax.tree.map(lambda i: specs[i], inputs),
        out_specs=jax.tree.map(lambda i: specs[i], outputs),
        check_vma=False,
    )


def cut(x: Array, axis: int, block: int) -> Array:
    """`axis` cut in two, tiles of at most `block` and equal size, the last filled up with zeros."""
    n = x.shape[axis]
    tiles = -(-n // block)
    side = -(-n // tiles)
    # Whole vector registers, unless that would be more than a tile.
    side = min(-(-side // 8) * 8, max(block, side))
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, tiles * side - n)
    return jnp.pad(x, padding).reshape(*x.shape[:axis], tiles, side, *x.shape[axis + 1 :])


def uncut(x: Array, axis: int, n: int) -> Array:
    joined = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return lax.slice_in_dim(joined, 0, n, axis=axis)


def alike(own: tuple[float | None, ...]) -> list[range]:
    """Kinds one after the other that are met in the same way, the first apart: compiled once each."""
    starts = [0, *(k for k in range(1, len(own)) if k == 1 or own[k] != own[k - 1])]
    return [range(*ends) for ends in pairwise([*starts, len(own)])]


def in_turn(share: Share, columns: Int[Array, "T B"], kinds: range) -> Met:
    """The tiles of some kinds, one after the other."""
    chosen = jax.tree.map(lambda x: x[kinds.start : kinds.stop].reshape(-1, *x.shape[2:]), share)
    return chosen.keys, jnp.tile(columns, (len(kinds), 1)), chosen.marks


def multiplied(settings: Settings, x: Array) -> Array:
    """`x` in the type in which it is multiplied."""
    return x if settings.dtype is None else x.astype(settings.dtype)


def numbers(device: Int[Array, ""] | int, n: int, tiles: tuple[int, ...]) -> Int[Array, "T B"]:
    """Global numbers of the rows of a device; −1 for the padding behind its `n` rows."""
    local = jnp.arange(tiles[0] * tiles[1]).reshape(tiles)
    return jnp.where(local < n, device * n + local, -1)


def place(ring: tuple[str, ...]) -> Int[Array, ""] | int:
    """The number of this device, or of its slice, in a ring."""
    return lax.axis_index(ring) if ring else 0


def owner(settings: Settings, turn: Turn) -> Int[Array, ""] | int:
    """The number of the device whose share is here."""
    slice_, device = ((place(ring) - t) % settings.size(ring) for ring, t in zip(settings.rings, turn, strict=True))
    return slice_ * settings.size(settings.rings[1]) + device


def pass_on(settings: Settings, ring: tuple[str, ...], x: Any) -> Any:
    """Sends `x` from every member of a ring to the next."""
    size = settings.size(ring)
    pairs = [(i, (i + 1) % size) for i in range(size)]
    return jax.tree.map(lambda leaf: lax.ppermute(leaf, ring, pairs), x)


def tour(
    settings: Settings, ring: tuple[str, ...], visit: Callable[[Any, Share, Any], Any], carry: Any, share: Share
) -> Any:
    """`carry` after a visit to the share of every member of a ring: `carry, share, turn -> carry`."""
    last = settings.size(ring) - 1

    def turn(t: Int[Array, ""], state: tuple[Any, Share]) -> tuple[Any, Share]:
        carry, share = state
        # Independent of the products of this turn, so that both can run at the same time.
        following = pass_on(settings, ring, share)
        return visit(carry, share, t), following

    if last:
        carry, share = lax.fori_loop(0, last, turn, (carry, share))
    return visit(carry, share, last)


def in_tiles(
    settings: Settings, queries: Array, keys: Array, marks: tuple[AnchorMarks, KeyMarks]
) -> tuple[Anchors, Share]:
    """The rows of this device in tiles."""
    n = queries.shape[0]
    anchors = multiplied(settings, cut(queries, 0, settings.block))
    anchor_marks = jax.tree.map(lambda x: cut(x, 0, settings.block), marks[0])
    key_marks = jax.tree.map(lambda x: cut(x, 1, settings.block), marks[1])
    share = Share(multiplied(settings, cut(keys, 1, settings.block)), key_marks)
    return Anchors(anchors, numbers(place(settings.axes), n, anchors.shape[:2]), anchor_marks), share
