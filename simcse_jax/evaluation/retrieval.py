"""Retrieval: whether search finds the answers of a question, from pairs of a question and its answer without scores.

A task's questions are the distinct texts of the first column, and its corpus the distinct texts of the second. A
question may have several answers, and several questions may share one. Texts are equal if their words are. The corpus
is ranked by cosine, to six decimals; **among equal cosines, the answers come last**, so that a model that gives all
texts the same vector scores 0. With R answers of a question and h_i = 1 where rank i holds one of them:

    recall@k = Σ_{i≤k} h_i / R        MRR@10 = 1 / (least i ≤ 10 with h_i = 1), or 0
    nDCG@10 = Σ_{i≤10} h_i / log₂(i + 1)  /  Σ_{i≤min(R, 10)} 1 / log₂(i + 1)

each averaged over the questions, as in trec_eval and BEIR, which break ties otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from simcse_jax.config import DataConfig, RetrievalMetric
from simcse_jax.data.corpus import open_source
from simcse_jax.data.files import Files
from simcse_jax.data.kinds import fault, is_sentence, place
from simcse_jax.data.rows import check_columns, is_null
from simcse_jax.errors import InputError
from simcse_jax.evaluation.geometry import alignment, uniformity
from simcse_jax.evaluation.pairs import SPLITS, is_pairs
from simcse_jax.evaluation.sts import EncodeFunction
from simcse_jax.evaluation.text import normal
from simcse_jax.inference.nearest import Exact
from simcse_jax.inference.vectors import unit
from simcse_jax.reports.progress import progress_bar

METRICS: tuple[RetrievalMetric, ...] = get_args(RetrievalMetric)
_DEPTH = 10  # ranks that count
_BLOCK = 4096  # questions, or texts of the corpus, whose vectors are scaled at a time
_SAMPLE = 2000  # pairs for the geometry, which takes quadratic time


@dataclass(frozen=True)
class RetrievalTask:
    """Questions, the corpus to search, and which of its texts answer which question."""

    name: str
    """A file, tfds:NAME/CONFIG, or a data set of the hub."""
    columns: tuple[str, str]
    questions: list[str]
    corpus: list[str]
    answers: Int[np.ndarray, "P 2"]
    """The number of a question and of one of its answers: each pair once, in the order of the file."""
    blank: int
    """Rows left out because a text was blank."""

    @property
    def sentences(self) -> list[str]:
        """Each text of the task once."""
        return list(dict.fromkeys([*self.questions, *self.corpus]))

    def describe(self) -> str:
        """The columns' roles, with an example of each, and the sizes."""
        question, answer = (f"{text[:40]}…" if len(text) > 40 else text for text in (self.questions[0], self.corpus[0]))
        notes = f", {self.blank:,} rows with a blank left out" if self.blank else ""
        if any(map(is_sentence, self.columns)):
            notes += (
                "; NOTE: the first row is taken for the columns' names, and looks like sentences: if it is an example, "
                "put a row 'question', 'answer' before it"
            )
        return (
            f"retrieval, question ← {self.columns[0]}: {question!r}, answer ← {self.columns[1]}: {answer!r}; "
            f"{len(self.questions):,} questions, {len(self.corpus):,} answers{notes}"
        )


def load_retrieval(name: str, mode: str = "test", columns: Sequence[str] = ()) -> RetrievalTask | None:
    """Reads a task of questions and answers; None where `name` is another kind of task.

    Args:
      name: a file, tfds:NAME/CONFIG, or a data set of the hub, of two columns or with those that `columns` names; of
        tables in files, the delimiter is found.
      mode: in data sets, `dev` takes the split validation, `test` the split test.
      columns: the columns of the question and of its answer, of a task that has them.

    Raises:
      InputError: a file that cannot be read, a column that is no text, columns that are not named and do not look like
        questions and answers, or fewer than two different answers.
    """
    if len(columns) not in (0, 2):
        raise InputError(
            f"columns of retrieval are {', '.join(columns)}: name two, of the question and of its answer, or none "
            "(evaluate --columns, or evaluation.columns)"
        )
    if not is_pairs(name):
        return None

    def pick(header: tuple[str, ...]) -> tuple[str, ...] | None:
        named = tuple(columns) if columns and set(columns) <= set(header) else None
        return named or (header if len(header) == 2 else None)

    source = open_source(DataConfig(train=name, split=SPLITS[mode]))
    if isinstance(source, Files) and (columns or source.layout):
        source = source.divided_for(pick)
    header = source.header() or ()
    if (picked := pick(header)) is None:
        return None
    if columns:
        check_columns(name, header, tuple(columns))
    if twice := next((column for column in picked if header.count(column) > 1), None):
        raise InputError(f"{name} has two columns {twice!r}: give each a name of its own")
    pairs: list[tuple[str, str]] = []
    blank = 0
    for where, number, values in source.rows(picked):
        question, answer = ("" if is_null(value) else value for value in values)
        if not isinstance(question, str) or not isinstance(answer, str):
            raise InputError(f"{where} {number} has no text in column {picked[0]} or {picked[1]}")
        question, answer = normal(question), normal(answer)
        if question and answer:
            pairs.append((question, answer))
        else:
            blank += bool(question or answer)
    if not columns and (why := _doubt(picked, pairs)):
        raise InputError(
            f"{name} has two columns and no score, as questions and answers do, but {why}: name the columns of the "
            "question and of its answer (evaluate --columns, or evaluation.columns), or give other pairs"
        )
    numbers: tuple[dict[str, int], dict[str, int]] = {}, {}
    found = dict.fromkeys(
        tuple(ids.setdefault(text, len(ids)) for ids, text in zip(numbers, pair, strict=True)) for pair in pairs
    )
    if len(numbers[1]) < 2:
        raise InputError(f"{name} has {len(numbers[1])} different answers: retrieval needs two or more to choose from")
    columns = (picked[0], picked[1])
    return RetrievalTask(name, columns, list(numbers[0]), list(numbers[1]), np.array(list(found), np.int64), blank)


