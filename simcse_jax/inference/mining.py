"""Hard negatives mined from a corpus: texts that a model finds near the sentence and that are not its positive.

For each example, the corpus is ranked by cosine with the sentence. Its own text and all positives that the examples
give the same sentence are left out; of the ranks asked for, those within a margin of the positive are taken for false
negatives (arXiv 2407.15831); of the rest, the nearest or some drawn at random become its hard negatives.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from simcse_jax.config import MiningConfig
from simcse_jax.config.mining import MOST_NEGATIVES
from simcse_jax.errors import InputError
from simcse_jax.inference.nearest import Faiss, Found, better
from simcse_jax.inference.shapes import power_of_two
from simcse_jax.inference.vectors import as_cosines, unit
from simcse_jax.reports.progress import progress_bar
from simcse_jax.runtime.mesh import batch_sharding, put_batch, replicated
from simcse_jax.runtime.processes import first_on_process_0
from simcse_jax.storage.files import new_file, writing
from simcse_jax.storage.manifest import Damage, read_sealed, write_sealed

_BLOCK = 65536  # vectors of a device scored at a time
_QUERIES = 256
_PART = 4096  # examples


@dataclass
class Counts:
    """What mining took, summed over examples."""

    examples: int = 0
    found: list[int] = field(default_factory=lambda: [0] * (MOST_NEGATIVES + 1))
    """Examples by their number of negatives."""
    near: int = 0
    """Candidates taken for false negatives: within a margin of the positive."""
    positive: float = 0.0
    """Sum of the positives' cosines."""
    negative: float = 0.0
    """Sum of the negatives' cosines."""

    def add(self, other: "Counts") -> None:
        """Adds the counts of other examples."""
        self.examples += other.examples
        self.found = [a + b for a, b in zip(self.found, other.found, strict=True)]
        self.near += other.near
        self.positive += other.positive
        self.negative += other.negative

    def report(self) -> dict[str, Any]:
        """The figures as JSON values; a mean of nothing is None."""
        negatives = sum(n * count for n, count in enumerate(self.found))
        return {
            "examples": self.examples,
            "with_negatives": {str(n): count for n, count in enumerate(self.found) if count},
            "too_near": self.near,
            "mean_positive_cosine": self.positive / self.examples if self.examples else None,
            "mean_negative_cosine": self.negative / negatives if negatives else None,
        }


def distinct_texts(corpus: Sequence[str]) -> list[str]:
    """The texts of a corpus in their order, without blank ones and repetitions."""
    return list(dict.fromkeys(text.strip() for text in corpus if text.strip()))


