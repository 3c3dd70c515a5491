"""Transfer tasks in SentEval's layout (Conneau & Kiela 2018): labelled sentences, and pairs of them.

MR, CR (sentiment), SUBJ (subjectivity) and MPQA (polarity) have one set of sentences, TREC (question types) and MRPC
(paraphrases) a train and a test split, SST2 (sentiment) and SICKEntailment a dev split as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from simcse_jax.errors import InputError
from simcse_jax.evaluation.probe import FOLDS, TransferMode
from simcse_jax.evaluation.text import fields, normal, read_lines
from simcse_jax.storage.objects import local_path

_Row = tuple[str, str | None, int]
"""A sentence, the other one of a pair, and the number of the label."""

_BINARY = {  # files of label 1, of label 0
    "MR": ("MR/rt-polarity.pos", "MR/rt-polarity.neg"),
    "CR": ("CR/custrev.pos", "CR/custrev.neg"),
    "SUBJ": ("SUBJ/subj.objective", "SUBJ/subj.subjective"),
    "MPQA": ("MPQA/mpqa.pos", "MPQA/mpqa.neg"),
}
_SPLITS = {
    "SST2": {s: f"SST/binary/sentiment-{s}" for s in ("train", "dev", "test")},
    "TREC": {"train": "TREC/train_5500.label", "test": "TREC/TREC_10.label"},
    "MRPC": {s: f"MRPC/msr_paraphrase_{s}.txt" for s in ("train", "test")},
    "SICKEntailment": {
        "train": "SICK/SICK_train.txt",
        "dev": "SICK/SICK_trial.txt",
        "test": "SICK/SICK_test_annotated.txt",
    },
}
_LABELS = {
    "SST2": ("0", "1"),
    "TREC": ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"),
    "MRPC": ("0", "1"),
    "SICKEntailment": ("CONTRADICTION", "NEUTRAL", "ENTAILMENT"),
}
TRANSFER_TASKS = ("MR", "CR", "SUBJ", "MPQA", "SST2", "TREC", "MRPC")
"""The seven tasks of the usual table, in its order."""
ALL_TRANSFER_TASKS = (*TRANSFER_TASKS, "SICKEntailment")
"""All tasks that can be evaluated."""


@dataclass(frozen=True)
class Split:
    """Sentences, or pairs of them, and their labels from 0 upwards, in the order in which folds are drawn."""

    first: list[str]
    second: list[str] | None
    labels: Int[np.ndarray, " N"]

    def features(self, vectors_of: Callable[[list[str]], Float[np.ndarray, "N H"]]) -> Float[np.ndarray, "N F"]:
        """The features of the classifier, float64: the vector u of a sentence, or [|u − v|, u · v] of a pair."""
        u = vectors_of(self.first).astype(np.float64)
        if self.second is None:
            return u
        v = vectors_of(self.second).astype(np.float64)
        return np.concatenate([np.abs(u - v), u * v], axis=1)


@dataclass(frozen=True)
class TransferTask:
    """A task as it will be scored.

    Attributes:
      name: one of `ALL_TRANSFER_TASKS`.
      splits: "train" alone (nested folds), with "test" (folds of train), or with "dev" and "test".
    """

    name: str
    splits: dict[str, Split]


def load_transfer_task(name: str, data: str | Path, mode: TransferMode = "test") -> TransferTask:
    """Reads a task.

    Args:
      name: one of `ALL_TRANSFER_TASKS`.
      data: folder in SentEval's layout, with MR/, CR/ ... inside.
      mode: sets the number of folds that each label must suffice for.

    Raises:
      InputError: missing or malformed file, unknown label, or a label with too few sentences.
    """
    if not str(data):
        raise InputError(
            f"task {name} needs SentEval's data: give the folder that holds MR/, CR/ ... (--data), or set SIMCSE_DATA"
        )
    root = local_path(data)
    read: dict[str, list[_Row]]
    if name in _BINARY:
        positive, negative = _BINARY[name]
        read = {"train": _read_binary(root / positive, root / negative)}
    else:
        read = {split: _READERS[name](root / file) for split, file in _SPLITS[name].items()}
    _check_labels(name, read["train"], folds=0 if "dev" in read else FOLDS[mode], nested=len(read) == 1)
    return TransferTask(name, {split: _split(rows) for split, rows in read.items()})


def sentences_of(tasks: list[TransferTask]) -> list[str]:
    """Each sentence of the tasks once, in order of appearance."""
    splits = [split for task in tasks for split in task.splits.values()]
    return list(dict.fromkeys(s for split in splits for s in (*split.first, *(split.second or []))))


def _split(rows: list[_Row]) -> Split:
    # SentEval orders by length in words, then by label, to save padding, and draws its folds over that order.
    rows = sorted(rows, key=lambda row: (*(len(s.split()) for s in row[:2] if s is not None), row[2]))
    second = [b for _, b, _ in rows if b is not None]
    return Split([a for a, _, _ in rows], second or None, np.array([label for *_, label in rows]))


def _check_labels(name: str, rows: list[_Row], folds: int, nested: bool) -> None:
    """Raises `InputError` if the training examples have too few of a label."""
    names = _LABELS.get(name, ("0", "1"))
    # The examples of a label that an outer fold leaves must suffice for the inner folds.
    least = folds + -(-folds // (folds - 1)) if nested else max(1, folds)
    counts = np.bincount([label for *_, label in rows], minlength=len(names))
    if counts.min() < least:
        raise InputError(
            f"{name} has {counts.min()} training examples of the label {names[int(counts.argmin())]}; "
            f"expected at least {least}" + (f" for {folds} folds" if folds else "")
        )


def _label(name: str, path: Path, number: int, label: str) -> int:
    if label not in _LABELS[name]:
        raise InputError(f"{path}, line {number} has the label {label!r}; expected one of {', '.join(_LABELS[name])}")
    return _LABELS[name].index(label)


def _read_binary(positive: Path, negative: Path) -> list[_Row]:
    # SentEval takes blank lines as sentences, too: CR and MPQA have some.
    return [
        (normal(line), None, n) for n, path in ((1, positive), (0, negative)) for line in read_lines(path, "latin-1")
    ]


def _read_sst(path: Path) -> list[_Row]:
    rows = [(n, fields(path, n, line.strip(), 2)) for n, line in enumerate(read_lines(path), 1)]
    return [(normal(row[0]), None, _label("SST2", path, n, row[1])) for n, row in rows]


def _read_trec(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    for number, line in enumerate(read_lines(path, "latin-1"), 1):
        kind, _, sentence = line.strip().partition(" ")
        label, colon, _ = kind.partition(":")
        if not colon or not sentence:
            raise InputError(f"{path}, line {number} must be LABEL:sublabel and a question; got {line[:60]!r}")
        rows.append((normal(sentence), None, _label("TREC", path, number, label)))
    return rows


def _read_mrpc(path: Path) -> list[_Row]:
    rows = [(n, fields(path, n, line.strip(), 5)) for n, line in enumerate(read_lines(path)[1:], 2)]
    return [(normal(row[3]), normal(row[4]), _label("MRPC", path, n, row[0])) for n, row in rows]


def _read_sick(path: Path) -> list[_Row]:
    rows = [(n, fields(path, n, line.strip(), 5)) for n, line in enumerate(read_lines(path)[1:], 2)]
    return [(normal(row[1]), normal(row[2]), _label("SICKEntailment", path, n, row[4])) for n, row in rows]


_READERS: dict[str, Callable[[Path], list[_Row]]] = {
    "SST2": _read_sst,
    "TREC": _read_trec,
    "MRPC": _read_mrpc,
    "SICKEntailment": _read_sick,
}
