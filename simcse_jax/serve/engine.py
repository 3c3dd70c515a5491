"""The work of the worker thread: the vectors of all jobs in one pass, and their hits in one search."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from simcse_jax.inference.index import Hit, Index
from simcse_jax.inference.simcse import SimCSE
from simcse_jax.inference.vectors import unit

_FEW_HITS = 16  # enough for most requests


@dataclass(frozen=True)
class Job:
    """A request: sentences to encode, and perhaps to search for."""

    sentences: list[str]
    normalize: bool = True
    top_k: int = 0
    """Hits to find per sentence; 0: the vectors are the answer."""
    threshold: float | None = None
    """Least score of a hit; any where None."""


@dataclass(frozen=True)
class Answer:
    """The sentences' vectors, [S, D], and their hits."""

    vectors: Float[np.ndarray, "S D"]
    hits: list[list[Hit]]
    cut: frozenset[str] = frozenset()
    """Those among the sentences and hits that are longer than the model takes: only their beginning counts."""


class Engine:
    """A model and, perhaps, an index, called with jobs."""

    def __init__(self, model: SimCSE, index: Index | None, max_hits: int, batch: int) -> None:
        """Keeps model and index; compiles nothing yet.

        Args:
          model: the model; the index holds its vectors.
          index: the index to search; None: jobs without a search only.
          max_hits: most hits per query.
          batch: most sentences in a usual call.
        """
        self.model, self.index = model, index
        self._max_hits, self._batch = max_hits, batch

    def warm_up(self) -> None:
        """Compiles the programs that jobs will need."""
        self.model.warm_up()
        if self.index is not None:
            for hits in {_FEW_HITS, self._max_hits}:
                count = 1
                while count < 2 * self._batch:
                    self._search(np.zeros((count, self.index.width), np.float32), hits)
                    count *= 2

    def __call__(self, jobs: Sequence[Job]) -> list[Answer]:
        """The answers, in the jobs' order; a sentence of several jobs is encoded once.

        Raises:
          RuntimeError: the model gave too few vectors, or numbers that are not finite.
        """
        places = {sentence: place for place, sentence in enumerate(dict.fromkeys(s for j in jobs for s in j.sentences))}
        raw = np.asarray(self.model.encode(list(places), normalize=False))
        if raw.shape != (len(places), self.model.width):
            raise RuntimeError(f"vectors of shape {raw.shape} for {len(places)} sentences")
        if not np.isfinite(raw).all():
            raise RuntimeError("a vector is not finite")
        scaled = unit(raw)
        asked = list(dict.fromkeys(places[s] for job in jobs if job.top_k for s in job.sentences))
        most = max(job.top_k for job in jobs)
        found = dict(zip(asked, self._search(scaled[asked], most), strict=True)) if asked else {}
        texts = list({*places, *(hit.sentence for row in found.values() for hit in row[:most])})
        cut = frozenset(text for text, is_cut in zip(texts, self.model.are_cut(texts), strict=True) if is_cut)
        answers = []
        for job in jobs:
            chosen = [places[sentence] for sentence in job.sentences]
            nearest = [found[place][: job.top_k] for place in chosen] if job.top_k else []
            least = -np.inf if job.threshold is None else job.threshold
            hits = [[hit for hit in row if hit.score >= least] for row in nearest]
            answers.append(Answer((scaled if job.normalize else raw)[chosen], hits, cut))
        return answers

    def _search(self, queries: Float[np.ndarray, "Q D"], hits: int) -> list[list[Hit]]:
        # Two numbers of hits, and no more queries than `warm_up` had: nothing is left to compile.
        assert self.index is not None
        count = _FEW_HITS if hits <= _FEW_HITS else self._max_hits
        starts = range(0, len(queries), self._batch)
        return [row for i in starts for row in self.index.search(queries[i : i + self._batch], top_k=count)]
