"""The measures of a model's vectors."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from simcse_jax.evaluation.geometry import (
    alignment,
    average_cosine,
    effective_rank,
    gold_groups,
    gold_range,
    indexed_pairs,
    iso_score,
    isotropy,
    positive_pairs,
    singular_values,
    uniformity,
)
from simcse_jax.evaluation.sts import Task, cosine, distinct_sentences, evaluate

MEASURES = {
    "score": ("Spearman × 100", 2),
    "sts": ("average of tasks", 2),
    "alignment": ("alignment", 3),
    "uniformity": ("uniformity", 3),
    "average_cosine": ("average cosine", 3),
    "isotropy": ("I(W)", 3),
    "iso_score": ("IsoScore", 3),
    "effective_rank": ("effective rank", 1),
    "contrast": ("cosine, top − bottom group", 3),
}
"""The measures: label, and number of digits shown."""


@dataclass(frozen=True)
class Measured:
    """The measures of a model, or of a checkpoint.

    Attributes:
      name: name of the model.
      label: the name, with the step of a checkpoint.
      step: step of the checkpoint with these parameters; None if the model is no run.
      about: pooler, width and post-processor.
      figures: a figure for each of `MEASURES` that was measured.
      scores: Spearman × 100 of each task besides the analysed one, and their average as "Avg.".
      spectrum: `singular_values` of the distinct sentences.
      cosines: cosines of the pairs.
    """

    name: str
    label: str
    step: int | None
    about: dict[str, Any]
    figures: dict[str, float]
    scores: dict[str, float]
    spectrum: Float[np.ndarray, " R"]
    cosines: Float[np.ndarray, " P"]


@dataclass(frozen=True)
class GradedPairs:
    """The pairs to analyse, in five groups by gold score.

    Attributes:
      task: their task.
      gold: the gold scores.
      group: fifth of the scale, 0 to 4, of each pair.
      labels: label of each group: its range of gold scores, and its number of pairs.
    """

    task: Task
    gold: Float[np.ndarray, " P"]
    group: Int[np.ndarray, " P"]
    labels: list[str]


def pairs_of(task: Task) -> GradedPairs:
    """The pairs of a task."""
    gold = np.concatenate([subset.gold for subset in task.subsets])
    group, (low, high) = gold_groups(gold), gold_range(gold)
    edges = low + (high - low) * np.arange(6) / 5
    counts = np.bincount(group, minlength=5)
    labels = [f"{a:g} to {b:g} (n = {n:,})" for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    return GradedPairs(task, gold, group, labels)


def measure(
    pairs: GradedPairs, tasks: list[Task], vectors: Mapping[str, Float[np.ndarray, " H"]]
) -> tuple[dict[str, float], dict[str, float], Float[np.ndarray, " R"], Float[np.ndarray, " P"]]:
    """The `figures`, `scores`, `spectrum` and `cosines` of `Measured`.

    Args:
      pairs: the pairs to analyse.
      tasks: tasks to score besides.
      vectors: vectors of every sentence of both.
    """

    def encode(sentences: list[str]) -> Float[np.ndarray, "S H"]:
        return np.stack([vectors[sentence] for sentence in sentences])

    x = encode(distinct_sentences([pairs.task]))
    first, second, gold = indexed_pairs(pairs.task)
    positive = positive_pairs(gold)
    cosines, spectrum = cosine(x[first], x[second]), singular_values(x)
    groups = [float(np.mean(cosines[pairs.group == g])) for g in range(5) if np.any(pairs.group == g)]
    scores = evaluate(tasks, encode)["reported"] if tasks else {}
    figures: dict[str, float | None] = {
        "score": evaluate([pairs.task], encode)["reported"][pairs.task.name],
        **({"sts": scores["Avg."]} if tasks else {}),
        "alignment": alignment(x[first[positive]], x[second[positive]]),
        "uniformity": uniformity(x),
        "average_cosine": average_cosine(x),
        "isotropy": isotropy(x),
        "iso_score": iso_score(x),
        "effective_rank": effective_rank(spectrum),
        "contrast": groups[-1] - groups[0] if len(groups) > 1 else None,
    }
    return _present(figures), _present(scores), spectrum, cosines


def _present(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: figure for name, figure in figures.items() if figure is not None}