class Miner:
    """A corpus whose vectors are on the devices, and the positives of the examples."""

    def __init__(
        self,
        encode: Callable[[list[str]], Float[np.ndarray, "S D"]],
        corpus: Sequence[str],
        examples: Sequence[tuple[str, str]],
        config: MiningConfig,
        mesh: Mesh,
    ) -> None:
        """Encodes the corpus.

        Args:
          encode: gives the vectors of texts.
          corpus: the texts, see `distinct_texts`.
          examples: sentences and their positives.
          config: the settings.
          mesh: the devices that the corpus is split over.

        Raises:
          InputError: a corpus without text, or faiss is not installed.
        """
        self.texts = distinct_texts(corpus)
        if not self.texts:
            raise InputError("the corpus has no text to mine: give one text per line, or another column")
        self._encode, self._examples, self._config = encode, examples, config
        numbers = {text: n for n, text in enumerate(self.texts)}
        self._own: dict[str, set[int]] = defaultdict(set)
        for sentence, positive in examples:
            own = (numbers[text.strip()] for text in (sentence, positive) if text.strip() in numbers)
            self._own[sentence].update(own)
        vectors = unit(encode(self.texts))
        self._find: Callable[[Float[np.ndarray, "Q D"], int], Found]
        if config.backend == "jax":
            self._find = _sharded(vectors, mesh)
        else:
            index = Faiss(vectors.shape[1], vectors if config.backend == "faiss-ivf" else None)
            index.add(vectors)
            self._find = lambda queries, count: index.find(queries, count, cosines=True)

    def mine(self, start: int, stop: int, counts: Counts) -> Iterator[list[int]]:
        """The hard negatives of examples start..stop−1, in order, by their numbers in `texts`; adds to the counts."""
        part = self._examples[start:stop]
        queries, positives = (unit(self._encode([example[side] for example in part])) for side in (0, 1))
        limits = as_cosines(np.sum(queries * positives, axis=1))
        config = self._config
        wanted = config.last_rank + max(len(self._own[sentence]) for sentence, _ in part)
        scores, numbers = self._find(queries, min(wanted, len(self.texts)))
        for place, (sentence, _) in enumerate(part):
            own, limit = self._own[sentence], float(limits[place])
            ranked = [
                (number, score)
                for number, score in zip(numbers[place].tolist(), scores[place].tolist(), strict=True)
                if number >= 0 and number not in own
            ][config.first_rank : config.last_rank]
            most = min(limit - config.margin, limit - config.relative_margin * abs(limit))
            candidates = [found for found in ranked if found[1] < most]
            if config.choose == "random" and len(candidates) > config.negatives:
                generator = np.random.default_rng((config.seed, start + place))
                chosen = np.sort(generator.choice(len(candidates), config.negatives, replace=False))
                candidates = [candidates[n] for n in chosen]
            taken = candidates[: config.negatives]
            counts.examples += 1
            counts.near += sum(score >= most for _, score in ranked)
            counts.found[len(taken)] += 1
            counts.positive += limit
            counts.negative += sum(score for _, score in taken)
            yield [number for number, _ in taken]


