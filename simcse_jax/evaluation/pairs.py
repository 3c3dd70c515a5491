"""Graded sentence pairs of the user's own, as tasks: files, and data sets of TFDS or of the hub."""

from pathlib import Path

from simcse_jax.config import DataConfig
from simcse_jax.data import tfds
from simcse_jax.data.corpus import open_source
from simcse_jax.data.files import FORMATS, format_of
from simcse_jax.data.rows import text_of
from simcse_jax.errors import InputError

KINDS = "files of graded pairs (.tsv, .csv, .jsonl, .parquet), tfds:NAME/CONFIG, and data sets of the hub (owner/name)"
_SPLITS = {"test": "test", "dev": "validation"}


def is_pairs_file(name: str) -> bool:
    """Whether the name of a task is a file; such a task has no splits."""
    return not name.startswith(tfds.PREFIX) and format_of(Path(name)) in FORMATS


def is_pairs(name: str) -> bool:
    """Whether a task consists of graded pairs of the user's own."""
    return is_pairs_file(name) or name.startswith(tfds.PREFIX) or "/" in name


def title(name: str) -> str:
    """A task's name in a table; a file's, without folders and ending."""
    return Path(name).name.split(".")[0] if is_pairs_file(name) else name


def read_graded_pairs(name: str, mode: str) -> list[tuple[str, str, str]]:
    """The rows (sentence, sentence, score) of columns sentence1, sentence2 and score, or label for the last.

    Args:
      name: a file, tfds:NAME/CONFIG, or a data set of the hub.
      mode: in data sets, `dev` takes the split validation, `test` the split test.

    Raises:
      InputError: no such file or data set, other columns, a sentence that is no text, or scores that are all the same,
        as in a test split whose scores are secret.
    """
    source = open_source(DataConfig(train=name, split=_SPLITS[mode]))
    header = source.header() or ()
    score = "score" if "score" in header else "label"
    columns = ("sentence1", "sentence2", score)
    if not set(columns) <= set(header):
        there = ", ".join(header) or "none"
        raise InputError(f"{name} must have the columns sentence1, sentence2 and score (or label); it has {there}")
    pairs: list[tuple[str, str, str]] = []
    for where, number, (first, second, grade) in source.rows(columns):
        if all(value in (None, "") for value in (first, second, grade)):  # a blank line, as at the end of a file
            continue
        if not isinstance(first, str) or not isinstance(second, str):
            raise InputError(f"{where} {number} has no text in column sentence1 or sentence2")
        pairs.append((first, second, text_of(grade) or ""))
    if len({grade for _, _, grade in pairs}) < 2 and not is_pairs_file(name):
        found = f"the score of all its pairs is {pairs[0][2]}" if pairs else "it holds no pair"
        raise InputError(f"{name}, split {_SPLITS[mode]}: {found}; take another split")
    return pairs
