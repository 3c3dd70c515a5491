"""Search for the vectors with the largest inner products: exactly in JAX, or with faiss."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from simcse_jax.errors import InputError
from simcse_jax.inference.shapes import power_of_two
from simcse_jax.inference.vectors import as_cosines

# Vectors and queries scored at a time: no larger matrix of scores exists up to 32,768 hits per query. Both are padded
# to powers of two, so that a few compiled programs serve every number of vectors and queries.
_BLOCK = 65536
_LEAST = 256
_QUERIES = 64
_GROUP = 64  # vectors per group of a block; the groups' best scores are compared first

Found = tuple[Float[np.ndarray, "Q K"], Int[np.ndarray, "Q K"]]
"""Scores, the largest first, and the vectors' numbers; -inf and -1 where fewer than K were found."""


class Nearest(Protocol):
    """Float32 vectors of one width, numbered in the order in which they were added."""

    def add(self, vectors: Float[np.ndarray, "N D"]) -> None:
        """Appends vectors, copied."""

    def find(self, queries: Float[np.ndarray, "Q D"], count: int, cosines: bool = False) -> Found:
        """The `count` largest inner products with each query; by `as_cosines` where all vectors have length 1."""

    def vectors(self, start: int, end: int) -> Float[np.ndarray, "N D"]:
        """The vectors of these numbers, copied."""


class Exact:
    """All inner products, in JAX, on its first device; among equal ones, the vector added first comes first."""

    def __init__(self, width: int) -> None:
        """Starts without vectors."""
        self._width = width
        self._count = 0
        self._blocks: list[Float[Array, "B D"]] = []  # all but the last are full

    def add(self, vectors: Float[np.ndarray, "N D"]) -> None:
        """Appends vectors, copied."""
        # Only the last block may have room; only it is made anew.
        full, held = divmod(self._count, _BLOCK)
        last = self.vectors(full * _BLOCK, self._count)
        del self._blocks[full:]
        for start in range(-held, len(vectors), _BLOCK):
            part = vectors[max(start, 0) : start + _BLOCK]
            before = held if start < 0 else 0
            rows = before + len(part)
            block = np.zeros((max(_LEAST, power_of_two(rows)), self._width), np.float32)
            block[:before] = last[:before]
            block[before:rows] = part
            self._blocks.append(jax.device_put(block))
        self._count += len(vectors)

    def find(self, queries: Float[np.ndarray, "Q D"], count: int, cosines: bool = False) -> Found:
        """The `count` largest inner products with each query, in float32."""
        wide = max(8, power_of_two(count))
        results = []
        for start in range(0, len(queries), _QUERIES):
            part = queries[start : start + _QUERIES]
            rows = power_of_two(len(part))
            asked = np.zeros((rows, self._width), np.float32)
            asked[: len(part)] = part
            best = jnp.full((rows, wide), -jnp.inf, jnp.float32), jnp.full((rows, wide), -1, jnp.int32)
            for number, block in enumerate(self._blocks):
                best = better(jnp.asarray(asked), block, *best, number * _BLOCK, self._count, cosines)
            results.append([np.asarray(x)[: len(part), :count] for x in best])
        scores, numbers = (np.concatenate(x) for x in zip(*results, strict=True))
        return scores, numbers

    def vectors(self, start: int, end: int) -> Float[np.ndarray, "N D"]:
        """The vectors of these numbers, copied."""
        parts = [np.zeros((0, self._width), np.float32)]
        for number in range(start // _BLOCK, -(-end // _BLOCK)):
            first = number * _BLOCK
            parts.append(np.asarray(self._blocks[number][max(start - first, 0) : min(end - first, _BLOCK)]))
        joined: Float[np.ndarray, "N D"] = np.concatenate(parts)
        return joined


@jax.jit
def better(
    queries: Float[Array, "Q D"],
    block: Float[Array, "B D"],
    scores: Float[Array, "Q K"],
    numbers: Int[Array, "Q K"],
    first: Int[Array, ""] | int,
    total: Int[Array, ""] | int,
    cosines: Bool[Array, ""] | bool,
) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """The best K so far, merged with one block; its vectors are numbered from `first`, below `total`."""
    size = block.shape[0]
    products = jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)
    # Before the choice, so that of several copies of a query the first come first.
    products = jnp.where(cosines, as_cosines(products), products)
    products = jnp.where(jnp.arange(size)[None] < total - first, products, -jnp.inf)
    found, places = _top_k(products, min(size, scores.shape[1]))
    # top_k takes the first of equals, and the vectors found before have the lower numbers.
    scores, chosen = jax.lax.top_k(jnp.concatenate([scores, found], axis=1), scores.shape[1])
    numbers = jnp.take_along_axis(jnp.concatenate([numbers, places + first], axis=1), chosen, axis=1)
    return scores, jnp.where(jnp.isneginf(scores), -1, numbers)