def _sharded(vectors: Float[np.ndarray, "N D"], mesh: Mesh) -> Callable[[Float[np.ndarray, "Q D"], int], Found]:
    """A search of vectors that are split over all devices: each finds its best, and these are merged.

    Among equal cosines, the vector of the lower number comes first.
    """
    total, devices = len(vectors), mesh.size
    share = -(-total // devices)
    # Few blocks of equal size per device; what fills them up is never found.
    block = min(_BLOCK, max(8, power_of_two(share)))
    share = -(-share // block) * block

    def load(rows: slice) -> Float[np.ndarray, "n D"]:
        start, stop, _ = rows.indices(share * devices)
        part = np.zeros((stop - start, vectors.shape[1]), np.float32)
        mine = vectors[start : min(stop, total)]
        part[: len(mine)] = mine
        return part

    corpus = put_batch(mesh, share * devices, load)

    def search(queries: Float[Array, "Q D"], corpus: Float[Array, "n D"], count: int) -> tuple[Array, Array]:
        first = jax.lax.axis_index(mesh.axis_names) * share
        best = jnp.full((len(queries), count), -jnp.inf), jnp.full((len(queries), count), -1, jnp.int32)

        def meet(best: tuple[Array, Array], place: Int[Array, ""]) -> tuple[tuple[Array, Array], None]:
            part = jax.lax.dynamic_slice_in_dim(corpus, place * block, block)
            met: tuple[Array, Array] = better(queries, part, *best, first + place * block, total, True)
            return met, None

        best, _ = jax.lax.scan(meet, best, jnp.arange(share // block))
        # [devices, Q, count] to [Q, devices · count], the devices in the order of their numbers.
        every = (jnp.moveaxis(jax.lax.all_gather(x, mesh.axis_names), 0, 1) for x in best)
        scores, numbers = (x.reshape(len(queries), -1) for x in every)
        scores, places = jax.lax.top_k(scores, count)
        return scores, jnp.take_along_axis(numbers, places, axis=1)

    rows, whole = batch_sharding(mesh).spec, replicated(mesh).spec

    def find(queries: Float[np.ndarray, "Q D"], count: int) -> Found:
        wide = min(max(8, power_of_two(count)), share * devices)
        mapped = jax.shard_map(
            partial(search, count=wide), mesh=mesh, in_specs=(whole, rows), out_specs=whole, check_vma=False
        )
        program = compiled.setdefault(wide, jax.jit(mapped))
        results = []
        for start in range(0, len(queries), _QUERIES):
            part = np.zeros((_QUERIES, queries.shape[1]), np.float32)
            given = queries[start : start + _QUERIES]
            part[: len(given)] = given
            results.append([np.asarray(x)[: len(given), :count] for x in program(part, corpus)])
        scores, numbers = (np.concatenate(x) for x in zip(*results, strict=True))
        return scores, numbers

    compiled: dict[int, Any] = {}
    return find


def mine_to_file(
    output: Path,
    corpus: Sequence[str],
    examples: Sequence[tuple[str, str]],
    make_miner: Callable[[], Miner],
    identity: dict[str, Any],
) -> dict[str, Any]:
    """Mines all examples and writes them with their hard negatives, in every process of a job alike.

    Each part of the examples is kept in the folder `OUTPUT.parts` until all are done, so that another call goes on.

    Args:
      output: the .jsonl or .parquet file, with the columns sentence, positive, negative_1 and so on; a negative that an
        example lacks is null.
      corpus, examples: those of the miner.
      make_miner: makes the miner; called if something is left to mine.
      identity: what the result follows from, as JSON values; parts that followed from something else are an error.

    Returns:
      `Counts.report` over all examples, in process 0.

    Raises:
      InputError: the parts are of another model, text or settings; or a file cannot be written.
    """
    parts = output.with_name(f"{output.name}.parts")
    starts = range(0, len(examples), _PART)
    files = {start: parts / f"{start}.json" for start in starts}
    left = first_on_process_0(lambda: _left(parts, files, identity))
    miner = make_miner() if left else None
    with progress_bar(len(examples), "examples", "mining", shown=jax.process_index() == 0) as bar:
        bar.update(len(examples) - sum(min(_PART, len(examples) - start) for start in left))
        for start in left:
            assert miner is not None
            counts, stop = Counts(), min(start + _PART, len(examples))
            negatives = list(miner.mine(start, stop, counts))
            if jax.process_index() == 0:
                with writing(output):
                    write_sealed(files[start], {"counts": asdict(counts), "negatives": negatives})
            bar.update(stop - start)
    total = first_on_process_0(lambda: _join(output, distinct_texts(corpus), examples, list(files.values())))
    if jax.process_index() == 0:
        shutil.rmtree(parts)
    return total.report()


def _left(parts: Path, files: dict[int, Path], identity: dict[str, Any]) -> list[int]:
    """The first examples of the parts that are not there yet; makes the folder."""
    about = parts / "about.json"
    if jax.process_index() == 0 and not about.exists():
        with writing(about):
            parts.mkdir(exist_ok=True)
            write_sealed(about, identity)
    try:
        if read_sealed(about) != json.loads(json.dumps(identity)):
            raise InputError(
                f"{parts} holds parts of a call with another model, text or settings: give those again, or remove the "
                "folder"
            )
    except Damage as damage:
        raise InputError(f"{about} is damaged ({damage}): remove the folder {parts}") from damage
    return [start for start, file in files.items() if not _is_whole(file)]


def _is_whole(file: Path) -> bool:
    try:
        read_sealed(file)
    except Damage:
        return False
    return True


def _join(output: Path, texts: list[str], examples: Sequence[tuple[str, str]], files: list[Path]) -> Counts:
    """Process 0 writes the examples with the negatives of all parts, and gets the counts over all."""
    total = Counts()
    found: list[list[int]] = []
    if jax.process_index() != 0:
        return total
    for file in files:
        part = read_sealed(file)
        total.add(Counts(**part["counts"]))
        found += part["negatives"]
    columns = max(map(len, found), default=0)
    names = ("sentence", "positive", *(f"negative_{n + 1}" for n in range(columns)))
    rows = []
    for example, numbers in zip(examples, found, strict=True):
        negatives = [*(texts[n] for n in numbers), *[None] * (columns - len(numbers))]
        rows.append(dict(zip(names, (*example, *negatives), strict=True)))
    with writing(output), new_file(output) as partial:
        if output.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), partial)
        else:
            with partial.open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return total
