"""Batches in which no text occurs twice."""

import numpy as np
from jaxtyping import Bool, Int, UInt64

_AT_ONCE = 2**16
"""Examples that are looked at together."""


def distinct_batches(
    permutation: Int[np.ndarray, " n"], texts: UInt64[np.ndarray, "n C"], most: int
) -> tuple[Int[np.ndarray, " M"], Int[np.ndarray, " S"]]:
    """Cuts a permutation into batches without a text that occurs twice.

    Each example goes into the first batch that has room and none of its texts, and is left out where there is none.

    Args:
      permutation: the examples, in the order in which they are placed.
      texts: ids of the texts of each example, by its number.
      most: examples of a full batch.

    Returns:
      Places for the examples of all batches, `most` per batch; and the size of each batch.
    """
    made = _Batches(permutation, texts, most)
    for start in range(0, len(permutation), _AT_ONCE):
        made.add(permutation[start : start + _AT_ONCE])
    return made.examples.ravel(), np.array(made.sizes, np.int64)


class _Batches:
    """The batches of an epoch while they are filled.

    An example can only miss `first` by a text that occurs near to it in the permutation, or in a batch that is begun:
    such examples are placed one by one, and the others, which are most, in slices.
    """

    def __init__(self, permutation: Int[np.ndarray, " n"], texts: UInt64[np.ndarray, "n C"], most: int) -> None:
        steps = -(-len(permutation) // most)
        self.examples, self.sizes = np.zeros((steps, most), permutation.dtype), [0] * steps
        self._texts, self._most = texts, most
        self._first = 0
        """The first batch that is not full."""
        self._held: dict[int, set[int]] = {}
        """The texts of each batch that is begun and not full."""
        self._last: dict[int, int] = {}
        """The last batch that holds a text: of all texts in `_held`, and of some whose batches are full."""
        self._next: dict[int, int] = {}
        """A batch before which none has room for a text and lacks it: of the texts that were placed one by one."""
        self._pruned = 0
        """The size of `_last` after it was pruned."""

    def add(self, part: Int[np.ndarray, " m"]) -> None:
        """Places examples, in their order."""
        texts = self._texts[part]
        alone = self._apart(texts)
        first, size = self._first, self.sizes[self._first] if self._first < len(self.sizes) else 0
        done = 0
        for at in np.flatnonzero(~alone).tolist():
            self._fill(part[done:at])
            self._place(int(part[at]), texts[at].tolist())
            done = at + 1
        self._fill(part[done:])
        if self._first < len(self.sizes) and self.sizes[self._first]:  # of what was placed in slices, only this counts
            since = size if self._first == first else 0
            placed = self.examples[self._first, since : self.sizes[self._first]]
            own = self._texts[placed].ravel().tolist()
            self._held.setdefault(self._first, set()).update(own)
            for text in own:
                self._last[text] = max(self._last.get(text, 0), self._first)
        if len(self._last) > 2 * self._pruned + _AT_ONCE:
            self._last = {text: batch for text, batch in self._last.items() if batch >= self._first}
            self._next = {text: batch for text, batch in self._next.items() if text in self._last}
            self._pruned = len(self._last)

    def _apart(self, texts: UInt64[np.ndarray, "m C"]) -> Bool[np.ndarray, " m"]:
        """Which examples share no text with another of them or with a batch that is begun."""
        flat = texts.ravel()
        order = np.argsort(flat, kind="stable")
        rows, ordered = order // texts.shape[1], flat[order]
        same = (ordered[1:] == ordered[:-1]) & (rows[1:] != rows[:-1])
        shared = np.fromiter(map(self._last.__contains__, flat.tolist()), bool, len(flat)).reshape(texts.shape)
        apart: Bool[np.ndarray, " m"] = np.logical_not(shared.any(axis=1))
        apart[rows[1:][same]] = apart[rows[:-1][same]] = False
        return apart

    def _fill(self, examples: Int[np.ndarray, " m"]) -> None:
        done = 0
        while done < len(examples):
            batch, size = self._first, self.sizes[self._first]
            chosen = examples[done : done + self._most - size]
            done += len(chosen)
            self.sizes[batch] = size + len(chosen)
            self.examples[batch, size : self.sizes[batch]] = chosen
            self._advance(batch)

    def _place(self, example: int, own: list[int]) -> None:
        steps = len(self.sizes)
        batch = max(self._first, *(self._next.get(text, 0) for text in own))
        while batch < steps and not self._takes(batch, own):
            batch += 1
        if batch < steps:
            self.examples[batch, self.sizes[batch]] = example
            self.sizes[batch] += 1
            self._held.setdefault(batch, set()).update(own)
            for text in own:
                self._last[text] = max(self._last.get(text, 0), batch)
        for text in own:
            after = max(self._next.get(text, 0), self._first)
            while after < steps and not self._takes(after, [text]):
                after += 1
            if after > self._first:
                self._next[text] = after
        if batch < steps:
            self._advance(batch)

    def _takes(self, batch: int, own: list[int]) -> bool:
        held = self._held.get(batch)
        return self.sizes[batch] < self._most and (held is None or held.isdisjoint(own))

    def _advance(self, batch: int) -> None:
        """Forgets the texts of a batch that is full."""
        if self.sizes[batch] == self._most:
            self._held.pop(batch, None)
        while self._first < len(self.sizes) and self.sizes[self._first] == self._most:
            self._first += 1