def check_used(columns: Sequence[str], tasks: Sequence[RetrievalTask]) -> None:
    """Raises `InputError` for columns that are named where none of the tasks has them."""
    if columns and not tasks:
        raise InputError(
            f"columns names {' and '.join(columns)}, which none of the tasks has: give a file that has both, or leave "
            "them out (columns of graded pairs go by their names)"
        )


def check_metric(task: RetrievalTask, metric: RetrievalMetric) -> None:
    """Raises `InputError` for a metric that is 100 whatever the model: recall among as many texts as count."""
    depth = int(metric.partition("@")[2])
    if metric.startswith("recall") and len(task.corpus) <= depth:
        raise InputError(
            f"{task.name} has {len(task.corpus)} different answers, so {metric} is 100 for every model: take another "
            "metric, or a larger file"
        )


def retrieve(task: RetrievalTask, vectors_of: EncodeFunction) -> dict[str, float]:
    """All `METRICS` × 100, by name.

    Args:
      task: from `load_retrieval`.
      vectors_of: texts to vectors at any scale, see `sts.encode_once`; a vector that is not finite counts as zero.
    """
    total = len(task.corpus)
    numbers = task.answers[np.lexsort((task.answers[:, 1], task.answers[:, 0]))]
    keys = numbers[:, 0] * total + numbers[:, 1]
    counts = np.bincount(numbers[:, 0])
    nearest: Exact | None = None
    for start in range(0, total, _BLOCK):
        vectors = _unit(vectors_of(task.corpus[start : start + _BLOCK]))
        nearest = Exact(vectors.shape[1]) if nearest is None else nearest
        nearest.add(vectors)
    assert nearest is not None
    sums: dict[str, float] = dict.fromkeys(METRICS, 0.0)
    order = np.argsort(counts, kind="stable")  # questions of as many answers together: these decide the depth
    with progress_bar(len(order), "questions", "searching", shown=len(order) > _BLOCK) as bar:
        for start in range(0, len(order), _BLOCK):
            chosen = order[start : start + _BLOCK]
            # Where equal cosines go on behind this depth, ten other texts stand before every answer among them.
            depth = min(_DEPTH + int(counts[chosen].max()), total)
            cosines, found = nearest.find(_unit(vectors_of([task.questions[i] for i in chosen])), depth)
            hits = np.isin(chosen[:, None] * total + found, keys)
            places = np.lexsort((hits, -np.round(cosines.astype(np.float64), 6)), axis=1)
            for name, value in _figures(np.take_along_axis(hits, places, axis=1), counts[chosen]).items():
                sums[name] += float(np.sum(value))
            bar.update(len(chosen))
    return {name: 100 * value / len(order) for name, value in sums.items()}


def _figures(hits: Bool[np.ndarray, "Q K"], counts: Int[np.ndarray, " Q"]) -> dict[str, Float[np.ndarray, " Q"]]:
    """Each metric of each question, from the ranks that hold answers and the number of answers."""
    hits = hits[:, :_DEPTH]
    discounts = 1 / np.log2(np.arange(2, _DEPTH + 2))
    ideal = np.cumsum(discounts)[np.minimum(counts, _DEPTH) - 1]
    return {
        "ndcg@10": hits @ discounts[: hits.shape[1]] / ideal,
        "mrr@10": np.max(hits / np.arange(1, hits.shape[1] + 1), axis=1),
        **{f"recall@{k}": np.sum(hits[:, :k], axis=1) / counts for k in (1, 5, 10)},
    }


def answer_geometry(task: RetrievalTask, vectors_of: EncodeFunction) -> dict[str, float | None]:
    """Alignment of questions and their answers, and uniformity of the answers: of the first 2,000 pairs."""
    first, second = task.answers[:_SAMPLE].T
    vectors = vectors_of([task.corpus[i] for i in second])
    return {
        "alignment": alignment(vectors_of([task.questions[i] for i in first]), vectors),
        "uniformity": uniformity(vectors[np.unique(second, return_index=True)[1]]),
    }


def _unit(vectors: Float[np.ndarray, "S H"]) -> Float[np.ndarray, "S H"]:
    finite = np.isfinite(vectors).all(axis=1, keepdims=True)
    return unit(np.where(finite, vectors, 0))


def _doubt(columns: tuple[str, ...], pairs: list[tuple[str, str]]) -> str:
    """What speaks against taking two columns for questions and answers in their order; empty where nothing does."""
    for column, values in zip(columns, zip(*pairs, strict=True), strict=False):
        if why := fault(column, list(values), alone=False):
            return f"column {column or repr(column)} {why}"
    if place(columns[0]) != 0 and place(columns[1]) == 0:
        return f"column {columns[0]} comes first"
    return ""
