"""Graded sentence pairs of the user's own, as tasks: files, and data sets of TFDS or of the hub."""

import math
from pathlib import Path
from typing import Any

from simcse_jax.config import DataConfig
from simcse_jax.data import tfds
from simcse_jax.data.corpus import open_source
from simcse_jax.data.files import FORMATS, find_columns
from simcse_jax.data.kinds import is_sentence
from simcse_jax.data.reading import format_of
from simcse_jax.data.rows import is_null
from simcse_jax.errors import InputError, plain
from simcse_jax.reports.progress import say

KINDS = "files of graded pairs (.tsv, .csv, .jsonl, .parquet), tfds:NAME/CONFIG, and data sets of the hub (owner/name)"
SPLITS = {"test": "test", "dev": "validation"}
"""The split of a data set, by mode."""


def is_pairs_file(name: str) -> bool:
    """Whether the name of a task is a file; such a task has no splits."""
    return not name.startswith(tfds.PREFIX) and format_of(Path(name)) in FORMATS


def is_pairs(name: str) -> bool:
    """Whether a task consists of graded pairs of the user's own."""
    return is_pairs_file(name) or name.startswith(tfds.PREFIX) or "/" in name


def title(name: str) -> str:
    """A task's name in a table; a file's, without folders and ending."""
    return Path(name).name.split(".")[0] if is_pairs_file(name) else name


def read_graded_pairs(name: str, mode: str) -> list[tuple[str, str, float]]:
    """The rows (sentence, sentence, score); those with a blank sentence are left out, which a line says.

    Args:
      name: a file, tfds:NAME/CONFIG, or a data set of the hub, with columns as in `_NAMES`; of tables in files, the
        delimiter is found.
      mode: in data sets, `dev` takes the split validation, `test` the split test.

    Raises:
      InputError: no such file or data set, other columns, a sentence that is no text, a score that is no number, no
        pair, or scores that are all the same in a data set, as in a test split whose scores are secret.
    """
    source, header, columns = find_columns(open_source(DataConfig(train=name, split=SPLITS[mode])), _find)
    if columns is None:
        there = "is plain text" if header is None else f"has {', '.join(header)[:200] or 'none'}"
        advice = "For pairs of a question and its answer, without scores, name both columns (evaluate --columns, or "
        advice += "evaluation.columns)"
        if any(map(is_sentence, header or ())):
            advice = "If that row is an example, put the row of names before it"
        raise InputError(
            f"{name} must have the columns sentence1, sentence2 and score (or label), which its first row names; it "
            f"{there}. {advice}"
        )
    pairs: list[tuple[str, str, float]] = []
    left_out = 0
    for where, number, values in source.rows(columns):
        first, second, grade = ("" if is_null(value) else value for value in values)
        if not isinstance(first, str) or not isinstance(second, str):
            raise InputError(f"{where} {number} has no text in column {columns[0]} or {columns[1]}")
        if not any(str(value).strip() for value in (first, second, grade)):  # a blank line, as at the end of a file
            continue
        if first.strip() and second.strip():
            pairs.append((first, second, _score(f"{where} {number}", columns[2], grade)))
        else:
            left_out += 1
    if left_out:
        say(f"{name}: {left_out:,} pairs with a blank sentence are left out")
    if not pairs:
        raise InputError(f"{name} holds no scored pair")
    if len({grade for _, _, grade in pairs}) < 2 and not is_pairs_file(name):
        found = f"the score of all its pairs is {pairs[0][2]:g}"
        raise InputError(f"{name}, split {SPLITS[mode]}: {found}; take another split")
    return pairs


def _score(where: str, column: str, grade: Any) -> float:
    try:
        score = float(grade)
    except (TypeError, ValueError, OverflowError):  # the last of a whole number that no float can hold
        raise InputError(f"{where} has a score that is no number, {str(grade)[:60]!r} in column {column}") from None
    if not math.isfinite(score):
        raise InputError(f"{where} has a score that is not finite: give each pair a number, or leave the pair out")
    return score


_NAMES = (
    (
        ("sentence1", "sentence2"),
        ("sentencea", "sentenceb"),
        ("sent1", "sent2"),
        ("text1", "text2"),
        ("texta", "textb"),
    ),
    ("score", "label", "similarityscore", "similarity", "relatednessscore"),
)
"""Names of the sentences' columns, and of the score's; capitals and signs such as _ do not matter."""


def _find(header: tuple[str, ...]) -> tuple[str, str, str] | None:
    """The columns of the sentences and the score; None where the header has none or has one of them twice."""
    names = [plain(name) for name in header]
    pair = next((pair for pair in _NAMES[0] if set(pair) <= set(names)), ())
    score = next((score for score in _NAMES[1] if score in names), None)
    if not pair or score is None or any(names.count(name) > 1 for name in (*pair, score)):
        return None
    first, second, third = (header[names.index(name)] for name in (*pair, score))
    return first, second, third