def _top_k(scores: Float[Array, "Q B"], count: int) -> tuple[Float[Array, "Q K"], Int[Array, "Q K"]]:
    """`jax.lax.top_k` of long rows, in a fraction of the time on CPUs: the same values and places.

    The K largest lie in the K groups with the largest maxima. That holds for ties as well: of equal maxima, top_k takes
    the first groups, and the groups taken are looked through in their order.
    """
    queries, size = scores.shape
    if count * 4 > size // _GROUP:
        return tuple(jax.lax.top_k(scores, count))  # type: ignore[return-value]
    groups = scores.reshape(queries, size // _GROUP, _GROUP)
    chosen = jnp.sort(jax.lax.top_k(groups.max(axis=2), count)[1], axis=1)
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(queries, count * _GROUP)
    found, places = jax.lax.top_k(candidates, count)
    return found, jnp.take_along_axis(chosen, places // _GROUP, axis=1) * _GROUP + places % _GROUP


def import_faiss() -> Any:
    """The package faiss; raises `InputError` if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "this backend needs the package faiss-cpu: pip install 'simcse-jax[search]', or use the backend jax"
        ) from error
    return faiss


_NUMBER, _CENTRES = 37, 98  # places in `Faiss.cells`: of the number of cells, and of the centres behind their number


def _probed(cells: int) -> int:
    return -(-cells // 8)


def _centres(cells: np.ndarray, width: int) -> Float[np.ndarray, "C D"]:
    """The centres in `Faiss.cells`: an IndexIVFFlat without vectors, as faiss writes it.

    They are read by their places, because faiss takes memory for whatever sizes a file names.

    Raises:
      ValueError: something else, of another width, damaged.
    """
    data = cells.tobytes()
    number, held = (int.from_bytes(data[start : start + 8], "little") for start in (_NUMBER, _CENTRES - 8))
    if cells.dtype != np.uint8 or data[:8] != b"IwFl" + width.to_bytes(4, "little") or any(data[8:16]):
        raise ValueError(f"cells that are no IndexIVFFlat of width {width} without vectors")
    if not number or held != number * width or len(data) < _CENTRES + 4 * held:
        raise ValueError(f"{number:,} cells of width {width} in {len(data):,} bytes")
    centres: Float[np.ndarray, "C D"] = np.frombuffer(data, "<f4", held, _CENTRES).reshape(number, width)
    if not np.isfinite(centres).all():
        raise ValueError("cells whose centres are not finite")
    return centres


class Faiss:
    """Search with faiss, on the CPU: all inner products, or those with the vectors of the nearest cells.

    Cells are learnt by k-means from the vectors that the index begins with: about √N of them, N/39 below N = 1,521. A
    query searches the nearest eighth of them (IndexIVFFlat).
    """

    def __init__(self, width: int, sample: Float[np.ndarray, "N D"] | None = None, cells: Any = None) -> None:
        """Starts without vectors.

        Args:
          width: D.
          sample: vectors to learn cells from; exact where None.
          cells: the `cells` of another, in place of a sample.

        Raises:
          InputError: faiss is not installed, or there is no vector to learn from.
          ValueError: `cells` are damaged, or of another width.
        """
        faiss = import_faiss()
        self.cells: Any = cells
        if cells is not None:
            centres = _centres(cells, width)
            quantizer = faiss.IndexFlatIP(width)
            quantizer.add(centres)
            self._index = faiss.IndexIVFFlat(quantizer, width, len(centres), faiss.METRIC_INNER_PRODUCT)
            self._index.train(centres)  # which it need not be, as the centres are there
            self._index.nprobe = _probed(len(centres))
        elif sample is None:
            self._index = faiss.IndexFlatIP(width)
        elif not len(sample):
            raise InputError("the backend faiss-ivf learns its cells from sentences: give some, or use another backend")
        else:
            # faiss warns below 39 vectors per cell.
            number = max(1, min(round(len(sample) ** 0.5), len(sample) // 39))
            self._index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, number, faiss.METRIC_INNER_PRODUCT)
            self._index.nprobe = _probed(number)
            self._index.train(np.ascontiguousarray(sample, np.float32))
            self.cells = faiss.serialize_index(self._index)

    def add(self, vectors: Float[np.ndarray, "N D"]) -> None:
        """Appends vectors, copied."""
        self._index.add(np.ascontiguousarray(vectors, np.float32))

    def find(self, queries: Float[np.ndarray, "Q D"], count: int, cosines: bool = False) -> Found:
        """The `count` largest inner products with each query, among the cells searched."""
        scores, numbers = self._index.search(np.ascontiguousarray(queries, np.float32), count)
        scores = as_cosines(scores) if cosines else scores
        return np.where(numbers < 0, -np.inf, scores).astype(np.float32), numbers

    def vectors(self, start: int, end: int) -> Float[np.ndarray, "N D"]:
        """The vectors of these numbers, copied."""
        copied: Float[np.ndarray, "N D"] = self._index.reconstruct_n(start, end - start)
        return copied
