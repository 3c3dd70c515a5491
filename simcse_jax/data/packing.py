"""Packing: several sentences per row, so that less padding is computed.

First-fit decreasing (Johnson, 1973): the longest sentence first, each into the first row that has room. Every device
packs its own examples, each column of the text apart, into as many rows as the fullest batch of the run needs, so that
one compiled step serves all batches.
"""

import numpy as np
from jaxtyping import Int, Integer

from simcse_jax.data.batch import Packing


def first_fit(
    lengths: Int[np.ndarray, "G N"], length: int, slots: int
) -> tuple[Int[np.ndarray, "G N"], Int[np.ndarray, "G N"]]:
    """Packs groups of sentences, each group into rows of its own.

    Args:
      lengths: tokens of each sentence, at most `length`.
      length: tokens per row.
      slots: most sentences per row.

    Returns:
      The row of each sentence in its group, and its slot there: the number of sentences put into that row before it.
    """
    groups, n = lengths.shape
    # Two rows of first-fit are never both half empty, unless their slots have run out.
    most = min(n, 2 * int(lengths.sum(1).max(initial=0)) // length + n // slots + 2)
    room = np.full((groups, most), length)
    taken = np.zeros((groups, most), int)
    rows, places = np.zeros((2, groups, n), int)
    group = np.arange(groups)
    for sentence in np.argsort(-lengths, axis=1, kind="stable").T:
        wanted = lengths[group, sentence]
        row = np.argmax((room >= wanted[:, None]) & (taken < slots), axis=1)
        rows[group, sentence], places[group, sentence] = row, taken[group, row]
        room[group, row] -= wanted
        taken[group, row] += 1
    return rows, places


def pack(
    ids: Int[np.ndarray, "N C L"],
    lengths: Int[np.ndarray, "N C"],
    reserved: Int[np.ndarray, "N C"],
    packing: Packing,
    pad_id: int,
) -> tuple[Int[np.ndarray, "R C W"], Int[np.ndarray, "R C S"], Int[np.ndarray, "N C"]]:
    """Packs the sentences of one device.

    Args:
      ids: token ids, padded on the right.
      lengths: tokens of each sentence.
      reserved: room for each sentence, at least its length; it decides the row.
      packing: the shape.
      pad_id: token that fills up rows.

    Returns:
      The sentences in rows, their lengths there, and the place of each among the R·S.
    """
    _, columns, length = ids.shape
    rows, slots = (x.T for x in first_fit(reserved.T, packing.length, packing.slots))
    # The columns of a row are rows of their own.
    each = rows * columns + np.arange(columns)
    shape = (packing.rows * columns, packing.length, packing.slots)
    flat = ids[np.arange(length) < lengths[..., None]]
    packed, sizes = lay(flat, lengths.ravel(), each.ravel(), slots.ravel(), shape, pad_id)
    places = (rows * packing.slots + slots).astype(np.int32)
    return packed.reshape(-1, columns, packing.length), sizes.reshape(-1, columns, packing.slots), places


def lay(
    tokens: Integer[np.ndarray, " T"],
    lengths: Int[np.ndarray, " N"],
    rows: Int[np.ndarray, " N"],
    slots: Int[np.ndarray, " N"],
    shape: tuple[int, int, int],
    pad_id: int,
) -> tuple[Int[np.ndarray, "R W"], Int[np.ndarray, "R S"]]:
    """Lays sentences into rows.

    Args:
      tokens: token ids of all sentences, one after the other.
      lengths: tokens of each.
      rows, slots: the places from `first_fit`.
      shape: R, W and S.
      pad_id: token that fills up rows.

    Returns:
      Token ids, and the length of the sentence in each slot.
    """
    count, length, most = shape
    sizes = np.zeros((count, most), np.int32)
    sizes[rows, slots] = lengths
    starts = rows * length + (np.cumsum(sizes, axis=1) - sizes)[rows, slots]
    # The distance that each sentence moves, from its place among all tokens.
    moved = starts - (np.cumsum(lengths) - lengths)
    ids = np.full(count * length, pad_id, np.int32)
    ids[np.arange(len(tokens)) + np.repeat(moved, lengths)] = tokens
    return ids.reshape(count, length), sizes
