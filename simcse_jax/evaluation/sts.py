"""Semantic textual similarity: SentEval's tasks, layout and protocol (Conneau & Kiela 2018), without its code.

A task is a list of subsets of sentence pairs with gold scores. A model is scored by the correlation of the
cosine of each pair's vectors with the gold score. STS12-16 are reported as Spearman over all subsets concatenated
(`all`), STS-B and SICK-R as Spearman on the test split.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from simcse_jax.errors import InputError, did_you_mean
from simcse_jax.evaluation.pairs import KINDS, is_pairs, read_graded_pairs, title
from simcse_jax.evaluation.tables import text_table
from simcse_jax.evaluation.text import fields, normal, read_lines
from simcse_jax.inference.vectors import moderate
from simcse_jax.reports.tables import formatted
from simcse_jax.storage.objects import local_path

Mode = Literal["test", "dev"]
EncodeFunction = Callable[[list[str]], Float[np.ndarray, "S H"]]

_SUBSETS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
_SPLITS = {
    "STSBenchmark": {s: f"STS/STSBenchmark/sts-{s}.csv" for s in ("train", "dev", "test")},
    "SICKRelatedness": {
        "train": "SICK/SICK_train.txt",
        "dev": "SICK/SICK_trial.txt",
        "test": "SICK/SICK_test_annotated.txt",
    },
}
STS_TASKS = (*_SUBSETS, *_SPLITS)
"""The seven tasks of the usual table, in its order."""
STS_DEV_TASKS = tuple(_SPLITS)
"""The tasks with a dev split."""
_OTHER_NAMES = {
    **dict.fromkeys(("sts", "stsb", "stsbspearman", "stsbenchmarkspearman"), "STSBenchmark"),
    **dict.fromkeys(("sick", "sickr", "sickrspearman"), "SICKRelatedness"),
    "sicke": "SICKEntailment",
    "sst": "SST2",
}
"""What GLUE, mteb and the SimCSE authors' code call tasks and their scores, as `did_you_mean` compares names."""


@dataclass(frozen=True)
class Subset:
    """Sentence pairs and their gold scores."""

    name: str
    first: list[str]
    second: list[str]
    gold: Float[np.ndarray, " P"]


@dataclass(frozen=True)
class Task:
    """A task as it will be scored.

    Attributes:
      name: one of `STS_TASKS`, or graded pairs of the user's own: a file, tfds:NAME/CONFIG, a data set of the hub.
      subsets: its sentence pairs.
      reported: the split whose Spearman is the task's figure, or "all" for all subsets concatenated.
    """

    name: str
    subsets: list[Subset]
    reported: str


def unknown_tasks(names: Iterable[str], known: Collection[str]) -> InputError:
    """The error for names that are not among those of `known`, with the ones that they may stand for."""
    guesses = "".join(
        f"unknown task '{name}': "
        f"{'separate names by spaces; ' if ',' in name else did_you_mean(name, known, _OTHER_NAMES)}"
        for name in names
    )
    return InputError(f"{guesses}known are {', '.join(known)}, {KINDS}")


def load_task(name: str | Path, data: str | Path, mode: Mode = "test", all_splits: bool = False) -> Task:
    """Reads a task.

    Args:
      name: one of `STS_TASKS`; or columns sentence1, sentence2 and score in a file, tfds:NAME/CONFIG or a data set of
        the hub.
      data: folder in SentEval's layout, with STS/ and SICK/ inside; for `STS_TASKS` alone.
      mode: the split to report; STS12-16 have a test split only, files have no splits.
      all_splits: also read the splits of STS-B and SICK-R that are not reported, as SentEval does.

    Raises:
      InputError: unknown task, missing or malformed file, or no dev split.
    """
    name = str(name)
    if is_pairs(name):
        first, second, gold = zip(*read_graded_pairs(name, mode), strict=True)
        return Task(name, [Subset("all", [*map(normal, first)], [*map(normal, second)], np.array(gold))], "all")
    if name not in STS_TASKS:
        raise unknown_tasks([name], STS_TASKS)
    if not str(data):
        raise InputError(
            f"task {name} needs SentEval's data: give the folder that holds STS/ and SICK/ (--data), or set SIMCSE_DATA"
            "; or name a .tsv file of graded pairs as the task"
        )
    root = local_path(data)
    if name in _SPLITS:
        wanted = list(_SPLITS[name]) if all_splits else [mode]
        read = _read_stsb if name == "STSBenchmark" else _read_sick
        return Task(name, [read(s, root / _SPLITS[name][s]) for s in wanted], mode)
    if mode != "test":
        raise InputError(f"{name} has no dev split: use --mode test, or the tasks {', '.join(_SPLITS)}")
    return Task(name, [_read_sts(s, root / "STS" / f"{name}-en-test") for s in _SUBSETS[name]], "all")


def _subset(name: str, path: Path | str, pairs: list[tuple[str, str, str]]) -> Subset:
    if not pairs:
        raise InputError(f"{path} holds no scored pair")
    try:
        gold = np.array([float(score) for _, _, score in pairs])
    except ValueError as error:
        raise InputError(f"{path} holds a score that is no number ({error})") from error
    if not np.isfinite(gold).all():
        raise InputError(f"{path} holds a score that is not finite: give each pair a number, or leave the pair out")
    return Subset(name, [normal(a) for a, _, _ in pairs], [normal(b) for _, b, _ in pairs], gold)


