"""Which sentences are negatives of which anchors, and how much they weigh (`NegativesConfig`)."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from simcse_jax.config import NegativesConfig
from simcse_jax.objectives.pairs import AnchorMarks, KeyMarks, masked
from simcse_jax.objectives.vectors import unit


class Marks(NamedTuple):
    """Facts of a batch's examples, besides their vectors, by row and sentence: anchor, positive, hard negatives.

    Each is None where nothing needs it. An axis of sentences may be of length 1 where a sentence is its own positive.
    """

    present: Bool[Array, "N V"] | None = None
    """Whether an example has this sentence; anchor and positive always."""
    texts: UInt32[Array, "N V 2"] | None = None
    """64-bit ids of the sentences' tokens, in two words each."""
    guide: Float[Array, "N V G"] | None = None
    """Vectors of the guide, any scale."""


class Earlier(NamedTuple):
    """Sentences of K earlier batches, each a negative of every anchor."""

    vectors: Float[Array, "K N H"]
    """Any scale."""
    valid: Bool[Array, "K N"]
    """Those that count."""
    texts: UInt32[Array, "K N T 2"] | None = None
    """Ids of the texts of their examples, as `Marks.texts` without hard negatives."""
    guide: Float[Array, "K N G"] | None = None
    """Their vectors of the guide."""


def groups_of(negatives: NegativesConfig, views: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The sets of negatives that are reduced together: the view of the anchors and those of their negatives.

    Views are the anchor, the positive, hard negatives and then earlier batches.
    """
    pairs = {
        "query_to_document": (0, tuple(range(1, views))),
        "query_to_query": (0, (0,)),
        "document_to_query": (1, (0,)),
        "document_to_document": (1, (1,)),
    }
    chosen = [pairs[name] for name in negatives.directions]
    if negatives.softmax == "direction":
        yield from chosen
        return
    for anchor in (0, 1):
        if kinds := [kind for side, group in chosen if side == anchor for kind in group]:
            yield anchor, tuple(kinds)


class Sides(NamedTuple):
    """The marks of a batch in the form that `Pairs` takes."""

    settings: NegativesConfig
    marks: Marks
    earlier: Earlier | None
    places: int
    """Number of views besides the anchor's that are of this batch."""
    valid: Bool[Array, " N"]
    positive: Float[Array, " N"]
    """Cosine of each pair."""

    def anchors(self, view: int) -> AnchorMarks:
        """Marks of the anchors of a view."""
        settings, guide = self.settings, self._guide
        limit = None
        if guide is not None:
            own = jnp.sum(guide[:, 0] * guide[:, min(1, guide.shape[1] - 1)], axis=-1)
            limit = _ceiling(own, settings.guide_margin, settings.guide_margin_kind)
        return AnchorMarks(
            None if self._texts is None else self._texts[:, :2],
            None if settings.margin is None else _ceiling(self.positive, settings.margin, settings.margin_kind),
            None if guide is None else guide[:, min(view, guide.shape[1] - 1)],
            limit,
        )

    def keys(self, kinds: tuple[int, ...]) -> KeyMarks:
        """Marks of the sentences of some views."""
        texts, guide = self._texts, self._guide
        return KeyMarks(
            jnp.stack([self._valid(kind) for kind in kinds]),
            None if texts is None else jnp.stack([self._texts_of(texts, kind) for kind in kinds]),
            None if guide is None else jnp.stack([self._guide_of(guide, kind) for kind in kinds]),
        )

    def candidates(self, kinds: tuple[int, ...]) -> Float[Array, " N"]:
        """Number of negatives of each anchor, before any is masked."""
        # As floats: above 65,536 rows, the sum over rows does not fit an int32.
        valid = jnp.stack([self._valid(kind) for kind in kinds]).astype(self.positive.dtype)
        return jnp.sum(valid) - sum(kind < 2 for kind in kinds) * self.valid

    def _valid(self, kind: int) -> Bool[Array, " N"]:
        if kind > self.places:
            assert self.earlier is not None
            return self.earlier.valid[kind - self.places - 1]
        present = self.marks.present
        return self.valid if present is None or kind < 2 else self.valid & present[:, kind]

    def _texts_of(self, texts: UInt32[Array, "N V 2"], kind: int) -> UInt32[Array, "N U 2"]:
        """Ids of a sentence of a view: both of its example, which tell what it means, or twice that of a hard
        negative."""
        own = texts[:, :2]
        if kind > self.places:
            if self.earlier is None or self.earlier.texts is None:
                raise ValueError("negatives.duplicates needs earlier.texts")
            return self.earlier.texts[kind - self.places - 1][:, :2]
        return own if kind < 2 else jnp.broadcast_to(texts[:, kind : kind + 1], own.shape)

    def _guide_of(self, guide: Float[Array, "N V G"], kind: int) -> Float[Array, "N G"]:
        if kind > self.places:
            if self.earlier is None or self.earlier.guide is None:
                raise ValueError("negatives.guide needs earlier.guide")
            return unit(self.earlier.guide[kind - self.places - 1])
        return guide[:, min(kind, guide.shape[1] - 1)]

    @property
    def _texts(self) -> UInt32[Array, "N V 2"] | None:
        if self.settings.duplicates and self.marks.texts is None:
            raise ValueError("negatives.duplicates needs marks.texts")
        return self.marks.texts if self.settings.duplicates else None

    @property
    def _guide(self) -> Float[Array, "N V G"] | None:
        if not self.settings.guide:
            return None
        if self.marks.guide is None:
            raise ValueError("negatives.guide needs marks.guide")
        return unit(self.marks.guide)


def _ceiling(positive: Float[Array, " N"], margin: float, kind: str) -> Float[Array, " N"]:
    """The cosine above which a negative is taken for a false one."""
    return jax.lax.stop_gradient(positive + margin * (1 if kind == "absolute" else jnp.abs(positive)))


def debiased(
    negatives: Float[Array, " N"],
    count: Float[Array, " N"],
    positive: Float[Array, " N"],
    temperature: float | Float[Array, ""],
    share: float,
) -> Float[Array, " N"]:
    """log M g, with g = max((mean_j exp S_ij − τ⁺ exp S_ii) / (1 − τ⁺), exp(−1/τ)) (arXiv 2007.00224, equation 8).

    Args:
      negatives: log Σ_j exp S_ij.
      count: M, the number of negatives.
      positive: S_ii.
      temperature: τ.
      share: τ⁺, the share of negatives that are of the anchor's own class.
    """
    some = count > 0
    size = jnp.log(jnp.where(some, count, 1))
    # exp n − exp e, from the ratio of the two.
    excess = math.log(share) + size + positive - negatives
    rest = excess < -jnp.finfo(excess.dtype).eps  # so that exp of it is below 1
    lower = jnp.where(rest, negatives + jnp.log1p(-jnp.exp(jnp.where(rest, excess, -1))), -jnp.inf)
    corrected = jnp.maximum(lower - math.log1p(-share), size - 1 / temperature)
    return jnp.where(some, corrected, masked(negatives.dtype))
