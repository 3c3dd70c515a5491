"""Search over many vectors on this machine: time, memory, and the recall of faiss's cells.

python -m benchmarks.search --vectors 1000000 --width 384 --backends jax faiss-flat faiss-ivf
python -m benchmarks.search --model MODEL --sentences wiki.txt.gz --vectors 100000 --backends jax faiss-ivf
"""

import resource
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from simcse_jax.config import Backend
from simcse_jax.data.corpus import read_sentences
from simcse_jax.inference.index import Index
from simcse_jax.inference.simcse import SimCSE

_WARM, _TIMED = 2, 10
_QUERIES = 1000  # held out, for recall


@dataclass(frozen=True)
class Settings:
    """The settings of the command."""

    vectors: int = 1_000_000
    """Vectors in the index."""
    width: int = 384
    """Width of random vectors."""
    backends: tuple[Backend, ...] = ("jax",)
    """Backends to compare, one after the other; recall is against exact search."""
    model: str = ""
    """Encode real sentences with this model instead of drawing random vectors."""
    sentences: Path = Path()
    """Text file of these sentences, one per line, for the index and for the queries."""


def main(settings: Settings) -> None:
    """Prints one line per backend."""
    if settings.model:
        lines = read_sentences(settings.sentences, settings.vectors + _QUERIES)
        vectors = np.asarray(SimCSE(settings.model).encode(lines, progress=True))
    else:
        vectors = np.random.default_rng(0).standard_normal((settings.vectors + _QUERIES, settings.width), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    queries, vectors = vectors[:_QUERIES], vectors[_QUERIES:]
    names = [str(i) for i in range(len(vectors))]
    exact = [{hit.index for hit in hits} for hits in Index(names, vectors).search(queries, 10)]
    for backend in settings.backends:
        start, before = time.perf_counter(), _resident()
        index = Index(names, vectors, backend)
        built, added = time.perf_counter() - start, _resident() - before
        found = index.search(queries, 10)
        recall = np.mean([len(a & {hit.index for hit in b}) / len(a) for a, b in zip(exact, found, strict=True)])
        times = [_time(index, queries[:batch]) for batch in (1, 64)]
        shown = "; ".join(
            f"{np.median(wall):.0f} ms ({min(wall):.0f} to {max(wall):.0f}), {np.median(cpu):.0f} ms of CPU time"
            for wall, cpu in times
        )
        print(
            f"{backend}: {len(vectors):,} x {vectors.shape[1]}; built in {built:.1f} s, {added / 1e9:.2f} GB; "
            f"batch 1 and 64: {shown}; recall@10 {recall:.4f}; peak {_peak() / 1e9:.1f} GB",
            flush=True,
        )
        del index


def _time(index: Index, queries: np.ndarray) -> tuple[list[float], list[float]]:
    """Milliseconds of each search of the whole batch, and of CPU time over all cores."""
    wall, cpu = [], []
    for _ in range(_WARM + _TIMED):
        start = time.perf_counter(), time.process_time()
        index.search(queries, 10)
        wall.append(1000 * (time.perf_counter() - start[0]))
        cpu.append(1000 * (time.process_time() - start[1]))
    return wall[_WARM:], cpu[_WARM:]


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(tyro.cli(Settings))
