"""Sentences without labels, to fit post-processors to: lines of a text file, or the sentences of STS tasks."""

from pathlib import Path

from simcse_jax.data.corpus import read_sentences
from simcse_jax.data.reading import format_of
from simcse_jax.errors import InputError
from simcse_jax.evaluation.sts import distinct_sentences, load_task
from simcse_jax.evaluation.suite import expand_tasks
from simcse_jax.storage.objects import local_path


def unlabelled_sentences(source: str | Path, data: str | Path = "", limit: int | None = None) -> list[str]:
    """Distinct sentences, in order of appearance; blank ones are left out.

    Args:
      source: a text file, one sentence per line (.txt, .txt.gz); or STS tasks with commas between them: names, `sts`
        for all seven, .tsv files. A task gives the sentences of all its splits (train, dev, test), without gold scores.
      data: folder in SentEval's layout, for tasks.
      limit: use only this many lines of a text file, or sentences of tasks; all where None.

    Raises:
      InputError: no such file or task, or no sentence in it; `limit` below 1.
    """
    source = str(source)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be greater than 0")
    path = local_path(source)
    if format_of(path) == ".txt":
        found = read_sentences(path, limit)
    else:
        names = expand_tasks(filter(None, source.split(",")), "test")
        try:
            found = distinct_sentences([load_task(name, data, "test", all_splits=True) for name in names])[:limit]
        except InputError as error:
            raise InputError(f"sentences '{source}' (a .txt or .txt.gz file, or tasks): {error}") from error
    distinct = list(dict.fromkeys(s for s in found if s.strip()))
    if not distinct:
        raise InputError(f"'{source}' holds no sentence: give a text file, one sentence per line, or STS tasks")
    return distinct