def _read_sts(name: str, folder: Path) -> Subset:
    path = folder / f"STS.input.{name}.txt"
    inputs, golds = read_lines(path), read_lines(folder / f"STS.gs.{name}.txt")
    if len(inputs) != len(golds):
        raise InputError(f"{path} has {len(inputs)} lines but its gold file has {len(golds)}")
    rows = [fields(path, number, line, 2) for number, line in enumerate(inputs, 1)]
    scored = [(row, gold) for row, gold in zip(rows, golds, strict=True) if gold.strip()]
    return _subset(name, path, [(row[0], row[1], gold) for row, gold in scored])


def _read_stsb(name: str, path: Path) -> Subset:
    rows = [fields(path, number, line, 7) for number, line in enumerate(read_lines(path), 1)]
    return _subset(name, path, [(row[5], row[6], row[4]) for row in rows])


def _read_sick(name: str, path: Path) -> Subset:
    rows = [fields(path, number, line, 4) for number, line in enumerate(read_lines(path)[1:], 2)]
    return _subset(name, path, [(row[1], row[2], row[3]) for row in rows])


def cosine(a: Float[np.ndarray, "P H"], b: Float[np.ndarray, "P H"]) -> Float[np.ndarray, " P"]:
    """Cosine of each pair of vectors, to six decimals; 0 where a vector is zero or not a number, as in SentEval.

    Pairs of the same sentence then tie at 1. SentEval leaves their order to float32 rounding, which moves the Spearman
    of a subset with many of them (65 of 459 in SMTeuroparl) by up to 0.1 from one machine or batch size to another.
    """
    a, b = moderate(a.astype(np.float64)), moderate(b.astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        similarity = np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    rounded: np.ndarray = np.round(np.nan_to_num(similarity, nan=0.0), 6)
    return rounded


def distinct_sentences(tasks: list[Task]) -> list[str]:
    """Each sentence of the tasks once, in order of appearance."""
    return list(dict.fromkeys(s for t in tasks for u in t.subsets for s in (*u.first, *u.second)))


def encode_once(sentences: list[str], encode: EncodeFunction) -> EncodeFunction:
    """Encodes distinct sentences, and returns a function that looks up their vectors."""
    vectors = encode(sentences)
    index = {sentence: i for i, sentence in enumerate(sentences)}
    return lambda asked: vectors[[index[sentence] for sentence in asked]]


def similarities(task: Task, encode: EncodeFunction) -> list[Float[np.ndarray, " _"]]:
    """The model's score of each pair, subset by subset."""
    return [cosine(encode(subset.first), encode(subset.second)) for subset in task.subsets]


def reported_pairs(task: Task, encode: EncodeFunction) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
    """The model's scores and the gold scores of the pairs behind the task's figure."""
    chosen = [u for u in task.subsets if task.reported in ("all", u.name)]
    system = similarities(Task(task.name, chosen, task.reported), encode)
    return np.concatenate(system), np.concatenate([u.gold for u in chosen])


def evaluate(tasks: list[Task], encode: EncodeFunction) -> dict[str, Any]:
    """Scores a model.

    Args:
      tasks: from `load_task`.
      encode: sentences to vectors; called once, with each distinct sentence of all tasks once.

    Returns:
      `{"tasks": {task: {subset: {"pearson", "spearman", "pairs"}, "all": {"pearson" | "spearman": {"all", "mean",
      "wmean"}}}}, "reported": {task: Spearman, "Avg.": their mean}}`; correlations × 100, wmean weighted by pairs.
      None stands for a correlation where one side is constant, and for a mean with such a one in it.
    """
    from scipy.stats import pearsonr, spearmanr

    vectors_of = encode_once(distinct_sentences(tasks), encode)

    def correlate(system: Float[np.ndarray, " P"], gold: Float[np.ndarray, " P"]) -> dict[str, float | None]:
        # A constant side has no correlation, and neither has a single pair.
        if np.ptp(system) == 0 or np.ptp(gold) == 0:
            return {"pearson": None, "spearman": None}
        return {
            "pearson": 100 * float(pearsonr(system, gold).statistic),
            "spearman": 100 * float(spearmanr(system, gold).statistic),
        }

    scores: dict[str, Any] = {}
    for task in tasks:
        system = similarities(task, vectors_of)
        parts = [correlate(s, u.gold) for s, u in zip(system, task.subsets, strict=True)]
        whole = correlate(np.concatenate(system), np.concatenate([u.gold for u in task.subsets]))
        weights = [len(u.gold) for u in task.subsets]
        result: dict[str, Any] = {
            u.name: {**part, "pairs": len(u.gold)} for u, part in zip(task.subsets, parts, strict=True)
        }
        result["all"] = {
            kind: {
                "all": whole[kind],
                "mean": mean_of_all([p[kind] for p in parts]),
                "wmean": mean_of_all([p[kind] for p in parts], weights),
            }
            for kind in ("pearson", "spearman")
        }
        scores[task.name] = result
    whole_or_split = {t.name: scores[t.name][t.reported]["spearman"] for t in tasks}
    reported = {name: s["all"] if isinstance(s, dict) else s for name, s in whole_or_split.items()}
    reported["Avg."] = mean_of_all(list(reported.values()))
    return {"tasks": scores, "reported": reported}


def mean_of_all(values: Sequence[float | None], weights: Sequence[int] | None = None) -> float | None:
    """The mean of figures; None where one of them is absent, or there is none."""
    known = [value for value in values if value is not None]
    return float(np.average(known, weights=weights)) if known and len(known) == len(values) else None


def format_table(rows: dict[str, dict[str, float | None]]) -> str:
    """Reported figures as a text table: one row per model or moment, one column per task."""
    columns = list(next(iter(rows.values())))
    headers = [title(c) for c in columns]
    return text_table(headers, {name: [formatted("{:.2f}", row[c]) for c in columns] for name, row in rows.items()})
