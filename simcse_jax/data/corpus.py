"""The training text that a config names: files, a hub data set, or one of TFDS."""

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path

import numpy as np

from simcse_jax.config import DataConfig
from simcse_jax.data import tfds
from simcse_jax.data.columns import describe_columns, pick_columns
from simcse_jax.data.delimited import Layout
from simcse_jax.data.files import FORMATS, Files, find_files, is_shard
from simcse_jax.data.hub import is_hub_folder, name_in_job, open_hub, open_hub_folder
from simcse_jax.data.reading import format_of
from simcse_jax.data.rows import Example, Source, read_examples
from simcse_jax.errors import InputError
from simcse_jax.runtime.processes import tell_version
from simcse_jax.storage.objects import local_path


@dataclass(frozen=True)
class Corpus:
    """A source of examples: a sentence, its positive, hard negatives, as far as there are any.

    Attributes:
      name: the file or data set, for messages.
      fingerprint: a digest that changes when the content does.
      config: the settings that name it.
      source: its rows.
      doubt: see `pick_columns`; not for the text of a run that goes on, which it began with in an earlier version.
    """

    name: str
    fingerprint: str
    config: DataConfig
    source: Source
    doubt: bool = True

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """See `pick_columns`; found when the text is first read."""
        return pick_columns(self.source, self.config, self.doubt)

    def describe(self, example: Example) -> tuple[str, ...]:
        """Lines that say which column each sentence is from, with the first example."""
        return describe_columns(self.source, self.config, self.columns, example)

    def __iter__(self) -> Iterator[Example]:
        """Examples in order, with the same number of sentences each; blank sentences are kept."""
        return self._examples(self.source)

    def parts(self) -> list[tuple[int, Iterable[Example]]]:
        """The examples in parts, one after the other, each of which can be read without the others: the files, unless
        pairs of neighbours are drawn, one after the other from all of them. Each comes with its size in bytes."""
        if not isinstance(self.source, Files) or self.config.neighbours:
            return [(1, self)]
        files = [(path.stat().st_size, replace(self.source, paths=(path,))) for path in self.source.paths]
        return [(size, self._examples(file)) for size, file in files]

    def _examples(self, source: Source) -> Iterator[Example]:
        rows = read_examples(source, self.columns, self.config.where)
        if self.config.neighbours:
            yield from _with_neighbours(rows, self.config.neighbours)
        else:
            for _, _, row in rows:
                yield row


def open_corpus(config: DataConfig) -> Corpus:
    """Finds the training text that a config names, without tokenising it; hashes the content of local files.

    Raises:
      InputError: a missing file, an unknown ending, or an unavailable data set.
    """
    source = open_source(config)
    identity = [*source.identity(), config.columns]
    identity += [config.neighbours] if config.neighbours else []
    identity += [sorted(config.where.items())] if config.where else []
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    return Corpus(config.train, fingerprint, config, source)


def open_source(config: DataConfig) -> Source:
    """Finds the source that `data.train` names: a file, a folder, a pattern, `tfds:NAME`, or a name on the hub.

    Raises:
      InputError: see `open_corpus`; also a folder of shards with subfolders, or a delimiter for what is no table.
    """
    layout = Layout(config.delimiter.replace(r"\t", "\t"), config.header)
    source = _find_source(config, layout)
    if layout != Layout() and not (isinstance(source, Files) and source.layout):
        raise InputError(f"data.delimiter and data.header are for .csv and .tsv files, which {source.name} is not")
    return source


def _find_source(config: DataConfig, layout: Layout) -> Source:
    name, hub = config.train, (config.train, config.subset, config.split, config.revision)
    if name.startswith(tfds.PREFIX):
        return tfds.open_tfds(name, config.split)
    found = _find_local(config, layout)
    if found is None:
        return open_hub(*hub)
    tell_version(name_in_job(*hub), "")
    return found


def _find_local(config: DataConfig, layout: Layout) -> Source | None:
    """The source on a disk or an object store; None for a name that can only be one on the hub."""
    name = config.train
    path = local_path(name, config.cache)
    if path.is_file():
        return find_files(name, [path], layout)
    if path.is_dir():
        if is_hub_folder(path):
            return open_hub_folder(path, config.subset, config.split)
        _check_flat(name, path)
        return find_files(f"the folder {name}", list(filter(is_shard, path.iterdir())), layout)
    if glob.has_magic(name):
        found = map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 (also takes patterns that begin at the root)
        return find_files(f"the pattern {name}", list(filter(is_shard, found)), layout)
    if any(s.lower() in FORMATS for s in path.suffixes) or name.startswith((".", "/", "~")):
        raise InputError(f"no file {path}: check the path")
    return None


def _check_flat(name: str, folder: Path) -> None:
    """Raises `InputError` if a folder of shards has subfolders other than those hidden, named `_…`, or of a volume."""
    inner = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "_", "lost+found")))
    if inner:
        ending = next((p.suffix for p in folder.rglob("*") if is_shard(p)), FORMATS[0])
        raise InputError(
            f"the folder {name} has subfolders ({', '.join(inner[:3])}{', …' * (len(inner) > 3)}), which are not read: "
            f"give the pattern '{folder}/**/*{ending}' to read them too, or '{folder}/*{ending}' to leave them out"
        )


def read_sentences(path: Path, limit: int | None = None) -> list[str]:
    """The lines of a text file, plain or .gz; only the first `limit` if that is given.

    Raises:
      InputError: see `find_text`; not UTF-8, or empty.
    """
    path = find_text(path)
    rows = find_files(str(path), [path]).rows(())
    sentences = [row.values[0] for row in islice(rows, limit)]
    if not sentences:
        raise InputError(f"{path} is empty: give a file with one sentence per line")
    return sentences


def find_text(path: Path) -> Path:
    """A text file that is there, as a local path.

    Raises:
      InputError: no such file, a folder, or a file of another format.
    """
    path = local_path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a text file, one sentence per line")
    if not path.is_file():
        raise InputError(f"no file {path}: check the path")
    if format_of(path) != ".txt":
        raise InputError(f"{path} ends in '{path.suffix}'; expected .txt, one sentence per line, or .txt.gz")
    return path


def _with_neighbours(rows: Iterable[tuple[str, int, Example]], reach: int) -> Iterator[Example]:
    """Pairs each sentence with one of the `reach` that follow it in its document; the last of a document gives no pair.

    A document ends at a blank line and with its file.
    """
    generator = np.random.default_rng(0)
    document: list[str] = []
    before = ""
    for where, number, row in chain(rows, [("", 0, ("",))]):
        if len(row) != 1:
            raise InputError(f"data.neighbours needs text of one sentence per row; {where} {number} has {len(row)}")
        if where != before or not row[0].strip():
            for i, sentence in enumerate(document[:-1]):
                step = int(generator.integers(1, min(reach, len(document) - 1 - i) + 1))
                yield sentence, document[i + step]
            document = []
        before = where
        if row[0].strip():
            document.append(row[0])
